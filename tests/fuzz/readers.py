"""The readers of strangers' files, and for each what it reads: seeds, documents, and what lies beside them."""

from __future__ import annotations

import atexit
import csv
import io
import json
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from hub_cases import hub_documents, lay_eraser, my_eraser, read_hub
from PIL import Image, PngImagePlugin
from safetensors.torch import save
from torch import nn

import original_checkpoints
from esd_lora.bases.loading import load_base
from esd_lora.bases.stored import open_stored
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import HEADER_KEY, ErasedConcept
from esd_lora.erasers.manifests import load_eraser
from esd_lora.erasers.stacking import stack_layer
from esd_lora.erasers.tensor_files import hash_tensors, read_tensors
from esd_lora.evaluation.cases import ROLES, Case
from esd_lora.evaluation.evaluating import _differences
from esd_lora.evaluation.picture_files import painted_file
from esd_lora.evaluation.planning import plan_cases
from esd_lora.evaluation.report.attaching import _take_samples, attach
from esd_lora.evaluation.report.report import Report
from esd_lora.evaluation.scoring import _resume
from esd_lora.evaluation.suites.prompt_files import read_prompt_file
from esd_lora.evaluation.suites.suite_files import load_suite, suite_names
from esd_lora.families import FAMILIES
from esd_lora.fleet.registry import Registry
from esd_lora.fleet.requests import read_requests
from esd_lora.formats.importing import import_lora
from esd_lora.formats.inspecting import inspect_file
from esd_lora.fusing.moments import TEXT, Moment
from esd_lora.fusing.prompts import members_of
from esd_lora.fusing.states import FusionState, LayerProblem, writing_state
from esd_lora.pictures import open_picture, png, read_samples
from esd_lora.recipe_files import dump_recipe, load_fuse_spec, load_recipe, recipe_names, recipe_text
from random_erasers import random_eraser
from tiny import save_tiny, tiny_pipeline, tiny_recipe

PROJECT = Path(__file__).parents[2]
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_"
PARTS = {"A": (2, 768), "B": (8, 2)}


def nothing(_: Path) -> None:
    """Lay nothing beside the file."""


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file."""

    file: str
    """Name of the file that cases are written to."""
    read: Callable[[Path], object]
    """Reads the case in a folder."""
    seeds: Callable[[Path], list[bytes]]
    """Contents of files, the first of which loads; may use the folder."""
    documents: list[Any] = field(default_factory=list)
    """What files say, as JSON could hold it."""
    write: Callable[[Any], bytes] = lambda document: json.dumps(document).encode("utf-8", "surrogatepass")
    """Returns the file that says a document."""
    beside: Callable[[Path], None] = nothing
    """Lays into a folder what the file stands beside."""


def as_yaml(document: Any) -> bytes:
    """Return a document as YAML."""
    return yaml.dump(document, Dumper=yaml.SafeDumper, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def written(read: Callable[[Path], object], file: str) -> Callable[[Path], list[bytes]]:
    """Return a function that returns what `read` writes under a name."""

    def seeds(folder: Path) -> list[bytes]:
        read(folder)
        return [(folder / file).read_bytes()]

    return seeds


# Safetensors files: a document holds the header, `esd_lora` and `lora_adapter_metadata` in it as documents of their own.


def safetensors_document(content: bytes) -> dict[str, Any]:
    """Return the document of a safetensors file, with the number of bytes that follow it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    header["__metadata__"] = {k: json.loads(v) if k in NESTED else v for k, v in metadata.items()}
    return {"header": header, "data": len(content) - 8 - length}


NESTED = (HEADER_KEY, "lora_adapter_metadata")


