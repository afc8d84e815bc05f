"""Fuzzing of every reader of strangers' files: each case loads, or is refused in an `EsdLoraError` of a few lines.

    python tests/fuzz/fuzzing.py --seed 0 FOLDER recipe=500 pt=500

runs cases in FOLDER under guards and prints reader to counts as JSON. A third of the cases are bytes of seeds and of the kept
corpus, mutated; the others are documents of the right structure with a value or two exchanged, made by hypothesis. While a
reader works there is no socket, no process, no code from the case's folder and no writing outside it; a case has 5 seconds, and
the process 512 MB more than it had before the first. An input that breaks a rule stays in FOLDER/faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from readers import READERS, Reader

from esd_lora.errors import EsdLoraError

SECONDS = 5
MEGABYTES = 512
CORPUS = Path(__file__).parent / "corpus"
"""Reader to the worst inputs that were met, each a file of a few hundred bytes, which every run begins with."""


class FaultError(Exception):
    """A case that neither loaded nor was refused as it should be."""


class TooSlowError(BaseException):
    """A case took more than `SECONDS`; no reader may swallow it."""


class Guard:
    """What a process does while a reader works, as Python's audit events tell."""

    FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.fork")
    FORBIDDEN += ("os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "webbrowser.open", "os.kill")
    CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")

    def __init__(self, folder: Path):
        self.folder = str(folder.resolve())
        self.active = False
        self.broken: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuse and note what a reader has no business to do."""
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            bad = bool(writes) and not self.inside(path) and path != os.devnull
        elif event in self.CHANGING:
            bad = not all(self.inside(*place) for place in _changed(event, arguments))
        elif event == "exec":
            bad = self.inside(getattr(arguments[0], "co_filename", ""))
        elif event == "compile":
            bad = self.inside(arguments[1] or "")
        else:
            bad = event in self.FORBIDDEN
        if bad:
            self.active = False
            self.broken.append(f"{event} {arguments!r}"[:300])
            raise PermissionError(f"a reader may not: {event}")

    def inside(self, path: object, folder: int = -1) -> bool:
        """Return whether a path, from an open folder on or else from this one, is the case's folder or lies in it.

        A file that is open counts, as its opening was seen.
        """
        if isinstance(path, int):
            return True
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        start = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
        return f"{os.path.abspath(os.path.join(start, os.fsdecode(path)))}{os.sep}".startswith(self.folder + os.sep)  # noqa: PTH100, PTH118


def _changed(event: str, arguments: tuple[Any, ...]) -> list[tuple[object, int]]:
    """Return the paths that an event changes, each with the open folder that it counts from, or -1."""
    match event:
        case "os.rename":
            return [(arguments[0], arguments[2]), (arguments[1], arguments[3])]
        case "os.link":
            return [(arguments[1], arguments[3])]
        case "os.symlink":
            return [(arguments[1], arguments[2])]
        case "os.mkdir" | "os.chmod":
            return [(arguments[0], arguments[2])]
        case "os.truncate":
            return [(arguments[0], -1)]
        case _:
            return [(arguments[0], arguments[1])]


@contextmanager
def limited() -> Iterator[None]:
    """Allow `MEGABYTES` of memory beyond what the process has, for as long as the block runs."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEGABYTES * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_slow(*_: object) -> None:
    raise TooSlowError


class Session:
    """The cases of one reader: where they lie, and what became of them."""

    def __init__(self, name: str, folder: Path, guard: Guard):
        self.reader: Reader = READERS[name]
        self.name, self.guard = name, guard
        self.case, self.faults = folder / "case", folder / "faults"
        self.counts = {"cases": 0, "loads": 0, "refusals": 0}
        self.kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
        self.prepare()
        self.seeds = self.reader.seeds(self.case)
        self.prepare()

    def prepare(self) -> None:
        """Empty the case's folder, and lay into it what the reader's file stands beside."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir(parents=True)
        self.reader.beside(self.case)

    def run(self, content: bytes) -> None:
        """Have the reader read one case, and see that it keeps to the rules.

        Raises:
            FaultError: If it does not; the input is kept.
        """
        self.counts["cases"] += 1
        (self.case / self.reader.file).write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        problem = None
        try:
            self.guard.active = True
            with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                self.reader.read(self.case)
            self.counts["loads"] += 1
        except EsdLoraError as error:
            self.counts["refusals"] += 1
            problem = _fault_of(str(error))
        except TooSlowError:
            problem = f"more than {SECONDS} s"
        except BaseException:  # whatever it is, the input that does it is kept
            problem = traceback.format_exc(limit=-6)
        finally:
            self.guard.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.guard.broken:
            problem = f"{self.guard.broken.pop()}; {problem}"
        if problem:
            self.faults.mkdir(exist_ok=True)
            place = self.faults / f"{self.name}-{self.counts['cases']}"
            place.write_bytes(content)
            raise FaultError(f"{self.name}: {place} ({len(content)} bytes): {problem}")


def _fault_of(message: str) -> str | None:
    """Return what is wrong with the message of a refusal, if anything is."""
    lines = message.splitlines()
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"message that cannot be printed: {message!r}"
    if not message.strip() or len(lines) > 53 or max(map(len, lines)) > 2500:
        return f"message of {len(lines)} lines, the longest of {max(map(len, lines), default=0)} characters: {message[:300]!r}"
    return None


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return bytes with a few changes: flipped, cut, repeated, swapped, with words of trouble, or spliced with others."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 4, 8, 32, 128))
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                data[at:at] = rng.choice(WORDS)
            case 4:
                data[at : at + length] = rng.randbytes(length)
            case 5:
                data[at : at + 8] = rng.choice(INTEGERS).to_bytes(8, "little")
            case 6:
                other = rng.choice(others)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case _:
                del data[at:]
    return bytes(data)


INTEGERS = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    *(
        b"\0",
        b"\n",
        b'"',
        b"{",
        b"[",
        b"}",
        b"]",
        b":",
        b": ",
        b", ",
        b"\xff",
        b"\xc3",
        b"\xe2\x80\xa8",
        b"\x1b[2J",
        b"- ",
        b"?",
    ),
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b"null", b"true", b"''", b"*a", b"&a "),
    *(
        b"!!int ''",
        b"!!bool x",
        b"!!python/object/apply:os.system [true]",
        b"<<: ",
        b"{x}",
        b"{x:>900000000}",
        b"{x.__class__}",
    ),
    *(
        b"../../../etc/passwd",
        b"/dev/zero",
        b"a" * 300,
        b"(a+)+$",
        b"re:(a*)*b",
        b"\\ud800",
        b"0x",
        b"2020-13-45",
        b"subprocess",
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**53,
        2**63,
        -(2**64),
        10**99,
        0.0,
        -0.5,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        " ",
        "x",
        "\0",
        "\n",
        "a\nb",
        "猫",
        "\x1b[2J",
        "x" * 300,
        "y" * 20_000,
        "../..",
        "/etc/passwd",
        "/dev/zero",
        "a\\b",
        ".",
    ),
    *(
        "{x}",
        "{x!r}",
        "{0}",
        "{",
        "{concept.__class__}",
        "{concept:>900000000}",
        "re:(a*)*b",
        "re:(",
        "re:" + "(" * 500,
        "re:a{9}{9}",
    ),
    *(
        "(a+)+$",
        "^a$",
        "os:system",
        "subprocess:Popen",
        "NaN",
        "1e999",
        "=",
        "<<",
        "yes",
        "2001-01-01",
        "emoji",
        "fast",
        "*a",
        "!!int",
    ),
    *(
        [],
        {},
        [[]],
        {"": {}},
        [None],
        [1, 2],
        ["os", "system"],
        ["transformers", "AutoModel"],
        {"x": 1},
        {"a": {"b": {"c": []}}},
    ),
    *(["x"] * 2000, {f"k{i}": i for i in range(2000)}, [0] * 5, [2**40, 2**40], [-1], [0, 2**62], [[[[[[[[[[[]]]]]]]]]]]),
)
"""What stands in the place of a value that a document should have."""


def _places(document: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value in a document."""
    items: Any = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [place, *(inner for key, value in items for inner in _places(value, (*place, key)))]


@st.composite
def spoilt(draw: st.DrawFn, documents: list[Any]) -> Any:
    """Return one of the documents with one to three values exchanged, removed, moved or given other names."""
    document = deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = (None, *draw(st.sampled_from(_places(document))))
        if last is None:
            continue
        parent = document
        for key in above[1:]:
            parent = parent[key]
        match draw(st.integers(0, 5)):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[draw(st.sampled_from([v for v in VALUES if isinstance(v, str)]) | st.text(max_size=8))] = parent.pop(
                    last
                )
            case 2:
                parent[last] = deepcopy(draw(st.sampled_from(documents)))
            case 3 if isinstance(parent, list):
                parent += [parent[last]] * draw(st.sampled_from((1, 50)))
            case _:
                parent[last] = deepcopy(draw(st.sampled_from(VALUES) | st.text(max_size=20) | st.integers() | st.floats()))
    return document


def fuzz(name: str, cases: int, seed: int, folder: Path, guard: Guard) -> dict[str, int]:
    """Run the kept inputs and then `cases` cases of one reader, the same ones for the same seed.

    Returns:
        Number of cases, of those that loaded, and of those that were refused.

    Raises:
        FaultError: With the first input, as small as hypothesis makes it, that does something else.
    """
    session, rng = Session(name, folder, guard), random.Random(f"{name} {seed}")
    session.run(session.seeds[0])  # whatever is imported or kept for later is there from now on
    if not session.counts["loads"]:
        raise FaultError(f"{name}: the first seed does not load")
    sources = [*session.seeds, *session.kept]
    with limited():
        for content in sources:
            session.run(content)
        for _ in range(cases // 3 if session.reader.documents else cases):
            session.run(mutate(rng.choice(sources), sources, rng))
        if session.reader.documents:

            @hypothesis_seed(rng.randrange(2**32))
            @settings(
                max_examples=cases - cases // 3,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(spoilt(session.reader.documents))
            def structured(document: object) -> None:
                session.run(session.reader.write(document))

            structured()
            while session.counts["cases"] < cases:  # hypothesis stops where it has seen all that it can think of
                session.run(mutate(rng.choice(sources), sources, rng))
    return session.counts


def read_command() -> tuple[Path, int, dict[str, int]]:
    """Return the folder, the seed, and reader to number of cases that the command line names; ready this process for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("readers", nargs="+", metavar="READER=CASES")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    os.fsync = lambda _: None  # nothing here has to outlive a power failure, and a busy disk would look like a slow reader
    signal.signal(signal.SIGALRM, _too_slow)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pairs = (argument.partition("=") for argument in arguments.readers)
    return arguments.folder.resolve(), arguments.seed, {name: int(cases) for name, _, cases in pairs}


def main() -> None:
    """Fuzz the readers that the command line names, and print their counts."""
    folder, seed, readers = read_command()
    guard = Guard(folder / "case")
    counts = {name: fuzz(name, cases, seed, folder, guard) for name, cases in readers.items()}
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
