"""What commands return, and print with `--json`: one object each, as docs/json.md says.

Every command's function names its results as what it returns, and `python benchmarks/json_page.py` makes that page of them.
Paths are as they were given, or chosen, relative to the working directory.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict


@with_config(use_attribute_docstrings=True, extra="forbid")
class Result(TypedDict):
    """Anything that a command returns, or a part of it."""


class Error(Result):
    """What any command prints where something fails; its exit code is 1."""

    error: str
    """What was found, what was expected, and what to do."""


class Estimated(Result):
    """What a dry run says that the command would take."""

    out: str
    """Where it would write."""
    seconds: list[float] | None
    """How long it would take, at least and at most, beside loading; null where that is not known, or nothing to speak of."""
    memory: int | None
    """Bytes that it would hold at most; null where the system does not tell."""
    lines: list[str]
    """The estimate as people read it, work and files among it."""


class Trained(Result):
    """An eraser that was trained."""

    eraser: str
    """Its directory."""
    concepts: list[str]
    """Names of what it erases."""
    base: str
    """Base that it was trained on."""
    family: str
    """Family of the base."""
    rank: int
    """Highest rank of a layer."""
    cost: dict[str, float]
    """What it took: `steps`, `seconds`, `sample_evaluations` and more, as the eraser's header says."""
    kohya: str | None
    """File for A1111, Forge and ComfyUI, if it was asked for."""


class Picture(Result):
    """A picture that was painted."""

    file: str
    """Its file."""
    prompt: str
    """What it shows."""
    seed: int
    """Seed of its noise."""


class Painted(Result):
    """Pictures that were painted."""

    out: str
    """Their directory."""
    pictures: list[Picture]
    """By prompt, then by seed."""
    sheets: list[str]
    """Files that compare them."""
    videos: list[str]
    """Where they are the middle frames of videos, those, in the same order."""


class Member(Result):
    """A concept of a stack."""

    name: str
    """What is erased."""
    weight: float
    """How strongly; amplified below 0."""


class Stacked(Result):
    """A stack that was made."""

    eraser: str
    """Its directory, or its manifest."""
    concepts: list[Member]
    """What it erases."""
    ranks: list[int]
    """Lowest and highest rank of a layer."""
    making: list[str]
    """How it was fused or harmonised, a line each; nothing of a sum."""
    files: list[str]
    """Names of further files beside it: a state, a report of interference."""


class Proof(Result):
    """What a merged base was found to be, tensor by tensor."""

    touched: int
    """Tensors that are the base's plus the update, to within rounding."""
    untouched: int
    """Tensors that are the base's bit for bit."""
    worst: float
    """Largest distance of a touched value from base + update, in units of the dtype's spacing there; up to .5 is rounding."""


class Merged(Result):
    """A base that erasers were merged into."""

    model: str
    """The merged base, a directory or a file."""
    base: str
    """The base."""
    proof: Proof | None
    """What `--verify` proved; null without it."""


class Evaluated(Result):
    """An evaluation that is written."""

    out: str
    """Its directory, with `summary.json`, whose shape is `Report` of the Python API."""
    page: str
    """The page to look at."""
    summary: dict[str, Any]
    """What `summary.json` holds: numbers by variant, role and metric, what was not run, gates."""


class Layer(Result):
    """A layer of a LoRA."""

    rank: int
    """Rank of its update."""
    shape: list[int]
    """Shape of the weight that it changes."""
    norm: float | None
    """Frobenius norm of the update; null where it is beyond numbers."""


class Block(Result):
    """A part of a model."""

    layers: int
    """Number of its layers that change."""
    norm: float | None
    """Norm of their updates together."""


class Inspected(Result):
    """A LoRA file, looked into."""

    header: dict[str, Any]
    """The eraser's header (`EraserHeader` of the Python API)."""
    layers: dict[str, Layer]
    """Layers by module path."""
    blocks: dict[str, Block]
    """Parts of the model by name."""
    norm: float | None
    """Norm of the whole update."""
    size: int
    """Bytes of the file, or of the tensors if it is a manifest."""
    sha256: str | None
    """Hash of the file, if it is one."""
    sha256_tensors: str
    """Hash of the tensors' bytes alone."""


class LayerDifference(Result):
    """A layer that two files have."""

    distance: float | None
    """Distance of the updates, relative to the first's norm."""
    cosine: float | None
    """Cosine between them."""


class Compared(Result):
    """Two LoRA files, compared."""

    only_first: list[str]
    """Layers that the first has alone."""
    only_second: list[str]
    """Layers that the second has alone."""
    layers: dict[str, LayerDifference]
    """Layers that both have."""
    overall: float | None
    """Distance over all layers, relative to the first's norm."""
    header: dict[str, list[Any]]
    """Fields of the header that differ, of the first and of the second."""


class Exported(Result):
    """An eraser for another program."""

    file: str
    """The file, or of peft's the directory."""
    layout: str
    """Its layout."""


