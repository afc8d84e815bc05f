"""Stacks that grow and shrink, and large ones: seconds, memory, and how near they come to the stack that is fused anew.

    python benchmarks/growing_stacks.py [--only sizes,change,emoji] [--sizes 10,100,1000] [--text clip] [--out out/growing]

`sizes` fuses random erasers of Stable Diffusion 1.5's keys and values (`xattn-kv`, rank 4) beside the package's keep list, from
their files, at `--max-rank 64`, and draws `docs/growing.png`. `change` adds the 101st to a stack of 100 and removes one of 101,
each beside fusing all anew in the same process. Every eraser counts on 59 prompts, its own and that in 58 frames of the list.

Their text is made up (`--text made-up`): rows of 77 x 768 that words and their places decide, the same for the same prompt, in
no time. `--text clip` has a text encoder of the real size with random weights make it instead. One prompt's time there is
measured in any case, so that seconds are also told as they would be with it.

`emoji` is on the built-in base: twelve members by `instant`, told to avoid what the others erase, added one by one and at once;
then members go, and 120 pictures of each one's concept say whether it is back, beside the stack that never had it.

Memory is what a step needs at its peak beyond what the process held before it (VmHWM of a fresh process).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import ROOT, add_publish, show

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as esd-lora sets it
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

RANK, MAX_RANK = 4, 64
STACKED, ROUNDS = 100, 3
REMOVED = ("cat", "pizza", "car")
SHOTS = 120


def random_base(text: str) -> Any:
    """A base of SD 1.5's shape of which the layers that read text have weights, and made-up text or a real encoder."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from real_size import fill

    from esd_lora.bases.base import Base
    from esd_lora.built_in import keep_prompts
    from esd_lora.families import FAMILIES
    from published_denoisers import build_component, denoiser, shipped_config
    from tiny import tiny_tokenizer

    family = next(family for family in FAMILIES if family.name == "sd")
    unet: Any = denoiser("sd15").to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for path in family.modules(unet, "xattn-kv"):
        unet.get_submodule(path).weight.normal_(0, 0.03, generator=generator)
    encoder = None
    if text == "clip":
        with torch.device("meta"):
            encoder = build_component(shipped_config("sd1"), "text_encoder")
        encoder = fill(encoder, torch.float32).requires_grad_(False)
    scheduler = DDIMScheduler(prediction_type="epsilon")
    pipe = StableDiffusionPipeline(
        None, encoder, tiny_tokenizer(77), unet, scheduler, None, None, requires_safety_checker=False
    )

    class MadeUp(Base):
        """A base whose text is made up."""

        def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> Any:  # noqa: ARG002
            return {"prompt_embeds": torch.stack([made_up_text(prompt) for prompt in prompts])}

    return (MadeUp if encoder is None else Base)(pipe, family, "random", keep=keep_prompts("random"))


def made_up_text(prompt: str) -> Any:
    """Rows of a text, [77, 768]: as in CLIP each depends on its place and on the words up to there."""
    import torch

    from esd_lora.seeds import text_seed

    rows = torch.randn(77, 768, generator=torch.Generator().manual_seed(7))
    words = [torch.randn(768, generator=torch.Generator().manual_seed(text_seed(word))) for word in prompt.split()[:75]]
    for place, word in enumerate(words, 1):
        rows[place:] += word / len(words) ** 0.5
    return rows


def write_erasers(count: int, folder: Path) -> list[Path]:
    """Files of random erasers of keys and values with concepts of made-up names."""
    import torch

    from esd_lora.erasers.eraser import Eraser, LoraPair
    from random_erasers import build_header

    paths = [folder / f"eraser-{number}" for number in range(count)]
    base = random_base("made-up")
    layers = base.family.modules(base.model, "xattn-kv")
    hashes = base.hashes(layers)
    for number, path in enumerate(paths):
        if not path.is_dir():
            generator = torch.Generator().manual_seed(number)
            pairs: dict[str, LoraPair] = {}
            for module, layer in layers.items():
                out, inputs = layer.weight.shape
                down = torch.randn(RANK, inputs, generator=generator) * 0.02
                pairs[module] = LoraPair(down, torch.randn(out, RANK, generator=generator) * 0.02)
            header = build_header(f"concept{number}", scope="xattn-kv", base_hashes=hashes, base="random")
            Eraser(pairs, header).save(path)
    return paths


