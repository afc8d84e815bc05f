"""Hostile answers of the Hugging Face Hub: its client is answered without a socket, and does all that this toolkit wants of it.

A case is a list of answers, each a mapping of `at` (a piece of method and address), `status`, `headers`, and the body as
`json`, as `text`, or as the name of a `file` of the true repository, sent `times` over. The first answer whose piece fits is
given. A case that is no JSON is what every request is answered.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub
import torch
from huggingface_hub import constants, errors, file_download
from huggingface_hub.utils import _cache_manager, _http

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.fetching import take_snapshot
from esd_lora.errors import EsdLoraError
from esd_lora.sharing.catalog import search
from esd_lora.sharing.pulling import pull
from esd_lora.sharing.pushing import push
from esd_lora.wording import HubId
from loopback_hub import Clock, File, Repo
from random_erasers import random_eraser

httpx: Any = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # httpx or httpx2
NAME = "pytorch_lora_weights.safetensors"
REPO = "owner/name"


def my_eraser() -> Eraser:
    """Return an eraser, the same one every time."""
    return random_eraser({"conv": 1}, "a cat", dtype=torch.float32)


@cache
def true_files() -> dict[str, bytes]:
    """Return the files of a small repository with an eraser."""
    return {**my_eraser().files(), "README.md": b"---\ntags: [esd-lora, 'erases:a-cat']\n---\n", ".gitattributes": b""}


def hub_answers() -> list[dict[str, Any]]:
    """Return what the true Hub answers: an eraser that can be listed, fetched, searched for, and pushed anew."""
    repo, tree = Repo(REPO), {name: File(content, name == NAME) for name, content in true_files().items()}
    commit = repo.commit("refs/heads/main", tree)
    files = [name for name in tree if not name.startswith(".")]
    place = f"https://storage.test/{repo.objects}"
    pushed = {"success": True, "commitOid": commit, "commitUrl": f"https://huggingface.co/{REPO}/commit/{commit}"}
    modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in files]
    return [
        {"at": f"GET /api/models/{REPO}/tree", "json": [file.entry(name, None) for name, file in tree.items()]},
        {"at": f"GET /api/models/{REPO}", "json": repo.info()},
        {"at": "GET /api/models", "json": [repo.info()]},
        *(
            {
                "at": f"HEAD /{REPO}/resolve/{revision}/{name}",
                "status": 302 if tree[name].lfs else 200,
                "headers": {"X-Repo-Commit": commit, "ETag": f'"{tree[name].etag}"', "Content-Length": f"{tree[name].size}"}
                | ({"Location": place, "X-Linked-Size": f"{tree[name].size}"} if tree[name].lfs else {}),
            }
            for name in files
            for revision in ((commit, "main") if name == NAME else (commit,))
        ),
        *({"at": f"/{REPO}/resolve/{commit}/{name}", "file": name} for name in files if name != NAME),
        {"at": "GET https://storage.test/", "file": NAME, "times": 1},
        {"at": "GET /api/whoami-v2", "json": {"name": "owner", "type": "user", "orgs": []}},
        {"at": "POST /api/validate-yaml", "json": {"errors": [], "warnings": []}},
        {"at": "POST /api/repos/create", "json": {"url": f"https://huggingface.co/{REPO}", "name": REPO}},
        {"at": f"POST /api/models/{REPO}/preupload", "json": {"files": modes}},
        {"at": f"POST /api/models/{REPO}/commit", "json": pushed},
    ]


def hub_documents() -> list[Any]:
    """Return lists of answers: the true ones, in pages, with trouble, and with another commit by the time of fetching."""
    true = hub_answers()
    entries, more = true[0]["json"], '<https://huggingface.co/api/models/owner/name/tree/x?cursor=x>; rel="next"'
    paged = [{"at": "cursor=x", "json": entries[1:]}, {**true[0], "json": entries[:1], "headers": {"Link": more}}, *true[1:]]
    busy = [{"at": "", "status": 429, "headers": {"Retry-After": "3", "RateLimit": '"api";r=0;t=5'}, "text": "busy"}]
    gone = [{"at": "", "status": 404, "headers": {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}, "json": {}}]
    return [true, paged, busy, gone, [*true[:3], *gone]]


def _answer(answers: list[Any], content: bytes, request: Any) -> Any:
    """Return the response that a case has for a request."""
    line = f"{request.method} {str(request.url).removeprefix(constants.ENDPOINT)}"
    fitting = (a for a in answers if isinstance(a, dict) and isinstance(at := a.get("at", ""), str) and at in line)
    answer = next(fitting, {"status": 404} if answers else {"text": content})
    status, headers = answer.get("status", 200), answer.get("headers")
    body = answer["json"] if "json" in answer else answer.get("text", "")
    body = (
        body
        if isinstance(body, bytes)
        else json.dumps(body).encode()
        if "json" in answer
        else str(body).encode("utf-8", "replace")
    )
    body = true_files().get(str(answer.get("file")), body)
    times = answer.get("times", 1)
    return httpx.Response(
        status if isinstance(status, int) and 200 <= status <= 599 else 200,
        headers=_headers(headers if isinstance(headers, dict) else {}),
        content=_repeated(body, times if isinstance(times, int) else 1),
    )


def _repeated(body: bytes, times: int) -> Iterator[bytes]:
    """Yield a body so many times over, in pieces of the size that a network has."""
    once = max(1, 2**16 // max(1, len(body)))
    while body and times > 0:
        yield body * min(once, times)
        times -= once


def _headers(headers: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """Return headers as a server could send them: bytes in one line."""
    pairs = [(f"{name}".encode("ascii", "replace"), f"{value}".encode("utf-8", "replace")) for name, value in headers.items()]
    return [(name.replace(b"\n", b""), value.replace(b"\n", b"").replace(b"\r", b"")) for name, value in pairs if name.strip()]


@contextmanager
def _answering(content: bytes, home: Path) -> Iterator[None]:
    """Have the client be answered by a case, with its cache in a folder, and neither sleep nor show bars."""
    try:
        answers = json.loads(content)
    except (ValueError, RecursionError):
        answers = None
    answers = answers if isinstance(answers, list) else []
    transport = httpx.MockTransport(lambda request: _answer(answers, content, request))
    clock, cache = Clock([]), str(home / "hub")
    changes = [
        *((constants, name, cache) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")),
        (_cache_manager, "HF_HUB_CACHE", cache),
        (constants, "HF_HOME", str(home)),
        (constants, "HF_TOKEN_PATH", str(home / "token")),
        (constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens")),
        *((constants, name, True) for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")),
        (constants, "HF_HUB_OFFLINE", False),
        (sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True),
        *((module, "time", clock) for module in (_http, file_download)),
    ]
    patches = [patch.object(place, name, value) for place, name, value in changes]
    before = _http._GLOBAL_CLIENT_FACTORY
    for change in patches:
        change.start()
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport, follow_redirects=True))
    try:
        with patch.dict("os.environ", {"HF_TOKEN": "hf_owner"}):
            yield
    finally:
        huggingface_hub.set_client_factory(before)
        for change in patches:
            change.stop()


def lay_eraser(folder: Path) -> None:
    """Write the eraser that is pushed."""
    my_eraser().save(folder / "mine")


def read_hub(folder: Path) -> None:
    """Fetch, pull, search and push; what is refused among that is in one error."""
    refusals: list[str] = []
    home = folder / "huggingface"
    with _answering((folder / "answers.json").read_bytes(), home):
        for verb in (
            lambda: take_snapshot(HubId(REPO), whole=False),
            lambda: pull(REPO, folder / "out", force=True),
            lambda: [found.row() for found in search("name", concept="a cat")],
            lambda: push(folder / "mine", REPO, license="mit"),
        ):
            try:
                verb()
            except EsdLoraError as error:
                refusals.append(str(error))
    shutil.rmtree(home, ignore_errors=True)
    if refusals:
        raise EsdLoraError("\n".join(refusals))
