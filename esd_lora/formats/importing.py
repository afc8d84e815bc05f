"""Foreign LoRA files as erasers: kohya's names (A1111, LECO, SPM, sliders), diffusers' (ai-toolkit) and peft's."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, Field, FiniteFloat
from torch import Tensor

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, LoraPair, checked_pair, on_text_encoder
from esd_lora.erasers.header import HEADER_KEY, ErasedConcept, EraserHeader, Origin, parse_header
from esd_lora.erasers.tensor_files import DTYPES, read_tensors
from esd_lora.errors import EsdLoraError, shortened
from esd_lora.families import FAMILIES, ModelFamily, family_named
from esd_lora.families.layer_names import KOHYA_PREFIX, OriginalLayer
from esd_lora.files import hash_file
from esd_lora.formats.exporting import PEFT_FILES
from esd_lora.json_files import MAX_JSON, parse_json

UNKNOWN = "unknown"
_SUFFIX = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_up|lora_B|lora\.up)(?:\.default)?\.weight$|\.(alpha)$")
_ROLES = {"lora_down": "down", "lora_A": "down", "lora.down": "down", "lora_up": "up", "lora_B": "up", "lora.up": "up"}
_UNDERSCORED = (KOHYA_PREFIX, "lora_transformer_")
_DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_TEXT = ("lora_te", "text_encoder", "te_")
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "oft_": "OFT",
    "lora_mid": "LoCon's",
}
_REAL = (*DTYPES.values(), torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_NOTED = re.compile(r"ss_(?!tag|bucket|dataset)\w+|modelspec\.\w+|prompts|config|name|rank|alpha|software|version")


def import_lora(
    path: str | Path,
    *,
    family: str | None = None,
    concepts: Sequence[str] = (),
    base: str | None = None,
    without_text_encoder: bool = False,
) -> Eraser:
    """Read a LoRA file of another program as an eraser; the update of every layer stays the same.

    What the file does not say (what it erases, from which weights, how it was trained) is marked as unknown. A file that
    `exporting.export` wrote has our header in it and comes back whole.

    Args:
        path: A `.safetensors` file, a `.pt` file of tensors, or a directory of peft's or diffusers'.
        family: Name of the model family, where the layers' names fit several.
        concepts: Names of what it erases; the file's own name by default.
        base: Base that it was made for; by default what the file says.
        without_text_encoder: Leave out layers of text encoders, which are else taken where they are those of CLIP in a model
            that reads no other text: the eraser is then less than the file was.

    Raises:
        EsdLoraError: If it is no plain LoRA, damaged, of an unknown model, or has layers of another text encoder.
    """
    file, config = _locate(Path(path))
    tensors, metadata = read_tensors(file)
    layers, texts, style = _layers(tensors, file)
    if without_text_encoder:
        texts = {}
    if not layers and not texts:
        raise EsdLoraError(f"{file} holds no layer of a LoRA on a denoiser. Expected names such as {KOHYA_PREFIX}....")
    header = parse_header(metadata[HEADER_KEY], file) if HEADER_KEY in metadata else None
    if header and (family or concepts or base):
        raise EsdLoraError(f"{file} is an eraser's, which knows its family, concepts and base: leave out what you say of them.")
    chosen = family_named(header.family) if header else _choose_family(layers, texts, metadata, family, file)
    modules = dict(_modules(chosen))
    modules |= {name: [(m, OriginalLayer(m))] for name in texts if (m := _clip_module(chosen, name))}
    if strange := next((name for name in texts if name not in modules), None):
        raise EsdLoraError(
            f"{file} changes a text encoder that an eraser of family {chosen.name!r} does not hold ({shortened(strange)}):"
            " without it its effect is another. To leave it out all the same, take esd-lora import --without-text-encoder."
        )
    if style == "kohya" and not modules:
        raise EsdLoraError(f"{file} has kohya's names, which family {chosen.name!r} has none of. Is it of another family?")
    pairs: dict[str, LoraPair] = {}
    components = (chosen.denoiser, *chosen.clip_encoders)
    scales = {component: _Scales.read(metadata, config, file, component) for component in components}
    for name, parts in {**layers, **texts}.items():
        if "down" not in parts:
            raise EsdLoraError(f"{file}: layer {name} has an up factor and no down factor. Fetch it again.")
        whole = checked_pair(parts["down"], parts.get("up"), f"{file}: layer {name}")
        alpha = _number(parts["alpha"]) if "alpha" in parts else None
        if alpha is not None and not math.isfinite(alpha):
            raise EsdLoraError(f"{file}: alpha of layer {name} is {alpha}, expected a finite number. Fetch it again.")
        for module, place in modules.get(name, [(name, OriginalLayer(name))]):
            component, _, path = module.partition(".") if on_text_encoder(module) else (chosen.denoiser, "", module)
            scale = alpha / whole.rank if alpha is not None else scales[component].at(path, whole.rank)
            pair = _part(whole.scaled(scale, f"{file}: layer {name}"), place)
            if module in pairs:
                raise EsdLoraError(f"{file} has layer {module} twice, under two names. Fetch it again.")
            if pair:
                pairs[module] = pair
    return Eraser(pairs, header or _new_header(file, chosen, style, metadata, concepts, base))


def _locate(path: Path) -> tuple[Path, str]:
    """Return the file of tensors, and peft's configuration where there is one."""
    for name in (PEFT_FILES[0], WEIGHTS_NAME):
        if (path / name).is_file():
            config = path / PEFT_FILES[1]
            return path / name, _read_text(config) if config.is_file() else ""
    if not path.is_file():
        raise EsdLoraError(f"no LoRA at {path}: expected a .safetensors or .pt file, or a directory of peft or diffusers.")
    return path, ""


