"""Bases as they lie on disk: which tensor of which file is which layer, without loading a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from esd_lora.bases.configurations import MAX_FILE
from esd_lora.bases.single_file import identify
from esd_lora.built_in import BUILT_IN, base_files
from esd_lora.erasers.eraser import on_text_encoder
from esd_lora.erasers.hub_answers import checked_answers
from esd_lora.erasers.tensor_files import DTYPES, Header, read_header, read_rows
from esd_lora.errors import EsdLoraError
from esd_lora.families import ModelFamily, family_of, read_pipeline
from esd_lora.families.family import read_prediction_type
from esd_lora.families.layer_names import OriginalLayer, clip_layers
from esd_lora.files import PICKLES
from esd_lora.json_files import read_json
from esd_lora.wording import HubId

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "module.")
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx")
"""Suffixes of weights in any format."""
_IN_A_BLOCK = re.compile(r"\.\d+\.")
EMA = "model_ema."
"""Prefix of averaged copies of a U-Net's weights."""


class StoredFile(NamedTuple):
    """One safetensors file with weights of the denoiser, or of a text encoder."""

    path: Path
    header: Header
    layers: Mapping[str, list[tuple[str, OriginalLayer]]]
    """Tensor name to the layers in it: module path, and place. Some checkpoints hold each layer twice, once averaged (EMA)."""


