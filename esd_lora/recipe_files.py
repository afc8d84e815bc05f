"""Reading recipes from YAML: built-in names, `extends`, overrides, and every fault at once with its file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from esd_lora.errors import EsdLoraError, did_you_mean
from esd_lora.recipe import Recipe
from esd_lora.yaml_files import Document, Place, checked, laid_over, read_yaml


def recipes_dir() -> Path:
    """The folder of recipes that ship with the project: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the project, presets and concepts among them (`kind_of`)."""
    folder = recipes_dir()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Finds a recipe by built-in name or by path.

    Raises:
        EsdLoraError: If there is neither such a file nor such a name.
    """
    built_in = recipes_dir() / f"{name}.yaml"
    if name in recipe_names():
        return built_in
    if Path(name).is_file():
        return Path(name)
    raise EsdLoraError(
        f"no recipe {name!r}: neither a file nor a built-in name{did_you_mean(name, recipe_names())}."
        f" Built-in: {', '.join(recipe_names())}."
    )


def kind_of(name: str) -> Literal["recipe", "preset", "concept"]:
    """What a file is: a whole recipe; a preset, which names no concept; or a concept, which has no hyper-parameters.

    The latter two are there for others to extend: `extends: [sdxl/fast, concepts/van-gogh]`.
    """
    values = _load(recipe_path(name)).values
    return "preset" if "concepts" not in values else "recipe" if "train" in values else "concept"


def _load(path: Path, seen: tuple[Path, ...] = ()) -> Document:
    """Reads a recipe and, below it, what it extends."""
    if path.resolve() in seen:
        raise EsdLoraError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}. Break the circle.")
    document = read_yaml(path, "recipe", "extends: fast")
    parents = document.values.pop("extends", None)
    if parents is None:
        return document
    layers: list[Document] = []
    for parent in cast("list[object]", parents if isinstance(parents, list) else [parents]):
        beside = path.parent / str(parent)
        try:
            source = beside if beside.is_file() else recipe_path(str(parent))
        except EsdLoraError as error:
            raise EsdLoraError(f"{path}:{document.marks[('extends',)][1]}: extends {error}") from error
        layers.append(_load(source, (*seen, path.resolve())))
    return _laid([*layers, document])


def _laid(layers: Sequence[Document]) -> Document:
    """Documents over one another, the last on top."""
    whole = Document({}, {})
    for layer in layers:
        whole = Document(laid_over(whole.values, layer.values), {**whole.marks, **layer.marks})
    return whole


def load_recipe(
    source: str | Path | Sequence[str | Path], overrides: Mapping[str, Any] | None = None, /, **fields: Any
) -> Recipe:
    """Loads and checks a recipe.

    Args:
        source: A built-in name (`"fast"`, `"sd/van-gogh"`) or the path of a YAML file; or several, each over those before
            it: `["sdxl/fast", "concepts/van-gogh"]`.
        overrides: Dotted keys to values, over what the file says: `{"train.steps": 200}`.
        **fields: Top-level fields, over both: `base="emoji", concepts=["cat"]`.

    Raises:
        EsdLoraError: If the file cannot be read, or with every fault of the recipe at once, each as `file:line: field:
            what is wrong`.
    """
    paths = [recipe_path(str(name)) for name in ([source] if isinstance(source, str | Path) else source)]
    document = _laid([_load(path) for path in paths])
    return checked(Recipe, document, overrides, fields, kind="recipe", source=" ".join(map(str, paths)), hint=_hint)


def _hint(place: Place) -> str:
    return "" if place[0] == "concepts" else " (a preset gives it: 'extends: fast')"


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out; `load_recipe` reads it back to an equal recipe."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    if any(odd in text for odd in "\x85\u2028\u2029"):  # PyYAML writes these line breaks bare and reads them as spaces
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    return text


def recipe_schema() -> str:
    """The JSON schema of recipe files: a recipe's, but that a file may extend others and leave out what they say."""
    schema = Recipe.model_json_schema()
    for name, part in {"": schema, **schema["$defs"]}.items():
        if name in ("", "TrainSpec", "LoraSpec"):
            part.pop("required", None)
    names: dict[str, Any] = {"type": "string", "description": "A built-in recipe, or a file beside this one."}
    extends = {"anyOf": [names, {"type": "array", "items": names}]}
    for short in ("Concept", "PromptPair"):  # a plain string stands for one of these
        schema["$defs"][short] = {"anyOf": [{"type": "string"}, schema["$defs"][short]]}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"
