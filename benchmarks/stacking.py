"""Stacks on the built-in base: what is left of the erased, what is kept of the rest, by method and number of members.

    OMP_NUM_THREADS=1 python benchmarks/stacking.py [--seeds 0,1,2] [--counts 2,4,8,12] [--mixed] [--sheet docs/stacking.png]

Members are made alone, by `--recipe` (`fast` unless given; styles by `emoji-twemoji`), and told to avoid what the others erase,
so that none puts another's concept in the place of its own; every seed makes its own and paints its own pictures. No picture
of what is erased is painted on a prompt that a member or the stack was made with. What is made and measured lies in `--out` and
is not made again; `--train-only` stops after the members, and `--part 0/2` does every second.

- left: pictures on prompts for an erased concept where the judge still names it.
- leak: the same pictures, where the judge names any of the erased concepts; in brackets, where it is sure (0.9 or more).
- kept: pictures of the rest with object and style right, of those that the base gets right: objects in the keep list, objects
  in no list, and bare prompts ("a dog"), where a neighbour has least to hold on to.
- drift: mean absolute difference of the kept pictures' pixels from the base's, of 255.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from counting import object_of, style_of
from tables import add_publish, show

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.built_in import domain
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import stack
from esd_lora.evaluation.cases import Case, fill_template, object_cases, pair_cases, style_cases
from esd_lora.evaluation.detectors.judge import Judge, Verdict
from esd_lora.formats.cards import save_with_card
from esd_lora.fusing.closed_form import fuse
from esd_lora.fusing.harmonising import harmonise
from esd_lora.fusing.prompts import keep_list, own_prompts
from esd_lora.gating import Gate
from esd_lora.pictures import grid, paint
from esd_lora.recipe_files import load_recipe
from esd_lora.training import train

ERASED_SHOTS = 120
SURE = 0.9


OBJECTS = ("cat", "rocket", "pizza", "car", "butterfly", "guitar", "robot", "apple", "tiger", "umbrella", "sailboat", "crown")
STYLES = ("twemoji", "ink")
MIXED = ("cat", "pizza", "car", "apple", *STYLES)


def made(name: str, recipe: str, base: Base, seed: int, folder: Path, avoid: Sequence[str] = OBJECTS) -> Path:
    """Return where the eraser of an object or style lies; it is made if it is not there."""
    out = folder / f"{recipe}-{name}-{seed}{'' if avoid else '-alone'}"
    if not (out / "README.md").exists():
        settings = {"train.seed": seed, "train.preview_every": 0}
        if name in STYLES:
            chosen = load_recipe("emoji-twemoji", settings, concepts=[style_concept(name)])
        else:
            chosen = load_recipe(recipe, settings, concepts=[object_concept(name)], avoid=avoid)
        train(chosen, base=base, out=out, force=True)
    return out


def object_concept(name: str) -> dict[str, Any]:
    """Return the fields of an object's concept."""
    return {"name": name, "prompts": [fill_template("{a}", name)]}


def style_concept(style: str) -> dict[str, Any]:
    """Return what `emoji-twemoji` erases, of another style."""
    concept = load_recipe("emoji-twemoji").concepts[0]
    pairs = [(pair.prompt.replace("twemoji", style), pair.anchor) for pair in concept.prompts]
    prompts = [{"prompt": prompt, "anchor": anchor} for prompt, anchor in pairs]
    return {"name": style, "prompts": prompts, "fill": concept.fill}


