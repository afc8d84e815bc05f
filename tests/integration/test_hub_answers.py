"""Answers that no client should act on: the stand-in for the Hub gives them, huggingface_hub's own client receives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import loopback_hub
from esd_lora.erasers import hub_answers
from esd_lora.erasers.eraser import WEIGHTS_NAME
from esd_lora.errors import EsdLoraError
from esd_lora.sharing.catalog import search
from esd_lora.sharing.pulling import pull
from esd_lora.sharing.pushing import push
from loopback_hub import LoopbackHub
from random_erasers import random_eraser

hub = loopback_hub.hub  # the fixture

REPO = "bob/no-cat"
COMMIT = "0" * 40


@pytest.fixture
def bob(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The stand-in with an eraser in it, and somebody signed in."""
    hub.user("bob", "hf_bob")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    hub.plant(REPO, random_eraser({"conv": 1}, "a cat").files())
    return hub


def fetch(tmp_path: Path) -> None:
    pull(REPO, tmp_path / "out", force=True)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ETag", '"../../../../../../trace"'),
        ("ETag", '"TMP/trace"'),
        ("X-Linked-Etag", "TMP/trace"),
        ("ETag", '".."'),
        ("ETag", '""'),
        ("X-Repo-Commit", "../../../../trace"),
    ],
)
@pytest.mark.parametrize("status", [200, 404])
def test_header_that_leads_out_of_the_cache(
    header: str, value: str, status: int, bob: LoopbackHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    headers = {"X-Repo-Commit": COMMIT, "ETag": '"x"', header: value.replace("TMP", str(tmp_path))}
    headers |= {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
    bob.trouble(f"HEAD /{REPO}/resolve", status, times=99, headers=headers)
    with pytest.raises(EsdLoraError, match=f"the Hub answered with {header.lower()} .*, which is none"):
        fetch(tmp_path)
    assert not list(tmp_path_factory.getbasetemp().rglob("*trace*"))
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


def more(hub: LoopbackHub, path: str) -> dict[str, str]:
    return {"Link": f'<{hub.endpoint}{path}?cursor=x>; rel="next"'}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "more than 200 answers"),
        ([{"type": "directory", "path": "x", "oid": "x", "size": 0}], "more than 200 answers"),
        ([{"type": "file", "path": f"{i}.md", "oid": "x", "size": 0} for i in range(100)], "more than 500 files"),
    ],
    ids=["empty", "folders", "files"],
)
def test_listing_without_end(entries: list[Any], words: str, bob: LoopbackHub, tmp_path: Path) -> None:
    path = f"/api/models/{REPO}/tree/main"
    bob.trouble(f"GET /api/models/{REPO}/tree", 200, times=10**6, headers=more(bob, path), body=json.dumps(entries))
    with pytest.raises(EsdLoraError, match=words):
        fetch(tmp_path)
    bob.trouble("GET /api/models$", 200, times=10**6, headers=more(bob, "/api/models"), body="[]")
    with pytest.raises(EsdLoraError, match="more than 200 answers"):
        search("cat")


def test_answer_without_end(bob: LoopbackHub, tmp_path: Path) -> None:
    bob.trouble(f"GET /api/models/{REPO}", 200, body="[" + " " * 2**24)
    with pytest.raises(EsdLoraError, match=r"it sent more than 16,777,216 bytes\. Do not trust it"):
        fetch(tmp_path)


def test_file_without_end(bob: LoopbackHub, tmp_path: Path) -> None:
    bob.trouble("GET /storage/", 200, body="x" * 2**20)
    with pytest.raises(EsdLoraError, match=r"it sent more than \d,\d+ bytes of a file"):
        fetch(tmp_path)
    fetch(tmp_path)  # nothing of it stays


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "100000"}, {"Retry-After": "9" * 400}, {"RateLimit": '"api";r=0;t=99999999'}]
)
def test_long_wait_is_not_waited(headers: dict[str, str], bob: LoopbackHub, tmp_path: Path) -> None:
    bob.trouble(f"GET /api/models/{REPO}/tree", 429, headers=headers, times=3)
    with pytest.raises(EsdLoraError, match=r"too many requests from here. Try again in \d+ seconds"):
        fetch(tmp_path)
    assert not bob.waits
    assert len(bob.log) == 2


def test_short_wait_is_waited(bob: LoopbackHub, tmp_path: Path) -> None:
    bob.trouble(f"GET /api/models/{REPO}/tree", 429, headers={"Retry-After": "7"}, times=2)
    fetch(tmp_path)
    assert bob.waits == [8, 8]


def push_one(tmp_path: Path) -> None:
    random_eraser({"conv": 1}, "a cat").save(tmp_path / "mine")
    push(tmp_path / "mine", REPO, license="mit")


INFO = {"id": REPO, "sha": COMMIT}
WRONG: list[tuple[Callable[[Path], object], str, Any]] = [
    *((fetch, f"GET /api/models/{REPO}", body) for body in ([], {}, 7, None, {"sha": COMMIT}, {**INFO, "siblings": 7})),
    *((fetch, f"GET /api/models/{REPO}", {**INFO, **change}) for change in ({"cardData": {"self": 1}}, {"lastModified": 7})),
    *((fetch, f"GET /api/models/{REPO}/tree", body) for body in (7, ["x"], [{}], {"a": 1}, "[" * 100_000)),
    *(
        (fetch, f"GET /api/models/{REPO}/tree", [{"type": "file", "path": "x.md", "oid": "x", "size": 1, **change}])
        for change in (
            {"path": None},
            {"size": "x"},
            {"size": -1},
            {"oid": 7},
            {"lfs": {"oid": 7, "size": 1, "pointerSize": 1}},
        )
    ),
    *(
        (lambda _: search("cat"), "GET /api/models$", body)
        for body in (
            {"id": "x"},
            [{"id": 7}],
            [{"id": "x", "tags": 7}],
            [{"id": "x", "tags": [7]}],
            [{"id": "x", "likes": "x"}],
        )
    ),
    (push_one, f"GET /api/models/{REPO}", {**INFO, "siblings": [{"rfilename": ["x"]}]}),
    (push_one, f"POST /api/models/{REPO}/preupload", {"files": [{"path": 7}]}),
    (push_one, f"POST /api/models/{REPO}/commit", {"commitOid": 7}),
]


@pytest.mark.parametrize(("verb", "path", "body"), WRONG)
def test_json_of_another_shape(verb: Callable[[Path], object], path: str, body: Any, bob: LoopbackHub, tmp_path: Path) -> None:
    bob.trouble(path, 200, times=9, body=body if isinstance(body, str) else json.dumps(body))
    with pytest.raises(EsdLoraError, match="the Hub and its client do not agree on "):
        verb(tmp_path)
    bob.calm()
    verb(tmp_path)


def test_answers_are_checked_within_a_block_alone_and_by_a_client_made_anew(bob: LoopbackHub) -> None:
    def look(times: int) -> None:
        for _ in range(times):
            huggingface_hub.HfApi().model_info(REPO)

    with hub_answers.checked_answers():
        look(1)
    look(300)
    with hub_answers.checked_answers():
        huggingface_hub.close_session()  # as the client does where it cannot connect
        with pytest.raises(EsdLoraError, match="200 answers"):
            look(300)
    assert len(bob.log) == 502
