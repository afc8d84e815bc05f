"""Reading recipes from YAML: built-in names, `extends`, overrides, and every fault at once with its file and line."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from esd_lora.errors import EsdLoraError, near_ones, shortened
from esd_lora.faults import Place
from esd_lora.fuse_specs import FuseSpec, HarmoniseSpec
from esd_lora.recipe import Recipe
from esd_lora.yaml_files import Document, Model, checked, dump_yaml, laid_over, model_in, read_yaml

_LOG = logging.getLogger(__name__)
RecipeKind: TypeAlias = Literal["preset", "concept", "recipe", "fuse", "harmonise"]
"""A preset names no concept, a concept has no hyper-parameters, a recipe has both; the others are for stacks (`method`)."""
DEFAULT_PRESET = "fast"
"""The preset of small models, and where no base is named; its rate and steps were chosen on the built-in base."""
_MAX_FILES = 100  # that a recipe and those it extends come to


def recipes_dir() -> Path:
    """Return the folder of recipes that ship with the project: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def recipe_names() -> list[str]:
    """Return the names of all recipes that ship: of every file, and every BASE/CONCEPT composed of two (`recipe_paths`)."""
    return sorted(_shipped())


def recipe_paths(name: str) -> list[Path]:
    """Return the files of a recipe, each to be laid over those before it.

    A file, by path or built-in name, is a recipe by itself. BASE/CONCEPT is composed of two: `sd/van-gogh` of `sd/fast` and
    `concepts/van-gogh`. BASE is any folder of `recipes/` with a preset `fast`, CONCEPT any concept. A preset for the concept's
    scope in that folder stands in the place of `fast`: `sdxl/church` is composed of `sdxl/noxattn` and `concepts/church`.

    Raises:
        EsdLoraError: If there is neither such a file nor such a name.
    """
    shipped = _shipped()
    if name in shipped:
        return shipped[name]
    if (file := _beside(Path(), name)) is not None:
        return [file]
    nearest, *others = map(repr, near_ones(name, shipped))
    raise EsdLoraError(
        f"no recipe {shortened(repr(name))}: neither a file nor a built-in name (did you mean {nearest}? or"
        f" {', '.join(others)}). All stand in esd-lora recipes list."
    )


def recipe_bases() -> list[str]:
    """Return every BASE that concepts compose with: the folders that hold a preset `fast`."""
    return sorted(path.parent.name for path in recipes_dir().glob("*/fast.yaml"))


def _shipped() -> dict[str, list[Path]]:
    """Return name to files of all that ships, as in `recipe_paths`."""
    folder = recipes_dir()
    files = {path.relative_to(folder).with_suffix("").as_posix(): [path] for path in folder.rglob("*.yaml")}
    concepts = {path.stem: path for path in folder.glob("concepts/*.yaml")}
    composed = {
        f"{base}/{name}": [files.get(f"{base}/{_scope_of(path)}", files[f"{base}/fast"])[0], path]
        for base in recipe_bases()
        for name, path in concepts.items()
    }
    return composed | files


@cache
def _scope_of(concept: Path) -> object:
    """Return the scope that a concept which ships names."""
    return read_yaml(concept, "recipe", "extends: fast").values.get("scope")


def recipe_text(name: str) -> str:
    """Return a recipe as YAML: its file as it stands, or for BASE/CONCEPT what a file of its own would say.

    Raises:
        EsdLoraError: If there is no such recipe, or it is no text.
    """
    paths = recipe_paths(name)
    if len(paths) == 1:
        try:
            return paths[0].read_text("utf-8")
        except UnicodeDecodeError as error:
            raise EsdLoraError(f"{paths[0]}: cannot be read as a recipe: {error}.") from error
    recipe = load_recipe(name)
    parts = [path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in paths]
    erased = ", ".join(concept.name for concept in recipe.concepts)
    lines = [
        f"# Erases {erased} from {recipe.base}: scope {recipe.scope}, eta {recipe.eta}, steps {recipe.train.steps}.",
        *(f"# {recipe_title(part)}" for part in parts),
        f"extends: [{', '.join(parts)}]",
    ]
    return "\n".join(lines) + "\n"