class Imported(Result):
    """An eraser that was made of another program's file."""

    eraser: str
    """Its directory."""
    concepts: list[str]
    """What it is taken to erase."""
    family: str
    """Family of its base."""
    layers: int
    """Number of its layers."""
    origin_known: bool
    """Whether the file said where it came from."""


class ExtractedLayer(Result):
    """A layer of an extracted eraser."""

    rank: int
    """Its rank."""
    energy: float
    """Share of the difference's squared norm that is kept."""


class Extracted(Result):
    """An eraser that was made of a fine-tuned model."""

    eraser: str
    """Its directory."""
    concepts: list[str]
    """What it is taken to erase."""
    layers: dict[str, ExtractedLayer]
    """Layers that differ, by module path."""
    energy: float
    """Share that is kept over all of them."""


class Pushed(Result):
    """What a push did, or would do."""

    repo: str
    """The repository."""
    sent: bool
    """Whether anything was sent."""
    url: str | None
    """Address of the repository, or of the pull request; null where nothing was sent."""
    files: dict[str, int]
    """Places of files in the repository to their bytes."""
    card: str
    """The card."""


class Pulled(Result):
    """An eraser that was fetched."""

    eraser: str
    """Its directory."""
    commit: str
    """Commit that it is of."""
    files: list[str]
    """What was taken."""
    left_out: list[str]
    """Files of kinds that are not taken."""


class HubEraser(Result):
    """An eraser on the Hub, as its page says."""

    repo: str
    """The repository."""
    erases: list[str]
    """What it erases."""
    base: str
    """Base that it was made for."""
    downloads: int
    """How often it was fetched."""
    likes: int
    """How many like it."""
    updated: str
    """Day of its last change."""


class Searched(Result):
    """What a search found."""

    erasers: list[HubEraser]
    """Those downloaded most first."""


class LocalEraser(Result):
    """An eraser on this machine."""

    place: str
    """Its directory, or Hub id of one in the cache."""
    header: dict[str, Any]
    """Its header."""
    layers: int
    """Number of its layers."""
    size: int
    """Bytes of its file."""


class Listed(Result):
    """The erasers on this machine."""

    erasers: list[LocalEraser]
    """In the order in which they were found."""


class RecipeLine(Result):
    """A recipe that ships."""

    name: str
    """Its name."""
    kind: Literal["preset", "concept", "recipe", "fuse", "harmonise"]
    """A preset says how to train, a concept what to erase, a recipe both; the others are for stacks."""
    title: str
    """What it does."""


class Recipes(Result):
    """The recipes that ship."""

    recipes: list[RecipeLine]
    """By kind."""
    bases: list[str]
    """Every BASE of BASE/CONCEPT."""


class RecipeText(Result):
    """A recipe as it stands in its file."""

    name: str
    """Its name."""
    text: str
    """YAML."""


class RecipeCopied(Result):
    """A recipe that was copied."""

    recipe: str
    """The file."""


class RecipeChecked(Result):
    """A recipe without faults."""

    name: str
    """Its name or path."""
    kind: Literal["preset", "concept", "recipe", "fuse", "harmonise"]
    """What it is for."""
    resolved: dict[str, Any]
    """Every field with everything that it extends."""


class RecipesChecked(Result):
    """Recipes without faults."""

    recipes: list[RecipeChecked]
    """In the order in which they were given."""


class RequestsAdded(Result):
    """Requests that were added to a registry."""

    added: int
    """How many were not there."""
    there_already: int
    """How many were."""
    registry: str
    """Folder of the registry."""


class Requests(Result):
    """Requests as they stand."""

    requests: list[dict[str, Any]]
    """Each with the columns of docs/requests.md that hold something."""


class FleetRequest(Result):
    """Where a request of a fleet stands."""

    id: str
    """Its id."""
    state: Literal["queued", "running", "done", "failed", "refused"]
    """What became of it."""
    reason: str
    """Why it failed or was refused."""


class FleetRun(Result):
    """Where a fleet stands."""

    page: str
    """The page to look at."""
    requests: list[FleetRequest]
    """In their order."""


class Released(Result):
    """A release."""

    number: int
    """From 1."""
    requests: list[str]
    """Ids of the requests that are erased."""
    card: str
    """The model's card."""
    published: str
    """Folder of what may be published."""


class Demonstrated(Result):
    """What the demo made."""

    out: str
    """Its directory."""
    page: str
    """The page of its evaluation."""
    table: str
    """The numbers, as Markdown."""


class Finding(Result):
    """One thing that the doctor looked at."""

    name: str
    """What was looked at."""
    ok: bool
    """Whether nothing has to be done."""
    state: str
    """What is there."""
    remedy: str | None
    """What to do."""


class Examined(Result):
    """What the doctor found."""

    ok: bool
    """Whether all is well."""
    findings: list[Finding]
    """Quick ones first."""


class Completion(Result):
    """A shell's completion."""

    shell: str
    """bash, zsh or fish."""
    script: str
    """What the shell is to read."""
