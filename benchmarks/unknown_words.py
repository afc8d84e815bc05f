"""Prints how far words that a base draws, and made-up ones, move its predictions, in units of kept prompts'.

    OMP_NUM_THREADS=1 python benchmarks/unknown_words.py [--bases emoji playground/emoji-xl playground/emoji-flow]

`recognising` warns of a concept below its threshold. Each word is measured as a training measures it, on trajectories of its
own beside those of held-out kept prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import string
import warnings

from tables import add_publish, show

from esd_lora.adapter import add_adapter
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.calibration import Probe
from esd_lora.lessons import HeldOut, hold_out, plan
from esd_lora.recipe_files import load_recipe
from esd_lora.recognising import KNOWN
from esd_lora.teacher import Teacher

REAL = ("Van Gogh", "a violin", "an elephant", "nudity", "a hovercraft", "the great wave", "a wizard", "Paris at night")
"""What these bases have never drawn."""


def made_up(count: int) -> list[str]:
    """Return words that nobody has ever written, `zxqv blorp` the first."""
    draw = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "b", "g", "k", "m", "rp", "x")]
    words = ["".join(draw.choice(syllables) for _ in range(draw.randint(1, 3))) for _ in range(count)]
    noise = ["".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(4, 9))) for _ in range(count // 2)]
    return ["zxqv blorp", *(f"a {word}" for word in words[::2]), *words[1::2], *noise]


def shares(base_name: str, words: list[str]) -> list[float]:
    """Return the effect of every word on a base, as a probe measures it."""
    base = load_base(base_name, vae=False)
    recipe = load_recipe("fast", base=base_name, concepts=["a cat"], anchor=None)
    held_out = hold_out(recipe, plan(recipe, KEEP), KEEP, base.encode)
    teacher = Teacher(base, recipe, plan(recipe, KEEP), probed=[*held_out.prompts(), *words])
    add_adapter(base, base.family.modules(base.model, recipe.scope), recipe.lora, recipe.train.seed)  # off while it is measured
    return list(Probe(teacher, HeldOut(held_out.erased, held_out.kept, words)).shares.values())


KEEP = tuple(domain("emoji")["keep"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["emoji", "playground/emoji-xl", "playground/emoji-flow"])
    parser.add_argument("--made-up", type=int, default=24)
    add_publish(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    articles = {name: "an" if name[0] in "aeiou" else "a" for name in domain("emoji")["objects"]}
    kinds = {
        "objects": [f"{article} {name}" for name, article in articles.items()],
        "styles": [f"{style} style" for style in domain("emoji")["styles"]],
        "made up": made_up(options.made_up),
        "real, never drawn": list(REAL),
    }
    rows: list[list[str]] = []
    for base in options.bases:
        measured = shares(base, [word for words in kinds.values() for word in words])
        for kind, words in kinds.items():
            own, measured = measured[: len(words)], measured[len(words) :]
            below = sum(share < KNOWN for share in own)
            least, median, most = min(own), statistics.median(own), max(own)
            rows.append([base, kind, f"{least:.2f}", f"{median:.2f}", f"{most:.2f}", f"{below} of {len(words)}"])
    head = ["base", "words", "least", "median", "most", f"warned of (below {KNOWN:g})"]
    show("unknown-words", head, rows, publish=options.publish)


if __name__ == "__main__":
    main()