def recipe_title(name: str) -> str:
    """Return the first line of a recipe, which says what it does."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")


def recipe_kind(name: str) -> RecipeKind:
    """Return what a recipe is for.

    Presets and concepts are there for others to extend: `extends: [sdxl/fast, concepts/van-gogh]`.

    Raises:
        EsdLoraError: If there is no such recipe, or it cannot be read.
    """
    values = _read(recipe_paths(name)).values
    if values.get("method") in ("fuse", "harmonise"):
        return values["method"]
    return "preset" if "concepts" not in values else "recipe" if "train" in values else "concept"


def recipe_folder(names: Sequence[str]) -> str | None:
    """Return the folder of the preset that says which base some recipes are for, `sdxl` of `sdxl/fast`; `None` of others.

    Args:
        names: Recipes, each over those before it.

    Raises:
        EsdLoraError: If there is no such recipe, or it cannot be read.
    """
    document = _read([path for name in names for path in recipe_paths(name)])
    stated = document.marks.get(("base",))
    folder = Path(stated[0]).parent if stated else recipes_dir()
    return folder.name if folder.parent == recipes_dir() else None


def recipes_by_kind() -> dict[RecipeKind, list[str]]:
    """Return kind to names of every recipe file that ships, in the order of `RecipeKind`; composed ones are not among them."""
    kinds: dict[RecipeKind, list[str]] = {kind: [] for kind in get_args(RecipeKind)}
    for name in recipe_names():
        if len(recipe_paths(name)) == 1:
            kinds[recipe_kind(name)].append(name)
    return kinds


def _read(paths: Sequence[Path]) -> Document:
    """Read recipe files over one another, each with what it extends."""
    loaded: list[Path] = []
    return _laid([_load(path, (), loaded) for path in paths])


def _load(path: Path, within: tuple[Path, ...], loaded: list[Path]) -> Document:
    """Read a recipe file and, below it, what it extends, and add it to all that were `loaded` for those in `within`."""
    if path.resolve() in within:
        raise EsdLoraError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in within)}. Break the circle.")
    loaded.append(path)
    if len(loaded) > _MAX_FILES:
        raise EsdLoraError(f"{loaded[0]}: extends more than {_MAX_FILES} files, one file counted every time. Extend fewer.")
    document = read_yaml(path, "recipe", "extends: fast")
    parents = document.values.pop("extends", None)
    if parents is None:
        return document
    layers: list[Document] = []
    for parent in cast("list[object]", parents if isinstance(parents, list) else [parents]):
        try:
            files = [beside] if (beside := _beside(path, str(parent))) else recipe_paths(str(parent))
        except EsdLoraError as error:
            raise EsdLoraError(f"{path}:{document.marks[('extends',)][1]}: extends {error}") from error
        layers += [_load(file, (*within, path.resolve()), loaded) for file in files]
    return _laid([*layers, document])


def _beside(path: Path, name: str) -> Path | None:
    """Return the file of a name that a recipe beside it says, if there is one."""
    try:
        return path.parent / name if (path.parent / name).is_file() else None
    except OSError:  # the name is too long for one
        return None


def _laid(layers: Sequence[Document]) -> Document:
    """Return documents over one another, the last on top."""
    whole = Document({}, {})
    for layer in layers:
        whole = Document(laid_over(whole.values, layer.values), {**whole.marks, **layer.marks})
    return whole


def load_recipe(
    source: str | Path | Recipe | Sequence[str | Path],
    overrides: Mapping[str, Any] | None = None,
    /,
    *,
    allow_code: Collection[str] = (),
    **fields: Any,
) -> Recipe:
    """Load and check a recipe.

    Args:
        source: A built-in name (`"fast"`, `"sd/van-gogh"`) or the path of a YAML file; or several, each over those before
            it: `["sdxl/fast", "concepts/van-gogh"]`; or a recipe that is loaded.
        overrides: Dotted keys to values, over what the file says: `{"train.steps": 200}`.
        allow_code: Every `module:attribute` that it may name as objective or optimiser: code of your own, which runs when it is
            trained with the same `allow_code`.
        **fields: Top-level fields, over both: `base="emoji", concepts=["cat"]`.

    Raises:
        EsdLoraError: If the file cannot be read, or with every fault of the recipe at once, each as `file:line: field:
            what is wrong`.
    """
    return _checked(Recipe, source, overrides, fields, "fast", allow_code)


def load_fuse_spec(
    source: str | Path | FuseSpec = "fuse", overrides: Mapping[str, Any] | None = None, /, **fields: Any
) -> FuseSpec:
    """Load and check how to fuse: `load_fuse_spec(lam=0.03)`.

    Args:
        source: A built-in name, the path of a YAML file, or what was loaded before.
        overrides: As in `load_recipe`.
        **fields: As in `load_recipe`.

    Raises:
        EsdLoraError: As `load_recipe` does.
    """
    return _checked(FuseSpec, source, overrides, fields, "fuse")


def load_harmonise_spec(
    source: str | Path | HarmoniseSpec = "harmonise", overrides: Mapping[str, Any] | None = None, /, **fields: Any
) -> HarmoniseSpec:
    """Load and check how to harmonise: `load_harmonise_spec(steps=200)`. Arguments and errors are those of `load_fuse_spec`."""
    return _checked(HarmoniseSpec, source, overrides, fields, "harmonise")


def _checked(
    model: type[Model],
    source: str | Path | BaseModel | Sequence[str | Path],
    overrides: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    example: str,
    allow_code: Collection[str] = (),
) -> Model:
    """Read sources over one another as a model; `example` is a built-in name that gives every field but concepts."""

    def hint(place: Place) -> str:
        return "" if place[0] == "concepts" else f" (a preset gives it: 'extends: {example}')"

    if isinstance(source, BaseModel):
        return checked(model, Document(source.model_dump(), {}), overrides, fields, kind="recipe", source="given", hint=hint)
    paths = [path for name in ([source] if isinstance(source, str | Path) else source) for path in recipe_paths(str(name))]
    document, where = _read(paths), " ".join(map(str, paths))
    _LOG.debug("recipe %s", where)
    method = document.values.get("method")
    if model is Recipe and method in ("fuse", "harmonise"):
        raise EsdLoraError(f"{where} says how to {method} a stack, and nothing to train. Give another recipe.")
    return checked(model, document, overrides, fields, kind="recipe", source=where, hint=hint, allow_code=allow_code)


@cache
def recipe_fields() -> dict[str, FieldInfo]:
    """Return every field of a recipe that holds a value of its own, by its dotted name: `train.steps`."""

    def fields(model: type[BaseModel], above: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in model.model_fields.items():
            inner = model_in(field.annotation)
            if inner is None:
                yield above + name, field
            else:
                yield from fields(inner, f"{above}{name}.")

    return dict(fields(Recipe, ""))


def dump_recipe(recipe: BaseModel) -> str:
    """Return a recipe as YAML, every field written out; loading reads it back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"), width=120)


def recipe_schema() -> str:
    """Return the JSON schema of recipe files: of every kind, but that a file may extend others and leave out what they say."""
    names: dict[str, Any] = {"type": "string", "description": "A built-in recipe, or a file beside this one."}
    extends = {"anyOf": [names, {"type": "array", "items": names}]}
    parts: dict[str, Any] = {}
    for model in (Recipe, FuseSpec, HarmoniseSpec):
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        parts |= schema.pop("$defs", {})
        parts[model.__name__] = schema | {"properties": {"extends": extends, **schema["properties"]}}
    for name in ("Recipe", "PictureSpec", "TrainSpec", "LoraSpec", "FuseSpec", "HarmoniseSpec"):
        parts[name].pop("required", None)
    for short in ("Concept", "PromptPair"):  # a plain string stands for one of these
        parts[short] = {"anyOf": [{"type": "string"}, parts[short]]}
    kinds = [{"$ref": f"#/$defs/{model}"} for model in ("Recipe", "FuseSpec", "HarmoniseSpec")]
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": kinds, "$defs": parts}, indent=1) + "\n"
    )