def _number(alpha: Tensor) -> float:
    """Return the number that a tensor of one value holds; NaN where it holds none, as one of complex numbers does."""
    return float(alpha) if alpha.dtype in _REAL else math.nan


def _read_text(config: Path) -> str:
    with config.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(MAX_JSON + 1)


_Layers = dict[str, dict[str, Tensor]]
"""Factors and alpha by the name of a layer."""


def _layers(tensors: Mapping[str, Tensor], file: Path) -> tuple[_Layers, _Layers, str]:
    """Return the layers of the denoiser, names bare of prefixes, those of text encoders, and the layout they are in."""
    layers: _Layers = {}
    texts: _Layers = {}
    style = "diffusers"
    for key, tensor in tensors.items():
        match = _SUFFIX.search(key)
        if not match:
            kind = next((kind for part, kind in _OTHER_KINDS.items() if part in key), None)
            what = f"{kind} tensors, whose update is no plain product of two factors" if kind else "no LoRA's tensors"
            raise EsdLoraError(f"{file} has {what} ({key}). Only plain LoRA files can be imported.")
        name, role = key[: match.start()], _ROLES.get(match[1], "alpha")
        if name.startswith((*_UNDERSCORED, "lora_te")):
            style = "kohya"
        elif name.startswith("base_model.model."):
            style = "peft"
        of_text = name.startswith(_TEXT)
        for prefix in () if of_text else (*_UNDERSCORED, *_DOTTED):
            name = name.removeprefix(prefix)
        if role == "alpha" and tensor.numel() != 1:
            raise EsdLoraError(f"{file}: {key} has {tensor.numel()} values, expected one. Fetch it again.")
        (texts if of_text else layers).setdefault(name, {})[role] = tensor
    return layers, texts, style


_IN_CLIP = re.compile(
    r"(lora_te\d?_|text_encoder(?:_\d)?\.)(?:text_model[._])?encoder[._]layers[._](\d+)[._](self_attn|mlp)[._](\w+)"
)


def _clip_module(family: ModelFamily, name: str) -> str | None:
    """Return the path of a layer on a text encoder by its name in a file; `None` where a family has none of that name."""
    match = _IN_CLIP.fullmatch(name)
    components = dict(zip(family.clip_in_kohya, family.clip_encoders, strict=True))
    component = components.get(match[1], match[1].removesuffix(".")) if match else None
    if not match or component not in family.clip_encoders:
        return None
    return f"{component}.text_model.encoder.layers.{match[2]}.{match[3]}.{match[4]}"


@cache
def _modules(family: ModelFamily) -> Mapping[str, list[tuple[str, OriginalLayer]]]:
    """Return every name that a file may have for a layer, with dots or underscores, to the layers in it by module path."""
    places = family.original_layers()
    names: dict[str, list[tuple[str, OriginalLayer]]] = {}
    for module, place in places.items():
        for name in dict.fromkeys((place.name, place.name.replace(".", "_"))):
            names.setdefault(name, []).append((module, place))
    for module in places:
        for name in (module, module.replace(".", "_")):  # where both projects use a name, it is diffusers'
            names[name] = [(module, OriginalLayer(module))]
    return names


def _choose_family(
    layers: Mapping[str, Mapping[str, Tensor]],
    texts: Collection[str],
    metadata: Mapping[str, str],
    given: str | None,
    file: Path,
) -> ModelFamily:
    """Return the family whose layers these are: the given one, or the only one that names, metadata and widths fit."""
    if given is not None:
        family = family_named(given)
        strange = next((name for name in layers if _modules(family) and name not in _modules(family)), None)
        if strange:
            raise EsdLoraError(f"{file} has layer {strange}, which no model of family {given!r} has.")
        return family
    fitting = [family for family in FAMILIES if _modules(family) and layers.keys() <= _modules(family).keys()]
    # Layers of text alone fit those that have them; beside a denoiser's, what has no place is refused by name.
    fitting = [family for family in fitting if layers or all(_clip_module(family, name) for name in texts)]
    fitting = [family for family in fitting if _has_heights(family, layers)] or fitting
    base_model = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    for family in fitting:
        if family.metadata_pattern and re.search(family.metadata_pattern, base_model):
            return family
    if len(fitting) > 1:
        fitting = [family for family in fitting if _has_widths(family, layers)] or fitting
    if len(fitting) != 1:
        shown = ", ".join([*layers, *texts][:3])
        names = " and ".join(family.name for family in fitting)
        remedy = f"fit {names} alike: say which with esd-lora import --family" if fitting else "are of no model known here"
        raise EsdLoraError(f"the layers of {file} ({shown}{', ...' if len(layers) + len(texts) > 3 else ''}) {remedy}.")
    return fitting[0]


