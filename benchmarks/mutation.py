"""Mutate the modules that carry mathematics, one operator or number at a time, and print what no test notices.

    python benchmarks/mutation.py --only objectives,intervals
    python benchmarks/mutation.py                                 # all of them: an hour on two idle cores
    python benchmarks/mutation.py --tests tests/unit --every 5    # a sample, judged by fewer tests

First every test runs once, and coverage.py tells which lines it reaches. A mutant is the module with one change; it is killed
where a test that reaches the changed line fails or takes far longer: first those that killed before it in the same module,
then the quickest, up to a minute's worth. `--reach FILE` keeps which tests reach what, for the next time.
Mutants are written into copies of the package, never here. What others bring (torch, diffusers, ...) is imported once: every
mutant runs in a fork. That, and operators that leave texts alone, is why this is not mutmut or cosmic-ray, whose mutants of
messages would be most of the list. Survivors are printed; some change nothing that can be seen, such as a chunk's size.
"""

from __future__ import annotations

import argparse
import ast
import copy
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import coverage
import pytest
from tqdm import tqdm

PROJECT = Path(__file__).parents[1]
MODULES = [
    "objectives",
    "trajectory",
    "teacher",
    "gating",
    "erasers/stacking",
    "fusing/closed_form",
    "fusing/moments",
    "fusing/harmonising",
    "weights/merging",
    "weights/streaming",
    "formats/exporting",
    "formats/importing",
    "evaluation/baselines/sld",
    "evaluation/report/intervals",
]
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
HEAD = """# Mutants

Written by `python benchmarks/mutation.py --out benchmarks/mutation.md`, one section for each module whenever it runs.

A mutant is a module with one operator, number, sign or truth value changed; a test that fails on it kills it. What survives is
listed with the reason why no test can notice it, or need not.
"""
_STRICT = "the two are of one length by construction; `strict` guards against a change of the code"
_BAR = "whether there is a progress bar"
_CALLER = "which caller a warning points at"
_LIMIT = "the last unit of a limit"
REASONS = [
    ("True -> False", "strict=True", _STRICT),
    ("True -> False", "progress: bool=True", f"{_BAR} unless one says"),
    ("not progress -> progress", "disable=not progress", _BAR),
    ("False -> True", "full_matrices=False", "further columns, which are cut off with the small ones"),
    ("3 -> 4", "were trained on different weights", _CALLER),
    ("2 -> 3", "parts = sorted(", "how deep the blocks lie that a message suggests"),
    ("2 -> 3", "layers are wider than", _CALLER),
    ("0 -> 1", "layers are wider than", "which of the wide layers a warning names"),
    ("2 -> 3", "json.dumps(config, indent=2)", "how a file is indented"),
    ("1000000.0", "MB are free", "a millionth of a megabyte in a message"),
    ("and 'the pipeline'", "_name_or_path", "what messages call a pipeline that came without a name"),
    ("1.0 -> 2.0", "min(best, 1.0)", "rounding alone: no cosine is above 1 by more than 1e-7"),
    ("0 -> 1", "batch, held = ([], 0)", "a byte more or less in a batch of a gigabyte"),
    ("== torch.float16", "GradScaler", "the scaler scales loss and step alike; only a GPU in float16 needs it"),
    ("len(fitting) > 1", "len(fitting) > 1", "one family that fits is taken whatever its widths"),
    ("10000 -> 10001", "max_length=10000", _LIMIT),
    ("2000 -> 2001", "[:2000]", _LIMIT),
    ("1 -> 2", "MAX_JSON + 1", "a byte beyond the limit is refused as well as two"),
    ("<= _modules", "fitting =", "no file has every name of a family, as many names are of the same layer"),
    ("1000 -> 1001", "'batch': 1000", "resamples drawn at a time"),
    ("10000 -> 10001", "resamples: int=10000", "one resample more"),
]
"""A part of a change, a part of its line, and why no test can notice it, or need not."""
WORTH = 60  # seconds of tests for a mutant
PYTEST = ["-x", "-q", "-m", "not slow", "--assert=plain", "-p", "no:cacheprovider"]
"""Asserts as they are: rewriting warns of what was imported before."""


class Mutant(NamedTuple):
    """A module with one change."""

    line: int
    called: bool
    """Whether the line runs when a function is called, and not once, when the module is imported."""
    change: str
    source: str


