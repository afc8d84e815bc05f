"""Single-file checkpoints as A1111 and ComfyUI use them: told apart by their tensors, and read without a download.

diffusers converts the weights; what it would fetch from the Hub for that (configurations, CLIP's vocabulary) lies in
`bases/configs` for SD 1.x, SD 2.x and SDXL, and comes from a diffusers directory for the others.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.files import PICKLES

_UNET = "model.diffusion_model."
_CLIP_L = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_VAE = ("first_stage_model.", "vae.")
_CLIP = ("cond_stage_model.", "conditioner.", "text_encoders.clip_")
_T5 = ("text_encoders.t5xxl.",)
_SUPPORTED = "SD 1.x, SD 2.x and SDXL on their own; Stable Diffusion 3 and Flux.1 with --base-config"


class Kind(NamedTuple):
    """What a checkpoint holds."""

    title: str
    family: str
    config: str | None
    """Name of the configuration in `bases/configs`, if it lies there."""


def open_single_file(
    file: Path, *, config: str | Path | None, device: torch.device, dtype: torch.dtype, vae: bool
) -> tuple[Any, str]:
    """Reads a single-file checkpoint.

    Args:
        file: The `.safetensors` checkpoint.
        config: A diffusers directory of the same architecture, whose configurations are taken (and whose weights, for
            components that the file lacks). It also decides what the model predicts.
        device: Where to put the pipeline.
        dtype: Of its weights.
        vae: Whether to load the VAE.

    Returns:
        The diffusers pipeline and the name of its family.

    Raises:
        EsdLoraError: If the file is a pickle, damaged, no model of a family that can be read from one file, or does not fit
            the configuration.
    """
    if file.suffix.lower() in PICKLES:
        raise EsdLoraError(
            f"{file} is a pickle, and opening one runs whatever code was put into it. Take the model's .safetensors file, or"
            " convert it on a machine you can spare."
        )
    header = read_header(file)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.tensors.items()}
    kind = kind_of(file, shapes)
    if config is not None:
        directory = nullcontext(_checked(Path(config), kind, file))
    elif kind.config is not None:
        directory = unpacked_config(kind.config)
    else:
        raise EsdLoraError(
            f"{file} holds {kind.title}, and not all else that it needs (text encoders, vocabularies, configurations) is in the"
            " file or comes with esd-lora: give --base-config a diffusers directory of the same architecture."
        )
    with directory as folder:
        pipe = _convert(file, folder, shapes, dtype, vae)
    pipe.to(device)
    if config is None:
        _set_prediction_type(pipe, kind, shapes, header.metadata)
    return pipe, kind.family


def kind_of(file: Path, shapes: Mapping[str, Sequence[int]]) -> Kind:
    """What a checkpoint with tensors of these shapes holds.

    Raises:
        EsdLoraError: With what was found instead, if no family can be read from it.
    """
    if stem := shapes.get(f"{_UNET}input_blocks.0.0.weight"):
        labelled = f"{_UNET}label_emb.0.0.weight" in shapes
        if stem[1] != 4:
            found = f"an inpainting, depth or editing model, its U-Net taking {stem[1]} channels instead of 4"
        elif any(name.startswith("control_model.") for name in shapes):
            found = "a ControlNet"
        elif "edm_mean" in shapes:
            found = "Playground v2.5, whose noise schedule (EDM) no family covers"
        elif not labelled and any(name.startswith(_CLIP_L) for name in shapes):
            return Kind("SD 1.x", "sd", "sd1")
        elif not labelled and any(name.startswith(_OPEN_CLIP) for name in shapes):
            return Kind("SD 2.x", "sd", "sd2")
        elif labelled and any(name.startswith("conditioner.embedders.1.") for name in shapes):
            return Kind("SDXL", "sdxl", "sdxl")
        elif labelled and any(name.startswith(("conditioner.", _OPEN_CLIP)) for name in shapes):
            found = "the SDXL refiner or an unCLIP model, which do not draw from text alone"
        else:
            return Kind("a U-Net alone", "sdxl" if labelled else "sd", None)
    elif any(name.removeprefix(_UNET) == "joint_blocks.0.x_block.attn.qkv.weight" for name in shapes):
        return Kind("Stable Diffusion 3", "sd3", None)
    else:
        found = _told_by_diffusers(shapes)
        if found in ("flux-dev", "flux-schnell"):
            return Kind("Flux.1", "flux", None)
        found = f"a checkpoint that diffusers calls {found!r}" if found else _told_by_names(shapes)
    raise EsdLoraError(f"{file} holds {found}. Supported single files: {_SUPPORTED}. Otherwise give a diffusers directory.")


def _told_by_diffusers(shapes: Mapping[str, Sequence[int]]) -> str | None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    except (KeyError, UnboundLocalError, TypeError, ValueError):  # it trips over sizes it does not know
        return None
    return None if kind == "v1" else kind  # "v1" is also its word for whatever it does not know


def _told_by_names(shapes: Mapping[str, Sequence[int]]) -> str:
    if any("lora_" in name or ".lora." in name for name in shapes):
        return "a LoRA, not a base model"
    if shapes and all(
        name.startswith(("first_stage_model.", "encoder.", "decoder.", "quant", "post_quant")) for name in shapes
    ):
        return "a VAE alone"
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in shapes):
        return "one component of a diffusers pipeline"
    first = ", ".join(list(shapes)[:3])
    return f"{len(shapes)} tensors that are no model known here ({first}{', ...' if len(shapes) > 3 else ''})"


def _checked(config: Path, kind: Kind, file: Path) -> Path:
    """A diffusers directory of the user's, once it is seen to be of the checkpoint's family."""
    from esd_lora.families import family_of, read_pipeline

    index = config / "model_index.json"
    if not index.is_file():
        raise EsdLoraError(f"--base-config {config} has no model_index.json: give it a diffusers pipeline directory.")
    family = family_of(read_pipeline(index)).name
    if family != kind.family:
        raise EsdLoraError(
            f"{file} holds {kind.title} (family {kind.family!r}), --base-config {config} is of family {family!r}."
            " Give a directory of the same architecture."
        )
    return config


def _convert(file: Path, folder: Path, shapes: Mapping[str, Any], dtype: torch.dtype, vae: bool) -> Any:
    """The pipeline, from the file's weights and, for what it lacks, those that the directory has."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    apart: dict[str, Any] = {} if vae else {"vae": None}
    try:
        for part, found in index.items():
            if part in apart or not part.startswith(("vae", "text_encoder")) or not any((folder / part).glob("*.safetensors*")):
                continue
            library, name = found
            places = _VAE if part == "vae" else _T5 if name.startswith("T5") else _CLIP
            if not any(key.startswith(places) for key in shapes):
                component = getattr(import_module(library), name)
                apart[part] = component.from_pretrained(folder / part, dtype=dtype, local_files_only=True)
        pipe = getattr(diffusers, index["_class_name"]).from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype, **apart
        )
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        said = str(error).strip() or type(error).__name__
        first = said.splitlines()[0].partition(". ")[0].rstrip(".")  # what follows is advice on other calls
        raise EsdLoraError(
            f"{file} does not fit the configuration of a {index['_class_name']}: {first}."
            " Is it whole, and of that architecture, and has --base-config what it lacks?"
        ) from error
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            lacking = [path for path, parameter in component.named_parameters() if parameter.is_meta]
            if lacking:
                raise EsdLoraError(
                    f"{file} lacks {len(lacking)} tensors of the {part}, {lacking[0]} the first. Take the full checkpoint, or"
                    " give --base-config a diffusers directory that has them."
                )
    return pipe


