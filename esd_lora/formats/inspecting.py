"""Looking into eraser files, and foreign LoRA files: what they change, how much, and how two of them differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.fetching import locate
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file
from esd_lora.formats.cards import measured_line
from esd_lora.formats.opening import open_eraser

_BAR = 30  # characters of the longest bar


class LayerFacts(NamedTuple):
    """One layer of a LoRA."""

    rank: int
    shape: tuple[int, ...]
    """Shape of the weight it changes."""
    norm: float
    """Frobenius norm of the update."""


class Inspected(NamedTuple):
    """A LoRA file and the facts about it."""

    eraser: Eraser
    layers: dict[str, LayerFacts]
    """Facts by module path."""
    size: int
    """Bytes of the file on disk, or of the tensors if it is a manifest."""
    sha256: str | None
    """Hash of the file, if it is one."""
    sha256_tensors: str
    """Hash of the tensors' bytes alone, the same whatever the header says."""

    def as_json(self) -> dict[str, Any]:
        """Return everything, for other programs."""
        return {
            "header": self.eraser.header.model_dump(mode="json"),
            "layers": {m: {"rank": f.rank, "shape": list(f.shape), "norm": f.norm} for m, f in self.layers.items()},
            "blocks": {b: {"layers": len(norms), "norm": _total(norms)} for b, norms in self._by_block().items()},
            "norm": _total([facts.norm for facts in self.layers.values()]),
            "size": self.size,
            "sha256": self.sha256,
            "sha256_tensors": self.sha256_tensors,
        }

    def _by_block(self) -> dict[str, list[float]]:
        blocks: dict[str, list[float]] = {}
        for module, facts in self.layers.items():
            blocks.setdefault(block_of(module), []).append(facts.norm)
        return blocks

    def lines(self, each_layer: bool | None = None) -> list[str]:
        """Return the facts, a line a topic, then bars of the update's norm.

        Args:
            each_layer: Whether to show a bar for every layer, or one for every block; layers if they are not too many.
        """
        rows = [f"{name:>10}  {value}" for name, value in self._topics().items()]
        blocks = self._by_block()
        rows += ["", "norm of the update by block (layers)"]
        rows += bars({f"{block} ({len(norms)})": _total(norms) for block, norms in blocks.items()})
        if each_layer or (each_layer is None and len(self.layers) <= 80):
            rows += ["", "norm of the update by layer (rank)"]
            rows += bars({f"{module} ({facts.rank})": facts.norm for module, facts in self.layers.items()})
        elif each_layer is None:
            rows += ["", f"{len(self.layers)} layers; --layers shows each"]
        return rows

    def _topics(self) -> dict[str, str]:
        header = self.eraser.header
        ranks = sorted({facts.rank for facts in self.layers.values()})
        concepts = [
            f"{c.name} ({'eta ' + format(c.eta, 'g') if c.eta is not None else 'eta unknown'}, weight {c.weight:g}"
            f"{', amplified' if c.weight < 0 else ''}{''.join(f', {block} x {x:g}' for block, x in c.blocks.items())})"
            for c in header.concepts
        ]
        pairs = [f"{p!r} -> {a!r}" for c in header.concepts for p, a in c.pairs[:3]]
        topics = {
            "erases": ", ".join(concepts),
            "prompts": "; ".join(pairs) or "unknown",
            "preserves": f"{len(header.preserve)} prompts",
            **({"guards": "; ".join(map(repr, header.guard))} if header.guard else {}),
            "base": f"{header.base}{'@' + header.base_revision if header.base_revision else ''} (family {header.family},"
            f" {header.prediction_type or 'prediction unknown'})",
            "scope": f"{header.scope}: {len(self.layers)} layers, rank {', '.join(map(str, ranks))}",
            "size": f"{self.size / 1000:,.0f} kB",
            "trained": f"objective {header.objective}" + "".join(f", {k} {v:g}" for k, v in header.cost.items()),
            "made": f"{header.created}, format {header.format}, " + ", ".join(f"{k} {v}" for k, v in header.versions.items()),
        }
        for origin in header.origins:
            notes = "; ".join(f"{key} {value!r}" for key, value in list(origin.notes.items())[:6])
            files = ", ".join(f"{name} ({digest[:12]})" for name, digest in origin.files.items())
            cut = f", rank {origin.rank}" * (origin.rank is not None)
            cut += f", energy {origin.energy}" * (origin.energy is not None)
            topics["origin"] = f"{origin.how} from {files}, {origin.layout}{cut}; provenance unknown"
            topics["origin"] += f"; it says {notes}" * bool(notes)
        if lines := header.making():
            topics["making"] = "; ".join(lines)
        if header.truncation:
            topics["cut off"] = f"{header.truncation:.2%} of the update's norm"
        if header.evaluation:
            topics["measured"] = measured_line(header.evaluation)
        topics["sha256"] = f"{self.sha256 or 'of no file'}, of the tensors {self.sha256_tensors}"
        return topics


