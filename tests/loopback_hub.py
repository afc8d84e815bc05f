"""A stand-in for the Hugging Face Hub on loopback, which huggingface_hub's own client talks to over a real socket.

It keeps model repositories in memory and answers what the client asks to create, upload, list, look at and download them, as
far as that was read in the client's source (huggingface_hub 2.4) and is known of the Hub: status codes, headers, JSON. LFS
objects lie, as on the Hub, at another origin (a second port), so that the client drops its token on the way there.

It is not the Hub: no Xet (tests set HF_HUB_DISABLE_XET=1), git, datasets, Spaces, discussions, merging of pull requests, rate
limits of its own, .gitignore; search looks at names alone; a pull request is a ref nobody reviews. Beyond the standard library
it needs PyYAML, to read model cards as the Hub does. One thing differs on purpose: a 401 that stands for a repository one
may not see says so in `X-Error-Code`, since the client guesses that from the address for https alone.

Trouble is had on demand (`trouble`, `cut`), hostile repositories are planted past the client (`plant`), and every request is
in `log`. In a test, take the fixture `hub`; for a program of its own, `environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socketserver
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode

import pytest
import yaml

WHEN = "2026-01-01T00:00:00.000Z"
LFS_NAMES = (".safetensors", ".png", ".jpg", ".bin", ".pt", ".ckpt", ".onnx", ".zip")
GIT_ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_NAMES).encode()
REASONS = {401: "Invalid username or password.", 413: "Payload Too Large", 429: "Too Many Requests", 503: "Service Unavailable"}


@dataclass
class Request:
    """A request as it arrived: its path without quoting, how many bytes of body came in, and what was answered."""

    method: str
    path: str
    query: str
    length: int
    authorization: str | None
    status: int | None = None
    sent: int = 0
    """Bytes of body that went out."""


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


class Refusal(Exception):  # noqa: N818
    """An answer that is an error, in the Hub's words."""

    def __init__(self, status: int, error: str | None = None, code: str | None = None, **headers: str):
        self.status, self.error = status, error or REASONS.get(status, "Error")
        self.headers = {"X-Error-Message": self.error} | headers | ({"X-Error-Code": code} if code else {})

    def answer(self) -> Answer:
        return Answer(self.status, as_json({"error": self.error}), self.headers)


def no_repo(signed_in: bool) -> Refusal:
    return Refusal(404, "Repository not found", "RepoNotFound") if signed_in else Refusal(401, code="RepoNotFound")


