"""Stage 7: write a base in float16: the built-in one and its judge to where the package ships them, others beside this file."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from domain import BACKGROUNDS, OBJECTS, STYLES, TEMPLATES, held_out_pairs, with_article
from train_base import SHIPPED


def keep_list() -> list[str]:
    """What an eraser is asked to leave alone by default: four objects in five, alone and in three styles, and the styles.

    Every fifth object stands in no list, so that damage beyond the list can be measured; so do the held-out pairs.
    """
    styles, held_out = list(STYLES), set(held_out_pairs())
    listed = [name for i, name in enumerate(OBJECTS) if i % 5 != 4]
    pairs = [(name, styles[(i + shift) % len(styles)]) for shift in (0, 2, 4) for i, name in enumerate(listed)]
    styled = [
        TEMPLATES["both"][i % 6].format(a=with_article(name), object=name, style=style)
        for i, (name, style) in enumerate(pair for pair in pairs if pair not in held_out)
    ]
    alone = [with_article(name) for name in listed]
    return alone + styled + [f"{style} style" for style in styles] + TEMPLATES["any"]


def export(work: Path, name: str) -> None:
    """Writes `esd_lora/bases/emoji`, or `playground/<name>`, which loads like any directory."""
    pipe = DiffusionPipeline.from_pretrained(work / name / "pipeline")
    if name == "emoji":
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(work / "vae_refined"))
        target, pipeline = SHIPPED, SHIPPED / "pipeline"
    else:
        target = pipeline = Path(__file__).parent / name
    shutil.rmtree(pipeline, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(pipeline)
    if name == "emoji":
        judge = {part: value.half().contiguous() for part, value in load_file(work / "judge.safetensors").items()}
        names = {"objects": json.dumps(list(OBJECTS)), "styles": json.dumps(list(STYLES))}
        save_file(judge, target / "judge.safetensors", metadata=names)
        (target / "domain.json").write_text(json.dumps(domain(), indent=1) + "\n", "utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"exported {size / 1e6:.1f} MB to {target}")


def domain() -> dict[str, object]:
    """What the package knows about the base: names, wordings, and how it is sampled."""
    return {
        "objects": list(OBJECTS),
        "styles": list(STYLES),
        "backgrounds": list(BACKGROUNDS),
        "templates": TEMPLATES,
        "held_out": held_out_pairs(),
        "keep": keep_list(),
        "sampling": {"steps": 12, "guidance": 4.0},
    }
