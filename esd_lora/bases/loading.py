"""Loading a base model: built in, from a directory, a single file or the Hub."""

from __future__ import annotations

import logging
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from esd_lora import ranks
from esd_lora.bases.base import Base
from esd_lora.bases.configurations import MAX_FILE, bounded_models, check_configurations, require_weights
from esd_lora.bases.notices import quiet_libraries
from esd_lora.bases.quantizing import QUANTIZED, quantize, require_library
from esd_lora.bases.single_file import model_class, open_single_file
from esd_lora.built_in import BUILT_IN, base_files, domain, keep_prompts, no_base, require_base
from esd_lora.erasers.hub_answers import checked_answers
from esd_lora.errors import EsdLoraError, did_you_mean, how_to_install
from esd_lora.families import ModelFamily, family_of, pipeline_libraries, read_pipeline
from esd_lora.files import PICKLES
from esd_lora.json_files import read_json
from esd_lora.progress import stage
from esd_lora.wording import HubId

_LOG = logging.getLogger(__name__)
_ENCODING = 1.2
"""Times the size of text encoders is taken while they encode."""


def load_base(
    base: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    config: str | Path | None = None,
    vae: bool = True,
    text_first: bool = False,
) -> Base:
    """Load a base model of any family.

    Args:
        base: A built-in name (`emoji`), a local diffusers directory, a single-file `.safetensors` checkpoint, or a Hub id
            (`owner/name`, `owner/name@revision`).
        device: `auto` takes the GPU if there is one; or `cpu`, `cuda`, `mps`.
        dtype: Dtype of the frozen weights, or its name; by default float32 on the CPU, and on a GPU bfloat16, or float16 where
            bfloat16 is not supported. `int8` and `nf4` quantize the denoiser, on the CPU or on the way to the device, and leave
            the rest in the default.
        config: For a single file, a diffusers directory of the same architecture; SD 1.x, 2.x and SDXL need none.
        vae: Whether to load the VAE; only pictures need it.
        text_first: Whether to place the text encoders alone; the denoiser follows when `Base.free_text_encoders` drops them,
            and the VAE for as long as pictures are painted. So a device needs memory for the larger of the two, not for both
            (Flux: 24 GB beside 10 in bfloat16).

    Raises:
        EsdLoraError: If there is no such base, it is not a diffusers pipeline, no family covers it, or there is no such
            device.
    """
    require_base(str(base))
    with stage(f"loading base {base}"):
        return _load(base, device, dtype, config, vae, text_first)


def _load(
    base: str | Path, device: str, dtype: torch.dtype | str | None, config: str | Path | None, vae: bool, text_first: bool
) -> Base:
    """Load a base as `load_base` does."""
    name, commit = str(base), None
    place = choose_device(device)
    quantized = dtype if isinstance(dtype, str) and dtype in QUANTIZED else None
    if quantized:
        require_library(quantized)
    dtype = choose_dtype(place, None if quantized else dtype)
    source = base_files(name) if name in BUILT_IN else Path(name)
    in_one_file = not source.is_dir() and (source.is_file() or source.suffix.lower() in (".safetensors", *PICKLES))
    if config is not None and not in_one_file:
        raise EsdLoraError(f"base config {config} goes with a single-file checkpoint, and base {name!r} is none. Leave it out.")
    if source.is_dir():
        index = source / "model_index.json"
        if not index.is_file():
            raise EsdLoraError(f"{source} has no model_index.json, so it is not a diffusers pipeline directory.")
        family = _usable_family(index)
        pipe = _load_pipeline(str(source), None, dtype, vae)
    elif in_one_file:
        with quiet_libraries():
            pipe, family = open_single_file(source, config=config, device=place, dtype=dtype, vae=vae)
    elif hub_id := HubId.read(name):
        name, source = hub_id.repo, look_up(hub_id)
        commit = source.name  # the cache keeps files under snapshots/COMMIT
        family = _usable_family(source / "model_index.json")  # before gigabytes of weights come
        pipe = _load_pipeline(hub_id.repo, commit, dtype, vae)
    else:
        raise EsdLoraError(no_base(name))
    pipe.set_progress_bar_config(disable=True)
    if not vae:
        pipe.vae = None
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
            if quantized and part == family.denoiser:
                quantize(component, family, quantized)
            if not text_first:
                component.to(place)
    if text_first:
        place_text_encoders(pipe, place)
    steps, guidance = family.default_sampling(pipe)
    sampling = domain(name)["sampling"] if name in BUILT_IN else {"steps": steps, "guidance": guidance}
    waits = place if text_first else None
    _LOG.debug("base %s: family %s from %s, %s, %s", name, family.name, source, quantized or dtype, place)
    return Base(pipe, family, name, commit, source, keep_prompts(name), **sampling, destination=waits, quantized=quantized)


def _usable_family(index: Path) -> ModelFamily:
    """Return the family of the pipeline that an index names.

    Raises:
        EsdLoraError: As `read_pipeline` and `family_of` do, or if a module that the family needs is not installed.
    """
    family = family_of(read_pipeline(index))
    if family.needs and find_spec(family.needs[0]) is None:
        module, extra = family.needs
        raise EsdLoraError(f"family {family.name!r} needs {module}, which is not installed: {how_to_install(extra)}.")
    return family