def mutants(text: str) -> Iterator[Mutant]:
    """Yield every mutant of a module: operators swapped or dropped, numbers moved by 1, signs and `not` lost."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    called = {
        id(node) for f in functions for part in (f.body if isinstance(f.body, list) else [f.body]) for node in ast.walk(part)
    }
    for number, node in enumerate(ast.walk(tree)):
        for change in changes(node):
            mutated = copy.deepcopy(tree)
            place = next(other for i, other in enumerate(ast.walk(mutated)) if i == number)
            before = ast.unparse(node)
            replace(mutated, place, change)
            description = f"{before} -> {ast.unparse(change)}"
            yield Mutant(node.lineno, id(node) in called, description, ast.unparse(mutated))  # type: ignore[attr-defined]


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


def without_docstrings(text: str) -> str:
    """Return a module as its mutants are written: one line for each statement, and no docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) and len(node.body) > 1:
            node.body = node.body[1:]
    return ast.unparse(tree)


def copy_of_package(folder: Path) -> Path:
    """Copy the package into a folder, the chosen modules as their mutants are written, and return where it lies."""
    package = folder / "esd_lora"
    shutil.copytree(PROJECT / "esd_lora", package, ignore=shutil.ignore_patterns("__pycache__", "emoji"))
    (package / "bases" / "emoji").symlink_to(PROJECT / "esd_lora" / "bases" / "emoji")
    shutil.copytree(PROJECT / "recipes", package / "recipes")
    for module in MODULES:
        path = package / f"{module}.py"
        path.write_text(without_docstrings(path.read_text("utf-8")), "utf-8")
    return package


def start_pytest(package: Path, options: list[str], plugins: list[object]) -> int:
    """Fork a run of pytest on a copy of the package, and return the process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 1
    try:
        os.chdir(PROJECT)
        sys.path.insert(0, str(package.parent))
        code = int(pytest.main([*PYTEST, f"--basetemp={package.parent / 'tmp'}", *options], plugins=plugins))
    finally:
        os._exit(code)


class Reach:
    """A plugin of pytest that notes how long each test takes, and which lines of the package it reaches.

    What a fixture reaches counts for every test of the file, since fixtures are shared.
    """

    def __init__(self, package: Path, result: Path) -> None:
        self.result = result
        self.seconds: dict[str, float] = defaultdict(float)
        self.unfit: set[str] = set()
        self.coverage = coverage.Coverage(data_file=None, source=[str(package)], config_file=False)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item):
        self.coverage.switch_context(item.nodeid.partition("::")[0])
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.unfit.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        fit = {test: seconds for test, seconds in self.seconds.items() if test not in self.unfit}
        lines = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
        self.result.write_text(json.dumps({"seconds": fit, "unfit": sorted(self.unfit), "lines": lines}), "utf-8")


class Killer:
    """A plugin of pytest that writes the name of the first test that fails into a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.file.write_text(report.nodeid, "utf-8")


