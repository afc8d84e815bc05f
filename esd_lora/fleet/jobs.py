"""What a request comes to: a recipe, a suite to measure its eraser with, and the key that its result is filed under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esd_lora import __version__
from esd_lora.built_in import BUILT_IN, keep_prompts, read_prompts
from esd_lora.closed_form import plain_prompts
from esd_lora.erasers.header import EraserHeader
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file, hash_folder
from esd_lora.fleet.request import Request
from esd_lora.recipe import Recipe
from esd_lora.recipe_files import load_recipe
from esd_lora.wording import HubId, mentions

SUITES: Mapping[str, Mapping[str, str]] = {
    "emoji": {"object": "emoji-object", "character": "emoji-object", "style": "emoji-style"},
}
"""Built-in base to the suite that measures each kind of request on it; other bases have none unless one is given."""
ACTIVE = ("open", "done")
"""Status of the requests that a model has to fulfil; done ones were fulfilled for a model that was released before."""
STYLE_PROMPTS = ("{{x}} in the style of {name}", "{{x}} in {name} style", "{{x}} by {name}")
"""What asks for a style, each anchored on `{x}` alone, as recipes/concepts/van-gogh.yaml has it."""
STYLE_SUBJECTS = 16
"""Subjects that take the place of `{x}`: so many of the base's keep list, evenly spaced."""


class Settings(NamedTuple):
    """How all requests of a fleet are trained and measured."""

    base: str
    """As for `load_base`."""
    base_config: str | None = None
    recipe: tuple[str, ...] = ("fast",)
    """Names or files, each over those before it; what a request says is laid over them."""
    second: tuple[str, ...] = ()
    """The same for a second try, where a measurement says that the first is not enough."""
    overrides: Mapping[str, Any] = {}
    """Dotted recipe fields to values, the same for every request; a request's own stand above them."""
    suites: Mapping[str, str] = {}
    """Kind of request to the suite that measures it, over those of `SUITES`; an empty text for none."""
    suite_settings: Mapping[str, Any] = {}
    """Dotted keys over the suites' files."""
    limit: int | None = None
    """Most pictures of each prompt set of a suite."""
    not_enough_if: tuple[str, ...] = ()
    """Conditions on the measurement (`evaluate --fail-if`) under which `second` trains once more."""
    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    """CPU threads of a worker; torch's default unless given."""


class Job(NamedTuple):
    """One request, ready to be worked on."""

    request: Request
    suite: str
    """Name or path; empty where nothing measures it."""
    key: str
    """Hash of everything that the result depends on: where it is the same, the result is there already."""


