"""What a stack is solved from, layer by layer; and kept in a file beside the stack, so that it can grow and shrink.

`stack.state.safetensors` holds for every layer the members' `down` and `up`, side by side, and their `down_i G_i`; for every
layer, but once for all that read the text, the sums of second moments of all members and of all kept prompts, in float64; and,
as JSON, the members' headers, the keep list and how the stack was fused. So the stack is solved anew whatever ranks it was cut
to, and a member leaves it without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.erasers.eraser import STATE_NAME, WEIGHTS_NAME, Eraser, LoraPair, checked_pair
from esd_lora.erasers.header import HEADER_KEY, EraserHeader, parse_header
from esd_lora.erasers.stacking import modules_of, stack_layer
from esd_lora.erasers.tensor_files import all_finite, read_header, read_tensors, writing_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.files import lock_output, replaced_file
from esd_lora.fuse_specs import FuseSpec
from esd_lora.fusing.moments import TEXT, Moment
from esd_lora.fusing.prompts import Members, members_of

FORMAT = 1
"""Number of the format of states; one of another number is not read, for a stack can always be fused anew."""
_RECORD = "record"


class LayerProblem(NamedTuple):
    """What the closed form of one layer is solved from."""

    path: str
    """Path of the layer."""
    pair: LoraPair
    """The plain stack's: the members' `down` and `up`, side by side."""
    down_g: Tensor
    """`down_i G_i` of every member that has the layer, [rank, inputs], float64, beside `pair.down`."""
    ranks: list[int]
    """Rank of every such member."""
    name: str
    """Name of the moment, which layers that read the text share."""
    moment: Moment
    """Sums of the second moments, of all members and of what is kept."""
    count: int
    """N: the members, whether they have the layer or not."""
    kept: int
    """Number of kept prompts in `moment`."""

    def total(self, lam: float) -> Tensor:
        """Return `sum_j G_j + lam N G_keep`, [inputs, inputs], float64."""
        return torch.add(self.moment.members, self.moment.kept, alpha=lam * self.count / max(self.kept, 1))


class StateMember(BaseModel):
    """A member of a stack that has a state."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    """SHA-256 of its tensors, its weight folded in."""
    header: EraserHeader


class StateRecord(BaseModel):
    """What a state says beside its tensors."""

    model_config = ConfigDict(frozen=True)

    format: int
    spec: FuseSpec
    """How the stack was fused."""
    rank: int | None
    energy: float | None
    held_in: str
    """What the base's weights were held in when it was read."""
    listed: tuple[str, ...]
    """Prompts to keep, as they were given."""
    members: tuple[StateMember, ...] = Field(min_length=1)
    """In the order in which their rows stand in every layer."""
    ranks: dict[str, tuple[int, ...]]
    """Path of every layer to the rank of each member there, 0 where it has none."""
    summed: tuple[str, ...]
    """Layers that were added up: nothing was read for them."""


@dataclass(frozen=True)
class FusionState:
    """What was read for a stack, from its file: the tensors stay there until they are looked at."""

    record: StateRecord
    tensors: dict[str, Tensor]
    members: Members

    @property
    def spec(self) -> FuseSpec:
        """How the stack was fused."""
        return self.record.spec

    @classmethod
    def load(cls, path: str | Path) -> FusionState:
        """Read the state of a stack from its directory, or from the file itself.

        Raises:
            EsdLoraError: If there is none, it is damaged, of another format, or of another stack than the one it stands beside.
        """
        path = Path(path)
        file = path / STATE_NAME if path.is_dir() else path
        if not file.is_file():
            raise EsdLoraError(
                f"no {STATE_NAME} at {path}: expected a stack that was fused with --keep-state. Fuse its members once more so."
            )
        tensors, _ = read_tensors(file)
        record = _read_record(tensors, file)
        if path.is_dir() and _fused_from(path) != [member.sha256 for member in record.members]:
            raise EsdLoraError(f"{file} is the state of another stack than the one beside it. Fuse that one anew.")
        erasers = _read_members(record, tensors, file)
        hashed = zip((member.sha256 for member in record.members), erasers, strict=True)
        return cls(record, tensors, members_of(hashed, record.listed))

    def hashed(self) -> list[tuple[str, Eraser]]:
        """Return every member with its SHA-256."""
        return list(zip(self.members.hashes, self.members.erasers, strict=True))

    def fill(self, name: str, moment: Moment) -> bool:
        """Put what is known of a moment into an empty one, and return whether anything is.

        Args:
            name: Name of the moment.
            moment: Gets its sums, and what members' updates make of their own.
        """
        known = [path for path in moment.paths if path in self.record.ranks]
        needed = [f"{name}.members", f"{name}.kept", *(f"{path}.product" for path in known)]
        if not all(tensor in self.tensors for tensor in needed):
            return False
        for stored, mine in zip(needed, (moment.members, moment.kept), strict=False):
            if self.tensors[stored].shape != mine.shape:
                raise EsdLoraError(f"the state's {stored} does not fit the base. Fuse the stack anew.")
            mine.copy_(self.tensors[stored])
        for path in known:
            rows = self.tensors[f"{path}.product"].to(moment.kept).split(self.record.ranks[path])
            products = zip(self.members.keys(), rows, strict=True)
            moment.products |= {(path, key): product for key, product in products if len(product)}
        return True


def _fused_from(directory: Path) -> list[str]:
    """Return the hashes of the members that a directory's stack was fused from."""
    weights = directory / WEIGHTS_NAME
    fusions = parse_header(read_header(weights).metadata.get(HEADER_KEY, "{}"), weights).fusions
    return list(fusions[-1].members) if fusions else []


