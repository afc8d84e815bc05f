"""The eraser: a plain diffusers LoRA file whose header says what it removes and where it came from.

A directory holds `pytorch_lora_weights.safetensors`, `recipe.yaml`, `README.md` and what training left (log, previews).
The keys are diffusers' own (`unet.<module>.lora_A.weight`), `alpha / rank` is folded into `lora_B`, so that
`pipe.load_lora_weights(directory)` reproduces the trained model with nothing else said.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from esd_lora.cards import render_card
from esd_lora.errors import EsdLoraError
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import dump_recipe

FORMAT = 1
"""Number of the file format, apart from the package's version. A reader accepts this and every older one."""
HEADER_KEY = "esd_lora"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
RUN_FILES = (WEIGHTS_NAME, "recipe.yaml", "README.md", "train_log.jsonl", "checkpoint.pt", "samples/before_after.png")
"""What a run writes into its directory, previews aside."""


class LoraPair(NamedTuple):
    """The low-rank update of one linear or convolution, its scale folded into `up`."""

    down: Tensor
    """[rank, in] or [rank, in, kernel, kernel]: diffusers' `lora_A`."""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]: diffusers' `lora_B`."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight the pair belongs to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """What the pair adds to its layer's weight, in the weight's shape, float32 or better."""
        up, down = (x if x.dtype == torch.float64 else x.float() for x in (self.up, self.down))
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)


class ErasedConcept(BaseModel):
    """What one concept of an eraser was trained on; stacking without damage needs every line of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    synonyms: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...]
    """(erased prompt, anchor)."""
    eta: float
    weight: float = 1.0
    """Strength at which the concept stands in this file; changed by stacking."""


class EraserHeader(BaseModel):
    """The header of an eraser file: JSON under one key of the safetensors metadata."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    family: str
    """Model family the eraser was trained on, such as `sd`."""
    prefix: str
    """Component the keys start with: `unet` or `transformer`."""
    prediction_type: str
    """`epsilon`, `v_prediction` or `flow`."""
    base: str
    base_revision: str | None = None
    base_hashes: dict[str, str]
    """Module path to `hash_weight` of the base's weight there, for every layer the eraser touches."""
    concepts: tuple[ErasedConcept, ...]
    preserve: tuple[str, ...] = ()
    """Prompts whose predictions were held in place."""
    objective: str
    scope: str
    recipes: tuple[Recipe, ...]
    """The recipe as resolved; one of each member in a stack."""
    versions: dict[str, str]
    created: str
    """ISO 8601, UTC."""
    cost: dict[str, float] = {}
    """Seconds, sample evaluations and student samples the training took."""
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Eraser:
    """A set of low-rank updates by module path, and the header that says what they do."""

    pairs: Mapping[str, LoraPair]
    header: EraserHeader

    @property
    def names(self) -> list[str]:
        """Names of the erased concepts."""
        return [concept.name for concept in self.header.concepts]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under diffusers' LoRA keys."""
        out: dict[str, Tensor] = {}
        for module, pair in self.pairs.items():
            out[f"{self.header.prefix}.{module}.lora_A.weight"] = pair.down.contiguous()
            out[f"{self.header.prefix}.{module}.lora_B.weight"] = pair.up.contiguous()
        return out

    def save(self, directory: str | Path) -> Path:
        """Writes the eraser's directory and returns it; each file appears whole or not at all.

        Args:
            directory: Made when missing. Files of other names in it are left alone.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = save(self.state_dict(), metadata={"format": "pt", HEADER_KEY: self.header.model_dump_json()})
        documents = [dump_recipe(recipe) for recipe in self.header.recipes]
        write_whole(directory / "recipe.yaml", "---\n".join(documents).encode())
        write_whole(directory / "README.md", render_card(self.header).encode())
        write_whole(directory / WEIGHTS_NAME, weights)
        return directory

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Reads an eraser from its directory or its safetensors file; nothing is ever unpickled.

        Raises:
            EsdLoraError: If there is no such file, it is damaged, it has no header of ours, its format is newer than
                this package, or its keys are not those of a LoRA.
        """
        path = Path(path)
        file = path / WEIGHTS_NAME if path.is_dir() else path
        if not file.is_file():
            raise EsdLoraError(f"no eraser at {path}: expected a directory with {WEIGHTS_NAME}, or a .safetensors file.")
        try:
            with cast("Any", safe_open)(file, framework="pt") as opened:  # safetensors ships no types
                metadata: dict[str, str] = opened.metadata() or {}
                text = metadata.get(HEADER_KEY)
                tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in list(opened.keys())} if text else {}
        except SafetensorError as error:
            raise EsdLoraError(f"{file} is damaged or not a safetensors file ({error}). Fetch or train it again.") from error
        if text is None:
            raise EsdLoraError(f"{file} has no {HEADER_KEY!r} header: it is a LoRA, but not an eraser of this toolkit.")
        header = _read_header(text, file)
        return cls(_read_pairs(tensors, header.prefix, file), header)


def _read_header(text: str, file: Path) -> EraserHeader:
    try:
        found = re.search(r'"format"\s*:\s*(\d+)', text)
        if found and int(found[1]) > FORMAT:
            raise EsdLoraError(f"{file} has format {found[1]}, this version reads up to {FORMAT}. Upgrade esd-lora.")
        return EraserHeader.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EsdLoraError(f"{file} has a damaged header ({where}: {first['msg']}). Fetch or train it again.") from error


def _read_pairs(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> dict[str, LoraPair]:
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    pairs: dict[str, LoraPair] = {}
    for key in downs:
        module = key.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
        up = tensors.get(f"{prefix}.{module}.lora_B.weight")
        down = tensors[key]
        if up is None or min(up.dim(), down.dim()) < 2 or up.shape[1] != down.shape[0]:
            raise EsdLoraError(f"{file}: layer {module} has no lora_B that fits its lora_A. Fetch or train it again.")
        pairs[module] = LoraPair(down, up)
    if not pairs or len(tensors) != 2 * len(pairs):
        raise EsdLoraError(f"{file}: keys are not those of a diffusers LoRA under {prefix!r}. Fetch or train it again.")
    return pairs


def clear_output(directory: Path, force: bool, names: Sequence[str]) -> None:
    """Makes an output directory, and refuses one that holds something unless told to write over it.

    Args:
        directory: Made when missing.
        force: Remove files of `names` in it first; others stay.
        names: What the caller is about to write.

    Raises:
        EsdLoraError: If the directory is not empty and `force` is not set, or it is a file.
    """
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise EsdLoraError(f"output {directory}: {place} is a file, expected a directory. Choose another.")
    if directory.is_dir() and any(directory.iterdir()):
        if not force:
            raise EsdLoraError(f"output {directory} already exists and is not empty. Choose another, or add --force.")
        for name in names:
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def hash_weight(weight: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of a base weight.

    Values are hashed as float16, so that a float32 base and its float16 variant count as the same.
    """
    values = weight.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
