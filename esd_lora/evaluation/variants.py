"""Variants: the models that paint an evaluation's pictures, above all the base and the base with erasers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from esd_lora.adapter import applied
from esd_lora.bases.base import Base
from esd_lora.bases.quantizing import dequantized
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.privacy import without_folders
from esd_lora.erasers.stacking import Strength
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.evaluation.cases import ROLES, Case, Role
from esd_lora.pictures import paint
from esd_lora.trajectory import Encode
from esd_lora.wording import slug

Painter = Callable[[Sequence[Case]], list[Image]]
"""Paints one picture for each case."""


class Variant(NamedTuple):
    """One model to compare."""

    name: str
    """Unique in the evaluation; names the folder of its pictures."""
    record: dict[str, Any]
    """All that its pictures depend on, beside the base, prompts, seeds and sampler."""
    on: Callable[[], AbstractContextManager[Painter]]
    """Makes the model paint for the length of a `with` block."""
    roles: tuple[Role, ...] = ROLES
    """Roles of the prompts that it paints."""


def make_painter(base: Base, steps: int, guidance: float, **options: Any) -> Painter:
    """Return a function that paints with a base as it stands, each case with guidance of its own where it has one.

    Args:
        base: From `load_base`.
        steps: Denoising steps.
        guidance: Guidance scale of all other cases.
        options: For `pictures.paint`.
    """

    def paint_cases(cases: Sequence[Case]) -> list[Image]:
        pictures: dict[int, Image] = {}
        for scale in dict.fromkeys(case.guidance for case in cases):
            chosen = {i: case for i, case in enumerate(cases) if case.guidance == scale}
            prompts, seeds = [case.prompt for case in chosen.values()], [case.seed for case in chosen.values()]
            painted = paint(base, prompts, seeds, steps=steps, guidance=guidance if scale is None else scale, **options)
            pictures |= dict(zip(chosen, painted, strict=True))
        return [pictures[i] for i in range(len(cases))]

    return paint_cases


def bare(base: Base, steps: int, guidance: float, encode: Encode | None = None) -> Variant:
    """Return the base as it is.

    Args:
        base: From `load_base`.
        steps: Denoising steps.
        guidance: Guidance scale.
        encode: As in `pictures.paint`.
    """
    return Variant("base", {}, lambda: nullcontext(make_painter(base, steps, guidance, encode=encode)))


def erased(
    base: Base,
    erasers: Sequence[Eraser],
    weights: Sequence[Strength],
    steps: int,
    guidance: float,
    name: str = "erased",
    encode: Encode | None = None,
) -> Variant:
    """Return the base with erasers on, as one stack."""
    members = [
        {"concepts": eraser.names, "sha256": hash_tensors(eraser.state_dict()), "weight": weight, "blocks": dict(blocks)}
        for eraser, (weight, blocks) in zip(erasers, weights, strict=True)
    ]

    @contextmanager
    def on() -> Generator[Painter]:
        with applied(base, erasers, weights):
            yield make_painter(base, steps, guidance, encode=encode)

    return Variant(name, {"erasers": members}, on)


def members_erased(
    base: Base,
    members: Sequence[Eraser],
    weights: Sequence[Strength],
    steps: int,
    guidance: float,
    encode: Encode | None = None,
) -> list[Variant]:
    """Return the base with every member of a stack alone, then with the first two, the first three, and so on, but not all."""
    parts = {alone_name(member, i + 1): slice(i, i + 1) for i, member in enumerate(members)}
    parts |= {first_name(count): slice(count) for count in range(2, len(members))}
    return [erased(base, members[part], weights[part], steps, guidance, name, encode) for name, part in parts.items()]


def alone_name(member: Eraser, number: int) -> str:
    """Return the name of the variant with one member of a stack alone, counted from 1."""
    return f"{number}-{slug(' '.join(member.names))}"


def first_name(count: int) -> str:
    """Return the name of the variant with the first `count` members of a stack."""
    return f"first-{count}"


def base_record(base: Base) -> dict[str, Any]:
    """Return which base it is: its id, and for every part that a picture goes through a hash of the weights."""
    parts = {name: part for name, part in sorted(base.pipe.components.items()) if isinstance(part, torch.nn.Module)}
    hashes = {name: _hash_weights(part) for name, part in parts.items()}
    return {
        "id": without_folders(base.id),
        "revision": base.revision,
        "weights": hashes,
        "dtype": base.held_in,
    }


def _hash_weights(part: torch.nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 over names and bytes of weights, one at a time: they may fill the memory."""
    digest = hashlib.sha256()
    for name, tensor in part.state_dict().items():
        digest.update(name.encode())
        digest.update(dequantized(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
