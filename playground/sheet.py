"""Stage 8: contact sheets to look at: every drawing, what the VAE keeps of it, and what the base paints."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import draw
from domain import OBJECTS, STYLES, TEMPLATES, held_out_pairs, with_article
from esd_lora.bases.loading import load_base
from esd_lora.evaluation.detectors.judge import Judge
from esd_lora.pictures import grid, paint

STEPS, GUIDANCE = 20, 4.0


def sheet(work: Path, name: str) -> None:
    """Writes `drawings.png`, `reconstructions.png` and `samples.png` (objects across, styles down) and prints the verdicts."""
    place = name if name == "emoji" else str(Path(__file__).parent / name)
    base, judge = load_base(place), Judge("emoji")
    domain, _ = draw.load(work)
    objects, styles = list(OBJECTS), list(STYLES)
    still = torch.zeros(len(objects), dtype=torch.long)
    rows: dict[str, dict[str, list[Image.Image]]] = {"drawings": {}, "reconstructions": {}, "samples": {}}
    verdicts = []
    for s, style in enumerate(styles):
        images = draw.jitter(domain[:, s], still, torch.Generator().manual_seed(50_000))
        with torch.no_grad():
            decoded = base.pipe.vae.decode(base.pipe.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        prompts = [TEMPLATES["both"][0].format(a=with_article(name), object=name, style=style) for name in objects]
        samples = paint(base, prompts, [60_000 + i for i in range(len(prompts))], steps=STEPS, guidance=GUIDANCE)
        rows["drawings"][style] = [_image(x) for x in images]
        rows["reconstructions"][style] = [_image(x) for x in decoded]
        rows["samples"][style] = samples
        verdicts += [((name, style), verdict) for name, verdict in zip(objects, judge(samples), strict=True)]
    for kind, styles_of in rows.items():
        halves = [{style: images[i : i + 20] for style, images in styles_of.items()} for i in (0, 20)]
        sheets = [grid(half, objects[i : i + 20], tile=64) for half, i in zip(halves, (0, 20), strict=True)]
        joined = Image.new("RGB", (sheets[0].width, sum(part.height for part in sheets)), "white")
        for i, part in enumerate(sheets):
            joined.paste(part, (0, i * sheets[0].height))
        joined.save(work / name / f"{kind}.png")
    held_out = set(held_out_pairs())
    for kind, hidden in (("seen", False), ("held-out", True)):
        judged = [(pair, verdict) for pair, verdict in verdicts if (pair in held_out) == hidden]
        right_object = sum(pair[0] == verdict.object for pair, verdict in judged)
        right_style = sum(pair[1] == verdict.style for pair, verdict in judged)
        print(f"{kind} pairs: object {right_object}/{len(judged)}, style {right_style}/{len(judged)}")
        wrong = [(pair, verdict.object, verdict.style) for pair, verdict in judged if pair != (verdict.object, verdict.style)]
        for pair, seen_object, seen_style in wrong:
            print(f"  {pair[0]} in {pair[1]}: judged {seen_object} in {seen_style}")


def _image(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.asarray((x.movedim(0, -1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)))
