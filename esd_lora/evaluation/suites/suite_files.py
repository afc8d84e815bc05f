"""Suite files: what to paint and which detectors score it, as YAML that is checked like a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from esd_lora.built_in import BUILT_IN
from esd_lora.errors import EsdLoraError, did_you_mean, shortened
from esd_lora.evaluation.cases import MAX_CASES, ROLES, Role, template_parts
from esd_lora.evaluation.registries import ATTACKS, DETECTORS, FEATURES
from esd_lora.registry import is_code
from esd_lora.yaml_files import allowed_code, checked, read_yaml


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptSet(_Frozen):
    """Prompts of one role, from templates, from a file, or of a built-in base's domain."""

    role: Role
    """Role of its prompts; one about an erased concept is a target all the same."""
    templates: tuple[str, ...] = ()
    """Texts with `{word}` for what `fill` lists, and `{concept}` for each erased concept in turn."""
    fill: dict[str, tuple[str, ...]] = {}
    """Words in braces to what takes their place, in all combinations."""
    domain: Literal["object", "style", "pairs", "bare"] | None = None
    """Prompts for a built-in base: `count` for each erased object or style that no eraser was trained on; or every other object
    in every style; or each with nothing around it, `count` times, with and without article ("a dog", "dog"), where a
    neighbour has least to hold on to."""
    nearest: int | None = Field(default=None, ge=1)
    """How many of what fills the templates, or of the domain's bare objects, are asked for: those that the base's text encoder
    puts nearest to what was erased; all unless given."""
    file: str | None = None
    """CSV or text file, by path; read where it lies."""
    release: str | None = None
    """What the file is expected to be, one of `prompt_files.KNOWN`; another is used, with a warning."""
    source: str | None = None
    """Where to get the file, for whoever lacks it."""
    optional: bool = False
    """Whether the suite runs without the file, its metrics "not run"."""
    own_guidance: bool = False
    """Whether a file's guidance counts, row by row, as in SLD's evaluation; ESD's and others' use one for all."""
    label: str | None = None
    """What a picture should show, in the detector's words, with the same braces; parts with ` + ` between. A file has a column
    for it."""
    count: int | None = Field(default=None, ge=1, le=MAX_CASES)
    """Pictures, of each concept or combination of what fills a template, wordings taking turns with new seeds; each wording
    once unless given."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first picture; later ones count up. A file may bring its own."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptSet:
        sources = [bool(self.templates), self.domain is not None, self.file is not None or self.source is not None]
        if sum(sources) != 1:
            raise ValueError("expected one of templates, domain, and file (or the source of a file to be given)")
        words = {word for text in (*self.templates, self.label or "") for _, word in template_parts(text) if word}
        if self.templates and (unknown := words - {"concept", *self.fill}):
            raise ValueError(f"nothing fills {{{sorted(unknown)[0]}}}{did_you_mean(sorted(unknown)[0], self.fill)}")
        if self.nearest and self.domain != "bare" and not (self.templates and len(self.fill) == 1 and "concept" not in words):
            raise ValueError("nearest chooses among bare objects of a domain, or what alone fills templates")
        return self


class DetectorSpec(BaseModel):
    """A detector that scores pictures; settings of its own stand beside these."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str | None = None
    """Name in `DETECTORS`, where the same one scores twice with other settings, or your own `module:Class`, which runs with
    --allow-code; its metrics get the key as a prefix then."""
    roles: tuple[Role, ...] = ROLES
    """Roles of the prompts whose pictures it scores."""


class AttackSpec(BaseModel):
    """An attempt to bring back what was erased; settings of its own stand beside this."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str | None = None
    """Name in `ATTACKS`, where the same attack is tried with several settings, or your own `module:function`, which runs with
    --allow-code."""


class DistanceSpec(DetectorSpec):
    """A distance between sets of pictures as a whole: see `scoring.measure_distances`."""

    roles: tuple[Role, ...] = ("general",)
    """Roles of the prompts whose pictures it compares."""
    reference: str | None = None
    """Folder of photos to measure from; the base's pictures unless given."""


