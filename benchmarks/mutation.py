"""Mutate the modules that carry mathematics, one operator or number at a time, and print what no test notices.

    OMP_NUM_THREADS=1 python benchmarks/mutation.py --only objectives,intervals
    OMP_NUM_THREADS=1 python benchmarks/mutation.py                   # all of them: an hour or so

A mutant is the module with one change; it is killed where one of the tests that concern the module fails, or takes too long.
Mutants are written into a copy of the package, never here. What others bring (torch, diffusers, ...) is imported once: every
mutant runs in a fork. Survivors are printed; some change nothing that can be seen, such as how much is done at a time.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[1]
TESTS = {
    "objectives": ["unit/test_objectives.py", "golden/test_against_reference.py"],
    "trajectory": ["unit/test_trajectory.py", "golden/test_against_reference.py"],
    "erasers/stacking": ["unit/test_stacking.py", "unit/test_finite.py", "property/test_stack_algebra.py"],
    "fusing/closed_form": ["integration/test_fusing.py"],
    "evaluation/report/intervals": ["unit/test_intervals.py"],
}
"""Module to the tests that concern it, the quickest first."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
LIMIT = 180  # seconds for a mutant's tests


class Mutant(NamedTuple):
    """A module with one change."""

    change: str
    source: str


def mutants(text: str) -> Iterator[Mutant]:
    """Yield every mutant of a module: operators swapped or dropped, numbers moved by 1, signs and `not` lost."""
    tree = ast.parse(text)
    for number, node in enumerate(ast.walk(tree)):
        for change in changes(node):
            mutated = copy.deepcopy(tree)
            place = next(other for i, other in enumerate(ast.walk(mutated)) if i == number)
            before = ast.unparse(node)
            replace(mutated, place, change)
            yield Mutant(f"{before} -> {ast.unparse(change)}", ast.unparse(mutated))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        if not any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right)):
            yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
            yield node.left
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)  # type: ignore[arg-type]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)


def replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Put a node into the place of another."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                setattr(parent, name, [new if part is old else part for part in value])
    ast.fix_missing_locations(tree)


def runnable(text: str) -> str:
    """Return a module without docstrings, as every mutant is written."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) and len(node.body) > 1:
            node.body = node.body[1:]
    return ast.unparse(tree)


def killed(package: Path, module: str, source: str, tests: list[str]) -> bool:
    """Run the tests of a module in a fork, with a mutant in its place, and return whether one fails."""
    (package / f"{module}.py").write_text(source, "utf-8")
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 1
        try:
            import pytest

            # Asserts as they are: rewriting warns of what was imported before.
            quick = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
            code = int(pytest.main([*quick, *(f"{PROJECT}/tests/{test}" for test in tests)]))
        finally:
            os._exit(code)
    began = time.monotonic()
    while time.monotonic() < began + LIMIT:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="names of modules, or their ends, with commas between")
    parser.add_argument("--every", type=int, default=1, help="take every so many mutants, for a sample")
    options = parser.parse_args()
    chosen = [m for m in TESTS if not options.only or any(m.endswith(end) for end in options.only.split(","))]
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "esd_lora"
        shutil.copytree(PROJECT / "esd_lora", package, ignore=shutil.ignore_patterns("__pycache__", "emoji"))
        (package / "bases" / "emoji").symlink_to(PROJECT / "esd_lora" / "bases" / "emoji")
        shutil.copytree(PROJECT / "recipes", package / "recipes")
        sys.path[:0] = [folder, str(PROJECT / "tests")]
        sys.dont_write_bytecode = True
        import diffusers  # noqa: F401
        import hypothesis  # noqa: F401
        import peft  # noqa: F401
        import scipy.stats  # noqa: F401
        import torch

        torch.set_num_threads(1)
        for module in chosen:
            original = (package / f"{module}.py").read_text("utf-8")
            text = runnable(original)
            assert not killed(package, module, text, TESTS[module]), f"tests of {module} fail without any mutant"
            made = list(mutants(text))[:: options.every]
            alive = [mutant for mutant in made if not killed(package, module, mutant.source, TESTS[module])]
            (package / f"{module}.py").write_text(original, "utf-8")
            print(f"{module}: {len(made) - len(alive)} of {len(made)} mutants killed", flush=True)
            for mutant in alive:
                print(f"  survives: {mutant.change}", flush=True)


if __name__ == "__main__":
    main()