def place_text_encoders(pipe: Any, place: torch.device) -> None:
    """Place a pipeline's text encoders: together, or each when it is called, where a card has no room for all (accelerate)."""
    from accelerate import cpu_offload_with_hook

    parts = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    size = sum(weight.nbytes for part in parts for weight in part.parameters())
    if len(parts) < 2 or _ENCODING * size <= _free(place):
        for part in parts:
            part.to(place)
        return
    hook: Any = None
    for part in parts:
        _, hook = cpu_offload_with_hook(part, place, hook)  # which sends the one before it back to the CPU
    parts[0]._hf_hook.prev_module_hook = hook


def _free(place: torch.device) -> float:
    """Return the bytes that are free on a card; elsewhere nothing is known to be scarce."""
    return torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else math.inf


def choose_device(device: str) -> torch.device:
    """Return the device of a name; `auto` is the best one that accelerate finds. Several ranks join each other here.

    Raises:
        EsdLoraError: If it is unknown or not there.
    """
    known = ("auto", "cpu", "cuda", "mps")
    if device.partition(":")[0] not in known:
        raise EsdLoraError(f"unknown device {device!r}{did_you_mean(device, known)}. Known: {', '.join(known)}.")
    if ranks.count() > 1:
        return _join_ranks(device)
    if device == "auto":
        from accelerate import PartialState

        return PartialState().device or torch.device("cpu")
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(device.partition(":")[0], lambda: True)():
        raise EsdLoraError(f"device {device!r} is not available here. Use --device auto or cpu.")
    return torch.device(device)


def _join_ranks(device: str) -> torch.device:
    """Join the other ranks, and return the device of this one: a GPU of its own, or the CPU where there are none.

    Raises:
        EsdLoraError: If ranks cannot have that device, or there are fewer than ranks, or no rank answers.
    """
    from accelerate import PartialState

    if ":" in device or device == "mps":
        raise EsdLoraError(f"device {device!r} is one, and {ranks.count()} ranks were started. Use --device auto, cuda or cpu.")
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = device == "cpu" or kind is None or kind.type == "mps"  # over which no ranks talk
    if device == "cuda" and on_cpu:
        raise EsdLoraError("device 'cuda' is not available here. Use --device auto or cpu.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and here > torch.accelerator.device_count():
        raise EsdLoraError(
            f"{here} ranks were started on a machine with {torch.accelerator.device_count()} devices. Start as many ranks, or"
            " use --device cpu."
        )
    try:
        return PartialState(cpu=on_cpu, timeout=ranks.PATIENCE).device or torch.device("cpu")
    except (RuntimeError, ValueError) as error:
        raise EsdLoraError(f"the {ranks.count()} ranks cannot join each other: {' '.join(str(error).split())[:300]}") from error


def choose_dtype(device: torch.device, dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype of frozen weights: the given one, or what suits the device.

    Raises:
        EsdLoraError: If it is no floating dtype that models come in.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in known:
        names = (*known, *QUANTIZED)
        raise EsdLoraError(f"unknown dtype {dtype!r}{did_you_mean(dtype, names)}. Known: {', '.join(names)}.")
    if dtype is not None:
        return known[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


def look_up(hub_id: HubId) -> Path:
    """Return the folder in the cache for the commit that the id stands for now, the pipeline's index in it.

    Raises:
        EsdLoraError: If it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        with quiet_libraries(), checked_answers(MAX_FILE):
            return Path(hf_hub_download(hub_id.repo, "model_index.json", revision=hub_id.revision)).parent
    except (OSError, ValueError) as error:
        raise EsdLoraError(f"base {hub_id.repo!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _load_pipeline(source: str, revision: str | None, dtype: torch.dtype, vae: bool) -> Any:
    with quiet_libraries():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        left_out: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if not vae:
            left_out["vae"] = None
        options: dict[str, Any] = {"use_safetensors": True, **left_out}
        folder = Path(source)
        try:
            if revision:
                with checked_answers(MAX_FILE):
                    folder = Path(DiffusionPipeline.download(source, revision=revision, **options))
            check_configurations(folder)
            with bounded_models(folder.glob("*/*.safetensors"), source):
                options |= _load_text_encoders(folder, dtype, source)
                pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **options)
        except EsdLoraError:
            raise
        except Exception as error:  # diffusers and transformers raise whatever a stranger's file makes them stumble over
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EsdLoraError(f"base {source!r} cannot be loaded: {first}") from error
    require_weights(pipe.components.items(), f"base {source!r}", "Fetch it again, or from elsewhere.")
    return pipe


def _load_text_encoders(folder: Path, dtype: torch.dtype, source: str) -> dict[str, Any]:
    """Return a pipeline's text encoders by name, whole: transformers fills what the files lack with noise, and goes on.

    Raises:
        EsdLoraError: If one lacks weights.
    """
    encoders: dict[str, Any] = {}
    for part, component in read_json(folder / "model_index.json").items():
        named = part.startswith("text_encoder") and isinstance(component, list)
        if named and component[0] in ("transformers", *pipeline_libraries()):
            kind: Any = model_class(*component)
            encoders[part], info = kind.from_pretrained(
                folder / part, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if lacking := sorted(info["missing_keys"]):
                raise EsdLoraError(
                    f"base {source!r} lacks {len(lacking)} tensors of the {part}, {lacking[0]} the first, or has them under"
                    " names that this version of transformers does not know. Fetch it again, or update transformers."
                )
    return encoders
