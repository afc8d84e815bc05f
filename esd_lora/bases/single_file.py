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
from typing import Any

import torch
from safetensors.torch import load_file

from esd_lora.bases.configurations import bounded_models, check_configurations, require_weights
from esd_lora.erasers.tensor_files import read_header
from esd_lora.errors import EsdLoraError
from esd_lora.families import FAMILIES, ModelFamily, family_of, pipeline_libraries, read_pipeline
from esd_lora.families.family import CheckpointKind
from esd_lora.families.flux import diffusers_model_type
from esd_lora.families.layer_names import CHECKPOINT_PREFIX
from esd_lora.files import PICKLES
from esd_lora.json_files import read_json

_VAE = ("first_stage_model.", "vae.")
_CLIP = ("cond_stage_model.", "conditioner.", "text_encoders.clip_")
_T5 = ("text_encoders.t5xxl.",)


def open_single_file(
    file: Path, *, config: str | Path | None, device: torch.device, dtype: torch.dtype, vae: bool
) -> tuple[Any, ModelFamily]:
    """Read a single-file checkpoint into a pipeline.

    Args:
        file: The `.safetensors` checkpoint.
        config: A diffusers directory of the same architecture, whose configurations are taken (and whose weights, for
            components that the file lacks). It also decides what the model predicts.
        device: Where to ask a model what it predicts, if its file does not say; then the pipeline is there, else on the CPU.
        dtype: Of its weights.
        vae: Whether to load the VAE.

    Returns:
        The diffusers pipeline and its family.

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
    family, checkpoint = identify(file, shapes)
    if not family.checkpoints:
        raise EsdLoraError(
            f"{file} holds {checkpoint.title}, which diffusers reads from no single file: erasers can be merged into it, and"
            " everything else needs a diffusers directory."
        )
    if config is not None:
        directory = nullcontext(_check_config(Path(config), family, checkpoint, file))
    elif checkpoint.config is not None:
        directory = unpacked_config(checkpoint.config)
    else:
        raise EsdLoraError(
            f"{file} holds {checkpoint.title}, and not all else that it needs (text encoders, vocabularies, configurations) is"
            " in the file or comes with esd-lora: give --base-config a diffusers directory of the same architecture."
        )
    with directory as folder:
        pipe = _convert(file, folder, family, shapes, dtype, vae)
    if config is None:
        stated = family.stated_prediction_type(header.metadata, shapes) or checkpoint.prediction_type
        _configure_scheduler(pipe, checkpoint, stated or measure_prediction_type(pipe.to(device)), zero_snr="ztsnr" in shapes)
    return pipe, family


def identify(file: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[ModelFamily, CheckpointKind]:
    """Return the family of a checkpoint with tensors of these shapes, and what kind it is.

    Raises:
        EsdLoraError: With what it holds instead, if no family can be read from it.
    """
    for family in FAMILIES:
        checkpoint = family.recognise(shapes)
        if checkpoint and checkpoint.supported:
            return family, checkpoint
        if checkpoint:
            content = checkpoint.title
            break
    else:
        content = _describe(shapes)
    kinds = [checkpoint for family in FAMILIES for checkpoint in family.checkpoints]
    alone, others = ([kind.title for kind in kinds if bool(kind.config) == ships] for ships in (True, False))
    raise EsdLoraError(
        f"{file} holds {content}. Supported single files: {', '.join(alone[:-1])} and {alone[-1]} on their own;"
        f" {', '.join(others[:-1])} and {others[-1]} with --base-config. Otherwise give a diffusers directory."
    )


def _describe(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return in words what a file holds that is no checkpoint of a family."""
    if kind := diffusers_model_type(shapes):
        return f"a checkpoint that diffusers calls {kind!r}"
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


def _check_config(config: Path, family: ModelFamily, checkpoint: CheckpointKind, file: Path) -> Path:
    """Return the user's diffusers directory, once it is seen to be of the checkpoint's family."""
    index = config / "model_index.json"
    if not index.is_file():
        raise EsdLoraError(f"--base-config {config} has no model_index.json: give it a diffusers pipeline directory.")
    other = family_of(read_pipeline(index))
    if other is not family:
        raise EsdLoraError(
            f"{file} holds {checkpoint.title} (family {family.name!r}), --base-config {config} is of family {other.name!r}."
            " Give a directory of the same architecture."
        )
    return config


