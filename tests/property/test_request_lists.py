"""Requests written out and read back are the same requests, and the log of a registry never loses one."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd_lora.errors import EsdLoraError
from esd_lora.fleet.registry import Registry
from esd_lora.fleet.request import Basis, Kind, Request, Status
from esd_lora.fleet.requests import overlapping, read_requests, write_requests
from esd_lora.wording import name_key

# What CSV, JSON and YAML read as something else, or quote.
ODD = [
    "a, b",
    'said "no"',
    "'x'",
    "=1+1",
    "'=1",
    "-2",
    "-2+3",
    "@a",
    "#",
    "- a: b",
    "null",
    "no",
    "1e5",
    "日本 🐈",
    "a\\",
    "ſtraße",
    "the the",
    "{x}",
]
seen = st.characters(exclude_categories=["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])
texts = st.text(seen, max_size=12) | st.sampled_from(ODD)
names = st.text(seen, min_size=1, max_size=12).map(lambda text: text.replace(";", ",")).filter(str.strip) | st.sampled_from(ODD)
days = st.dates(min_value=date(1, 1, 1))
whole = st.characters(exclude_categories=["Cs"])
values = st.text(whole, max_size=8) | st.sampled_from(["\x85", "\u2028", "a\n b", "~", "yes", "2026-11-30", *ODD])
settings = st.fixed_dictionaries(
    {},
    optional={
        "train.steps": st.integers(0, 2**62) | st.just("auto"),
        "train.lr": st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
        "train.stop_at": st.none() | st.floats(0.1, 1),
        "train.points": st.sampled_from(["one", "all"]),
        "lora.rslora": st.booleans(),
        "lora.ranks": st.dictionaries(st.sampled_from(["xattn", "re:to_[kv]$"]), st.integers(1, 1024)),
        "preserve": st.lists(values, max_size=3),
        "train.optimizer_args": st.dictionaries(values, st.lists(values | st.none() | st.integers(), max_size=2)),
    },
)


@st.composite
def requests(draw: st.DrawFn, id: str) -> Request:
    received, due = draw(st.none() | days), draw(st.none() | days)
    if received and due and due < received:
        received, due = due, received
    return Request(
        id=id,
        concept=draw(names),
        synonyms=draw(st.lists(names, max_size=2)),  # type: ignore[arg-type]
        kind=draw(st.sampled_from(get_args(Kind))),
        anchor=draw(st.none() | names),
        keep=draw(st.lists(names, max_size=2)),  # type: ignore[arg-type]
        basis=draw(st.none() | st.sampled_from(get_args(Basis))),
        reference=draw(texts),
        received=received,
        due=due,
        status=draw(st.sampled_from(get_args(Status))),
        private=draw(st.booleans()),
        settings=draw(settings),
    )


@st.composite
def lists(draw: st.DrawFn) -> list[Request]:
    """Draw requests that do not contradict each other."""
    drawn = [draw(requests(f"r{i}")) for i in range(draw(st.integers(0, 4)))]
    kept = {name_key(name) for request in drawn for name in request.keep}
    concepts = [name_key(request.concept) for request in drawn]
    return [
        request
        for i, request in enumerate(drawn)
        if concepts[i] not in concepts[:i] and kept.isdisjoint(map(name_key, request.names))
    ]


@contextmanager
def temporary() -> Iterator[Path]:
    """Yield a folder, and do not mind names that overlap."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share names")
        yield Path(folder)


@given(lists(), st.sampled_from(["r.csv", "r.jsonl"]))
def test_list_reads_back_as_itself(requests: list[Request], name: str) -> None:
    with temporary() as folder:
        write_requests(requests, folder / name)
        assert read_requests(folder / name) == tuple(requests)


@given(st.lists(st.tuples(names, st.lists(names, max_size=2)), max_size=6))
def test_groups_are_what_a_walk_from_name_to_name_finds(drawn: list[tuple[str, list[str]]]) -> None:
    everyone = [
        Request(id=f"r{i}", concept=concept, synonyms=synonyms, kind="object")  # type: ignore[arg-type]
        for i, (concept, synonyms) in enumerate(drawn)
    ]
    left = list(everyone)
    groups: list[set[str]] = []
    while left:
        group, keys = [left.pop(0)], set[str]()
        for request in group:  # grows on the way
            keys |= set(map(name_key, request.names))
            group += [other for other in left if keys & set(map(name_key, other.names))]
            left = [other for other in left if other not in group]
        groups.append({request.id for request in group})
    assert [{request.id for request in group} for group in overlapping(everyone)] == [
        group for group in groups if len(group) > 1
    ]


