"""Prints how well a ranking of prompts tells what an eraser hurts: nearness by the text encoder, and influence.

    OMP_NUM_THREADS=1 python benchmarks/influence.py [--concepts cat,guitar] [--shots 3]

Every concept is erased from the built-in base by the closed form with nothing preserved, so that what is hurt is what erasing
reaches. An object is hurt where the judge does not name it on a picture of its bare prompt on which it named it before. *AUC*
is the chance that a hurt object ranks before one that is not: 50 % is a coin. Influence knows the concept's anchor and frames,
not what was hurt.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it

from torch import Tensor

from esd_lora.adapter import applied
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.closed_form import choose_anchors
from esd_lora.evaluation.cases import fill_template
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.lessons import likeness_to, pools
from esd_lora.pictures import paint
from esd_lora.recipe_files import load_recipe
from esd_lora.text_rows import influence, rows_of
from esd_lora.training import train

CONCEPTS = "cat,rocket,pizza,guitar,penguin,car,cactus,key,bee,owl,tiger"


def chance(scores: Tensor, hurt: list[int], whole: list[int]) -> float:
    """Return the share of pairs of a hurt object and a whole one in which the hurt one has the larger score."""
    return sum(float(scores[i] > scores[j]) for i in hurt for j in whole) / (len(hurt) * len(whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=CONCEPTS)
    parser.add_argument("--shots", type=int, default=3, help="pictures of each object")
    options = parser.parse_args()
    base, judge, objects = load_base("emoji"), Judge("emoji"), list(domain("emoji")["objects"])
    prompts = [fill_template("{a}", name) for name in objects]
    cases = [(prompt, seed) for prompt in prompts for seed in range(options.shots)]

    def seen() -> list[str]:
        return [verdict.object for verdict in judge(paint(base, *zip(*cases, strict=True)))]

    encode, before = base.remembering(), seen()
    table: list[tuple[str, str, int, float, float]] = []
    for name in options.concepts.split(","):
        concept = {"name": name, "prompts": [fill_template("{a}", name)]}
        recipe = load_recipe("instant", {"preserve": []}, concepts=[concept])
        recipe = recipe.anchored(choose_anchors(recipe, base, encode))
        with applied(base, [train(recipe, base=base, progress=False)]):
            after = seen()
        shots = [range(i * options.shots, (i + 1) * options.shots) for i in range(len(objects))]
        lost = [any(before[k] == objects[i] != after[k] for k in shots[i]) for i in range(len(objects))]
        hurt = [i for i in range(len(objects)) if lost[i] and objects[i] != name]
        whole = [i for i in range(len(objects)) if not lost[i] and objects[i] != name]
        pairs = [texts[1:] for pool in pools(recipe, base.keep) for texts in pool]
        scores = (
            likeness_to([concept["prompts"][0]], prompts, base, encode)[0],
            influence(rows_of(encode, "prompt_embeds"), pairs, prompts),
        )
        nearness, reached = (chance(each, hurt, whole) for each in scores)
        table.append((name, recipe.concepts[0].anchor or "", len(hurt), nearness, reached))
    print(f"\n{datetime.date.today()}; {len(objects)} objects, {options.shots} pictures each\n")
    print("| erased | anchor | objects hurt | AUC, nearness | AUC, influence |\n|---|---|---|---|---|")
    for name, anchor, count, nearness, reached in table:
        print(f"| {name} | {anchor} | {count} | {nearness:.0%} | {reached:.0%} |")
    hurt_mean, nearness, reached = (statistics.mean(column) for column in zip(*(row[2:] for row in table), strict=True))
    print(f"| mean | | {hurt_mean:.1f} | {nearness:.0%} | {reached:.0%} |")


if __name__ == "__main__":
    main()
