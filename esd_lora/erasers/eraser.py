"""The eraser: a plain diffusers LoRA file whose header says what it removes and where it came from.

A directory holds `pytorch_lora_weights.safetensors`, `recipe.yaml`, `README.md` and what training left (log, previews).
The keys are diffusers' own (`unet.<module>.lora_A.weight`), `alpha / rank` is folded into `lora_B`, so that
`pipe.load_lora_weights(directory)` reproduces the trained model with nothing else said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.erasers.cards import Publication, render_card
from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.tensor_files import file_content, read_header, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.files import reporting_write_errors, write_atomically
from esd_lora.recipe_files import dump_recipe

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
MANIFEST_NAME = "stack.yaml"
SAMPLES = 4
"""Most prompts that are shown with an eraser, before and after."""
RUN_FILES = (
    *(WEIGHTS_NAME, "recipe.yaml", "README.md", "train_log.jsonl", "checkpoint.pt", "samples/before_after.png"),
    *(f"samples/{i}_{name}.png" for i in range(1, SAMPLES + 1) for name in ("base", "erased")),
)
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

    def inner(self, other: LoraPair) -> float:
        """Frobenius inner product of the two updates, by their factors: neither is ever multiplied out."""
        (down, up), (down_, up_) = ((x.double().flatten(1) for x in pair) for pair in (self, other))
        return float(((up.T @ up_) * (down @ down_.T)).sum())

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return max(self.inner(self), 0.0) ** 0.5


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

    def card(self, published: Publication | None = None) -> str:
        """The model card, for the eraser's own directory or for where it is published: see `cards.render_card`."""
        return render_card(self.header, len(self.pairs), [pair.rank for pair in self.pairs.values()], published)

    def save(self, directory: str | Path) -> Path:
        """Writes the eraser's directory and returns it; each file appears whole or not at all.

        Args:
            directory: Made when missing. Files of other names in it are left alone.
        """
        directory = Path(directory)
        with reporting_write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        weights = file_content(self.state_dict(), {"format": "pt", HEADER_KEY: self.header.model_dump_json()})
        documents = [dump_recipe(recipe) for recipe in self.header.recipes]
        if documents:
            write_atomically(directory / "recipe.yaml", "---\n".join(documents).encode())
        write_atomically(directory / "README.md", self.card().encode())
        write_atomically(directory / WEIGHTS_NAME, weights)
        return directory

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Reads an eraser from its directory or its safetensors file; nothing is ever unpickled.

        Raises:
            EsdLoraError: If there is no such file, it is damaged, it has no header of ours, its format is newer than
                this package, or its tensors are not those of a LoRA in finite floating-point numbers.
        """
        path = Path(path)
        file = path / WEIGHTS_NAME if path.is_dir() else path
        if not file.is_file():
            raise EsdLoraError(f"no eraser at {path}: expected a directory with {WEIGHTS_NAME}, or a .safetensors file.")
        text = read_header(file).metadata.get(HEADER_KEY)
        if text is None:
            raise EsdLoraError(
                f"{file} has no {HEADER_KEY!r} header: it is a LoRA, but not an eraser of this toolkit. Make it one with"
                " esd-lora import."
            )
        header = parse_header(text, file)
        return cls(_read_pairs(read_tensors(file)[0], header.prefix, file), header)


def _read_pairs(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> dict[str, LoraPair]:
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    pairs: dict[str, LoraPair] = {}
    for key in downs:
        module = key.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
        pairs[module] = checked_pair(tensors[key], tensors.get(f"{prefix}.{module}.lora_B.weight"), f"{file}: layer {module}")
    if not pairs or len(tensors) != 2 * len(pairs):
        raise EsdLoraError(f"{file}: keys are not those of a diffusers LoRA under {prefix!r}. Fetch or train it again.")
    return pairs


def checked_pair(down: Tensor, up: Tensor | None, what: str) -> LoraPair:
    """A pair of factors, once they are seen to be one.

    Args:
        down: As in `LoraPair`.
        up: As in `LoraPair`, or `None` where the file has none.
        what: File and layer, for the message.

    Raises:
        EsdLoraError: If they do not fit each other, have rank 0, or are not all finite floating-point numbers.
    """
    if up is None or down.dim() not in (2, 4) or up.dim() != down.dim() or up.shape[1] != down.shape[0]:
        shapes = f"{list(down.shape)} and {'nothing' if up is None else list(up.shape)}"
        raise EsdLoraError(f"{what} has no lora_B that fits its lora_A ({shapes}). Fetch or train it again.")
    if 0 in (*down.shape, *up.shape) or set(up.shape[2:]) - {1}:
        raise EsdLoraError(
            f"{what} has factors of shapes {list(down.shape)} and {list(up.shape)}: no update of rank 1 or more."
        )
    for factor in (down, up):
        if not factor.is_floating_point() or factor.element_size() < 2:
            raise EsdLoraError(f"{what} is stored as {str(factor.dtype)[6:]}, expected float16, bfloat16, float32 or float64.")
        if not bool(factor.isfinite().all()):
            raise EsdLoraError(f"{what} holds NaN or infinity: its training diverged. Train it again with a lower train.lr.")
    return LoraPair(down, up)


def hash_weight(weight: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of a base weight.

    Values are hashed as float16, so that a float32 base and its float16 variant count as the same.
    """
    values = weight.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