def _has_widths(family: ModelFamily, layers: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Return whether a layer that reads text has as many inputs as in a published model of the family, if it has any."""
    widths = {
        parts["down"].shape[1]
        for name, parts in layers.items()
        if "down" in parts and parts["down"].dim() > 1 and any(family.reads_text(each) for each, _ in _modules(family)[name])
    }
    return not (widths and family.text_widths) or bool(widths & family.text_widths)


def _has_heights(family: ModelFamily, layers: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Return whether original layers have as many outputs as the family's have, where those are so many times their inputs."""
    return all(
        len(parts["up"]) == place.total * parts["down"].shape[1]
        for name, parts in layers.items()
        if {"down", "up"} <= parts.keys() and parts["up"].dim() > 1 and parts["down"].dim() > 1
        for _, place in _modules(family)[name]
        if place.total
    )


_NAME = re.compile(r"(\^?)((?:[^\\^$*+?()\[\]{}|]|\\[^A-Za-z0-9])+)\$?", re.DOTALL)


def _literal(pattern: str, file: Path) -> str:
    """Return the end of a path that one of peft's patterns stands for, or the whole path after a `^`.

    peft takes them as regular expressions. They are a stranger's and never compiled here: one that is a name, as peft and
    `exporting` write them, its dots escaped or not, is taken by the letter.

    Raises:
        EsdLoraError: If it is no name.
    """
    match = _NAME.fullmatch(pattern)
    if not match:
        raise EsdLoraError(
            f"{file} gives an alpha to layers by the regular expression {shortened(repr(pattern))}, and a stranger's is never"
            " run. Save it with the name of each layer in its place."
        )
    return match[1] + re.sub(r"\\(.)", r"\1", match[2], flags=re.DOTALL)


class _Scales(BaseModel):
    """`alpha / rank` where peft's configuration says it instead of the tensors; 1 where nothing does."""

    lora_alpha: FiniteFloat | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = Field(default=None, max_length=10_000)
    use_rslora: bool = False

    @classmethod
    def read(cls, metadata: Mapping[str, str], config: str, file: Path, component: str) -> _Scales:
        try:
            fields: Any = parse_json(config or metadata.get("lora_adapter_metadata", "{}"))
            if not config and isinstance(fields, dict):  # diffusers' own, prefixed with the component
                named = cast("dict[str, Any]", fields).items()
                fields = {key.partition(".")[2]: value for key, value in named if key.startswith(f"{component}.")}
            scales = cls.model_validate(fields)
        except ValueError as error:  # pydantic's and json's are both
            raise EsdLoraError(f"{file} has a damaged configuration of its scales. Fetch it again.") from error
        names: dict[str, float] = {}
        for pattern, alpha in (scales.alpha_pattern or {}).items():
            names.setdefault(_literal(pattern, file), alpha)  # peft takes the first that matches
        return scales.model_copy(update={"alpha_pattern": names})

    def at(self, module: str, rank: int) -> float:
        if self.lora_alpha is None:
            return 1.0
        parts = module.split(".")
        names = {f"^{module}", *(".".join(parts[i:]) for i in range(len(parts)))}
        alpha = next((alpha for name, alpha in (self.alpha_pattern or {}).items() if name in names), self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def _part(pair: LoraPair, place: OriginalLayer) -> LoraPair | None:
    """Return the update of one layer, out of that of the original weight; `None` if it is zero."""
    if not place.total:
        return LoraPair(pair.down, place.reordered(pair.up, pair.down.shape[1]))
    up = pair.up[place.rows(pair.down.shape[1])]
    used = up.abs().sum(0) > 0  # a block-diagonal file has the other layers' ranks in it
    return LoraPair(pair.down[used], up[:, used]) if bool(used.any()) else None


def _new_header(
    file: Path, family: ModelFamily, style: str, metadata: Mapping[str, str], concepts: Sequence[str], base: str | None
) -> EraserHeader:
    """Return the header of an import: what the file says of itself, and `UNKNOWN` for the rest."""
    notes = {key: value[:2000] for key, value in metadata.items() if _NOTED.fullmatch(key)}
    return EraserHeader(
        family=family.name,
        prefix=family.denoiser,
        prediction_type=family.stated_prediction_type(metadata),
        base=base or metadata.get("ss_sd_model_name") or UNKNOWN,
        base_hashes={},
        concepts=tuple(ErasedConcept(name=name, pairs=(), eta=None) for name in concepts or [file.stem]),
        objective=UNKNOWN,
        scope=UNKNOWN,
        recipes=(),
        versions={"esd-lora": version("esd-lora")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        origins=(Origin(how="imported", files={file.name: hash_file(file)}, layout=style, notes=notes),),
    )
