"""The eraser: a plain diffusers LoRA file whose header says what it removes and where it came from.

A directory holds `pytorch_lora_weights.safetensors` and `recipe.yaml`; a training leaves its log and previews beside them,
and `formats.cards.save_with_card` the model card `README.md`. The keys are diffusers' own (`unet.<module>.lora_A.weight`),
`alpha / rank` is folded into `lora_B`, so that `pipe.load_lora_weights(directory)` alone reproduces the trained model. Layers
of the denoiser go by their paths in it; those of a text encoder begin with its name (`text_encoder.text_model.encoder...`), so
one eraser may have both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.tensor_files import all_finite, file_content, read_header, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.files import write_files

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
MANIFEST_NAME = "stack.yaml"
STATE_NAME = "stack.state.safetensors"
"""What a fused stack may keep beside it: see `fusing.states`."""
ERASER_FILES = (WEIGHTS_NAME, MANIFEST_NAME)
"""Files of which one makes a directory an eraser's, the first that is there."""
SAMPLES = 4
"""Largest number of prompts that are shown with an eraser, before and after."""
LOG_NAME, CHECKPOINT_NAME, CURVES_NAME = "train_log.jsonl", "checkpoint.pt", "training.png"
RUN_FILES = (
    *(WEIGHTS_NAME, "recipe.yaml", "README.md", LOG_NAME, CHECKPOINT_NAME, CURVES_NAME, "samples/before_after.png"),
    *(f"samples/{i}_{name}.png" for i in range(1, SAMPLES + 1) for name in ("base", "erased")),
)
"""What a run writes into an eraser's directory, previews aside."""


_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
"""How the paths of layers begin that do not lie in the denoiser."""


def on_text_encoder(module: str) -> bool:
    """Return whether the layer of a path lies on a text encoder, with whose name its path begins, and not in the denoiser."""
    return module.startswith(_TEXT_ENCODERS)


class LoraPair(NamedTuple):
    """The low-rank update of one linear or convolution, its scale folded into `up`."""

    down: Tensor
    """[rank, in] or [rank, in, kernel, kernel]: diffusers' `lora_A`."""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]: diffusers' `lora_B`."""

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight the pair belongs to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """Return what the pair adds to its layer's weight, `up @ down` in the weight's shape, float32 or better."""
        up, down = (x if x.dtype == torch.float64 else x.float() for x in (self.up, self.down))
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)

    def scaled(self, scale: float, what: str) -> LoraPair:
        """Return the pair whose update is this one's times a number, which is folded into `up`.

        Half precision would round again, and lose altogether what is small. So the product is made in float32 or better, and
        stored so, too, unless the dtype of `up` holds every value of it exactly, as it does times -1 or 1/2. Times 1 the pair
        comes back as it is.

        Args:
            scale: Any number.
            what: File or eraser and layer, for the message.

        Raises:
            EsdLoraError: If a value becomes NaN or infinity.
        """
        if scale == 1:
            return self
        up = self.up.to(torch.promote_types(self.up.dtype, torch.float32)) * scale
        if not all_finite(up):
            raise EsdLoraError(
                f"{what}: times {scale:g} its values go beyond {torch.finfo(up.dtype).max:.3g}, where {str(up.dtype)[6:]}"
                " ends. Give a lower strength or alpha."
            )
        stored = up.to(self.up.dtype)
        return self._replace(up=stored if torch.equal(stored.to(up.dtype), up) else up)

    def inner(self, other: LoraPair) -> float:
        """Return the Frobenius inner product `<delta, other.delta>`, by the factors: neither update is ever multiplied out.

        `<B A, B' A'> = sum((B^T B') * (A A'^T))`.
        """
        (down, up), (down_, up_) = ((x.double().flatten(1) for x in pair) for pair in (self, other))
        return float(((up.T @ up_) * (down @ down_.T)).sum())

    def norm(self) -> float:
        """Return the Frobenius norm of the update."""
        return max(self.inner(self), 0.0) ** 0.5


@dataclass(frozen=True)
class Eraser:
    """A set of low-rank updates by module path, and the header that says what they do."""

    pairs: Mapping[str, LoraPair]
    header: EraserHeader

    @property
    def changes_text(self) -> bool:
        """Whether any of its layers lies on a text encoder, so that prompts are encoded otherwise with it."""
        return any(map(on_text_encoder, self.pairs))

    @property
    def names(self) -> list[str]:
        """Names of the concepts that are erased."""
        return [concept.name for concept in self.header.concepts]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors under diffusers' LoRA keys."""
        tensors: dict[str, Tensor] = {}
        for module, pair in self.pairs.items():
            layer = _key(module, self.header.prefix)
            tensors[f"{layer}.lora_A.weight"] = pair.down.contiguous()
            tensors[f"{layer}.lora_B.weight"] = pair.up.contiguous()
        return tensors

    def metadata(self) -> dict[str, str]:
        """Return the metadata of its safetensors file, of whichever layout: the header goes along everywhere.

        Raises:
            EsdLoraError: If a number in the header is NaN or infinity.
        """
        return {"format": "pt", HEADER_KEY: self.header.to_json()}

    def files(self) -> dict[str, bytes]:
        """Return what its directory holds, by file name: weights, and the recipe if there is one."""
        files = {WEIGHTS_NAME: file_content(self.state_dict(), self.metadata())}
        if self.header.recipes:
            files["recipe.yaml"] = self.header.recipe_document().encode()
        return files

    def save(self, directory: str | Path) -> Path:
        """Write weights and recipe into a directory, and return it; `formats.cards.save_with_card` adds the model card.

        Args:
            directory: Made when missing. Files of other names in it are left alone; ours appear together, whole, or not at all.
        """
        write_files(Path(directory), self.files())
        return Path(directory)

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read an eraser from its directory or its safetensors file; nothing is ever unpickled.

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
                f"{file} has no {HEADER_KEY!r} header: it is a LoRA, but not an eraser of this toolkit, and need not erase"
                " anything. If it does, make it one with esd-lora import --concept."
            )
        header = parse_header(text, file)
        return cls(_read_pairs(read_tensors(file)[0], header.prefix, file), header)


def _key(module: str, prefix: str) -> str:
    """Return how a layer's tensors are called in the file: by its path, in the denoiser's component or its own."""
    return module if on_text_encoder(module) else f"{prefix}.{module}"


def _read_pairs(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> dict[str, LoraPair]:
    """Return the pairs by module path, once the keys are seen to be those of `Eraser.state_dict` and nothing else."""
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    pairs: dict[str, LoraPair] = {}
    for key in downs:
        module = key.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
        up = tensors.get(f"{_key(module, prefix)}.lora_B.weight")
        pairs[module] = checked_pair(tensors[key], up, f"{file}: layer {module}")
    if not pairs or len(tensors) != 2 * len(pairs):
        raise EsdLoraError(f"{file}: keys are not those of a diffusers LoRA under {prefix!r}. Fetch or train it again.")
    return pairs


def checked_pair(down: Tensor, up: Tensor | None, what: str) -> LoraPair:
    """Return a pair of factors, once they are seen to be one.

    Args:
        down: [rank, in] or [rank, in, kernel, kernel].
        up: [out, rank] or [out, rank, 1, 1], or `None` where the file has none.
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
    """Return the first 16 hex digits of the SHA-256 of a base weight.

    Values are hashed as float16, so that a float32 base and its float16 variant count as the same.
    """
    values = weight.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
