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
    """What an eraser is asked to leave alone by default: every second object, alone and in one style, and the styles.

    The other objects stand in no list, so that damage beyond the list can be measured.
    """
    styles = list(STYLES)
    listed = list(OBJECTS)[::2]
    alone = [with_article(name) for name in listed]
    styled = [TEMPLATES["both"][i % 6].format(a=with_article(n), object=n, style=styles[i % 5]) for i, n in enumerate(listed)]
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
    domain = {
        "objects": list(OBJECTS),
        "styles": list(STYLES),
        "backgrounds": list(BACKGROUNDS),
        "templates": TEMPLATES,
        "held_out": held_out_pairs(),
        "keep": keep_list(),
        "sampling": {"steps": 12, "guidance": 4.0},
    }
    (TARGET / "domain.json").write_text(json.dumps(domain, indent=1) + "\n", "utf-8")
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"exported {size / 1e6:.1f} MB to {TARGET}")