class Stored(NamedTuple):
    """A base on disk."""

    path: Path
    """Diffusers directory or single file."""
    family: ModelFamily
    prediction_type: str | None
    """`None` where only the model itself could tell."""
    denoiser: Path | None
    """The denoiser's folder in a directory."""
    files: list[StoredFile]
    """Files with its weights, sorted by name; a single file has those of the text encoders in it."""

    def files_of(self, modules: Collection[str]) -> list[StoredFile]:
        """Return the files in which some layers may stand: the denoiser's, and those of text encoders that have any of them.

        Raises:
            EsdLoraError: If one is damaged.
        """
        components = {module.partition(".")[0] for module in modules if on_text_encoder(module)} if self.denoiser else ()
        folders = [self.path / component for component in self.family.clip_encoders if component in components]
        return [*self.files, *(_text_file(file) for folder in folders for file in sorted(folder.glob("*.safetensors")))]

    def weights(self, modules: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield module path and weight of every linear and convolution of the denoiser, or of those in `modules`; each once."""
        seen: set[str] = set()
        for file in self.files_of(modules or ()):
            with file.path.open("rb") as source:
                for name, members in file.layers.items():
                    for module, place in members:
                        wanted = not on_text_encoder(module) if modules is None else module in modules
                        if wanted and module not in seen and not name.startswith(EMA):
                            seen.add(module)
                            yield module, read_layer(source, file.header, name, place)


def read_layer(source: BinaryIO, header: Header, name: str, place: OriginalLayer) -> Tensor:
    """Return a layer's weight in diffusers' order, out of the tensor it stands in."""
    inputs = header.tensors[name]["shape"][1]
    return place.reordered(read_rows(source, header, name, place.rows(inputs)), inputs)


def _text_file(file: Path) -> StoredFile:
    """Return a file of a text encoder in its folder."""
    header = read_header(file)
    layers = {name: clip_layers(file.parent.name, name) for name in header.tensors}
    return only_layers(StoredFile(file, header, {name: members for name, members in layers.items() if members}))


def find_layers(family: ModelFamily, names: Collection[str]) -> dict[str, list[tuple[str, OriginalLayer]]]:
    """Return tensor name to the layers that stand in it, for any state dict of a denoiser, whole or in part.

    Args:
        family: Family of the model.
        names: Names of the tensors, diffusers' or the original ones, with or without a prefix.
    """
    bare = bare_names(names)
    weights = {name.removesuffix(".weight"): full for name, full in bare.items() if name.endswith(".weight")}
    places = family.original_layers(bare)
    if not places or any(
        module in weights and _IN_A_BLOCK.search(module) and place.name != module for module, place in places.items()
    ):
        return {full: [(module, OriginalLayer(module))] for module, full in weights.items()}  # diffusers' own names
    layers: dict[str, list[tuple[str, OriginalLayer]]] = {}
    known = set(names)
    for module, place in places.items():
        averaged = EMA + f"diffusion_model.{place.name}.weight".replace(".", "")  # CompVis' LitEma drops the dots
        for full in (weights.get(place.name), averaged):
            if full in known:
                layers.setdefault(str(full), []).append((module, place))
    return layers


def bare_names(names: Collection[str]) -> dict[str, str]:
    """Return each tensor's name without the denoiser's prefix, if the names have one, to the name as it stands."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def open_stored(base: str | Path) -> Stored:
    """Find the denoiser's layers of a base on disk; a base on the Hub is fetched into the cache.

    Args:
        base: A built-in base, a diffusers directory, a Hub id, or a single-file `.safetensors` checkpoint.

    Raises:
        EsdLoraError: If there is no such base, or it is a pickle, damaged, quantised, or of no known family.
    """
    path = base_files(str(base)) if str(base) in BUILT_IN else Path(base)
    if path.is_file() or path.suffix.lower() in (".safetensors", *PICKLES):
        return _open_file(path)
    if not path.is_dir() and (hub_id := HubId.read(str(base))):
        path = _fetch(hub_id)
    if not (path / "model_index.json").is_file():
        raise EsdLoraError(
            f"no base {str(base)!r}: expected {', '.join(BUILT_IN)}, a diffusers directory, a .safetensors checkpoint, or a Hub"
            " id."
        )
    return _open_directory(path)


def _fetch(hub_id: HubId) -> Path:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        with checked_answers(MAX_FILE):
            return Path(DiffusionPipeline.download(hub_id.repo, revision=hub_id.revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise EsdLoraError(f"base {str(hub_id)!r} cannot be fetched: {str(error).strip().splitlines()[0]}") from error


def _open_directory(folder: Path) -> Stored:
    family = family_of(read_pipeline(folder / "model_index.json"))
    config = folder / "scheduler" / "scheduler_config.json"
    denoiser = folder / family.denoiser
    files: list[StoredFile] = []
    for file in sorted(denoiser.glob("*.safetensors")):
        header = read_header(file)
        modules = [name.removesuffix(".weight") for name in header.tensors if name.endswith(".weight")]
        files.append(StoredFile(file, header, {f"{module}.weight": [(module, OriginalLayer(module))] for module in modules}))
    if not files:
        raise EsdLoraError(f"{denoiser} has no .safetensors weights. Save the base as safetensors first.")
    prediction_type = read_prediction_type(read_json(config)) if config.is_file() else None
    if not isinstance(prediction_type, str | None):
        raise EsdLoraError(f"{config} is damaged: its prediction_type is no text. Fetch the base again.")
    return Stored(folder, family, prediction_type, denoiser, [only_layers(file) for file in files])


def _open_file(file: Path) -> Stored:
    if file.suffix.lower() in PICKLES:
        raise EsdLoraError(f"{file} is a pickle, and opening one runs whatever code was put into it. Take a .safetensors file.")
    header = read_header(file)
    family, checkpoint = identify(file, {name: entry["shape"] for name, entry in header.tensors.items()})
    prediction_type = family.stated_prediction_type(header.metadata, header.tensors) or checkpoint.prediction_type
    layers = find_layers(family, header.tensors)
    for component, prefix in zip(family.clip_encoders, family.clip_prefixes, strict=True):
        texts = {name: clip_layers(component, name.removeprefix(prefix)) for name in header.tensors if name.startswith(prefix)}
        layers |= {name: members for name, members in texts.items() if members}
    return Stored(file, family, prediction_type, None, [only_layers(StoredFile(file, header, layers))])


def only_layers(file: StoredFile) -> StoredFile:
    """Return a file without norms and embeddings, whose weights are no matrices of floating-point numbers."""
    entries = file.header.tensors
    layers = {n: m for n, m in file.layers.items() if len(entries[n]["shape"]) in (2, 4) and entries[n]["dtype"] in DTYPES}
    return file._replace(layers=layers)
