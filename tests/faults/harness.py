"""Runs verbs in forked processes, stops or hinders them at every write in turn, and looks at what is left.

    PYTHONPATH=tests python tests/faults/harness.py report.json --stride 1 --pairs 10

A process that has imported everything forks for each trial, so that a trial costs what the verb costs. Where a verb writes is
seen by Python's audit events (`open`, `os.rename`, ...), which come before each call to the system: the package itself has
nothing in it for this. Clocks stand still in the trials, so what they leave can be compared byte by byte.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

LONGEST = 120
"""Seconds after which a trial counts as hung."""
CREATING = {"open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"}
WRITING = CREATING | {"os.remove", "os.rmdir", "os.chmod"}
"""Audit events of calls that may change a file system."""
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EMFILE)
SLOW = ("train", "evaluate")
PUSH = "push"
"""The verb that writes elsewhere: it is stopped at its requests."""
LOG = "registry.jsonl"
REGISTRY = "requests"
"""What adds to what is there, and replaces nothing."""
GROWING = ("train_log.jsonl", "checkpoint.pt", "previews")
"""What a training leaves on its way, and takes away or goes on with."""

SUITE = """description: Likeness of toy pictures.
prompts: {all: {role: general, templates: ["a {class}"], fill: {class: [cat, dog]}, label: "{class}"}}
detectors: {ssim: {}}
steps: 2
"""


class Places(NamedTuple):
    """What verbs read."""

    base: Path
    file: Path
    cat: Path
    car: Path
    tuned: Path
    recipe: Path
    suite: Path


class Verb(NamedTuple):
    """A command, in two variants that leave different results."""

    command: Callable[[Places, Path, int], Sequence[object]]
    """From what it reads, where it writes and the number of the variant, 0 or 1, to its arguments."""
    out: str = "out"
    grows: bool = False
    """Whether a directory that is new fills up bit by bit, to be gone on with."""
    members: bool = False
    """Whether the erasers that it reads have to lie beside what it writes."""


VERBS: dict[str, Verb] = {
    "train": Verb(lambda p, out, v: ["train", p.recipe, "-s", f"train.seed={v}", "--device", "cpu", "-o", out], grows=True),
    "stack": Verb(lambda p, out, v: ["stack", p.cat, f"{p.car}:{v + 1}", "--report", "-o", out]),
    "stack to a manifest": Verb(
        lambda p, out, v: ["stack", out.with_name("cat"), f"{out.with_name('car')}:{v + 1}", "-o", out],  # noqa: ARG005
        "out.yaml",
        members=True,
    ),
    "merge": Verb(lambda p, out, v: ["merge", f"{p.cat}:{v + 1}", "--base", p.base, "-o", out]),
    "merge a file": Verb(lambda p, out, v: ["merge", f"{p.cat}:{v + 1}", "--base", p.file, "-o", out], "out.safetensors"),
    "export": Verb(lambda p, out, v: ["export", (p.cat, p.car)[v], "--layout", "kohya", "-o", out], "out.safetensors"),
    "export for peft": Verb(lambda p, out, v: ["export", (p.cat, p.car)[v], "--layout", "peft", "-o", out]),
    "import": Verb(lambda p, out, v: ["import", (p.cat, p.car)[v] / "pytorch_lora_weights.safetensors", "-o", out]),
    "extract": Verb(lambda p, out, v: ["extract", "--base", p.base, "--tuned", p.tuned, "--rank", v + 1, "-o", out]),
    "evaluate": Verb(
        lambda p, out, v: ["evaluate", f"{p.cat}:{v + 1}", "--base", p.base, "--suite", p.suite, "--device", "cpu", "-o", out],
        grows=True,
    ),
    "generate": Verb(
        lambda p, out, v: [
            *("generate", "a cat", "--base", p.base, "--eraser", f"{p.cat}:{v + 1}", "--compare", "--steps", 2),
            *("--device", "cpu", "-o", out),
        ]
    ),
    "pull": Verb(lambda p, out, v: ["pull", ("ada/cat", "ada/car")[v], "-o", out]),  # noqa: ARG005
    "recipes copy": Verb(lambda p, out, v: ["recipes", "copy", ("fast", "paper")[v], "-o", out], "out.yaml"),  # noqa: ARG005
}


class Result(NamedTuple):
    """How a trial ended."""

    code: int
    """Exit code, or the negative number of the signal that ended it."""
    text: str
    events: int
    """Number of calls that write, below the watched folder."""


class Frozen(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Frozen:
        return cls(2026, 1, 1, tzinfo=tz or UTC)


def set_up(folder: Path) -> Places:
    """Make what verbs read, import what they need, and stop the clocks."""
    import torch

    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"  # its monitor is a thread, and threads do not survive a fork
    keep_locks_apart()
    from esd_lora.recipe_files import dump_recipe
    from esd_lora.training import train
    from original_checkpoints import save_checkpoint
    from tiny import save_tiny, tiny_pipeline, tiny_recipe

    for module in ("training", "formats.importing", "weights.extracting", "fleet.event_log"):
        __import__(f"esd_lora.{module}")
        sys.modules[f"esd_lora.{module}"].datetime = Frozen  # type: ignore[attr-defined]
    for module in ("train_state", "training"):
        sys.modules[f"esd_lora.{module}"].time = SimpleNamespace(monotonic=lambda: 0.0)  # type: ignore[attr-defined]
    base = save_tiny(folder / "base")
    cat = folder / "cat"
    train(tiny_recipe(base, lr=0.05), out=cat, progress=False)
    car = folder / "car"
    train(tiny_recipe(base, concepts=["a car"], scope="noxattn", lr=0.05, steps=2), out=car, progress=False)
    recipe = folder / "recipe.yaml"
    spec = {"lr": 0.05, "checkpoint_every": 2, "preview_every": 2, "probe_every": 2, "refresh_every": 3}
    recipe.write_text(dump_recipe(tiny_recipe(base, steps=5, **spec)), "utf-8")
    suite = folder / "toy.yaml"
    suite.write_text(SUITE)
    file = save_checkpoint(tiny_pipeline(), folder / "model.safetensors")
    places = Places(base, file, cat, car, folder / "tuned", recipe, suite)
    done = run(["merge", f"{cat}:3", "--base", base, "-o", places.tuned])
    assert done.code == 0, done.text
    return places


def keep_locks_apart() -> None:
    """Give tqdm, before its first bar, a lock that a fork copies: who dies holding a shared one hangs the others."""
    from tqdm.std import tqdm

    tqdm.set_lock(threading.RLock())


def run(arguments: Sequence[object], hook: Callable[[], None] | None = None, watch: Path | None = None) -> Result:
    """Run a command in a forked process.

    Args:
        arguments: Of the command line.
        hook: Called in the process before it begins.
        watch: Folder below which writes are counted.
    """
    (result,) = run_together([arguments], hook, watch)
    return result


def run_together(
    commands: Sequence[Sequence[object]], hook: Callable[[], None] | None = None, watch: Path | None = None
) -> list[Result]:
    """Run commands at the same time, each in a forked process."""
    started: list[tuple[int, int, mmap.mmap]] = []
    for arguments in commands:
        (reader, writer), shared = os.pipe(), mmap.mmap(-1, 8)
        pid = os.fork()
        if pid == 0:
            try:
                _be_a_trial(arguments, writer, shared, hook, watch)
            finally:
                os._exit(98)  # nothing of the process that forked is unwound
        os.close(writer)
        started.append((pid, reader, shared))
    results: list[Result] = []
    for pid, reader, shared in started:
        with open(reader, "rb") as output:  # noqa: PTH123
            text = output.read().decode(errors="replace")
        _, status = os.waitpid(pid, 0)
        results.append(Result(os.waitstatus_to_exitcode(status), text, int.from_bytes(shared[:8], "little")))
    return results


def _be_a_trial(
    arguments: Sequence[object], output: int, shared: mmap.mmap, hook: Callable[[], None] | None, watch: Path | None
) -> None:
    """Run a command in this process, which was forked for it, and end the process."""
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.alarm(LONGEST)
        count = 0

        def counting(event: str, event_arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if is_write(event, event_arguments, watch):
                count += 1
                shared[:8] = count.to_bytes(8, "little")

        sys.addaudithook(counting)
        if hook:
            hook()
        from esd_lora.cli import main

        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_write(event: str, arguments: tuple[Any, ...], watch: Path | None, among: set[str] = WRITING) -> bool:
    """Return whether an audit event is of a call that may change what lies below a folder."""
    if event not in among or watch is None or not isinstance(arguments[0], str | bytes):
        return False
    return os.fsdecode(arguments[0]).startswith(str(watch)) and (event != "open" or not reads(arguments))


def reads(arguments: tuple[Any, ...]) -> bool:
    """Return whether a file is opened for reading; a folder opened by its descriptor is to be put on the disk."""
    _, mode, flags = arguments
    if mode is None:
        return not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return not set(mode) & set("wax+")


def killing(number: int, watch: Path) -> Callable[[], None]:
    """Return a hook that has the process killed before its write of a number, from 1."""
    return _at(number, watch, WRITING, lambda: os.kill(os.getpid(), signal.SIGKILL), once=True)


def refusing(number: int, watch: Path, code: int) -> Callable[[], None]:
    """Return a hook that has the system refuse to create anything from a write of a number on."""

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    return _at(number, watch, CREATING, refuse, once=False)


def _at(number: int, watch: Path, events: set[str], act: Callable[[], None], *, once: bool) -> Callable[[], None]:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if is_write(event, arguments, watch, events):
            count += 1
            if count == number or (count > number and not once):
                act()

    return lambda: sys.addaudithook(hook)


def killing_later(seconds: float) -> Callable[[], None]:
    """Return a hook that has the process killed after a time."""

    def hook() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return hook


def limiting(kind: int, amount: int) -> Callable[[], None]:
    """Return a hook that sets a resource limit."""
    return lambda: resource.setrlimit(kind, (amount, amount))


def starving(megabytes: int) -> Callable[[], None]:
    """Return a hook that allows the process so much memory more than it has."""

    def hook() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        amount = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (amount, amount))

    return hook


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder that a user sees."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path for path in files}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def litter(folder: Path) -> list[str]:
    """Return what a run left that a user does not see, but for an evaluation that is to be gone on with."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*") if path.suffix != ".next")