IDS = ("no-cat", "no-dog", "no-pig")
changes = st.tuples(
    st.sampled_from(["add", "decide", "withdraw", "status"]),
    st.sampled_from(IDS),
    st.sampled_from(["open", "ambiguous", "refused", "done"]),
    names,
)


def change(registry: Registry, verb: str, id: str, status: Any, name: str) -> None:
    """Change a registry, if it may be changed so."""
    try:
        if verb == "add":
            registry.add([Request(id=id, concept=name, kind="object", status=status)])
        elif verb == "decide":
            registry.decide(
                id, "refused" if status == "refused" else "open", name, concept=None if status == "refused" else name
            )
        elif verb == "withdraw":
            registry.withdraw(id, name)
        else:
            registry.set_status(id, status, name)
    except EsdLoraError:
        pass


@given(st.lists(changes, min_size=1, max_size=10))
def test_no_request_is_lost_whatever_happens(drawn: list[tuple[str, str, Any, str]]) -> None:
    with temporary() as folder:
        registries = [Registry.open(folder, new=True) for _ in range(2)]
        known: set[str] = set()
        withdrawn: set[str] = set()
        for i, (verb, id, status, name) in enumerate(drawn):
            registry = registries[i % 2]  # two that take turns
            change(registry, verb, id, status, name)
            states = {request.id: request.status for request in registry.requests()}
            assert known <= states.keys()
            assert all(states[id] == "withdrawn" for id in withdrawn)
            known, withdrawn = set(states), {id for id in states if states[id] == "withdrawn"}
            assert Registry.open(folder, new=True).requests() == registry.requests()
            if known:
                assert read_requests(folder / "requests.csv") == registry.requests()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A log of every kind of event."""
    folder = tmp_path_factory.mktemp("registry")
    registry = Registry.open(folder, new=True)
    registry.add(
        [
            Request(id="no-cat", concept="cät", kind="object"),
            Request(id="no-dog", concept="dog", kind="object", status="ambiguous"),
        ]
    )
    registry.decide("no-dog", "open", concept="hound")
    registry.withdraw("no-cat")
    registry.set_status("no-dog", "done")
    return (folder / "registry.jsonl").read_bytes()


def opened(folder: Path, content: bytes) -> Registry:
    (folder / "registry.jsonl").write_bytes(content)
    return Registry.open(folder)


def test_log_cut_at_any_byte_is_read_to_its_last_whole_event(log: bytes, tmp_path: Path) -> None:
    lines = log.splitlines(keepends=True)
    states = [opened(tmp_path, b"".join(lines[:i])).requests() for i in range(len(lines) + 1)]
    assert len(set(states)) == len(lines) + 1 == 6
    ends = [len(b"".join(lines[:i])) for i in range(len(lines) + 1)]
    extra = Request(id="no-pig", concept="pig", kind="object")
    for size in range(len(log) + 1):
        whole = max(i for i, end in enumerate(ends) if end - 1 <= size)  # the line break may be missing
        torn = size not in ends and size + 1 not in ends
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            registry = opened(tmp_path, log[:size])
        assert registry.requests() == states[whole], size
        assert len(caught) == torn, size
        if size % 40 == 0 or not torn:  # each addition waits for the disk
            (tmp_path / "requests.csv").unlink(missing_ok=True)
            registry.add([extra])
            assert Registry.open(tmp_path).requests() == (*states[whole], extra), size


@given(st.data())
def test_change_of_any_byte_but_in_the_last_line_is_noticed(log: bytes, data: st.DataObject) -> None:
    earlier = len(log) - len(log.splitlines()[-1]) - 1
    place, value = data.draw(st.integers(0, earlier - 1)), data.draw(st.integers(0, 255))
    changed = log[:place] + bytes([value]) + log[place + 1 :]
    with temporary() as folder:
        if changed == log:
            assert opened(folder, changed).requests()
        else:
            with pytest.raises(EsdLoraError, match="Restore it from a copy"):
                opened(folder, changed)


def test_change_of_each_byte_but_in_the_last_line_is_noticed(log: bytes, tmp_path: Path) -> None:
    earlier = len(log) - len(log.splitlines()[-1]) - 1
    for place in range(earlier):
        for value in {log[place] ^ 1, log[place] ^ 32, 10} - {log[place]}:
            with pytest.raises(EsdLoraError, match="Restore it from a copy"):
                opened(tmp_path, log[:place] + bytes([value]) + log[place + 1 :])