def distance(one: Any, other: Any) -> float:
    """Largest difference of two erasers' updates over all layers, relative to the first one's there."""
    return max(
        float((pair.delta() - other.pairs[path].delta()).norm() / pair.delta().norm()) for path, pair in one.pairs.items()
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def count_texts(work: Callable[[], Any]) -> tuple[int, Any]:
    """How many prompts were encoded, and what came of it."""
    from unittest.mock import patch

    from esd_lora.bases.base import Base

    counts: list[int] = []
    kinds = [Base, *Base.__subclasses__()]
    shipped = {kind: kind.__dict__["encode"] for kind in kinds}
    patches = [
        patch.object(kind, "encode", lambda self, prompts, own=own: counts.append(len(prompts)) or own(self, prompts))
        for kind, own in shipped.items()
    ]
    for each in patches:
        each.start()
    try:
        result = work()
    finally:
        for each in patches:
            each.stop()
    return sum(counts), result


def time_clip() -> float:
    """Seconds that a text encoder of SD 1.5's size takes for a prompt, in batches of sixteen."""
    base = random_base("clip")
    prompts = [f"{number} dogs" for number in range(16)]
    base.encode(prompts)
    return statistics.median(timed(lambda: base.encode(prompts))[0] for _ in range(3)) / len(prompts)


def size_steps(count: int, text: str, folder: Path) -> dict[str, Any]:
    """Fuse so many erasers from their files."""
    from eraser_files import measured

    from esd_lora.erasers.eraser import Eraser
    from esd_lora.fusing.closed_form import fuse

    base, paths = random_base(text), write_erasers(count, folder)
    texts, result = count_texts(
        lambda: measured(lambda: fuse([Eraser.load(path) for path in paths], base, rank=MAX_RANK, progress=False))
    )
    return {**result, "texts": texts}


def change_steps(text: str, folder: Path) -> dict[str, Any]:
    """Add and remove the last of 101, beside fusing anew."""
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.fusing.closed_form import fuse
    from esd_lora.fusing.growing import change_members

    base = random_base(text)
    members = [Eraser.load(path) for path in write_erasers(STACKED + 1, folder)]
    few, many = folder / f"{STACKED}.safetensors", folder / f"{STACKED + 1}.safetensors"
    options = {"progress": False}
    texts, (seconds, whole) = count_texts(lambda: timed(lambda: fuse(members, base, state=many, **options)))
    rest = fuse(members[:-1], base, state=few, **options)
    name = members[-1].names[0]
    results: dict[str, Any] = {"fuse": {"seconds": seconds, "texts": texts}, "state": many.stat().st_size}
    for what, work, anew in (
        ("add", lambda: change_members(few, base, add=members[-1:], state=folder / "new", **options), whole),
        ("remove", lambda: change_members(many, base, remove=[name], state=folder / "new", **options), rest),
    ):
        texts, runs = count_texts(lambda work=work: [timed(work) for _ in range(ROUNDS)])
        middle = statistics.median(seconds for seconds, _ in runs)
        results[what] = {"seconds": middle, "texts": texts // ROUNDS, "distance": distance(anew, runs[0][1])}
    return results


def emoji_steps(folder: Path) -> dict[str, Any]:
    """Twelve members on the built-in base, one by one and at once; then some go."""
    from counting import count, score
    from stacking import OBJECTS, made

    from esd_lora.adapter import applied
    from esd_lora.bases.loading import load_base
    from esd_lora.erasers.eraser import Eraser
    from esd_lora.evaluation.cases import object_cases
    from esd_lora.evaluation.detectors.judge import Judge
    from esd_lora.fusing.closed_form import fuse
    from esd_lora.fusing.growing import change_members
    from esd_lora.fusing.prompts import keep_list, own_prompts

    base, judge = load_base("emoji"), Judge("emoji")
    members = {name: Eraser.load(made(name, "instant", base, 0, folder)) for name in OBJECTS}
    options = {"progress": False}
    seconds, whole = timed(lambda: fuse(list(members.values()), base, state=folder / "whole", **options))
    first, *others = members.values()
    fuse([first], base, state=folder / "grown", **options)
    stack, added = None, list[float]()
    for member in others:
        took, stack = timed(
            lambda member=member: change_members(folder / "grown", base, add=[member], state=folder / "grown", **options)
        )
        added.append(took)
    results: dict[str, Any] = {"fuse": seconds, "add": added, "distance": distance(whole, stack), "removed": {}}
    kept, dropped = keep_list(list(members.values()), base.keep)
    used = {prompt for member in members.values() for prompt in own_prompts(member, kept, dropped)}
    for name in REMOVED:
        took, without = timed(lambda name=name: change_members(folder / "whole", base, remove=[name], **options))
        never = fuse([member for other, member in members.items() if other != name], base, **options)
        cases = object_cases(name, used, SHOTS)

        def right(erasers: list[Any], cases: Any = cases) -> list[int]:
            with applied(base, erasers):
                return list(count(each.object_right for each in score(base, judge, cases)))

        pictures = {"base": right([]), "whole": right([whole]), "without": right([without]), "never": right([never])}
        results["removed"][name] = {"seconds": took, "distance": distance(never, without), **pictures}
    return results


def plot(rows: dict[int, dict[str, Any]], place: Path) -> None:
    """Seconds and memory by the number of members, on logarithmic axes, beside what is linear."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, margin, font = 380, 300, 60, ImageFont.load_default(13)
    image = Image.new("RGB", (2 * width, height), "white")
    draw, counts = ImageDraw.Draw(image), list(rows)
    panels = {"seconds": [row["seconds"] for row in rows.values()], "peak MB": [row["memory"] / 1e6 for row in rows.values()]}
    for number, (name, values) in enumerate(panels.items()):
        linear = [values[-1] * count / counts[-1] for count in counts]
        low, high = (math.log10(pick(*values, *linear)) for pick in (min, max))

        def at(
            count: int, value: float, left: int = number * width, low: float = low, high: float = high
        ) -> tuple[float, float]:
            across = math.log(count / counts[0]) / math.log(counts[-1] / counts[0])
            up = (math.log10(value) - low) / (high - low)
            return left + margin + across * (width - margin - 30), height - 45 - up * (height - 90)

        draw.text((number * width + margin, 10), f"{name} (dotted: linear)", fill="black", font=font)
        for count, value, on_line in zip(counts, values, linear, strict=True):
            x, y = at(count, value)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#2166ac")
            draw.text((x - 14, y - 22), f"{value:,.0f}", fill="#2166ac", font=font)
            draw.text((x - 12, height - 30), f"{count:,}", fill="black", font=font)
            x, y = at(count, on_line)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill="#777777")
        draw.line([at(*each) for each in zip(counts, values, strict=True)], fill="#2166ac", width=3)
        (x, y), (far, top) = at(counts[0], linear[0]), at(counts[-1], linear[-1])
        for step in range(0, 40, 2):
            begin, end = (((x + (far - x) * s / 40), (y + (top - y) * s / 40)) for s in (step, step + 1))
            draw.line([begin, end], fill="#777777")
    image.save(place, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="sizes,change,emoji")
    parser.add_argument("--sizes", default="10,100,1000")
    parser.add_argument("--text", choices=["made-up", "clip"], default="made-up")
    parser.add_argument("--out", type=Path, default=Path("out/growing"))
    add_publish(parser)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        import warnings

        warnings.simplefilter("ignore")  # the random erasers are of no weights in particular
        kind, _, count = options.stage.partition(":")
        steps = {
            "clip": time_clip,
            "sizes": lambda: size_steps(int(count), options.text, options.out),
            "change": lambda: change_steps(options.text, options.out),
            "emoji": lambda: emoji_steps(options.out),
        }
        print(json.dumps(steps[kind]()))
        return

    def stage(name: str) -> Any:
        command = [sys.executable, __file__, "--out", str(options.out), "--text", options.text, "--stage", name]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])

    wanted = options.only.split(",")
    clip = stage("clip") if {"sizes", "change"} & {*wanted} and options.text != "clip" else 0.0
    note = (
        f"Text made up; a text encoder of SD 1.5's size takes {clip:.2f} s a prompt here." if clip else "Text by a random CLIP."
    )
    if "sizes" in wanted:
        rows = {int(count): stage(f"sizes:{count}") for count in options.sizes.split(",")}
        cells = [
            [
                *(f"{count:,}", f"{row['seconds']:.0f}", f"{row['seconds'] / count:.2f}", f"{row['memory'] / 1e6:,.0f}"),
                *(f"{row['texts']:,}", f"{row['seconds'] + clip * row['texts']:,.0f}"),
            ]
            for count, row in rows.items()
        ]
        head = ["erasers", "s", "s an eraser", "peak MB", "texts", "s with CLIP's text"]
        show("growing-sizes", head, cells, note, publish=options.publish)
        if options.publish:
            plot(rows, ROOT / "docs" / "growing.png")
    if "change" in wanted:
        result = stage("change")
        anew, cells = result["fuse"], list[list[str]]()
        for name, what in (("fuse", f"fuse {STACKED + 1}"), ("add", "add one to 100"), ("remove", "remove one of 101")):
            row = result[name]
            both = [(each["seconds"], each["seconds"] + clip * each["texts"]) for each in (row, anew)]
            ratios = [f"1/{of / one:.0f}" for one, of in zip(*both, strict=True)]
            same = f"{row['distance']:.1e}" if "distance" in row else ""
            cells.append([what, f"{row['texts']:,}", f"{both[0][0]:.1f}", ratios[0], f"{both[0][1]:.0f}", ratios[1], same])
        head = ["", "texts", "s", "of fusing", "s with CLIP's text", "of fusing", "off the stack fused anew"]
        states = f"{note} Its state has {result['state'] / 1e6:,.0f} MB. Medians of {ROUNDS} changes."
        show("growing-change", head, cells, states, publish=options.publish)
    if "emoji" in wanted:
        result = stage("emoji")
        added = statistics.median(result["add"])
        print(f"twelve at once in {result['fuse']:.1f} s, one more in {added:.1f} s; off by {result['distance']:.1e}")
        head = ["removed of twelve", "base", "stack of twelve", "without it", "never had it", "off that", "s"]
        cells = [
            [
                name,
                *(f"{hits / of:.1%}" for hits, of in (row[who] for who in ("base", "whole", "without", "never"))),
                *(f"{row['distance']:.1e}", f"{row['seconds']:.1f}"),
            ]
            for name, row in result["removed"].items()
        ]
        note = (
            f"Pictures of {SHOTS} on which the judge names the concept. Twelve added one by one are off the twelve fused at"
            f" once by {result['distance']:.1e} of a layer's update; that took {result['fuse']:.1f} s, one more {added:.1f}."
        )
        show("growing-emoji", head, cells, note, publish=options.publish)


if __name__ == "__main__":
    main()