def safetensors_file(document: Any) -> bytes:
    """Return the file of a document of `safetensors_document`; ones follow."""
    values: Any = document if isinstance(document, dict) else {}
    header, data = values.get("header", document), values.get("data", 0)
    if isinstance(header, dict) and isinstance(metadata := header.get("__metadata__"), dict):
        texts = {k: json.dumps(v) if k in NESTED and not isinstance(v, str) else v for k, v in metadata.items()}
        header = {**header, "__metadata__": texts}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = min(max(data, 0), 2**22) if isinstance(data, int) else 0
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 1.0) * (size // 4) + b"\1" * (size % 4)


def read_eraser(folder: Path) -> None:
    """Load and inspect an eraser, and write what its header says."""
    file = folder / "x.safetensors"
    eraser = Eraser.load(file)
    assert inspect_file(file).lines()
    assert eraser.state_dict()
    assert isinstance(eraser.header.effect() + "".join(eraser.header.making()) + eraser.header.recipe_document(), str)


@cache
def eraser_contents() -> list[bytes]:
    """Return eraser files of every format, and one of now."""
    golden = [(PROJECT / f"tests/golden/format_{i}.safetensors").read_bytes() for i in (1, 2, 3)]
    eraser = random_eraser({"conv": 2, "mid.attn2.to_k": 1}, "a cat", "a hat", dtype=torch.float32)
    return [eraser.files()["pytorch_lora_weights.safetensors"], *golden]


@cache
def lora_contents() -> list[bytes]:
    """Return LoRA files of one or two layers: kohya's, diffusers' with its metadata, and of dotted original names."""
    factors = {part: torch.ones(shape) for part, shape in PARTS.items()}
    kohya = "lora_unet_" + KEY.replace(".", "_")
    first = {f"{kohya}k.lora_{'down' if part == 'A' else 'up'}.weight": tensor for part, tensor in factors.items()}
    first[f"{kohya}k.alpha"] = torch.tensor(1.0)
    second = {f"unet.{KEY}{x}.lora_{part}.weight": tensor.clone() for part, tensor in factors.items() for x in "kv"}
    scales = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {f"{KEY}k": 8}, "unet.use_rslora": False}
    third = {f"base_model.model.{KEY}k.lora_{part}.weight": tensor for part, tensor in factors.items()}
    notes = {"ss_base_model_version": "sd_v1", "ss_v_parameterization": "True", "ss_sd_model_name": "x", "modelspec.title": "y"}
    return [save(first, notes), save(second, {"lora_adapter_metadata": json.dumps(scales)}), save(third), save(first | second)]


@cache
def state_contents() -> list[bytes]:
    """Return the state of a stack of two, one layer added up."""
    erasers = [random_eraser({"conv": rank, "mid.attn2.to_k": 1}, "a cat", dtype=torch.float32) for rank in (1, 2)]
    members = members_of(zip("ab", erasers, strict=True), ["a dog"])
    base: Any = SimpleNamespace(family=FAMILIES[0], held_in="float32")
    pair = stack_layer(path := "mid.attn2.to_k", erasers)
    assert base.family.reads_text(path)
    problem = LayerProblem(path, pair, pair.down.double(), [1, 1], TEXT, Moment(nn.Linear(3, 4)), 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        with writing_state(file, members, base, load_fuse_spec(), None, None, ["conv"]) as keep:
            keep(problem)
        return [file.read_bytes()]


def read_state(folder: Path) -> None:
    """Load the state of a stack, and take from it what a layer is solved from."""
    state = FusionState.load(folder / "x.safetensors")
    for name in (TEXT, *state.record.ranks):
        state.fill(name, Moment(nn.Linear(3, 4), [*state.record.ranks]))
    assert all(eraser.state_dict() for _, eraser in state.hashed())


def read_lora(folder: Path) -> None:
    """Import and inspect a LoRA file."""
    assert import_lora(folder / "x.safetensors", concepts=[]).pairs
    assert inspect_file(folder / "x.safetensors").lines()


# peft's configuration beside its weights


def lay_adapter(folder: Path) -> None:
    """Write the weights of a peft adapter."""
    tensors = {f"base_model.model.{KEY}k.lora_{part}.weight": torch.ones(shape) for part, shape in PARTS.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))