class Suite(_Frozen):
    """The plan of an evaluation: what it paints, which detectors score that, and what attacks."""

    description: str
    """What it measures, in a sentence."""
    base: str | None = None
    """Built-in base that it is about, if about one alone."""
    prompts: dict[str, PromptSet]
    """Prompts by the name of their set, which begins the names of their cases."""
    detectors: dict[str, DetectorSpec]
    """Name in `DETECTORS`, or one of its own, to settings."""
    distances: dict[str, DistanceSpec] = {}
    """Name in `FEATURES`, or one of its own, to settings."""
    attacks: dict[str, AttackSpec] = {}
    """Name in `ATTACKS`, or one of its own, to settings."""
    neighbours: dict[str, tuple[str, ...]] = {}
    """Groups of labels; those beside an erased one are its neighbours."""
    layout: Literal["ua-ira-cra", "erased-and-others"] | None = None
    """Numbers that a paper's table has, beside the suite's own: see `summarising.paper_layout`."""
    targets: bool = True
    """Whether some prompt must be about what was erased; not so where the suite is about what erasing costs."""
    sensitive: bool = False
    """Whether pictures are blurred on the page until they are clicked."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps; the base's default unless given."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; the base's default unless given, or as a prompt file says."""
    clip_skip: int | None = Field(default=None, ge=1)
    """Last layers of CLIP that prompts skip; all layers are read unless given."""
    _name: str = PrivateAttr("custom")

    def require_allowed(self, allow_code: Collection[str]) -> None:
        """Refuse a suite that names code that was not allowed; nothing is imported.

        Args:
            allow_code: Every `module:attribute` that may be imported.

        Raises:
            EsdLoraError: With how to allow it.
        """
        for registry, specs in ((DETECTORS, self.detectors), (FEATURES, self.distances), (ATTACKS, self.attacks)):
            for name, spec in specs.items():
                registry.check(spec.kind or name, allow_code)

    @property
    def name(self) -> str:
        """Name of its file, for records; `custom` where it was not loaded from one."""
        return self._name

    @property
    def needs_text_encoder(self) -> bool:
        """Whether a base's text encoder chooses some of its prompts."""
        return any(prompts.nearest for prompts in self.prompts.values())

    @field_validator("base")
    @classmethod
    def _ships(cls, base: str | None) -> str | None:
        if base not in (None, *BUILT_IN):
            raise ValueError(f"no built-in base{did_you_mean(base, BUILT_IN)}; known: {', '.join(BUILT_IN)}")
        return base

    def code(self) -> list[str]:
        """Return every `module:attribute` that it names: code that runs where it was allowed."""
        specs = [*self.detectors.values(), *self.distances.values(), *self.attacks.values()]
        return sorted({spec.kind for spec in specs if spec.kind and is_code(spec.kind)})

    @field_validator("prompts", "detectors", "distances", "attacks")
    @classmethod
    def _file_names(cls, specs: dict[str, Any]) -> dict[str, Any]:
        # They become names of files; a case is the name of its prompts, a dash, and a number.
        for name in specs:
            if not re.fullmatch(r"\w[\w-]{0,99}", name):
                raise ValueError(f"{shortened(repr(name))} is no name: expected up to 100 letters, digits, - and _")
        return specs

    @field_validator("detectors", "distances", "attacks")
    @classmethod
    def _known(
        cls, specs: dict[str, DetectorSpec] | dict[str, AttackSpec], info: ValidationInfo
    ) -> dict[str, DetectorSpec] | dict[str, AttackSpec]:
        known = {"detectors": DETECTORS, "distances": FEATURES, "attacks": ATTACKS}[info.field_name or ""]
        for name, spec in specs.items():
            try:
                known.check(spec.kind or name, allowed_code(info))
            except EsdLoraError as error:
                raise ValueError(str(error)) from error
        return specs


_FOLDER = Path(__file__).parent


def suite_names() -> list[str]:
    """Return the names of the suites that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_suite(
    source: str | Path,
    overrides: Mapping[str, Any] | None = None,
    prompt_file: str | Path | None = None,
    *,
    allow_code: Collection[str] = (),
) -> Suite:
    """Load and check a suite.

    Args:
        source: A name (`"nudity"`) or the path of a YAML file.
        overrides: Dotted keys to values, over what the file says: `{"prompts.i2p.file": "unsafe-prompts4703.csv"}`.
        prompt_file: CSV or text file for the first prompt set that takes one; `overrides` go before it.
        allow_code: Every `module:attribute` that it may name as a detector, features or an attack: code of your own, which runs
            when it is evaluated with the same `allow_code`.

    Raises:
        EsdLoraError: If there is no such suite, with every fault of it at once, or if it takes no prompt file and one is given.
    """
    name = str(source)
    path = _FOLDER / f"{name}.yaml" if name in suite_names() else Path(name)
    if not path.is_file():
        known = ", ".join(suite_names())
        raise EsdLoraError(f"no suite {name!r}: neither a name nor a file{did_you_mean(name, suite_names())}. Known: {known}.")
    document = read_yaml(path, "suite", "description: ...")
    suite = checked(Suite, document, overrides, kind="suite", source=str(path), allow_code=allow_code)
    if prompt_file is not None:
        taker = next((name for name, prompts in suite.prompts.items() if prompts.source or prompts.file), None)
        if taker is None:
            raise EsdLoraError("this suite takes no prompt file; leave --prompts out.")
        overrides = {f"prompts.{taker}.file": str(prompt_file), **(overrides or {})}
        suite = checked(Suite, document, overrides, kind="suite", source=str(path), allow_code=allow_code)
    suite._name = path.stem
    return suite
