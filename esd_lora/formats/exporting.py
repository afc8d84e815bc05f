"""Erasers under the names of other programs: kohya's (A1111, Forge, ComfyUI), diffusers', peft's."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, LoraPair, on_text_encoder
from esd_lora.erasers.privacy import without_folders, without_local_paths
from esd_lora.erasers.tensor_files import file_content, hash_tensors
from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.families import family_named
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.files import reserve_directory, reserve_file, write_atomically, write_files
from esd_lora.wording import eraser_name

LAYOUTS = ("kohya", "diffusers", "peft")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""Weights and configuration of a peft adapter."""


def export(eraser: Eraser, out: str | Path, *, layout: str, force: bool = False) -> Path:
    """Write an eraser under the names of another program; the update of every layer stays the same.

    Of a base or file on this machine the last part of its path is named, for the file may travel.

    Args:
        eraser: The eraser to write.
        out: A `.safetensors` file for `kohya` and `diffusers`, a directory for `peft`.
        layout: `kohya` for A1111, Forge and ComfyUI; `diffusers`; `peft` for `PeftModel.from_pretrained` on the denoiser.
        force: Write over what is there.

    Returns:
        `out`.

    Raises:
        EsdLoraError: If there is no such layout, the eraser's family has no names in it, or `out` exists or cannot be written.
    """
    out, eraser = Path(out), Eraser(eraser.pairs, without_local_paths(eraser.header))
    if layout not in LAYOUTS:
        raise EsdLoraError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}. Known: {', '.join(LAYOUTS)}.")
    if layout == "peft":
        if eraser.changes_text:
            raise EsdLoraError("peft's layout holds one model's layers, and the eraser changes the text encoder: take another.")
        tensors, config = _peft(eraser)
        with reserve_directory(out, force):
            contents = (file_content(tensors, eraser.metadata()), json.dumps(config, indent=2).encode())
            write_files(out, dict(zip(PEFT_FILES, contents, strict=True)))
        return out
    if out.suffix != ".safetensors":
        raise EsdLoraError(f"output {out}: layout {layout!r} is one file, give it a name that ends in .safetensors.")
    content = kohya_content(eraser) if layout == "kohya" else eraser.files()[WEIGHTS_NAME]
    with reserve_file(out, force):
        write_atomically(out, content)
    return out


def kohya_content(eraser: Eraser) -> bytes:
    """Return the content of the file for A1111, Forge and ComfyUI.

    Raises:
        EsdLoraError: If kohya's files have no name for a layer.
    """
    tensors = kohya_tensors(eraser)
    return file_content(tensors, eraser.metadata() | _kohya_metadata(eraser, tensors))