def inspect_file(path: str | Path) -> Inspected:
    """Look into an eraser, a stack manifest, one of these on the Hub, or any LoRA file that `opening.open_eraser` converts.

    Raises:
        EsdLoraError: If there is no such file, it is damaged, or no plain LoRA.
    """
    path = locate(path)
    file = path / WEIGHTS_NAME if (path / WEIGHTS_NAME).is_file() else path
    eraser = open_eraser(path)
    layers = {module: LayerFacts(pair.rank, pair.shape, pair.norm()) for module, pair in eraser.pairs.items()}
    tensors = eraser.state_dict()
    size = file.stat().st_size if file.is_file() else sum(tensor.nbytes for tensor in tensors.values())
    return Inspected(eraser, layers, size, hash_file(file) if file.is_file() else None, hash_tensors(tensors))


def block_of(module: str) -> str:
    """Return the part of the model that a layer lies in: `down_blocks.0`, `mid_block`, `transformer_blocks.3`."""
    match = re.match(r"(\w+blocks\.\d+|mid_block)\.", module)
    return match[1] if match else module.partition(".")[0]


def bars(values: Mapping[str, float]) -> list[str]:
    """Return a bar chart in text, a line a value."""
    width = max(map(len, values), default=0)
    finite = {name: value for name, value in values.items() if math.isfinite(value)}  # norms of huge factors are not
    most = max(finite.values(), default=0) or 1
    lengths = {name: round(_BAR * (finite[name] / most)) if name in finite else _BAR for name in values}
    return [f"  {name:<{width}}  {'█' * lengths[name]:<{_BAR}}  {value:.4g}" for name, value in values.items()]


def _total(norms: list[float]) -> float:
    """Return the norm of several updates together."""
    return sum(norm * norm for norm in norms) ** 0.5


class FileDifference(NamedTuple):
    """The difference of two LoRA files."""

    only: tuple[list[str], list[str]]
    """Layers that the first has alone, and the second."""
    layers: dict[str, tuple[float, float]]
    """Layer that both have to the distance of the updates, relative to the first's norm, and their cosine."""
    overall: float
    """Distance over all layers, those of one file included, relative to the first's norm."""
    header: dict[str, tuple[Any, Any]]
    """Fields of the header that differ."""

    def lines(self) -> list[str]:
        """Return the difference, a line a fact."""
        rows = [f"{name:>16}  {_short(a)}  |  {_short(b)}" for name, (a, b) in self.header.items()]
        for name, modules in zip(("first", "second"), self.only, strict=True):
            if modules:
                rows.append(
                    f"only in the {name}: {len(modules)} layers ({', '.join(modules[:3])}{', ...' * (len(modules) > 3)})"
                )
        rows.append(f"{len(self.layers)} layers in both; the updates differ by {self.overall:.3%} of the first's norm")
        if self.overall:
            shown = sorted(self.layers.items(), key=lambda item: -item[1][0])[:20]
            rows += ["", "layer, distance relative to the first, cosine"]
            rows += [f"  {module}  {distance:.3%}  {cosine:+.3f}" for module, (distance, cosine) in shown]
            if len(self.layers) > len(shown):
                rows.append(f"  and {len(self.layers) - len(shown)} more that differ less")
        return rows


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def diff(first: str | Path, second: str | Path) -> FileDifference:
    """Compare two LoRA files: headers, layers, and the updates themselves.

    Raises:
        EsdLoraError: If one cannot be read, or they change layers of different shapes.
    """
    a, b = (inspect_file(path).eraser for path in (first, second))
    layers: dict[str, tuple[float, float]] = {}
    distances: list[float] = []
    for module in (name for name in a.pairs if name in b.pairs):  # in their order, for sums
        old, new = a.pairs[module], b.pairs[module]
        if old.shape != new.shape:
            raise EsdLoraError(
                f"layer {module} has shape {old.shape} in {first} and {new.shape} in {second}: two models' files."
            )
        norms = old.norm() * new.norm()
        distance = max(0.0, old.inner(old) + new.inner(new) - 2 * old.inner(new)) ** 0.5
        distances.append(distance)
        layers[module] = distance / (old.norm() or 1.0), old.inner(new) / (norms or 1.0)
    only = sorted(a.pairs.keys() - b.pairs.keys()), sorted(b.pairs.keys() - a.pairs.keys())
    whole = _total([pair.norm() for pair in a.pairs.values()])
    alone = [eraser.pairs[m].norm() for eraser, modules in zip((a, b), only, strict=True) for m in modules]
    old_header, new_header = (eraser.header.model_dump(mode="json") for eraser in (a, b))
    return FileDifference(
        only=only,
        layers={module: layers[module] for module in a.pairs if module in layers},
        overall=_total([*distances, *alone]) / (whole or 1.0),
        header={key: (old_header[key], new_header[key]) for key in old_header if old_header[key] != new_header[key]},
    )