def _convert(file: Path, folder: Path, family: ModelFamily, shapes: Mapping[str, Any], dtype: torch.dtype, vae: bool) -> Any:
    """Return the pipeline, from the file's weights and, for what it lacks, those that the directory has."""
    import diffusers

    index = read_json(folder / "model_index.json")
    apart: dict[str, Any] = {} if vae else {"vae": None}
    check_configurations(folder)
    pipeline = getattr(diffusers, index["_class_name"])
    whole = hasattr(pipeline, "from_single_file")  # of some models diffusers reads the denoiser alone
    try:
        for part, component_class in index.items():
            if (
                component_class in (None, [None, None])
                or part in apart
                or not part.startswith(("vae", "text_encoder"))
                or not any((folder / part).glob("*.safetensors*"))
            ):
                continue
            library, name = component_class
            prefixes = _VAE if part == "vae" else _T5 if name.startswith("T5") else _CLIP
            if not whole or not any(key.startswith(prefixes) for key in shapes):
                component = model_class(library, name)
                with bounded_models((folder / part).glob("*.safetensors"), folder):
                    apart[part] = component.from_pretrained(
                        folder / part, dtype=dtype, local_files_only=True, use_safetensors=True
                    )
        with bounded_models([file, *folder.glob("*/*.safetensors")], file):
            if whole:
                pipe = pipeline.from_single_file(
                    str(file), config=str(folder), local_files_only=True, torch_dtype=dtype, **apart
                )
            else:
                apart[family.denoiser] = _read_denoiser(file, folder, family.denoiser, index, dtype)
                pipe = pipeline.from_pretrained(folder, local_files_only=True, dtype=dtype, **apart)
    except EsdLoraError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a stranger's file makes them stumble over
        reason = str(error).strip() or type(error).__name__
        first = reason.splitlines()[0].partition(". ")[0].rstrip(".")  # what follows is advice on other calls
        raise EsdLoraError(
            f"{file} does not fit the configuration of a {index['_class_name']}: {first}."
            " Is it whole, and of that architecture, and has --base-config what it lacks?"
        ) from error
    remedy = "Take the full checkpoint, or give --base-config a diffusers directory that has them."
    require_weights(pipe.components.items(), file, remedy)
    return pipe


def _read_denoiser(file: Path, folder: Path, part: str, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the denoiser of a file; without ComfyUI's prefix, over which some of diffusers' converters stumble."""
    state = load_file(file)
    state = {
        name.removeprefix(CHECKPOINT_PREFIX): tensor
        for name, tensor in state.items()
        if not name.startswith((*_VAE, "text_encoders."))
    }
    return model_class(*index[part]).from_single_file(
        state, config=str(folder), subfolder=part, local_files_only=True, torch_dtype=dtype
    )


def model_class(library: str, name: str) -> Any:
    """Return a class of models that an index names.

    Raises:
        EsdLoraError: If it is none: a stranger may name anything that can be imported.
    """
    import diffusers
    import transformers
    from diffusers.models.modeling_utils import ModelMixin

    known: dict[str, Any] = {
        "diffusers": (diffusers, ModelMixin),
        "transformers": (transformers, transformers.PreTrainedModel),
    }
    if library in pipeline_libraries():
        known[library] = import_module(f"diffusers.pipelines.{library}"), transformers.PreTrainedModel
    module, parent = known.get(library, (None, None))
    named = getattr(module, name, None)
    if not (isinstance(named, type) and issubclass(named, parent)):
        raise EsdLoraError(f"the model_index.json names {library}.{name}, which is no class of models of that library.")
    return named


def _configure_scheduler(pipe: Any, checkpoint: CheckpointKind, prediction_type: str, *, zero_snr: bool) -> None:
    """Have the scheduler know what the model predicts, and whether it was trained to zero terminal signal-to-noise."""
    changes: dict[str, Any] = {"prediction_type": prediction_type}
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    if checkpoint.v_side and prediction_type == "v_prediction":
        pipe.unet.register_to_config(sample_size=checkpoint.v_side)


@torch.no_grad()
def measure_prediction_type(pipe: Any) -> str:
    """Return `epsilon` or `v_prediction`, from the U-Net's prediction for noise at the last timestep.

    There x_t is nearly all noise. A noise model predicts x_t itself; a v model minus the picture it expects, which the noise
    says nothing about.
    """
    unet, side = pipe.unet, pipe.unet.config.sample_size
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    x_t = noise.to(unet.device, unet.dtype)
    embeds = pipe.encode_prompt([""], unet.device, 1, False)[0].to(unet.dtype)
    t = torch.tensor([pipe.scheduler.config.num_train_timesteps - 1], device=unet.device)
    prediction = unet(x_t, t, encoder_hidden_states=embeds, return_dict=False)[0]
    correlation = torch.corrcoef(torch.stack([prediction.flatten().float(), x_t.flatten().float()]))[0, 1]
    return "epsilon" if correlation > 0.5 else "v_prediction"


CONFIGS = Path(__file__).parent / "configs"
"""Configurations of published models and CLIP's vocabulary; of checkpoints in one file `sd1`, `sd2` and `sdxl` are all."""


@contextmanager
def unpacked_config(name: str) -> Generator[Path]:
    """Yield a diffusers directory without weights, unpacked from `CONFIGS` for as long as the block runs."""
    parts: dict[str, dict[str, Any]] = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="esd-lora-") as folder:
        for part, values in parts.items():
            if part == "model_index":
                (Path(folder) / "model_index.json").write_text(json.dumps(values))
                continue
            subfolder = Path(folder) / part
            subfolder.mkdir()
            if part.startswith("tokenizer"):
                write_clip_tokenizer(subfolder, **values)
            else:
                (subfolder / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(values))
        yield Path(folder)


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Write the files of CLIP's tokenizer. OpenAI's and OpenCLIP's differ in the padding alone.

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