ADAPTERS = [
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {f"{KEY}k": 8, r"^a\.b$": 2}, "use_rslora": True},
    {"lora_alpha": 4.0, "rank_pattern": {}, "alpha_pattern": None, "target_modules": ["to_k"]},
]


# Pickles: a document says which tensors there are, of which kind, and how they are nested.


def quietly(make: Callable[[], Any]) -> Any:
    """Return what `make` makes, without torch's warnings that it may give such tensors up."""
    with warnings.catch_warnings(action="ignore"):
        return make()


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.ones(2, 768),
    "up": lambda: torch.ones(8, 2),
    "one": lambda: torch.tensor(1.0),
    "half": lambda: torch.ones(8, 2, dtype=torch.float16),
    "expanded": lambda: torch.zeros(1).expand(50_000, 50_000),
    "overlapping": lambda: torch.zeros(4000).as_strided((2000, 2000), (1, 1)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "rows": lambda: quietly(lambda: torch.eye(3).to_sparse_csr()),
    "meta": lambda: torch.empty(50_000, 50_000, device="meta"),
    "quantised": lambda: quietly(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
    "complex": lambda: torch.tensor(1j),
    "truth": lambda: torch.tensor(True),
    "float8": lambda: torch.ones(8, 2).to(torch.float8_e5m2),
    "float4": lambda: torch.zeros(8, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "empty": lambda: torch.ones(0, 768),
    "nothing": lambda: torch.ones(()),
    "learned": lambda: torch.nn.Parameter(torch.ones(8, 2)),
    "transposed": lambda: torch.ones(2, 8).T,
    "nested": lambda: quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
}


def pickled(document: Any) -> bytes:
    """Return the file that torch writes of a document, names of `KINDS` in it being tensors."""

    def build(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: build(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [build(inner) for inner in value]
        return KINDS[value]() if isinstance(value, str) and value in KINDS else value

    buffer = io.BytesIO()
    torch.save(build(document), buffer)
    return buffer.getvalue()


def repacked(content: bytes) -> bytes:
    """Return an archive whose pickle is `content`, and whose first storages are of 8 kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/byteorder", "little")
        for i in range(3):
            archive.writestr(f"x/data/{i}", b"\0" * 8192)
        archive.writestr("x/version", "3\n")
    return buffer.getvalue()


_DOWN, _UP, _ALPHA = (f"lora_unet_{KEY.replace('.', '_')}k.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
PICKLES = [
    {_DOWN: "plain", _UP: "up", _ALPHA: "one"},
    {"state_dict": {_DOWN: "plain", _UP: "half"}, "epoch": 3},
    *({_DOWN: "plain", _UP: kind, _ALPHA: kind} for kind in KINDS),
]


def read_pickle(folder: Path) -> None:
    """Read tensors out of a pickle, and import them."""
    read_tensors(folder / "x.pt")
    assert import_lora(folder / "x.pt").pairs


def read_bare_pickle(folder: Path) -> None:
    """Read a pickle inside an archive of torch's."""
    (folder / "x.pt").write_bytes(repacked((folder / "x.pkl").read_bytes()))
    read_tensors(folder / "x.pt")


def bare_pickles(_: Path) -> list[bytes]:
    """Return the pickles inside archives of torch's."""
    with_data = [zipfile.ZipFile(io.BytesIO(pickled(document))) for document in PICKLES]
    return [archive.read("archive/data.pkl") for archive in with_data] + [pickle.dumps({"x": [1] * 3}, 2)]


# YAML


def lay_members(folder: Path) -> None:
    """Write two erasers and a manifest."""
    for name, seed in (("a", 0), ("b", 1)):
        random_eraser({"conv": 1}, f"a {name}", seed=seed, dtype=torch.float32).save(folder / name)
    (folder / "b.yaml").write_text("stack: [{file: b}]")


MANIFESTS = [
    {"stack": [{"file": "a", "weight": 0.5, "blocks": {"conv": 2.0}}, {"file": "b.yaml", "weight": -1}]},
    {"stack": [{"file": "a", "sha256": "0" * 64}, {"file": "x.yaml"}, {"file": "b/pytorch_lora_weights.safetensors"}]},
]


def read_recipe(folder: Path) -> None:
    """Load a recipe, and lay out what it teaches."""
    recipe = load_recipe(folder / "x.yaml")
    assert all(concept.lessons() for concept in recipe.concepts)
    dump_recipe(recipe)


def recipe_documents() -> list[Any]:
    """Return recipes: one with every field, and those that ship."""
    whole = yaml.safe_load(dump_recipe(tiny_recipe("owner/model")))
    short = {
        "extends": ["fast", "concepts/van-gogh"],
        "base": "emoji",
        "scope": "re:mid.*to_v$",
        "lora": {"ranks": {"full": 2}},
    }
    filled = {"extends": "x2.yaml", "base": "emoji", "concepts": [{"name": "x", "prompts": ["a {x}"], "fill": ["b", "c"]}]}
    shipped = [yaml.safe_load(recipe_text(name)) for name in recipe_names()[::9]]
    return [whole, short, filled, *shipped]


def lay_recipe(folder: Path) -> None:
    """Write a recipe to extend."""
    (folder / "x2.yaml").write_text("extends: [fast, fast]\n")


CONCEPTS = [ErasedConcept(name="a cat", synonyms=("kitten",), pairs=(("a cat", ""),), eta=1.0)]


def read_suite(folder: Path) -> None:
    """Load a suite, and lay out its pictures."""
    suite = load_suite(folder / "x.yaml")
    plan_cases(suite, CONCEPTS)


def suite_documents() -> list[Any]:
    """Return suites: one of each kind of prompts, and those that ship."""
    mine = {
        "description": "x",
        "base": "emoji",
        "prompts": {
            "filled": {
                "role": "general",
                "templates": ["a {b} {concept}"],
                "fill": {"b": ["c", "d"]},
                "label": "{b}",
                "count": 3,
            },
            "domain": {"role": "general", "domain": "object", "count": 2, "seed": 3},
            "pairs": {"role": "paraphrase", "domain": "pairs"},
        },
        "detectors": {"judge": {"roles": ["target"]}},
        "distances": {"fid": {"reference": "photos"}},
        "attacks": {"fine-tune": {"steps": 3}},
        "neighbours": {"animals": ["cat", "dog"]},
        "targets": False,
        "steps": 4,
        "guidance": 2.0,
    }
    root = PROJECT / "esd_lora/evaluation/suites"
    return [mine, *(yaml.safe_load((root / f"{name}.yaml").read_text("utf-8")) for name in suite_names())]


# Tables, pictures, scores


def as_csv(document: Any) -> bytes:
    """Return a list of rows as CSV."""
    text = io.StringIO()
    rows = document if isinstance(document, list) else [[document]]
    csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


TABLES = [
    [
        ["case_number", "prompt", "evaluation_seed", "class", "sd_image_width"],
        [1, "a cat", 3721, "cat", 512],
        [2, "b", 2**62, "", 64],
    ],
    [["", "prompt", "sd_seed", "sd_guidance_scale"], [0, "two\nlines", "3.0", 7.5], [1, 'a "quote", b', 4, 255]],
]


REQUESTS = [
    [
        ["id", "concept", "synonyms", "kind", "keep", "due", "train.steps", "lora.ranks"],
        ["a", "a cat", "kitten;tom", "object", "a dog", "2026-12-01", 200, "{xattn: 4}"],
        ["b", "Van Gogh", "", "style", "", "", "auto", ""],
    ],
]
REQUEST_LINES = [
    [
        {"id": "a", "concept": "a cat", "kind": "object", "synonyms": ["kitten"], "train.steps": 200, "due": "2026-12-01"},
        {"id": "b", "concept": "tiger", "kind": "object", "synonyms": ["kitten"], "private": True, "lora.ranks": {"xattn": 4}},
    ]
]


def registry_log(folder: Path) -> list[bytes]:
    """Return the log of a registry in which every kind of thing happened."""
    (folder / "list.jsonl").write_bytes(as_lines(REQUEST_LINES[0]))
    registry = Registry.open(folder / "mine", new=True)
    with warnings.catch_warnings(action="ignore"):
        registry.add(read_requests(folder / "list.jsonl"))
        registry.decide("a", "open", concept="a dog")
        registry.set_status("a", "done")
        registry.withdraw("b")
    return [(folder / "mine" / "registry.jsonl").read_bytes()]


def pictures(_: Path) -> list[bytes]:
    """Return PNGs with a prompt: plain, with a palette, with 16 bits, interlaced by no one."""
    contents: list[bytes] = []
    for mode in ("RGB", "P", "I;16", "1", "RGBA", "LA"):
        note, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        note.add_itxt("parameters", "a cat\nin two lines", zip=mode == "P")
        note.add_text("Comment", "x" * 50, zip=True)
        Image.new(mode, (9, 7)).save(buffer, "PNG", pnginfo=note)
        contents.append(buffer.getvalue())
    return contents


def photos(_: Path) -> list[bytes]:
    """Return pictures in every format, a WEBP of two frames and a JPEG that is turned among them."""
    contents: list[bytes] = []
    turned = Image.Exif()
    turned[0x0112] = 6
    for kind, options in (("PNG", {}), ("JPEG", {"exif": turned}), ("WEBP", {}), ("BMP", {}), ("PNG", {"save_all": True})):
        buffer = io.BytesIO()
        frames = [Image.new("RGB", (9, 7), color) for color in ("red", "blue")]
        frames[0].save(buffer, kind, **options, **({"append_images": frames[1:]} if "save_all" in options else {}))
        contents.append(buffer.getvalue())
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return [*contents, buffer.getvalue()]


RECORD = {"metric": "x", "weights": "café"}
SCORES = [
    [
        {"record": RECORD},
        *({"variant": "base", "case": f"{i}", "values": {"x": i}, "details": {"seen": "\u2028"}} for i in range(3)),
    ]
]


def as_lines(document: Any) -> bytes:
    """Return a list as lines of JSON."""
    values = document if isinstance(document, list) else [document]
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode("utf-8", "surrogatepass")


NUMBER = {"value": 0.5, "low": 0.1, "high": 0.9, "of": 4, "hits": 2, "difference": {"value": -0.5, "low": -1.0, "high": 0.0}}
MEMBER = {"name": "a cat", "base": NUMBER, "alone": None, "together": NUMBER}
REPORTS = [
    {
        "suite": "x",
        "concepts": ["a cat"],
        "variants": {"base": {"target": {"x": NUMBER}}},
        "labels": {"cat": {"base": {"x": NUMBER}}},
        "layout": {"erased": {"UA": 0.5}},
        "stack": {"metric": "x", "members": [MEMBER], "matrix": [[NUMBER, None]], "kept": [NUMBER]},
        "distances": {"fid": {"erased": {"value": 1.5, "of": 3}}},
        "not_run": {"clip": "no weights"},
        "record": {"detectors": {"x": {"metric": "x"}, "fid": {"metric": "FID", "beside": "base"}}},
        "gates": [{"gate": "x < 1", "failed": False}],
    }
]

CASES = [
    [case._replace(id=f"{role}-{i}", role=role).to_dict() for i in range(2) for role in ROLES]
    for case in (Case("", "target", "a", 0, "cat"),)
]


def lay_painted(folder: Path) -> None:
    """Write the pictures of `CASES`, of the base and erased."""
    for case in CASES[0]:
        for variant in ("base", "erased"):
            file = painted_file(folder, variant, case["case"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(Image.new("RGB", (2, 2))))


def attachable() -> list[Any]:
    """Return reports of the eraser that `lay_eraser` writes."""
    member = {"sha256": hash_tensors(my_eraser().state_dict()), "weight": 1.0, "blocks": {}}
    return [{**REPORTS[0], "record": {**REPORTS[0]["record"], "variants": {"erased": {"erasers": [member]}}}}]


# Bases


@cache
def tiny_base() -> Path:
    """Return a saved toy pipeline, which is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="esd-lora-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_tiny(folder / "tiny")


def lay_base(folder: Path) -> None:
    """Copy a base into a folder, with code of its own in it."""
    shutil.copytree(tiny_base(), folder, dirs_exist_ok=True)
    for place in ("pipeline.py", "unet/mine.py", "mine.py"):
        (folder / place).write_text("raise SystemExit\n")


def base_document(name: str) -> Any:
    """Return what a configuration of the toy base says."""
    return json.loads((tiny_base() / name).read_text("utf-8"))


def stored(folder: Path) -> None:
    """Find the layers of a base."""
    assert open_stored(folder).files


def load_whole(folder: Path) -> None:
    """Load a base."""
    assert load_base(folder, device="cpu").pipe


def base_reader(name: str, read: Callable[[Path], object], **changes: Any) -> Reader:
    """Return the reader of one configuration of a base, each of whose values may be that of `changes` too."""
    document = base_document(name)
    content = (tiny_base() / name).read_bytes()
    others = [{**document, key: value} for key, value in changes.items()]
    return Reader(name, read, lambda _: [content], [document, *others], beside=lay_base)


def read_checkpoint(folder: Path) -> None:
    """Find the layers of a single file."""
    assert open_stored(folder / "x.safetensors").files


@cache
def checkpoint() -> bytes:
    """Return a single-file checkpoint of Stable Diffusion at toy size: its header, and as many ones as it announces."""
    content = original_checkpoints.save_checkpoint(tiny_pipeline(), tiny_base().parent / "model.safetensors").read_bytes()
    return safetensors_file(safetensors_document(content))


INDEX = {
    "text_encoder": ["mine", "Mine"],
    "vae": ["os", "system"],
    "_class_name": ["mine", "Mine"],
    "safety_checker": [None, None],
}
DENOISER = {
    "block_out_channels": [10**9, 10**9],
    "layers_per_block": 10**9,
    "transformer_layers_per_block": 10**9,
    "cross_attention_dim": 10**9,
    "num_class_embeds": 10**9,
    "time_embedding_dim": 10**9,
}
TEXT_ENCODER = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**9,
    "max_position_embeddings": 10**9,
    "attn_implementation": "kernels-community/flash-attn",
    "auto_map": {"AutoModel": "mine.Mine"},
}
READERS: dict[str, Reader] = {
    "eraser": Reader(
        "x.safetensors",
        read_eraser,
        lambda _: eraser_contents(),
        [safetensors_document(content) for content in eraser_contents()],
        safetensors_file,
    ),
    "state": Reader("x.safetensors", read_state, lambda _: state_contents()),
    "lora": Reader(
        "x.safetensors",
        read_lora,
        lambda _: lora_contents(),
        [safetensors_document(content) for content in lora_contents()],
        safetensors_file,
    ),
    "adapter": Reader(
        "adapter_config.json",
        lambda folder: inspect_file(folder).lines(),
        lambda _: [json.dumps(document).encode() for document in ADAPTERS],
        ADAPTERS,
        beside=lay_adapter,
    ),
    "pt": Reader("x.pt", read_pickle, lambda _: [pickled(document) for document in PICKLES], PICKLES, pickled),
    "pickle": Reader("x.pkl", read_bare_pickle, bare_pickles),
    "manifest": Reader(
        "x.yaml",
        lambda folder: load_eraser(folder / "x.yaml").state_dict(),
        lambda _: [as_yaml(document) for document in MANIFESTS],
        MANIFESTS,
        as_yaml,
        lay_members,
    ),
    "recipe": Reader(
        "x.yaml",
        read_recipe,
        lambda _: [as_yaml(document) for document in recipe_documents()],
        recipe_documents(),
        as_yaml,
        lay_recipe,
    ),
    "suite": Reader(
        "x.yaml", read_suite, lambda _: [as_yaml(document) for document in suite_documents()], suite_documents(), as_yaml
    ),
    "prompts": Reader(
        "x.csv",
        lambda folder: read_prompt_file(folder / "x.csv"),
        lambda _: [as_csv(table) for table in TABLES],
        TABLES,
        as_csv,
    ),
    "lines": Reader(
        "x.txt",
        lambda folder: read_prompt_file(folder / "x.txt"),
        lambda _: [b"# mine\na cat\n\n  a dog \n", "\ufeffein Käfer\r\n猫\u2028x".encode()],
    ),
    "requests": Reader(
        "x.csv",
        lambda folder: read_requests(folder / "x.csv"),
        lambda _: [as_csv(table) for table in REQUESTS],
        REQUESTS,
        as_csv,
    ),
    "request lines": Reader(
        "x.jsonl",
        lambda folder: read_requests(folder / "x.jsonl"),
        lambda _: [as_lines(document) for document in REQUEST_LINES],
        REQUEST_LINES,
        as_lines,
    ),
    "registry": Reader("registry.jsonl", lambda folder: Registry.open(folder).requests(), registry_log),
    "picture": Reader("1_erased.png", read_samples, pictures),
    "photo": Reader("x", lambda folder: open_picture(folder / "x"), photos),
    "scores": Reader(
        "x.jsonl",
        lambda folder: _resume(folder / "x.jsonl", RECORD),
        lambda _: [as_lines(document) for document in SCORES],
        SCORES,
        as_lines,
    ),
    "cases": Reader(
        "cases.jsonl",
        _take_samples,
        lambda _: [as_lines(document) for document in CASES],
        CASES,
        as_lines,
        lay_painted,
    ),
    "evaluation": Reader(
        "evaluation.json",
        lambda folder: _differences(folder / "evaluation.json", REPORTS[0]["record"], tolerant=False),
        lambda _: [json.dumps(document["record"]).encode() for document in REPORTS],
        [document["record"] for document in REPORTS],
    ),
    "attached": Reader(
        "summary.json",
        lambda folder: attach(folder / "mine", folder),
        lambda _: [json.dumps(document).encode() for document in attachable()],
        attachable(),
        beside=lay_eraser,
    ),
    "report": Reader(
        "summary.json",
        lambda folder: Report.load(folder).to_markdown(),
        lambda _: [json.dumps(document).encode() for document in REPORTS],
        REPORTS,
    ),
    "hub": Reader(
        "answers.json",
        read_hub,
        lambda _: [json.dumps(document).encode() for document in hub_documents()],
        hub_documents(),
        beside=lay_eraser,
    ),
    "index": base_reader("model_index.json", stored, **INDEX),
    "schedule": base_reader("scheduler/scheduler_config.json", stored, prediction_type="flow_prediction"),
    "checkpoint": Reader(
        "x.safetensors",
        read_checkpoint,
        lambda _: [checkpoint()],
        [safetensors_document(checkpoint())],
        safetensors_file,
    ),
    "denoiser": base_reader("unet/config.json", load_whole, **DENOISER),
    "text encoder": base_reader("text_encoder/config.json", load_whole, **TEXT_ENCODER),
    "vae": base_reader("vae/config.json", load_whole, layers_per_block=10**9),
    "whole index": base_reader("model_index.json", load_whole, **INDEX),
    "whole schedule": base_reader("scheduler/scheduler_config.json", load_whole),
}
"""Name to reader. Those of whole bases build models for each case, and take longer."""
