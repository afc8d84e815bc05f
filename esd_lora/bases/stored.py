"""Bases as they lie on disk: which tensor of which file is which layer of the denoiser, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from esd_lora.bases.single_file import kind_of
from esd_lora.built_in import BUILT_IN, base_files
from esd_lora.erasers.tensor_files import DTYPES, Header, read_header, read_rows
from esd_lora.errors import EsdLoraError
from esd_lora.families import family_of, read_pipeline
from esd_lora.families.family import prediction_type
from esd_lora.families.layer_names import Place, places_in
from esd_lora.files import PICKLES

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "module.")
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx")
"""Suffixes of weights in any format."""
EMA = "model_ema."
"""Prefix of averaged copies of a U-Net's weights."""


class StoredFile(NamedTuple):
    """One safetensors file with weights of the denoiser."""

    path: Path
    header: Header
    layers: Mapping[str, list[tuple[str, Place]]]
    """Tensor name to the layers in it, by module path. Some checkpoints hold each layer twice, once averaged (EMA)."""


class Stored(NamedTuple):
    """A base on disk."""

    path: Path
    """Diffusers directory or single file."""
    family: str
    prediction_type: str | None
    """`None` where only the model itself could tell."""
    denoiser: Path | None
    """The denoiser's folder in a directory."""
    files: list[StoredFile]

    def weights(self, modules: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Module path and weight of every linear and convolution, or of those in `modules`; one at a time, each once."""
        seen: set[str] = set()
        for file in self.files:
            with file.path.open("rb") as source:
                for name, members in file.layers.items():
                    for module, place in members:
                        wanted = modules is None or module in modules
                        if wanted and module not in seen and not name.startswith(EMA):
                            seen.add(module)
                            yield module, read_layer(source, file.header, name, place)


def read_layer(source: BinaryIO, header: Header, name: str, place: Place) -> Tensor:
    """A layer's weight in diffusers' order, out of the tensor it stands in."""
    inputs = header.tensors[name]["shape"][1]
    return place.reordered(read_rows(source, header, name, place.rows(inputs)), inputs)


def find_layers(family: str, names: Collection[str]) -> dict[str, list[tuple[str, Place]]]:
    """Tensor name to the layers that stand in it, for any state dict of a denoiser, whole or in part.

    Args:
        family: Of the model.
        names: Of the tensors, under diffusers' or the original names, with or without a prefix.
    """
    bare = bare_names(names)
    weights = {name.removesuffix(".weight"): full for name, full in bare.items() if name.endswith(".weight")}
    places = places_in(family, bare)
    if not places or any(
        module in weights and "blocks." in module and place.name != module for module, place in places.items()
    ):
        return {full: [(module, Place(module))] for module, full in weights.items()}  # diffusers' own names
    layers: dict[str, list[tuple[str, Place]]] = {}
    known = set(names)
    for module, place in places.items():
        averaged = EMA + f"diffusion_model.{place.name}.weight".replace(".", "")  # CompVis' LitEma drops the dots
        for full in (weights.get(place.name), averaged):
            if full in known:
                layers.setdefault(str(full), []).append((module, place))
    return layers


def bare_names(names: Collection[str]) -> dict[str, str]:
    """Tensor name without the denoiser's prefix, if the names have one, to the name as it stands."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def open_stored(base: str | Path) -> Stored:
    """Finds the denoiser's layers of a base on disk; a Hub id is fetched into the cache.

    Args:
        base: A built-in base, a diffusers directory, a Hub id, or a single-file `.safetensors` checkpoint.

    Raises:
        EsdLoraError: If there is no such base, or it is a pickle, damaged, quantised, or of no known family.
    """
    path = base_files(str(base)) if str(base) in BUILT_IN else Path(base)
    if path.is_file() or path.suffix.lower() in (".safetensors", *PICKLES):
        return _single(path)
    return _directory(_fetched(str(base), path))


def _fetched(base: str, folder: Path) -> Path:
    if not folder.is_dir() and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        try:
            hub_id, _, revision = base.partition("@")
            folder = Path(DiffusionPipeline.download(hub_id, revision=revision or None, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise EsdLoraError(f"base {base!r} cannot be fetched: {str(error).strip().splitlines()[0]}") from error
    if not (folder / "model_index.json").is_file():
        raise EsdLoraError(
            f"no base {base!r}: expected {', '.join(BUILT_IN)}, a diffusers directory, a .safetensors checkpoint, or a Hub id."
        )
    return folder


def _directory(folder: Path) -> Stored:
    family = family_of(read_pipeline(folder / "model_index.json"))
    config = folder / "scheduler" / "scheduler_config.json"
    denoiser = folder / family.denoiser
    files: list[StoredFile] = []
    for file in sorted(denoiser.glob("*.safetensors")):
        header = read_header(file)
        modules = [name.removesuffix(".weight") for name in header.tensors if name.endswith(".weight")]
        files.append(StoredFile(file, header, {f"{module}.weight": [(module, Place(module))] for module in modules}))
    if not files:
        raise EsdLoraError(f"{denoiser} has no .safetensors weights. Save the base as safetensors first.")
    predicts = prediction_type(json.loads(config.read_text("utf-8"))) if config.is_file() else None
    return Stored(folder, family.name, predicts, denoiser, [only_layers(file) for file in files])


def _single(file: Path) -> Stored:
    if file.suffix.lower() in PICKLES:
        raise EsdLoraError(f"{file} is a pickle, and opening one runs whatever code was put into it. Take a .safetensors file.")
    header = read_header(file)
    kind = kind_of(file, {name: entry["shape"] for name, entry in header.tensors.items()})
    layers = find_layers(kind.family, header.tensors)
    told = header.metadata.get("modelspec.prediction_type", "v" if "v_pred" in header.tensors else "")
    predicts = {"v": "v_prediction", "epsilon": "epsilon"}.get(told)
    if kind.family in ("sd3", "flux"):
        predicts = "flow"
    elif kind.config in ("sd1", "sdxl"):
        predicts = predicts or "epsilon"
    return Stored(file, kind.family, predicts, None, [only_layers(StoredFile(file, header, layers))])


def only_layers(file: StoredFile) -> StoredFile:
    """Without norms and embeddings, whose weights are no matrices of floating-point numbers."""
    entries = file.header.tensors
    layers = {n: m for n, m in file.layers.items() if len(entries[n]["shape"]) in (2, 4) and entries[n]["dtype"] in DTYPES}
    return file._replace(layers=layers)