def reached_lines(package: Path, tests: list[str], kept: Path | None) -> dict[str, dict[int, list[str]]]:
    """Run the tests once, and return for each module which tests reach each line, the quickest first; 0: all of their files."""
    result = kept or package.parent / "reach.json"
    if not result.exists():
        os.waitpid(
            start_pytest(package, ["--maxfail=1000", "--continue-on-collection-errors", *tests], [Reach(package, result)]), 0
        )
    reach = json.loads(result.read_text("utf-8"))
    seconds: dict[str, float] = reach["seconds"]
    print(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s; {len(reach['unfit'])} fail or skip here, and are not used")
    by_file = defaultdict(list)
    for test in seconds:
        by_file[test.partition("::")[0]].append(test)
    reached: dict[str, dict[int, list[str]]] = {}
    for path, lines in reach["lines"].items():
        module = path.rpartition("/esd_lora/")[2].removesuffix(".py")
        by_line = {int(line): {test for name in names for test in by_file.get(name, [name])} for line, names in lines.items()}
        files = {test.partition("::")[0] for test in set().union(*by_line.values())}
        by_line[0] = {test for file in files for test in by_file[file]}  # they may read what it holds, and call nothing
        reached[module] = {
            line: sorted((t for t in names if t in seconds), key=seconds.__getitem__) for line, names in by_line.items()
        }
        for line, names in reached[module].items():
            total = 0.0
            reached[module][line] = [test for test in names if (total := total + seconds[test]) <= WORTH]
    return reached


class Verdict(NamedTuple):
    """What became of the mutants of a module."""

    alive: list[Mutant]
    """Those that no test noticed."""
    killers: dict[str, int]
    """Test to the number of mutants on which it failed first."""


def judge(made: list[Mutant], module: str, reached: dict[int, list[str]], packages: list[Path]) -> Verdict:
    """Run the tests of every mutant of a module, as many at a time as there are copies of the package."""
    alive, free, running = list[Mutant](), list(packages), dict[int, tuple[Mutant, Path, float]]()
    killers: dict[str, int] = {}
    left = list(made)
    with tqdm(total=len(made), desc=module, unit="mutant") as bar:
        while left or running:
            while left and free:
                mutant, package = left.pop(0), free.pop()
                # A line that runs once, when it is imported, is of concern to all tests of the module.
                tests = (reached.get(mutant.line) if mutant.called else None) or reached[0]
                ordered = sorted(tests, key=lambda test: -killers.get(test, 0))
                (package / f"{module}.py").write_text(mutant.source, "utf-8")
                child = start_pytest(package, ordered, [Killer(package.parent / "killer")])
                running[child] = mutant, package, time.monotonic() + 30 + 5 * WORTH
            for child, (mutant, package, end) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if not done and time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
                    done, status = os.waitpid(child, 0)
                if done:
                    del running[child]
                    free.append(package)
                    bar.update()
                    killer = package.parent / "killer"
                    if killer.exists():
                        test = killer.read_text("utf-8")
                        killers[test] = killers.get(test, 0) + 1
                        killer.unlink()
                    if status == 0:
                        alive.append(mutant)
            time.sleep(0.02)
    return Verdict(alive, killers)


def require_fit(tests: list[str], packages: list[Path]) -> None:
    """Run tests without any mutant, each copy of the package in turn, and stop where one fails: it proves nothing."""
    for package in packages:
        killer = package.parent / "killer"
        _, status = os.waitpid(start_pytest(package, tests, [Killer(killer)]), 0)
        if status and tests:
            raise SystemExit(f"{killer.read_text('utf-8') if killer.exists() else tests} fails without any mutant")


def import_others(package: Path) -> None:
    """Import what the package and its tests stand on, and forget the package itself, so that every fork reads its own copy."""
    sys.path.insert(0, str(package.parent))
    sys.path.insert(1, str(PROJECT / "tests"))
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401
    import torch

    import esd_lora.cli  # noqa: F401
    import toys  # noqa: F401
    from esd_lora.evaluation import evaluating  # noqa: F401

    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None  # as many mutants at a time as there are cores
    sys.path.remove(str(package.parent))
    for name in list(sys.modules):
        file = getattr(sys.modules[name], "__file__", None) or ""
        if name.partition(".")[0] == "esd_lora" or file.startswith(str(PROJECT / "tests")):
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="names of modules, or their ends, with commas between")
    parser.add_argument(
        "--tests",
        nargs="*",
        default=["tests/unit", "tests/golden", "tests/property", "tests/integration"],
        help="the tests that are to notice",
    )
    parser.add_argument("--reach", type=Path, help="file to keep in, or take from, which tests reach what")
    parser.add_argument("--out", type=Path, help="Markdown file to write, besides printing")
    parser.add_argument("--every", type=int, default=1, help="take every so many mutants, for a sample")
    options = parser.parse_args()
    chosen = [m for m in MODULES if not options.only or any(m.endswith(end) for end in options.only.split(","))]
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        packages = [copy_of_package(Path(folder) / str(i)) for i in range(os.cpu_count() or 1)]
        import_others(packages[0])
        reached = reached_lines(packages[0], options.tests, options.reach)
        for module in chosen:
            text = (packages[0] / f"{module}.py").read_text("utf-8")
            made = list(mutants(text))[:: options.every]
            alive, killers = judge(made, module, reached[module], packages)
            for package in packages:
                (package / f"{module}.py").write_text(text, "utf-8")
            require_fit(list(killers), packages)
            print(fate := section(module, text, made, alive, killers), flush=True)
            if options.out:
                write_section(options.out, module, fate)


def section(module: str, text: str, made: list[Mutant], alive: list[Mutant], killers: dict[str, int]) -> str:
    """Return what became of a module's mutants, in Markdown."""
    dead, failed = len(made) - len(alive), sum(killers.values())
    lines = [
        f"## `{module}.py`: {dead} of {len(made)} killed, {dead / max(1, len(made)):.1%}",
        "",
        f"{datetime.date.today()}, torch {version('torch')}, diffusers {version('diffusers')}.",
        f"{failed} by {len(killers)} tests that fail on them, {dead - failed} by errors on import or by time.",
        *(["These survive:"] if alive else []),
        "",
    ]
    for mutant in alive:
        line = text.splitlines()[mutant.line - 1].strip()
        reason = next((reason for part, place, reason in REASONS if part in mutant.change and place in line), None)
        lines.append(f"- `{mutant.change}` in `{line[:100]}`: {reason or 'no reason is known; a test is missing.'}")
    return "\n".join([*lines, *[""] * bool(alive)])


def write_section(file: Path, module: str, fate: str) -> None:
    """Write the section of one module into a page, in the place of an older one."""
    head, *parts = file.read_text("utf-8").split("\n## ") if file.exists() else [HEAD]
    sections = {part.partition(".py`")[0].removeprefix("`"): part.rstrip() for part in parts}
    sections[module] = fate.removeprefix("## ").rstrip()
    ordered = [sections[name] for name in MODULES if name in sections]
    file.write_text("\n\n## ".join([head.rstrip(), *ordered]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