def result_files(files: dict[str, str]) -> dict[str, str]:
    """Return the files of a result, without what a training leaves on its way."""
    return {name: digest for name, digest in files.items() if name.split("/")[1] not in GROWING} if files else {}


class Trials:
    """Trials of one verb, and what went wrong in them."""

    def __init__(self, name: str, places: Places, folder: Path):
        self.name, self.verb, self.places = name, VERBS[name], places
        self.folder, self.saved = folder / "trial", folder / "saved"
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._reset(fresh=True)
        self.nothing = contents(self.folder)
        self.new = self._made(1)
        self.old = self._made(0)
        shutil.copytree(self.folder, self.saved, symlinks=True)

    def _made(self, variant: int) -> dict[str, str]:
        """Return what a run that nothing hinders leaves, made in an empty folder."""
        self._reset(fresh=True)
        started = time.monotonic()
        done = run(self.command(variant))
        self.seconds = time.monotonic() - started
        assert done.code == 0, done.text
        assert not litter(self.folder), litter(self.folder)
        return contents(self.folder)

    def command(self, variant: int, *more: object) -> list[object]:
        """Return the arguments of a variant."""
        return [*self.verb.command(self.places, self.folder / self.verb.out, variant), *more]

    def _reset(self, *, fresh: bool) -> None:
        """Put the folder of the trials back to where there is nothing, or an old result."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if fresh:
            self.folder.mkdir(parents=True)
        else:
            shutil.copytree(self.saved, self.folder, symlinks=True)
        if fresh and self.verb.members:
            for member in (self.places.cat, self.places.car):
                shutil.copytree(member, self.folder / member.name)

    def stop(self, hook: Callable[[], None], *, fresh: bool, what: str, killed: bool) -> Result:
        """Run the verb over nothing or an old result, stopped by a hook, look at what is left, and have it done again."""
        self._reset(fresh=fresh)
        force = [] if fresh else ["--force"]
        result = run(self.command(1, *force), hook, self.folder)
        left, old = contents(self.folder), self.nothing if fresh else self.old
        where = f"{self.name}, {what}, {'new' if fresh else 'over an old one'}"
        if self.name == "train":
            whole = result_files(left) in (result_files(old), result_files(self.new))
        else:
            whole = left in (old, self.new) or (self.verb.grows and fresh)
        self._expect(whole, f"{where}: left {sorted(left)}, neither the old nor the new")
        self._expect(result.code != -signal.SIGALRM or "killed after" in what, f"{where}: hung")
        if not killed and result.code != 0:
            reported = result.code == 1 and "Traceback" not in result.text and "error: " in result.text
            self._expect(reported, f"{where}: exit code {result.code}: {result.text[-400:]}")
            self._expect(not litter(self.folder), f"{where}: left {litter(self.folder)} behind")
        if not killed and result.code == 0:
            self._expect(left == self.new, f"{where}: said that it was done, and left {sorted(left)}")
        resume = ["--resume"] if self._resumable() else ["--force"]
        again = run(self.command(1, *resume), watch=self.folder)
        self._expect(again.code == 0, f"{where}, done again: exit code {again.code}: {again.text[-400:]}")
        self._expect(contents(self.folder) == self.new, f"{where}, done again: not what an unbroken run leaves")
        self._expect(not any(self.folder.rglob(".*")), f"{where}, done again: left {litter(self.folder)} behind")
        return result

    def _resumable(self) -> bool:
        """Return whether a training left a checkpoint of its own."""
        return self.name == "train" and (self.folder / "out" / "checkpoint.pt").exists()

    def _expect(self, good: bool, sentence: str) -> None:
        if not good:
            self.failures.append(sentence)

    def count_writes(self, *, fresh: bool) -> int:
        """Return how often the verb calls the system to write."""
        self._reset(fresh=fresh)
        return run(self.command(1, *([] if fresh else ["--force"])), watch=self.folder).events

    def kill_everywhere(self, stride: int) -> None:
        """Kill the verb at every write in turn, or at every `stride`-th."""
        for fresh in (True, False):
            for number in range(1, self.count_writes(fresh=fresh) + 1, stride):
                result = self.stop(killing(number, self.folder), fresh=fresh, what=f"killed at write {number}", killed=True)
                self.counts["kills"] += result.code == -signal.SIGKILL

    def kill_sometimes(self, times: int, generator: random.Random) -> None:
        """Kill the verb at random times."""
        for _ in range(times):
            seconds = generator.uniform(0.001, self.seconds)
            result = self.stop(
                killing_later(seconds), fresh=generator.random() < 0.5, what=f"killed after {seconds:.3f} s", killed=True
            )
            self.counts["kills at random times"] += result.code == -signal.SIGALRM

    def refuse_everywhere(self, stride: int) -> None:
        """Have the system refuse every write in turn, or every `stride`-th, for two reasons each; slow verbs for one."""
        for fresh, shift in product((True, False), (0,) if self.name in SLOW else (0, 2)):
            for number in range(1, self.count_writes(fresh=fresh) + 1, stride):
                code = REFUSALS[(number // stride + shift) % len(REFUSALS)]
                what = f"write {number}: {errno.errorcode[code]}"
                result = self.stop(refusing(number, self.folder, code), fresh=fresh, what=what, killed=False)
                self.counts["refusals"] += result.code == 1
        for size in (10, 1000, 20_000, 60_000):
            hook = limiting(resource.RLIMIT_FSIZE, size)
            result = self.stop(hook, fresh=size % 3 == 0, what=f"files of {size} bytes at most", killed=False)
            self.counts["refusals"] += result.code == 1
        for megabytes in (1, 4, 16):
            result = self.stop(starving(megabytes), fresh=megabytes == 4, what=f"{megabytes} MB of memory more", killed=False)
            self.counts["refusals"] += result.code == 1

    def run_pairs(self, times: int) -> None:
        """Run two variants into one place at the same time."""
        for number in range(times):
            self._reset(fresh=number % 2 == 0)
            results = run_together([self.command(variant, "--force") for variant in (0, 1)])
            self.counts["pairs"] += 1
            where = f"{self.name}, pair {number}"
            for result in results:
                refused = result.code == 1 and "is being written by" in result.text
                self._expect(result.code == 0 or refused, f"{where}: exit code {result.code}: {result.text[-400:]}")
            self.counts["pairs of which one was refused"] += any(result.code for result in results)
            self._expect(not all(result.code for result in results), f"{where}: both refused")
            self._expect(contents(self.folder) in (self.old, self.new), f"{where}: neither the one nor the other is left")
            self._expect(not litter(self.folder), f"{where}: left {litter(self.folder)} behind")


def kill_pushes(
    places: Places, folder: Path, stride: int, times: int, generator: random.Random
) -> tuple[dict[str, int], list[str]]:
    """Kill pushes before and after every `stride`-th request, and at random times, see what others can pull, and push again.

    Returns:
        Counts, and what went wrong.
    """

    def command(name: str) -> list[object]:
        return ["push", places.cat, f"ada/{name}", "--base-model", "ada/base", "--license", "mit", "--yes"]

    def pull(name: str) -> tuple[Result, list[str]]:
        """Return how a pull went, and the hashes of what came; but of the card, which names its repository."""
        place = folder / "pulled"
        shutil.rmtree(place, ignore_errors=True)
        done = run(["pull", f"ada/{name}", "-o", place / name])
        return done, [digest for file, digest in contents(place).items() if "README" not in file] if done.code == 0 else []

    def stop(name: str, hook: Callable[[], None], kind: str) -> bool:
        """Push to a new repository, and return whether the push was killed."""
        killed = run(command(name), hook).code < 0
        counts[kind] += killed
        seen, held = pull(name)
        if held not in ([], expected) or (seen.code and "Traceback" in seen.text):
            failures.append(f"{name}: others pull a part of it, or not in a sentence: {seen.text[-400:]}")
        again = run(command(name))
        if again.code != 0:
            failures.append(f"{name}, done again: exit code {again.code}: {again.text[-400:]}")
        elif pull(name)[1] != expected:
            failures.append(f"{name}, done again: not what an unbroken push leaves")
        return killed

    folder.mkdir()
    counts, failures = Counter[str](), list[str]()
    started = time.monotonic()
    done = run(command("unbroken"))
    seconds = time.monotonic() - started
    assert done.code == 0, done.text
    expected = pull("unbroken")[1]
    assert expected
    for after in (False, True) if stride else ():
        number = 1
        while stop(f"killed-{'after' if after else 'before'}-request-{number}", at_request(number, after=after), "kills"):
            number += stride
        assert number > 5, "a push makes a handful of requests"
    for number in range(times):
        stop(f"killed-sometime-{number}", killing_later(generator.uniform(0.001, seconds)), "kills at random times")
    return dict(counts), failures


def stop_registries(folder: Path, stride: int) -> tuple[dict[str, int], list[str]]:
    """Kill and refuse changes of a registry at every `stride`-th write, read what is left, and make them again.

    Returns:
        Counts, and what went wrong.
    """
    registry, saved, file = folder / "registry", folder / "saved", folder / "list.csv"
    folder.mkdir()
    file.write_text("id,concept,kind\nno-cat,a cat,object\nno-dog,a dog,object\n")
    counts, failures = Counter[str](), list[str]()
    for verb, command in {
        "add": ["requests", "add", file, "-r", registry],
        "withdraw": ["requests", "withdraw", "no-cat", "-r", registry],
    }.items():
        old = contents(registry)
        if old:
            shutil.copytree(registry, saved)
        events, new = run(command, watch=registry).events, contents(registry)
        numbers = range(1, events + 1, stride)
        trials = {f"{verb}, killed at write {number}": killing(number, registry) for number in numbers}
        for number in numbers:
            code = REFUSALS[number % len(REFUSALS)]
            trials[f"{verb}, write {number}: {errno.errorcode[code]}"] = refusing(number, registry, code)
        for size in (10, 300, 500, 800):
            trials[f"{verb}, files of {size} bytes at most"] = limiting(resource.RLIMIT_FSIZE, size)
        for what, hook in trials.items():
            shutil.rmtree(registry)
            if old:
                shutil.copytree(saved, registry)
            result = run(command, hook, registry)
            counts["kills"] += result.code == -signal.SIGKILL
            counts["refusals"] += result.code == 1
            if result.code == 1 and (contents(registry) != old or litter(registry) or "Traceback" in result.text):
                failures.append(f"{what}: not refused in a sentence, or not without a trace: {result.text[-400:]}")
            left = run(["requests", "list", "-r", registry])
            if left.code and (old or "there is no registry" not in left.text):
                failures.append(f"{what}: the registry cannot be read: {left.text[-400:]}")
            again = run(command)
            if again.code or contents(registry) != new or litter(registry):
                failures.append(f"{what}, done again: not what an unbroken run leaves: {again.text[-400:]}")
    return dict(counts), failures


def at_request(number: int, *, after: bool) -> Callable[[], None]:
    """Return a hook that has the process killed before or after its request to the Hub of a number, from 1."""

    def hook() -> None:
        from huggingface_hub import get_session

        client: Any = type(get_session())
        send, count = client.send, 0

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return send(*arguments, **options)
            finally:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        client.send = counting

    return hook


@contextmanager
def hub_with(places: Places, home: Path) -> Iterator[None]:
    """Have the stand-in for the Hub, with two erasers on it, in a process of its own for the length of a `with` block."""
    code = (
        "import sys, pathlib; from loopback_hub import LoopbackHub\n"
        "with LoopbackHub() as hub:\n"
        "    hub.user('ada', 'hf_ada')\n"
        "    for place in map(pathlib.Path, sys.argv[1:]):\n"
        "        hub.plant(f'ada/{place.name}', {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()})\n"
        "    print(hub.endpoint, flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(places.cat), str(places.car)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        from huggingface_hub import constants

        constants.ENDPOINT, constants.HF_HUB_OFFLINE = endpoint, False
        constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = str(home)
        constants.HF_HUB_DISABLE_XET = True
        os.environ["HF_TOKEN"] = "hf_ada"
        try:
            yield
        finally:
            process.kill()


def report(folder: Path, strides: Mapping[str, int], *, randomly: int, pairs: int) -> dict[str, Any]:
    """Return what trials of verbs came to: counts by verb, and every failure.

    Args:
        folder: For everything; empty.
        strides: Name of a verb to the stride of the writes at which it is stopped, of a push's requests: 1 for all, 0 for none.
        randomly: Kills of every verb at random times.
        pairs: Pairs of every verb in one place.
    """
    places = set_up(folder)
    counts: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    with hub_with(places, folder / "hub"):
        strides = dict(strides)
        pushes, registries = strides.pop(PUSH, None), strides.pop(REGISTRY, 0)
        for number, (name, stride) in enumerate(strides.items()):
            trials = Trials(name, places, folder / f"verb-{number}")
            if stride:
                trials.kill_everywhere(stride)
                trials.refuse_everywhere(stride)
            trials.kill_sometimes(randomly, random.Random(number))
            trials.run_pairs(pairs)
            counts[name] = dict(trials.counts)
            failures += trials.failures
            sys.stderr.write("\n  ".join([name, str(counts[name]), *trials.failures]) + "\n")
        if pushes is not None:
            counts[PUSH], lost = kill_pushes(places, folder / "pushes", pushes, randomly, random.Random(0))
            failures += lost
        if registries:
            counts[REGISTRY], lost = stop_registries(folder / "registries", registries)
            failures += lost
    return {"counts": counts, "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verbs", nargs="*", default=[*VERBS, PUSH, REGISTRY])
    parser.add_argument("--stride", type=int, default=1, help="0 leaves these trials out")
    parser.add_argument("--slow-stride", type=int, help="of verbs that take a second, where it is another")
    parser.add_argument("--randomly", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        slow = options.stride if options.slow_stride is None else options.slow_stride
        strides = {name: slow if name in SLOW else options.stride for name in options.verbs}
        outcome = report(Path(place).resolve(), strides, randomly=options.randomly, pairs=options.pairs)
    options.out.write_text(json.dumps(outcome, indent=1) + "\n", "utf-8")