class Suite(NamedTuple):
    """What is painted for one set of erased concepts and one seed of pictures."""

    erased: list[Case]
    listed: list[Case]
    unlisted: list[Case]
    bare: list[Case]

    @classmethod
    def of(cls, objects: Sequence[str], styles: Sequence[str], used: set[str], seed: int) -> Suite:
        known = domain("emoji")
        first = 1000 * (seed + 1)
        keep = {name for name in known["objects"] if fill_template("{a}", name) in known["keep"]}
        each = -(-ERASED_SHOTS // (len(objects) + len(styles)))
        erased = [case for name in objects for case in object_cases(name, used, each, seed=first)]
        erased += [case for name in styles for case in style_cases(name, used, each, seed=first)]
        pairs = [case for case in pair_cases(seed=first) if {*objects, *styles}.isdisjoint(case.parts)]
        listed, unlisted = ([case for case in pairs if (object_of(case) in keep) == inside] for inside in (True, False))
        names = [(i, name) for i, name in enumerate(known["objects"]) if name not in objects]
        bare = [Case(name, "general", fill_template("{a}", name), first + i, name) for i, name in names]
        return cls(erased, listed, unlisted, bare)


Painter = Callable[[Sequence[Case]], list[Any]]
Seen = list[tuple[Any, Verdict]]


def painter(base: Base) -> Painter:
    return lambda cases: paint(base, [case.prompt for case in cases], [case.seed for case in cases])


def gated_painter(base: Base, members: Sequence[Eraser]) -> Painter:
    gate = Gate(base, members)

    def painted(cases: Sequence[Case]) -> list[Any]:
        factors = [tuple(gate(case.prompt)) for case in cases]
        out: list[Any] = [None] * len(cases)
        for alike in set(factors):
            places = [i for i, factor in enumerate(factors) if factor == alike]
            on = [(member, factor) for member, factor in zip(members, alike, strict=True) if factor]
            with applied(base, [member for member, _ in on], [factor for _, factor in on]):
                for place, picture in zip(places, painter(base)([cases[i] for i in places]), strict=True):
                    out[place] = picture
        return out

    return painted


def look(paint_all: Painter, judge: Judge, suite: Suite) -> dict[str, Seen]:
    """Pictures as arrays, with what the judge says."""
    out: dict[str, Seen] = {}
    for part, cases in suite._asdict().items():
        pictures = paint_all(cases)
        out[part] = list(zip([np.asarray(p, dtype=np.float32) for p in pictures], judge(pictures), strict=True))
    return out


def counts(
    suite: Suite, seen: Mapping[str, Seen], before: Mapping[str, Seen], objects: set[str], styles: set[str]
) -> dict[str, Any]:
    """Hits and totals of every column, `before` being the base's."""

    def named(case: Case, verdict: Verdict) -> tuple[str, float, set[str]]:
        by_object = object_of(case) in objects
        return (
            (verdict.object, verdict.object_confidence, objects)
            if by_object
            else (verdict.style, verdict.style_confidence, styles)
        )

    def right(case: Case, verdict: Verdict) -> bool:
        return verdict.object == object_of(case) and style_of(case) in (None, verdict.style)

    erased = [(case, *named(case, verdict)) for case, (_, verdict) in zip(suite.erased, seen["erased"], strict=True)]
    out: dict[str, Any] = {
        "left": [sum(name in case.parts for case, name, _, _ in erased), len(erased)],
        "left by": {
            who: [sum(name == who for case, name, _, _ in erased if who in case.parts), each]
            for who, each in Counter(
                next(p for p in case.parts if p in {*objects, *styles}) for case, _, _, _ in erased
            ).items()
        },
        "leak": [sum(name in among for _, name, _, among in erased), len(erased)],
        "sure leak": [sum(name in among and sure >= SURE for _, name, sure, among in erased), len(erased)],
    }
    for part in ("listed", "unlisted", "bare"):
        pairs = list(zip(getattr(suite, part), seen[part], before[part], strict=True))
        out[part] = [sum(right(case, v) for case, (_, v), _ in pairs), sum(right(case, v) for case, _, (_, v) in pairs)]
    both = [*zip(seen["listed"], before["listed"], strict=True), *zip(seen["unlisted"], before["unlisted"], strict=True)]
    out["drift"] = float(np.mean([np.abs(a - b).mean() for (a, _), (b, _) in both]))
    return out


def jointly(base: Base, names: Sequence[str], seed: int) -> Eraser:
    """Return one eraser trained on all concepts at once: what a user with no erasers to stack would do."""
    concepts = [style_concept(name) if name in STYLES else object_concept(name) for name in names]
    settings = {"train.seed": seed, "train.trajectories": 24 * len(names), "lora.rank": 16, "lora.alpha": 16}
    if {*names} & {*STYLES}:
        settings["objective"] = "contrast"  # as styles are erased alone
    return train(load_recipe("fast", settings, concepts=concepts), base=base, progress=False)


METHODS = ("sum", "sum by sqrt N", "closed form", "harmonised", "harmonised small", "gated", "joint training")
SMALL = 4
"""Rank of a small harmonised stack."""


def apply(
    method: str, base: Base, names: Sequence[str], members: Sequence[Eraser], seed: int, harmonised: Path
) -> list[Eraser]:
    """Return the erasers to have on the base; a harmonised one is made unless it is there."""
    if method == "joint training":
        return [jointly(base, names, seed)]
    if method.startswith("sum"):
        return [stack(members, [len(members) ** -0.5 if "sqrt" in method else 1.0] * len(members))]
    if method == "closed form":
        return [fuse(members, base, seed=seed, progress=False)]
    if not (harmonised / "README.md").exists():
        rank = {"rank": SMALL} if "small" in method else {}
        save_with_card(harmonise(members, base, seed=seed, progress=False, **rank), harmonised)
    return [Eraser.load(harmonised)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/stacking"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--counts", default="2,4,8,12")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--mixed", action="store_true", help="four objects and two styles, too")
    parser.add_argument("--no-avoid", action="store_true", help="members that know nothing of each other")
    parser.add_argument("--recipe", default="fast", help="of the objects' erasers")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--part", default="0/1", help="which of several processes this is")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of pictures of the largest stack of the first seed")
    add_publish(parser)
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    seeds, methods = [int(seed) for seed in options.seeds.split(",")], options.methods.split(",")
    base, judge = load_base("emoji"), Judge("emoji")
    avoid = () if options.no_avoid else OBJECTS
    if options.train_only:
        for i, (seed, name) in enumerate((seed, name) for seed in seeds for name in (*OBJECTS, *STYLES)):
            if i % parts == part:
                made(name, options.recipe, base, seed, options.out, avoid)
        return
    groups: dict[str, Sequence[str]] = {f"{n} objects": OBJECTS[: int(n)] for n in options.counts.split(",") if n}
    if options.mixed:
        groups["4 objects, 2 styles"] = MIXED

    def place(group: str, method: str, seed: int) -> Path:
        return options.out / f"{options.recipe}-{group}-{method}-{seed}{'' if avoid else '-alone'}".replace(" ", "_")

    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, (seed, group) in enumerate((seed, group) for seed in seeds for group in groups):
        if number % parts != part:
            continue
        names = groups[group]
        members = [Eraser.load(made(name, options.recipe, base, seed, options.out, avoid)) for name in names]
        objects, styles = {*names} - {*STYLES}, {*names} & {*STYLES}
        kept, dropped = keep_list(members, base.keep)
        used = {prompt for member in members for prompt in own_prompts(member, kept, dropped)}
        suite = Suite.of(sorted(objects), sorted(styles), used, seed)
        before: dict[str, Seen] = {}
        for method in methods:
            cache = place(group, method, seed).with_suffix(".json")
            if not cache.exists():
                before = before or look(painter(base), judge, suite)
                started = time.perf_counter()
                on = [] if method == "gated" else apply(method, base, names, members, seed, place(group, method, seed))
                seconds = time.perf_counter() - started
                with applied(base, on):
                    seen = look(gated_painter(base, members) if method == "gated" else painter(base), judge, suite)
                found = counts(suite, seen, before, objects, styles)
                size = sum(tensor.nbytes for eraser in on or members for tensor in eraser.state_dict().values())
                cache.write_text(json.dumps({**found, "seconds": seconds, "kB": size / 1000}))
                print(group, method, seed, found, f"{seconds:.0f} s", flush=True)
            rows.setdefault((group, method), []).append(json.loads(cache.read_text()))
    head = ["members", "method", "left", "leak (sure)", "kept, listed", "kept, in no list", "kept, bare", "drift", "s", "kB"]
    table: list[list[str]] = []
    for (group, method), found in rows.items():
        share = {
            key: (sum(row[key][0] for row in found), sum(row[key][1] for row in found))
            for key in ("left", "leak", "sure leak", "listed", "unlisted", "bare")
        }
        mean = {key: sum(row[key] for row in found) / len(found) for key in ("drift", "seconds", "kB")}
        left, leak, sure, listed, unlisted, bare = (f"{hits / of:.1%} (of {of})" for hits, of in share.values())
        shares = [left, f"{leak.split(' ')[0]} ({sure.split(' ')[0]})", listed, unlisted, bare]
        table.append([group, method, *shares, f"{mean['drift']:.1f}", f"{mean['seconds']:.0f}", f"{mean['kB']:.0f}"])
    note = f"Training and picture seeds {options.seeds}; shares over all, and of how many pictures."
    show("stacking-alone" if options.no_avoid else "stacking", head, table, note, publish=options.publish)
    if options.sheet:
        group = list(groups)[-1 - options.mixed]
        members = [Eraser.load(made(name, options.recipe, base, seeds[0], options.out, avoid)) for name in groups[group]]
        prompts = [
            *("a cat in ink style", "a noto drawing of a pizza", "a car, blob style", "an apple in fluent style"),
            *("a dog in ink style", "fluent fox", "a cake, noto style", "a house in blob style"),
            *("an owl in noto style", "a key, ink style"),
        ]
        pictures = {"base": paint(base, prompts, [5] * len(prompts))}
        for method in ("sum", "closed form", "harmonised"):
            with applied(base, apply(method, base, groups[group], members, seeds[0], place(group, method, seeds[0]))):
                pictures[method] = paint(base, prompts, [5] * len(prompts))
        grid(pictures, prompts, tile=96).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