class Plan(NamedTuple):
    """What jobs have in common; it goes to every worker once."""

    settings: Settings
    preset: Recipe
    """The recipe of them all; its concept is of no request."""
    second: Recipe | None
    """That of a second try."""
    preserved: tuple[str, ...]
    """Prompts that every request keeps, but for those that name it."""
    avoid: tuple[str, ...]
    """Names of what is to be erased that a prompt to preserve could hold."""
    digest: str
    """What `base_digest` says of the base."""

    @classmethod
    def of(cls, requests: Sequence[Request], settings: Settings) -> Plan:
        """Return the plan of a fleet.

        Raises:
            EsdLoraError: If the recipe has faults, or there is no such base.
        """
        fields: dict[str, Any] = {"base": settings.base, "concepts": ["anything"]}
        if settings.base_config:
            fields["base_config"] = settings.base_config
        preset = load_recipe(settings.recipe, settings.overrides, **fields)
        second = load_recipe(settings.second, settings.overrides, **fields) if settings.second else None
        prompts = preserved = keep_prompts(settings.base) if preset.preserve == "default" else preset.preserve
        if preset.neighbours:
            words = preset.neighbours.vocabulary
            prompts += read_prompts(words) if isinstance(words, str) else words
        active = [request for request in requests if request.status in ACTIVE]
        names = dict.fromkeys(name for request in active for name in request.names)
        avoid = tuple(name for name in names if any(mentions(prompt, [name]) for prompt in prompts))
        return cls(settings, preset, second, preserved, avoid, base_digest(settings.base))

    def job(self, request: Request) -> Job:
        """Return the job of a request.

        Raises:
            EsdLoraError: With every fault of its recipe.
        """
        suite = suite_for(request, self.settings)
        # What to avoid is left out: another request would change it for all. `is_stale` says whom it touches.
        recipes = [self.recipe(request), *([self.recipe(request, second=True)] if self.second and suite else [])]
        trained = [recipe.model_dump(mode="json", exclude={"avoid", "base", "base_config"}) for recipe in recipes]
        measured = [suite, dict(self.settings.suite_settings), self.settings.limit, self.settings.not_enough_if]
        text = json.dumps([__version__, self.digest, self.settings.dtype, trained, measured], sort_keys=True)
        return Job(request, suite, hashlib.sha256(text.encode()).hexdigest()[:16])

    def recipe(self, request: Request, *, second: bool = False) -> Recipe:
        """Return the recipe that erases what a request names.

        An object, a person or a character is erased by its names, each a concept with frames where the recipe has them; a style
        by prompts that ask for it, each anchored on itself without the style. What the request keeps is guarded.

        Args:
            request: Its own settings stand above all others.
            second: Whether that of the second try.

        Raises:
            EsdLoraError: With every fault of the recipe.
        """
        names, avoid = request.names, self.avoided_by(request)
        anchor = "" if request.anchor == "none" else request.anchor
        fields: dict[str, Any] = {"avoid": avoid, "guard": request.keep}
        if request.kind == "style":
            templates = [template.format(name=name) for name in names for template in STYLE_PROMPTS]
            prompts = [{"prompt": template, "anchor": "{x}"} for template in templates]
            fill = style_subjects(self.settings.base, names)
            fields["objective"] = "contrast"
            fields["concepts"] = [{"name": names[0], "synonyms": names[1:], "prompts": prompts, "fill": fill}]
        else:  # frames stand around a concept that is given by one prompt
            others = {name: tuple(other for other in names if other != name) for name in names}
            fields["concepts"] = [{"name": name, "synonyms": others[name], "anchor": anchor} for name in names]
        preset = self.second if second and self.second else self.preset
        recipe = load_recipe(preset, request.settings, **fields)
        if recipe.adapts_text:
            raise EsdLoraError(
                "scope text-encoder has no place in a fleet: its workers keep prompts encoded once, and a release fuses erasers"
                " of the denoiser. Train that one by itself (esd-lora train)."
            )
        return recipe

    def avoided_by(self, request: Request) -> tuple[str, ...]:
        """Return the names of others that are neither preserved nor take the place of what a request erases."""
        return tuple(name for name in self.avoid if name not in request.names)


def style_subjects(base: str, without: Sequence[str]) -> list[str]:
    """Return what to draw in a style: things that a base keeps, none of which names one of `without`."""
    prompts = [prompt for prompt in plain_prompts(keep_prompts(base)) if not mentions(prompt, without)]
    return prompts[:: -(-len(prompts) // STYLE_SUBJECTS)]


def suite_for(request: Request, settings: Settings) -> str:
    """Return the suite that measures a request's eraser, or an empty text."""
    return {**SUITES.get(settings.base, {}), **settings.suites}.get(request.kind, "")


def is_stale(header: EraserHeader, avoid: Sequence[str]) -> bool:
    """Return whether an eraser puts in its concept's place what is to be erased as well by now."""
    own = [name for concept in header.concepts for name in (concept.name, *concept.synonyms)]
    anchors = {anchor for concept in header.concepts for prompt, anchor in concept.pairs if not mentions(prompt, avoid)}
    return any(mentions(anchor, avoid) and not mentions(anchor, own) for anchor in anchors)


def base_digest(base: str) -> str:
    """Return what says whether a base is the same: of files their contents, of a Hub id its commit.

    Raises:
        EsdLoraError: If there is no such base.
    """
    if base in BUILT_IN:
        return f"{base} of {__version__}"
    place = Path(base)
    if place.is_file():
        return hash_file(place)
    if place.is_dir():
        return hashlib.sha256(json.dumps(hash_folder(place), sort_keys=True).encode()).hexdigest()
    hub_id = HubId.read(base)
    if hub_id is None:
        raise EsdLoraError(f"base {base!r} is no built-in base, file, directory or Hub id. Check --base.")
    from esd_lora.bases.loading import look_up

    return look_up(hub_id).name