def _read_record(tensors: dict[str, Tensor], file: Path) -> StateRecord:
    text = tensors.pop(_RECORD, torch.empty(0))
    try:
        record = StateRecord.model_validate_json(bytes(text.numpy()) if text.dtype == torch.uint8 else b"")
    except ValidationError as error:
        raise EsdLoraError(f"{file} is no state of a stack, or damaged. Fuse the stack anew.") from error
    if record.format != FORMAT:
        raise EsdLoraError(f"{file} has format {record.format}, this version reads {FORMAT}. Fuse the stack anew.")
    hashes = [member.sha256 for member in record.members]
    if hashes != sorted(hashes):
        raise EsdLoraError(f"{file} is damaged: its members are out of order. Fuse the stack anew.")
    return record


def _read_members(record: StateRecord, tensors: dict[str, Tensor], file: Path) -> list[Eraser]:
    """Return the members with their rows of every layer, once the tensors are seen to be what the record says."""
    pairs: list[dict[str, LoraPair]] = [{} for _ in record.members]
    for path, ranks in record.ranks.items():
        down, up, product = (tensors.get(f"{path}.{kind}") for kind in ("down", "up", "product"))
        fits = len(ranks) == len(pairs) and min(ranks) >= 0 and down is not None and len(down) == sum(ranks)
        if down is None or not fits or (product is None) != (path in record.summed):
            raise EsdLoraError(f"{file} is damaged: layer {path} is not that of {len(pairs)} members. Fuse the stack anew.")
        pair = checked_pair(down, up, f"{file}: layer {path}")
        for member, (begin, end) in zip(pairs, pairwise(accumulate(ranks, initial=0)), strict=True):
            if end > begin:
                member[path] = LoraPair(pair.down[begin:end], pair.up[:, begin:end])
        if product is not None and (product.shape != down.flatten(1).shape or not all_finite(product)):
            raise EsdLoraError(f"{file} is damaged: what was read for layer {path}. Fuse the stack anew.")
    return [Eraser(layers, member.header) for layers, member in zip(pairs, record.members, strict=True)]


def state_bytes(members: Members, base: Base, spec: FuseSpec, summed: Sequence[str] = ()) -> int:
    """Return how large the state of a stack is, up to what the file's header takes; ranks it is cut to make no difference."""
    shapes = _shapes(_record_of(members, base, spec, None, None, summed), members, base)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())


def _record_of(
    members: Members, base: Base, spec: FuseSpec, rank: int | None, energy: float | None, summed: Sequence[str]
) -> StateRecord:
    """Return what a state says beside its tensors."""
    paths = sorted(modules_of(members.erasers))
    return StateRecord(
        format=FORMAT,
        spec=spec,
        rank=rank,
        energy=energy,
        held_in=base.held_in,
        listed=members.listed,
        members=tuple(StateMember(sha256=sha, header=e.header) for sha, e in zip(members.hashes, members.erasers, strict=True)),
        ranks={path: tuple(e.pairs[path].rank if path in e.pairs else 0 for e in members.erasers) for path in paths},
        summed=tuple(summed),
    )


def _text(record: StateRecord) -> Tensor:
    """Return a record as the bytes of its JSON."""
    return torch.frombuffer(bytearray(record.model_dump_json().encode()), dtype=torch.uint8)


def _shapes(record: StateRecord, members: Members, base: Base) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a state."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {_RECORD: (torch.uint8, (len(_text(record)),))}
    for path, ranks in record.ranks.items():
        having = [eraser.pairs[path] for eraser in members.erasers if path in eraser.pairs]
        (down, up), rows, inputs = having[0], sum(ranks), having[0].down[0].numel()
        shapes[f"{path}.down"] = _widest(pair.down.dtype for pair in having), (rows, *down.shape[1:])
        shapes[f"{path}.up"] = _widest(pair.up.dtype for pair in having), (len(up), rows, *up.shape[2:])
        if path not in record.summed:
            shapes[f"{path}.product"] = torch.float64, (rows, inputs)
            name = TEXT if base.family.reads_text(path) else path
            shapes |= {f"{name}.{kind}": (torch.float64, (inputs, inputs)) for kind in ("members", "kept")}
    return shapes


@contextmanager
def writing_state(
    file: str | Path,
    members: Members,
    base: Base,
    spec: FuseSpec,
    rank: int | None,
    energy: float | None,
    summed: list[str],
) -> Generator[Callable[[LayerProblem], None]]:
    """Write the state of a stack, layer by layer, in one step once the `with` block is done.

    Args:
        file: Where to write.
        members: The members with their prompts.
        base: The base that is read.
        spec: How the stack is fused.
        rank: Highest rank of a layer.
        energy: Share of every layer's effect to keep.
        summed: Layers that are added up.

    Yields:
        A function that takes what a layer is solved from.
    """
    record = _record_of(members, base, spec, rank, energy, summed)
    text = _text(record)
    shapes = _shapes(record, members, base)
    file = Path(file)
    with lock_output(file), replaced_file(file) as partial, writing_tensors(partial, shapes, {"format": "pt"}) as write:
        write(_RECORD, text)
        written: set[str] = set()

        def keep_pair(path: str, pair: LoraPair) -> None:
            write(f"{path}.down", pair.down)
            write(f"{path}.up", pair.up)

        def keep(problem: LayerProblem) -> None:
            keep_pair(problem.path, problem.pair)
            write(f"{problem.path}.product", problem.down_g)
            if problem.name not in written:
                written.add(problem.name)
                write(f"{problem.name}.members", problem.moment.members)
                write(f"{problem.name}.kept", problem.moment.kept)

        for path in summed:
            keep_pair(path, stack_layer(path, members.erasers))
        yield keep


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that holds the values of all."""
    return reduce(torch.promote_types, dtypes)