@dataclass(frozen=True)
class File:
    """What a commit holds under a name, and what the Hub says about it, which need not be true."""

    data: bytes
    lfs: bool
    lies: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.lies.get("size", len(self.data))

    @property
    def sha256(self) -> str:
        return self.lies.get("sha256", hashlib.sha256(self.data).hexdigest())

    @property
    def oid(self) -> str:
        """The name of the blob in git, which is a pointer for an LFS file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        blob = pointer if self.lfs else self.data
        return self.lies.get("oid", hashlib.sha1(b"blob %d\0%b" % (len(blob), blob)).hexdigest())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str, commit: str | None) -> dict[str, Any]:
        """The file in a listing of the tree, with its last commit if one is given."""
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        if commit:
            entry["lastCommit"] = {"id": commit, "title": "commit", "date": WHEN}
        return entry | {key: value for key, value in self.lies.items() if key not in ("size", "sha256", "oid", "lfs")}

    def sibling(self, path: str, blobs: bool) -> dict[str, Any]:
        lfs = {"lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        return {"rfilename": path} | ({"size": self.size, "blobId": self.oid, **lfs} if blobs else {})


Tree = dict[str, File]


class Repo:
    """A repository: commits by their sha, refs, LFS objects, and what its page says."""

    def __init__(self, name: str, private: bool = False):
        self.name, self.namespace = name, name.split("/")[0]
        self.private, self.gated, self.downloads, self.likes = private, False, 0, 0
        self.tags: tuple[str, ...] = ()
        self.commits: dict[str, Tree] = {}
        self.refs: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}

    def commit(self, ref: str, tree: Tree) -> str:
        content = [self.name, len(self.commits), ref, sorted((path, file.oid) for path, file in tree.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(tree), sha
        return sha

    def find(self, revision: str) -> tuple[str | None, str]:
        """The ref and the commit that a revision stands for: a branch, tag, full ref or (the start of) a commit's sha."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return ref, self.refs[ref]
        for sha in self.commits:
            if len(revision) >= 7 and sha.startswith(revision):
                return None, sha
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def info(self, revision: str = "main", blobs: bool = False) -> dict[str, Any]:
        """All that the page of the model says, its card's metadata and the tags that follow from it among that."""
        sha = self.find(revision)[1]
        tree = self.commits[sha]
        card = card_data(tree["README.md"].data.decode(errors="replace")) if "README.md" in tree else {}
        bases = [card["base_model"]] if isinstance(card.get("base_model"), str) else card.get("base_model") or []
        relation = card.get("base_model_relation")
        tags = [*self.tags, *(card.get("tags") or []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{relation}:{base}" for base in bases if relation]
        tags += [f"license:{card['license']}"] if "license" in card else []
        return {
            "_id": hashlib.md5(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.namespace,
            "sha": sha,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": self.downloads,
            "likes": self.likes,
            "tags": list(dict.fromkeys(map(str, tags))),
            "createdAt": WHEN,
            "lastModified": WHEN,
            "siblings": [file.sibling(path, blobs) for path, file in sorted(tree.items())],
            "cardData": card,
        } | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}


def card_data(text: str) -> dict[str, Any]:
    """The metadata on top of a model card; raises yaml.YAMLError or ValueError where that is none."""
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    data = yaml.safe_load(match.group(1)) if match else {}
    if not isinstance(data or {}, dict):
        raise ValueError("metadata is no mapping")
    return json.loads(json.dumps(data or {}, default=str))


@dataclass(frozen=True)
class User:
    name: str
    role: str
    orgs: tuple[str, ...]

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)

    def may_write(self, namespace: str) -> bool:
        return (self.role != "read" and namespace == self.name) or (self.role == "write" and namespace in self.orgs)


@dataclass
class _Trap:
    """Trouble that waits for its requests: an answer, or the number of bytes after which the connection is cut."""

    pattern: str
    times: int
    answer: Answer | None = None
    after: int = 0
    reply: bool = False


class LoopbackHub:
    """A Hub that listens while one is inside `with LoopbackHub() as hub`.

    `log` has every request in order of arrival, those to the storage among them: their paths start with `/storage/`.
    """

    multipart_above: int = 10_000_000
    """LFS objects of more bytes than this are asked for in parts..."""
    part_size: int = 5_000_000
    """... of this many bytes."""
    lfs_above: int = 10_000_000
    """Files of more bytes than this are LFS files, whatever their name."""
    page_size: int = 1000
    """The most entries that a listing gives at once."""

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.waits: list[float] = []
        """Seconds that the client would have slept between its tries; the fixture `hub` fills it."""
        self.card_errors: list[str] = []
        """What is wrong with every card from now on."""
        self.repos: dict[str, Repo] = {}
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.users: dict[str, User] = {}
        self.crashes: list[BaseException] = []
        self.lock = threading.RLock()
        self._traps: list[_Trap] = []
        self.servers = [_Server(self), _Server(self)]
        # By another name, not by its port alone: clients before huggingface_hub 2 drop the token where the host differs.
        hosts = zip(("127.0.0.1", "localhost"), self.servers, strict=True)
        self.endpoint, self.storage = (f"http://{host}:{server.server_address[1]}" for host, server in hosts)

    def __enter__(self) -> LoopbackHub:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self.servers:
            server.stop()
        if self.crashes:
            raise AssertionError(f"the loopback Hub itself failed: {self.crashes[0]!r}") from self.crashes[0]

    def user(self, name: str, token: str, role: str = "write", orgs: Sequence[str] = ()) -> None:
        """Let a token in, to `read`, to `write` (in the organisations too), or `fineGrained`: to write for the user alone."""
        self.users[token] = User(name, role, tuple(orgs))

    def plant(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        downloads: int = 0,
        likes: int = 0,
        tags: Sequence[str] = (),
        lies: Mapping[str, dict[str, Any]] | None = None,
    ) -> str:
        """Commit files to a repository's main branch, on top of what it holds, past the client; the sha of the commit.

        Any name goes. `lies` are by file what is said of it wherever the Hub speaks of it: `size`, `sha256` (of an LFS
        file), `oid` (its blob's name in git), `lfs` (whether it is one); other keys go into its entry in the tree as they are,
        such as `type`.
        """
        with self.lock:
            home = self.repos.setdefault(repo, Repo(repo))
            home.private, home.gated, home.downloads, home.likes, home.tags = private, gated, downloads, likes, tuple(tags)
            tree = dict(home.commits[home.refs["refs/heads/main"]]) if home.refs else {}
            for name, data in files.items():
                claims = (lies or {}).get(name, {})
                tree[name] = File(data, claims.get("lfs", self.is_lfs(name, len(data))), claims)
                home.objects[hashlib.sha256(data).hexdigest()] = data
            return home.commit("refs/heads/main", tree)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        home = self.repos[repo]
        return {name: file.data for name, file in home.commits[home.find(revision)[1]].items()}

    def trouble(
        self,
        pattern: str,
        status: int,
        *,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: str | dict[str, Any] | None = None,
    ) -> None:
        """Answer the next requests whose "METHOD /path" has the pattern in it like this; their bodies are read and thrown away.

        A header `X-Error-Code` makes the client's GatedRepoError and the like (RepoNotFound its RepositoryNotFoundError, as any
        401 about a repository does at the real Hub), `X-Error-Message: Access to this resource is disabled.` DisabledRepoError.
        """
        answer = Refusal(status, None, None, **dict(headers or {})).answer()
        if body is not None:
            answer = answer._replace(body=body.encode() if isinstance(body, str) else as_json(body))
        self._traps.append(_Trap(pattern, times, answer))

    def cut(self, pattern: str, after: int, *, times: int = 1, reply: bool = False) -> None:
        """Close the connection after that many bytes of body: of what comes in where a body does, else of the reply.

        With `reply` always of the reply: the work is done, but the client does not get to know.
        """
        self._traps.append(_Trap(pattern, times, after=after, reply=reply))

    def calm(self) -> None:
        """No more trouble of the kinds above."""
        self._traps.clear()

    def trap(self, line: str) -> _Trap | None:
        with self.lock:
            trap = next((trap for trap in self._traps if trap.times > 0 and re.search(trap.pattern, line)), None)
            if trap:
                trap.times -= 1
            return trap

    def is_lfs(self, name: str, size: int) -> bool:
        return size > 0 and (name.lower().endswith(LFS_NAMES) or size > self.lfs_above)


class _Server(ThreadingHTTPServer):
    """One port of the Hub. It knows its open connections, so that stopping waits for nobody."""

    daemon_threads = False
    server_bind = socketserver.TCPServer.server_bind  # http.server's asks the network for this machine's name

    def __init__(self, hub: LoopbackHub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.open = hub, set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        error = sys.exc_info()[1]
        if error and not isinstance(error, ConnectionError):  # a client may go whenever it likes
            self.hub.crashes.append(error)

    def stop(self) -> None:
        self.shutdown()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
        self.server_close()


class _Cut(Exception):  # noqa: N818
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    """What the Hub answers. `ROUTES` lead to the methods; what a method returns goes out as JSON unless it is an `Answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    REPO = r"(?P<repo>[^/]+/[^/]+)"
    API = rf"/api/models/{REPO}"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models", "models"),
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths"),
        ("GET", rf"{API}/refs", "refs"),
        ("POST", rf"{API}/(?P<kind>branch|tag)/(?P<name>[^/]+)", "new_ref"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "verify"),
        ("POST", rf"/api/complete_multipart/{REPO}/(?P<oid>\w+)", "complete"),
        ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
    STORAGE = (
        ("PUT", rf"/storage/{REPO}/(?P<oid>\w+)(/(?P<part>\d+))?", "store"),
        ("GET|HEAD", rf"/storage/{REPO}/(?P<oid>\w+)", "stored"),
    )

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.hub = self.server.hub
        raw, _, query = self.path.partition("?")
        self.query, self.url = parse_qs(query), f"{self.hub.endpoint}{raw}"
        self.seen = Request(self.command, unquote(raw), query, 0, self.headers.get("Authorization"))
        with self.hub.lock:
            self.hub.log.append(self.seen)
            trap = self.hub.trap(f"{self.command} {self.seen.path}")
        limit = trap.after if trap and not trap.answer else None
        comes_in = int(self.headers.get("Content-Length", 0)) > 0 and not (trap and trap.reply)
        try:
            self.body = self.read(limit if comes_in else None)
            self.write(trap.answer if trap and trap.answer else self.answer(raw), limit)
        except (_Cut, ConnectionError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def read(self, limit: int | None) -> bytes:
        """The body; with a limit no more than that of it, and then the connection is cut."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length if limit is None else min(length, limit))
        self.seen.length = len(body)
        if limit is not None or len(body) < length:
            raise _Cut
        return body

    def write(self, answer: Answer, limit: int | None) -> None:
        body = b"" if self.command == "HEAD" else answer.body[:limit]
        self.seen.status, self.seen.sent = answer.status, len(body)
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(answer.body))} | answer.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if limit is not None:
            raise _Cut

    def answer(self, path: str) -> Answer:
        try:
            with self.hub.lock:
                for methods, pattern, name in self.STORAGE if self.server is self.hub.servers[1] else self.ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods.split("|"):
                        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        result = getattr(self, name)(**arguments)
                        return result if isinstance(result, Answer) else Answer(200, as_json(result))
                if re.fullmatch(r"/api/models/[^/]+|/[^/]+/resolve/.+", path):
                    raise no_repo(self.user() is not None)
                if path.startswith("/api/"):
                    raise LookupError(f"the stand-in has no answer to {self.command} {path}: add a route")
                raise Refusal(404, "Not Found")
        except Refusal as refusal:
            return refusal.answer()
        except Exception as error:
            self.hub.crashes.append(error)
            raise _Cut from error

    def user(self) -> User | None:
        token = (self.seen.authorization or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repo(self, name: str, write: bool = False, pull_request: bool = False) -> Repo:
        """The repository, if the token lets one see it, and write to it or open a pull request if that is asked for."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and not (user and user.belongs_to(repo.namespace))):
            raise no_repo(user is not None)
        if write and user is None:
            raise no_repo(False)
        if write and user and not (user.may_write(repo.namespace) or (pull_request and user.role != "read")):
            raise Refusal(403, "Forbidden: you have no write access here; pass `create_pr=1` to open a Pull Request")
        return repo

    def whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise Refusal(401)
        token: dict[str, Any] = {"displayName": "loopback", "role": user.role, "createdAt": WHEN}
        if user.role == "fineGrained":
            scope = {"entity": {"type": "user", "name": user.name}, "permissions": ["repo.content.read", "repo.write"]}
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": [scope]}
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in user.orgs]
        known = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "email": None, "orgs": orgs}
        return known | {"auth": {"type": "access_token", "accessToken": token}}

    def create(self) -> Any:
        user, request = self.user(), json.loads(self.body)
        if user is None:
            raise Refusal(401)
        namespace = request.get("organization") or user.name
        name = f"{namespace}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if not user.may_write(namespace):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if name in self.hub.repos:
            return Answer(409, as_json({"error": "You already created this model repo", **url}))
        repo = self.hub.repos[name] = Repo(name, request.get("visibility") == "private" or bool(request.get("private")))
        repo.commit("refs/heads/main", {".gitattributes": File(GIT_ATTRIBUTES, lfs=False)})
        return url

    def validate(self) -> Any:
        errors, warnings = list(self.hub.card_errors), []
        try:
            if not card_data(json.loads(self.body)["content"]):
                warnings.append("empty or missing yaml metadata in repo card")
        except (yaml.YAMLError, ValueError) as error:
            errors.append(f"invalid metadata: {error}")
        verdict = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        plain = self.headers.get("Accept") == "text/plain"
        return Answer(400 if errors else 200, "\n".join(errors).encode() if plain else as_json(verdict))

    def page(self, entries: list[Any], most: int) -> Answer:
        """A page of a listing, and in its header the address of the next one."""
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + most < len(entries):
            query = urlencode({**self.query, "cursor": start + most}, doseq=True)
            headers["Link"] = f'<{self.url}?{query}>; rel="next"'
        return Answer(200, as_json(entries[start : start + most]), headers)

    def models(self) -> Any:
        query, user = self.query, self.user()
        listed = []
        for repo in self.hub.repos.values():
            if repo.private and not (user and user.belongs_to(repo.namespace)):
                continue
            info = repo.info()
            wanted = {*query.get("filter", []), *query.get("pipeline_tag", [])}
            named = all(word.lower() in repo.name.lower() for word in query.get("search", []))
            if named and wanted <= set(info["tags"]) and query.get("author", [repo.namespace]) == [repo.namespace]:
                listed.append(info)
        order = query.get("sort", ["downloads"])[0]
        listed.sort(key=lambda info: info["id"])
        listed.sort(key=lambda info: info.get(order) or 0, reverse=True)
        if "expand" not in query:
            hidden = {"author", "sha", "lastModified", "gated", "disabled", "siblings"} if "full" not in query else set()
            hidden |= {"cardData"} if "cardData" not in query else set()
            listed = [{key: value for key, value in info.items() if key not in hidden} for info in listed]
        most = min(int(query.get("limit", [self.hub.page_size])[0]), self.hub.page_size)
        return self.page([self.expanded(info) for info in listed], most)

    def expanded(self, info: dict[str, Any]) -> dict[str, Any]:
        """Of what is known of a model, what `expand` asks for; everything without one."""
        keys = self.query.get("expand")
        return {key: value for key, value in info.items() if key in ("_id", "id", *keys)} if keys else info

    def info(self, repo: str, revision: str = "main") -> Any:
        return self.expanded(self.repo(repo).info(revision, blobs="blobs" in self.query))

    def entries(self, tree: Tree, commit: str | None) -> list[dict[str, Any]]:
        """Files and directories as the tree lists them."""
        folders = {"/".join(path.split("/")[:depth]) for path in tree for depth in range(1, path.count("/") + 1)} - {""}
        listed = [file.entry(path, commit) for path, file in tree.items()]
        return listed + [
            {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path} for path in folders
        ]

    def tree(self, repo: str, revision: str, path: str = "") -> Any:
        home = self.repo(repo)
        sha = home.find(revision)[1]
        wants = {key: self.query.get(key, ["false"])[0].lower() in ("true", "1") for key in ("recursive", "expand")}
        start = f"{path}/" if path else ""
        entries = self.entries(home.commits[sha], sha if wants["expand"] else None)
        below = [entry for entry in entries if entry["path"].startswith(start)]
        if path and not below:
            raise Refusal(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        if not wants["recursive"]:
            below = [entry for entry in below if "/" not in entry["path"][len(start) :]]
        return self.page(sorted(below, key=lambda entry: entry["path"]), self.hub.page_size)

    def paths(self, repo: str, revision: str) -> Any:
        home, form = self.repo(repo), parse_qs(self.body.decode())
        sha = home.find(revision)[1]
        entries = self.entries(home.commits[sha], sha if form.get("expand", ["false"])[0] == "true" else None)
        return [entry for entry in entries if entry["path"] in form.get("paths", [])]

    def refs(self, repo: str) -> Any:
        refs = self.repo(repo).refs

        def listed(start: str, short: bool = True) -> list[dict[str, str]]:
            names = sorted(ref for ref in refs if ref.startswith(start))
            return [{"name": ref[len(start) :] if short else ref, "ref": ref, "targetCommit": refs[ref]} for ref in names]

        pulls = {"pullRequests": listed("refs/pr/")} if "include_prs" in self.query else {}
        return {"branches": listed("refs/heads/"), "converts": [], "tags": listed("refs/tags/")} | pulls

    def new_ref(self, repo: str, kind: str, name: str) -> Any:
        home, request = self.repo(repo, write=True), json.loads(self.body or b"{}")
        ref = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{request['tag']}"
        start = request.get("startingPoint", "main") if kind == "branch" else name
        if ref in home.refs:
            raise Refusal(409, f"Reference {ref} already exists")
        home.refs[ref] = home.find(start)[1]
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        home = self.repo(repo, write=True, pull_request="create_pr" in self.query)
        tree = home.commits[home.find(revision)[1]]
        files = []
        for file in json.loads(self.body)["files"]:
            there = tree.get(file["path"])
            mode = "lfs" if self.hub.is_lfs(file["path"], file["size"]) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
        return {"files": files}

    def batch(self, repo: str) -> Any:
        request = json.loads(self.body)
        home = self.repo(repo, write=True, pull_request="ref" not in request)
        storage = f"{self.hub.storage}/storage/{repo}"
        objects = []
        for wanted in request["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if oid not in home.objects:
                upload: dict[str, Any] = {"href": f"{storage}/{oid}?signature=loopback"}
                if size > self.hub.multipart_above and "multipart" in request["transfers"]:
                    self.hub.parts[repo, oid] = {}
                    count = -(-size // self.hub.part_size)
                    parts = {f"{part:05}": f"{storage}/{oid}/{part}?signature=loopback" for part in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_size), **parts}
                    upload = {"href": f"{self.hub.endpoint}/api/complete_multipart/{repo}/{oid}", "header": header}
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        many = any("header" in entry.get("actions", {}).get("upload", {}) for entry in objects)
        return {"transfer": "multipart" if many else "basic", "objects": objects}

    def store(self, repo: str, oid: str, part: str | None = None) -> Any:
        if part is not None:
            self.hub.parts[repo, oid][int(part)] = self.body
        else:
            self.hub.repos[repo].objects[oid] = self.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, repo: str, oid: str) -> Any:
        parts = self.hub.parts.pop((repo, oid), {})
        etags = {part["partNumber"]: part["etag"] for part in json.loads(self.body)["parts"]}
        if etags != {number: f'"{hashlib.md5(data).hexdigest()}"' for number, data in parts.items()}:
            raise Refusal(400, "the parts that were sent are not those that were named")
        self.hub.repos[repo].objects[oid] = b"".join(data for _, data in sorted(parts.items()))
        return {}

    def verify(self, repo: str) -> Any:
        home, request = self.repo(repo, write=True, pull_request=True), json.loads(self.body)
        data = home.objects.get(request["oid"], b"")
        if len(data) != request["size"] or hashlib.sha256(data).hexdigest() != request["oid"]:
            home.objects.pop(request["oid"], None)
            raise Refusal(400, "the object that was sent is not the one that was named")
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        pull_request = "create_pr" in self.query
        home = self.repo(repo, write=True, pull_request=pull_request)
        ref, parent = home.find(revision)
        tree = dict(home.commits[parent])
        for line in self.body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                if not pull_request and not parent.startswith(value.get("parentCommit", "")):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in home.objects:
                    raise Refusal(400, f"LFS pointer points to a file that does not exist: {value['path']}")
                tree[value["path"]] = File(home.objects[value["oid"]], lfs=True)
            else:
                gone = [path for path in tree if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                tree = {path: file for path, file in tree.items() if path not in gone}
        number = 1 + sum(ref.startswith("refs/pr/") for ref in home.refs)
        if pull_request:
            ref = f"refs/pr/{number}"
        if ref is None or ref.startswith("refs/tags/"):
            raise Refusal(400, f"{revision} is no branch")
        sha = home.commit(ref, tree)
        page = f"{self.hub.endpoint}/{repo}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if pull_request else {})

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        home, user = self.repo(repo), self.user()
        if home.gated and not (user and user.belongs_to(home.namespace)):
            raise Refusal(403 if user else 401, f"Access to model {repo} is restricted", "GatedRepo")
        sha = home.find(revision)[1]
        file = home.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self.content(file.data, headers, file.size)
        place = f"{self.hub.storage}/storage/{repo}/{hashlib.sha256(file.data).hexdigest()}?signature=loopback"
        headers |= {"Location": place, "X-Linked-Size": str(file.size), "X-Linked-Etag": headers["ETag"]}
        return Answer(302, b"Found", headers)

    def stored(self, repo: str, oid: str) -> Answer:
        data = self.hub.repos[repo].objects[oid]
        return self.content(data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, len(data))

    def content(self, data: bytes, headers: dict[str, str], size: int) -> Answer:
        """Bytes, or those of them that are asked for."""
        headers = headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if first > last:
                raise Refusal(416, "Requested Range Not Satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
            return Answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        return Answer(200, data, headers | ({"Content-Length": str(size)} if self.command == "HEAD" else {}))


def environment(hub: LoopbackHub, home: Path, token: str | None) -> dict[str, str]:
    """The environment for a program that is to take the stand-in for the Hub, with a cache and no settings of its own."""
    ours = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    others = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {
        key: value for key, value in os.environ.items() if not key.upper().startswith(others) and "PROXY" not in key.upper()
    }
    return kept | ours | ({"HF_TOKEN": token} if token else {})


class Clock:
    """The module `time` for the client, in which sleeping takes none."""

    def __init__(self, waits: list[float]):
        self.sleep = waits.append

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def connect(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client that this process has imported at the stand-in, in all places that read their settings on import."""
    from diffusers.loaders import lora_base
    from diffusers.utils import hub_utils
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _cache_manager, _http

    wanted = environment(hub, home, None)
    for name in {*os.environ} - {*wanted}:
        monkeypatch.delenv(name)
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    cache = str(home / "hub")
    if hasattr(_http, "_HUB_ORIGINS"):  # huggingface_hub 2 sends the token to these alone
        monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(hub.endpoint)})
    for place, name, value in (
        (constants, "ENDPOINT", hub.endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"}),
        (hf_api.api, "endpoint", hub.endpoint),
        (constants, "HF_HOME", str(home)),
        (constants, "HF_HUB_CACHE", cache),
        (constants, "HUGGINGFACE_HUB_CACHE", cache),
        (_cache_manager, "HF_HUB_CACHE", cache),
        (constants, "HF_TOKEN_PATH", str(home / "token")),
        (constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens")),
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_DISABLE_TELEMETRY", True),
        (constants, "HF_HUB_OFFLINE", False),
        (lora_base, "HF_HUB_OFFLINE", False),
        (hub_utils, "HF_HUB_OFFLINE", False),
        (hub_utils, "HF_HUB_DISABLE_TELEMETRY", True),
        (sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True),
        (_http, "time", Clock(hub.waits)),
        (file_download, "time", Clock(hub.waits)),
    ):
        monkeypatch.setattr(place, name, value)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The stand-in for the Hub, with the client of this process and its children pointed at it, and nobody signed in.

    To sign in: `hub.user("ada", "hf_ada")` and `monkeypatch.setenv("HF_TOKEN", "hf_ada")`, which is read at every call.
    """
    from huggingface_hub import close_session

    with LoopbackHub() as stand_in, warnings.catch_warnings():
        # The client's way of sending a file, which httpx2 warns about.
        warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)
        warnings.filterwarnings("ignore", "Cannot enable progress bars", UserWarning)  # which diffusers does as it likes
        connect(stand_in, tmp_path_factory.mktemp("huggingface"), monkeypatch)
        close_session()
        try:
            yield stand_in
        finally:
            close_session()