def _set_prediction_type(pipe: Any, kind: Kind, shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Sets what the model predicts: as the file says, or, for SD 2.x, which comes in both, as the U-Net answers."""
    said = metadata.get("modelspec.prediction_type", "")
    if said or "v_pred" in shapes:  # ModelSpec's field; the marker tensor that ComfyUI reads
        predicts = "v_prediction" if said.startswith("v") or "v_pred" in shapes else "epsilon"
    else:
        predicts = measured_prediction_type(pipe) if kind.config == "sd2" else "epsilon"
    changes: dict[str, Any] = {"prediction_type": predicts}
    if "ztsnr" in shapes:  # zero terminal signal-to-noise, marked in the same way
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    if kind.config == "sd2" and predicts == "v_prediction":
        pipe.unet.register_to_config(sample_size=96)  # the v models of SD 2.x draw 768 pixels, the others 512


@torch.no_grad()
def measured_prediction_type(pipe: Any) -> str:
    """`epsilon` or `v_prediction`, told from the U-Net's answer to noise at the last timestep.

    There x_t is nearly all noise. A noise model answers with x_t itself; a v model with minus the picture it expects, which
    the noise says nothing about.
    """
    unet, side = pipe.unet, pipe.unet.config.sample_size
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    x_t = noise.to(unet.device, unet.dtype)
    embeds = pipe.encode_prompt([""], unet.device, 1, False)[0].to(unet.dtype)
    t = torch.tensor([pipe.scheduler.config.num_train_timesteps - 1], device=unet.device)
    answer = unet(x_t, t, encoder_hidden_states=embeds, return_dict=False)[0]
    alike = torch.corrcoef(torch.stack([answer.flatten().float(), x_t.flatten().float()]))[0, 1]
    return "epsilon" if alike > 0.5 else "v_prediction"


CONFIGS = Path(__file__).parent / "configs"
"""Configurations and vocabulary of checkpoints in one file: `sd1`, `sd2`, `sdxl`."""


@contextmanager
def unpacked_config(name: str) -> Generator[Path]:
    """A diffusers directory without weights, unpacked from `CONFIGS` for as long as the block runs."""
    parts: dict[str, dict[str, Any]] = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="esd-lora-") as folder:
        for part, values in parts.items():
            if part == "model_index":
                (Path(folder) / "model_index.json").write_text(json.dumps(values))
                continue
            place = Path(folder) / part
            place.mkdir()
            if part.startswith("tokenizer"):
                write_clip_tokenizer(place, **values)
            else:
                (place / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(values))
        yield Path(folder)


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Writes the files of CLIP's tokenizer. OpenAI's and OpenCLIP's differ in the padding alone.

    The vocabulary follows from the list of merges as in openai/CLIP, clip/simple_tokenizer.py: 256 bytes, the same at the end
    of a word, one token for each merge, start and end.
    """
    merges = gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    start, end = "<|startoftext|>", "<|endoftext|>"
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), start, end]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}
    settings |= {"bos_token": start, "eos_token": end, "unk_token": end}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
