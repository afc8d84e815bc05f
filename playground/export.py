"""Stage 7: write the base and its judge, in float16, to where the package ships them."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from domain import BACKGROUNDS, OBJECTS, STYLES, TEMPLATES, held_out_pairs, with_article

TARGET = Path(__file__).parent.parent / "esd_lora" / "bases" / "emoji"


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


def export(work: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        work / "pipeline", vae=AutoencoderKL.from_pretrained(work / "vae_refined"), dtype=torch.float16
    )
    shutil.rmtree(TARGET / "pipeline", ignore_errors=True)
    pipe.save_pretrained(TARGET / "pipeline")
    judge = {name: value.half().contiguous() for name, value in load_file(work / "judge.safetensors").items()}
    save_file(
        judge, TARGET / "judge.safetensors", metadata={"objects": json.dumps(list(OBJECTS)), "styles": json.dumps(list(STYLES))}
    )
    (TARGET / "domain.json").write_text(json.dumps(domain(), indent=1) + "\n", "utf-8")
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"exported {size / 1e6:.1f} MB to {TARGET}")


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