def kohya_tensors(eraser: Eraser) -> dict[str, Tensor]:
    """Return the tensors under kohya's names: `NAME.lora_down.weight`, `NAME.lora_up.weight`, `NAME.alpha`.

    Clients scale by `alpha / rank`. All layers get one alpha, the highest rank, and what is left of the scale goes into
    `lora_up`, because diffusers' reader takes one layer's alpha for its neighbours.

    Raises:
        EsdLoraError: If kohya's files have no name for a layer.
    """
    family = family_named(eraser.header.family)
    names, places = dict(family.kohya_names()), family.original_layers()
    names |= {module: family.kohya_text_name(module) for module in eraser.pairs if on_text_encoder(module)}
    joined: dict[str, list[tuple[OriginalLayer, LoraPair]]] = {}
    for module, pair in eraser.pairs.items():
        if module not in names:
            reason = f"its layer {module} has no name there" if names else "kohya's files have no names for its layers"
            raise EsdLoraError(
                f"an eraser of family {family.name!r} cannot be written for kohya: {reason}. Use layout diffusers."
            )
        joined.setdefault(names[module], []).append((places.get(module, OriginalLayer(module)), pair))
    pairs = {name: _joined(members) for name, members in joined.items()}
    alpha = max(pair.rank for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors[f"{name}.lora_down.weight"] = pair.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = pair.scaled(pair.rank / alpha, f"layer {name}").up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _joined(members: list[tuple[OriginalLayer, LoraPair]]) -> LoraPair:
    """Return the update of an original weight, from those of the layers that are rows of it: `up` becomes block-diagonal."""
    (place, pair), *_ = members
    if not place.total:
        return LoraPair(pair.down, place.reordered(pair.up, pair.down.shape[1]))
    inputs = pair.down.shape[1]
    dtype = reduce(torch.promote_types, (pair.up.dtype for _, pair in members))
    up = torch.zeros(place.whole(inputs), sum(pair.rank for _, pair in members), dtype=dtype)
    first = 0
    for place, pair in members:
        up[place.rows(inputs), first : first + pair.rank] = pair.up
        first += pair.rank
    return LoraPair(torch.cat([pair.down for _, pair in members]), up)


def _kohya_metadata(eraser: Eraser, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return what A1111, Forge and ComfyUI show of a file, as far as it is known: `ss_*` (kohya) and ModelSpec's fields."""
    header, names = eraser.header, ", ".join(eraser.names)
    downs = [tensor for name, tensor in tensors.items() if name.endswith("lora_down.weight")]
    ranks = {down.shape[0] for down in downs}
    conv_ranks = {down.shape[0] for down in downs if down.dim() == 4 and down.shape[-1] > 1}
    alpha = f"{max(ranks)}"
    created = datetime.fromisoformat(header.created)
    digest = hash_tensors(tensors)
    metadata = {
        "ss_output_name": eraser_name(eraser.names),
        "ss_sd_model_name": without_folders(header.base),
        "ss_network_module": "networks.lora",
        "ss_network_dim": alpha if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alpha,
        "ss_training_started_at": f"{created.timestamp() - header.cost.get('seconds', 0):.0f}",
        "ss_training_finished_at": f"{created.timestamp():.0f}",
        "ss_training_comment": f"esd-lora eraser: objective {header.objective}, scope {header.scope}",
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"Eraser: {names}",
        "modelspec.description": f"A LoRA that {header.effect()}. Negative strength does the opposite.",
        "modelspec.date": created.isoformat(timespec="seconds"),
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.usage_hint": "Made for strength 1; there is no trigger word.",
        "modelspec.tags": ", ".join(["concept-erasure", "eraser", *eraser.names]),
    }
    if conv_ranks:
        metadata["ss_network_args"] = json.dumps({"conv_dim": str(max(conv_ranks)), "conv_alpha": alpha})
    if steps := header.cost.get("steps"):
        metadata["ss_steps"] = f"{steps:.0f}"
    if header.prediction_type in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = header.prediction_type.removesuffix("_prediction")
        metadata["ss_v_parameterization"] = str(header.prediction_type == "v_prediction")
    family = family_named(header.family)
    read_here = (pair.shape[1] for module, pair in eraser.pairs.items() if family.reads_text(module))
    made_here = (pair.shape[1] for module, pair in eraser.pairs.items() if on_text_encoder(module) and "q_proj" in module)
    text_width = next(read_here, next(made_here, None))
    if model := family.published_model(text_width, header.prediction_type):
        metadata |= {"ss_base_model_version": model.kohya, "ss_v2": str(model.v2)}
        metadata |= {"modelspec.architecture": f"{model.architecture}/lora", "modelspec.resolution": model.resolution}
    return metadata


def _peft(eraser: Eraser) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return tensors and configuration of a peft adapter; scales are folded in, so every alpha is its rank."""
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": tensor.contiguous()
        for module, pair in eraser.pairs.items()
        for factor, tensor in zip("AB", pair, strict=True)
    }
    ranks = [pair.rank for pair in eraser.pairs.values()]
    usual = max(set(ranks), key=ranks.count)
    patterns = {f"^{re.escape(module)}$": pair.rank for module, pair in eraser.pairs.items() if pair.rank != usual}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "base_model_name_or_path": without_folders(eraser.header.base),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(eraser.pairs),
        "bias": "none",
        "inference_mode": True,
    }
    return tensors, config
