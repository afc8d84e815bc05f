"""The stand-in for the Hub: the client of huggingface_hub uploads, looks, downloads and fails against it as it should."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import huggingface_hub as client
import pytest
from huggingface_hub import constants, errors

import loopback_hub
from loopback_hub import LoopbackHub, Request, environment

hub = loopback_hub.hub  # the fixture

CARD = b"---\nlicense: mit\nlibrary_name: diffusers\nbase_model: owner/base\nbase_model_relation: adapter\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 800
PICTURE = bytes(reversed(range(256))) * 300
FILES = {"README.md": CARD, "erased.safetensors": WEIGHTS, "pictures/cat.png": PICTURE, "pictures/cat.json": b"{}"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen(hub: LoopbackHub, pattern: str) -> list[Request]:
    """The requests whose method and path have a pattern in them."""
    return [request for request in hub.log if re.search(pattern, f"{request.method} {request.path}")]


@pytest.fixture
def ada(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The stand-in with somebody signed in."""
    hub.user("ada", "hf_ada", orgs=["lab"])
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


# Uploading


def test_a_repository_is_created_once(ada: LoopbackHub) -> None:
    assert client.create_repo("ada/no-cat", private=True).repo_id == "ada/no-cat"
    assert client.create_repo("ada/no-cat", exist_ok=True).repo_id == "ada/no-cat"
    with pytest.raises(errors.HfHubHTTPError, match="already created"):
        client.create_repo("ada/no-cat")
    assert client.model_info("ada/no-cat").private
    assert list(ada.files("ada/no-cat")) == [".gitattributes"]


def test_who_one_is(ada: LoopbackHub) -> None:
    ada.user("eve", "hf_eve", role="read")
    ada.user("bob", "hf_bob", role="fineGrained")
    adas, eves, bobs = (client.whoami(token) for token in (None, "hf_eve", "hf_bob"))
    assert (adas["name"], [org["name"] for org in adas["orgs"]]) == ("ada", ["lab"])
    assert [who["auth"]["accessToken"]["role"] for who in (adas, eves, bobs)] == ["write", "read", "fineGrained"]
    assert bobs["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["name"] == "bob"


@pytest.mark.parametrize("parts", [1, 3])
def test_a_folder_goes_up_whole(parts: int, ada: LoopbackHub, folder: Path) -> None:
    if parts > 1:
        ada.multipart_above, ada.part_size = len(PICTURE), len(WEIGHTS) // 3 + 1
    client.create_repo("ada/no-cat")
    commit = client.upload_folder(repo_id="ada/no-cat", folder_path=folder)
    held = ada.files("ada/no-cat")
    assert {name: held[name] for name in FILES} == FILES
    assert client.model_info("ada/no-cat").sha == commit.oid
    assert sum(request.length for request in seen(ada, f"PUT .*{sha256(WEIGHTS)}")) == len(WEIGHTS)
    assert len(seen(ada, f"PUT .*{sha256(WEIGHTS)}")) == parts
    assert {request.authorization for request in seen(ada, "PUT .*/storage/")} == {None}
    assert {request.authorization for request in seen(ada, "/api/models/")} == {"Bearer hf_ada"}


def test_unchanged_files_are_not_sent_again(ada: LoopbackHub, folder: Path) -> None:
    client.create_repo("ada/no-cat")
    first = client.upload_folder(repo_id="ada/no-cat", folder_path=folder)
    ada.log.clear()
    again = client.upload_folder(repo_id="ada/no-cat", folder_path=folder)
    assert again.oid == first.oid
    assert not seen(ada, "PUT|/commit/")

    (folder / "pictures/cat.json").write_bytes(b'{"a": 1}')
    later = client.upload_folder(repo_id="ada/no-cat", folder_path=folder, delete_patterns="*.png", ignore_patterns="*.png")
    assert later.oid != first.oid
    assert not seen(ada, "PUT")
    assert seen(ada, "/commit/")[0].length < 500
    assert "pictures/cat.png" not in ada.files("ada/no-cat")


def test_a_stranger_opens_a_pull_request(ada: LoopbackHub) -> None:
    ada.plant("owner/model", {"README.md": CARD})
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        client.upload_file(repo_id="owner/model", path_in_repo="cat.png", path_or_fileobj=PICTURE)
    commit = client.upload_file(repo_id="owner/model", path_in_repo="cat.png", path_or_fileobj=PICTURE, create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert client.list_repo_files("owner/model") == ["README.md"]
    assert client.list_repo_files("owner/model", revision="refs/pr/1") == ["README.md", "cat.png"]
    path = Path(client.hf_hub_download("owner/model", "cat.png", revision="refs/pr/1"))
    assert path.read_bytes() == PICTURE
    pulls = client.list_repo_refs("owner/model", include_pull_requests=True).pull_requests
    assert pulls is not None
    assert [(pull.ref, pull.target_commit) for pull in pulls] == [("refs/pr/1", commit.oid)]


def test_branches_and_tags(ada: LoopbackHub) -> None:
    first = ada.plant("ada/model", {"a.txt": b"1"})
    client.create_tag("ada/model", tag="v1")
    client.create_branch("ada/model", branch="work/new")
    client.upload_file(repo_id="ada/model", path_in_repo="a.txt", path_or_fileobj=b"2", revision="work/new")
    refs = client.list_repo_refs("ada/model")
    assert [branch.name for branch in refs.branches] == ["main", "work/new"]
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert [ada.files("ada/model", revision)["a.txt"] for revision in ("main", "v1", "work/new")] == [b"1", b"1", b"2"]
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        client.create_branch("ada/model", branch="work/new")
    client.create_branch("ada/model", branch="newer", revision="work/new")
    client.create_tag("ada/model", tag="v2", revision="work/new")
    assert [ada.files("ada/model", revision)["a.txt"] for revision in ("newer", "v2")] == [b"2", b"2"]


def test_a_commit_on_a_parent_that_moved_is_refused(ada: LoopbackHub) -> None:
    old = ada.plant("ada/model", {"a.txt": b"1"})
    new = ada.plant("ada/model", {"b.txt": b"2"})
    upload = {"repo_id": "ada/model", "path_in_repo": "a.txt", "path_or_fileobj": b"3"}
    with pytest.raises(errors.HfHubHTTPError, match="412") as failure:
        client.upload_file(**upload, parent_commit=old)
    assert failure.value.server_message == "A commit has happened since. Please refresh and try again."
    client.upload_file(**upload, parent_commit=new)
    assert ada.files("ada/model") == {"a.txt": b"3", "b.txt": b"2"}


def test_a_cut_upload_commits_nothing_and_a_rerun_sends_what_is_missing(ada: LoopbackHub, folder: Path) -> None:
    client.create_repo("ada/no-cat")
    ada.cut(f"PUT .*{sha256(WEIGHTS)}", 5000, times=6)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'erased\.safetensors'"):
        client.upload_folder(repo_id="ada/no-cat", folder_path=folder)
    assert [request.length for request in seen(ada, f"PUT .*{sha256(WEIGHTS)}")] == [5000] * 6
    assert ada.waits == [1, 2, 4, 8, 8]
    assert not seen(ada, "/commit/")

    ada.log.clear()
    client.upload_folder(repo_id="ada/no-cat", folder_path=folder)
    assert [request.length for request in seen(ada, "PUT")] == [len(WEIGHTS)]
    assert ada.files("ada/no-cat").keys() >= FILES.keys()


@pytest.mark.parametrize("reply", [True, False])
def test_a_commit_whose_reply_is_lost_has_happened_and_one_that_is_cut_has_not(reply: bool, ada: LoopbackHub) -> None:
    ada.plant("ada/model", {})
    ada.cut("/commit/", 1 if reply else 10_000, reply=reply)
    with pytest.raises(errors.HTTPError, match="peer closed connection" if reply else "Server disconnected"):
        client.upload_file(repo_id="ada/model", path_in_repo="a.txt", path_or_fileobj=b"1")
    assert ada.files("ada/model") == ({"a.txt": b"1"} if reply else {})
    assert len(seen(ada, "/commit/")) == 1


# Looking


def test_the_tree_names_lfs_objects(hub: LoopbackHub) -> None:
    commit = hub.plant("ada/no-cat", FILES)
    entries = {entry.path: entry for entry in client.list_repo_tree("ada/no-cat", recursive=True, expand=True)}
    assert [path for path, entry in entries.items() if isinstance(entry, client.hf_api.RepoFolder)] == ["pictures"]
    weights, card = entries["erased.safetensors"], entries["README.md"]
    assert weights.lfs is not None
    assert (weights.lfs.sha256, weights.lfs.size, weights.size) == (sha256(WEIGHTS), len(WEIGHTS), len(WEIGHTS))
    assert weights.last_commit.oid == commit
    assert card.lfs is None
    assert card.blob_id == hashlib.sha1(b"blob %d\0%b" % (len(CARD), CARD)).hexdigest()
    assert [entry.path for entry in client.list_repo_tree("ada/no-cat", "pictures")] == [
        "pictures/cat.json",
        "pictures/cat.png",
    ]
    assert [entry.path for entry in client.list_repo_tree("ada/no-cat")] == ["README.md", "erased.safetensors", "pictures"]
    paths = client.get_paths_info("ada/no-cat", ["pictures/cat.png", "nothing"])
    assert [(path.path, path.lfs.sha256) for path in paths] == [("pictures/cat.png", sha256(PICTURE))]
    hub.page_size = 2
    assert [entry.path for entry in client.list_repo_tree("ada/no-cat", recursive=True)] == list(entries)


def test_the_page_of_a_model(hub: LoopbackHub) -> None:
    commit = hub.plant("ada/no-cat", FILES, gated=True, downloads=7, likes=2, tags=["esd-lora"])
    info = client.model_info("ada/no-cat", files_metadata=True)
    assert (info.sha, info.gated, info.private, info.downloads, info.likes) == (commit, "auto", False, 7, 2)
    assert info.card_data.base_model == "owner/base"
    assert {"esd-lora", "diffusers", "license:mit", "base_model:owner/base", "base_model:adapter:owner/base"} <= set(info.tags)
    siblings = {file.rfilename: (file.size, file.lfs and file.lfs.sha256) for file in info.siblings}
    assert siblings["erased.safetensors"] == (len(WEIGHTS), sha256(WEIGHTS))
    assert siblings["README.md"] == (len(CARD), None)
    assert client.model_info("ada/no-cat", expand=["downloads"]).sha is None


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["bob/dog", "ada/no-cat", "ada/a-cat"]),
        ({"search": "CAT"}, ["ada/no-cat", "ada/a-cat"]),
        ({"author": "bob"}, ["bob/dog"]),
        ({"filter": "esd-lora"}, ["bob/dog", "ada/no-cat"]),
        ({"filter": ["esd-lora", "base_model:adapter:owner/base"]}, ["ada/no-cat"]),
        ({"sort": "likes"}, ["ada/a-cat", "bob/dog", "ada/no-cat"]),
        ({"limit": 1}, ["bob/dog"]),
    ],
)
def test_models_are_found(wanted: dict, names: list[str], hub: LoopbackHub) -> None:
    hub.plant("ada/no-cat", {"README.md": CARD}, downloads=5, likes=1, tags=["esd-lora"])
    hub.plant("bob/dog", {}, downloads=9, likes=2, tags=["esd-lora"])
    hub.plant("ada/a-cat", {}, likes=3)
    hub.plant("ada/secret-cat", {}, private=True, downloads=99, tags=["esd-lora"])
    assert [model.id for model in client.list_models(**wanted)] == names
    hub.log.clear()
    hub.page_size = 2
    assert [model.id for model in client.list_models(**wanted)] == names
    assert len(seen(hub, "/api/models")) == (len(names) + 1) // 2


def test_the_owner_finds_what_is_private(ada: LoopbackHub) -> None:
    ada.plant("ada/secret", {}, private=True)
    ada.plant("lab/secret", {}, private=True)
    ada.plant("bob/secret", {}, private=True)
    assert {model.id for model in client.list_models()} == {"ada/secret", "lab/secret"}
    assert [model.id for model in client.list_models(token=False)] == []


# Downloading


@pytest.mark.parametrize("name", ["README.md", "erased.safetensors"])
def test_a_file_is_downloaded_once(name: str, ada: LoopbackHub) -> None:
    ada.plant("ada/no-cat", FILES, private=True)
    path = Path(client.hf_hub_download("ada/no-cat", name))
    assert path.read_bytes() == FILES[name]
    assert path.is_relative_to(constants.HF_HUB_CACHE)
    assert sum(request.sent for request in seen(ada, "GET")) == len(FILES[name])
    assert {request.authorization for request in seen(ada, "GET /storage/")} <= {None}

    ada.plant("ada/no-cat", {"other.txt": b"a new commit"}, private=True)
    ada.log.clear()
    newer = Path(client.hf_hub_download("ada/no-cat", name))
    assert newer != path
    assert newer.resolve() == path.resolve()
    assert [request.method for request in ada.log] == ["HEAD"]


def test_a_cut_download_goes_on_where_it_was(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB, and what is not a whole one is lost
    hub.plant("ada/no-cat", FILES)
    hub.cut("GET /storage/", 5000)
    assert Path(client.hf_hub_download("ada/no-cat", "erased.safetensors")).read_bytes() == WEIGHTS
    assert [(got.status, got.sent) for got in seen(hub, "GET")] == [(200, 5000), (206, len(WEIGHTS) - 5000)]
    assert hub.waits == [1]


def test_a_download_that_is_always_cut_leaves_nothing(hub: LoopbackHub) -> None:
    hub.plant("ada/no-cat", FILES)
    hub.cut("GET /storage/", 5000, times=99)
    with pytest.raises(errors.HTTPError, match="peer closed connection"):
        client.hf_hub_download("ada/no-cat", "erased.safetensors")
    assert len(seen(hub, "GET")) == 6
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.is_file()]


def test_a_snapshot_is_downloaded(hub: LoopbackHub) -> None:
    commit = hub.plant("ada/no-cat", FILES)
    folder = Path(client.snapshot_download("ada/no-cat", ignore_patterns="*.png"))
    assert folder.name == commit
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == FILES.keys() - {"pictures/cat.png"}
    assert not seen(hub, sha256(PICTURE))


# Failing


@pytest.mark.parametrize(
    ("repo", "name", "revision", "token", "error"),
    [
        ("ada/nothing", "a.txt", None, "hf_ada", errors.RepositoryNotFoundError),
        ("ada/nothing", "a.txt", None, None, errors.RepositoryNotFoundError),
        ("nothing", "a.txt", None, None, errors.RepositoryNotFoundError),
        ("ada/private", "a.txt", None, "hf_bob", errors.RepositoryNotFoundError),
        ("ada/private", "a.txt", None, None, errors.RepositoryNotFoundError),
        ("ada/gated", "a.txt", None, "hf_bob", errors.GatedRepoError),
        ("ada/gated", "a.txt", None, None, errors.GatedRepoError),
        ("ada/model", "nothing", None, None, errors.RemoteEntryNotFoundError),
        ("ada/model", "a.txt", "nothing", None, errors.RevisionNotFoundError),
        ("ada/model", "a.txt", None, "hf_nobody", errors.HfHubHTTPError),
    ],
)
def test_what_may_not_be_downloaded(
    repo: str, name: str, revision: str | None, token: str | None, error: type[Exception], hub: LoopbackHub
) -> None:
    hub.user("ada", "hf_ada")
    hub.user("bob", "hf_bob")
    hub.plant("ada/model", {"a.txt": b"1"})
    hub.plant("ada/private", {"a.txt": b"1"}, private=True)
    hub.plant("ada/gated", {"a.txt": b"1"}, gated=True)
    for readable in ("ada/model", "ada/private", "ada/gated"):
        assert Path(client.hf_hub_download(readable, "a.txt", token="hf_ada", local_dir=constants.HF_HOME)).read_bytes() == b"1"
    with pytest.raises(error) as failure:
        client.hf_hub_download(repo, name, revision=revision, token=token)
    assert type(failure.value) is error


@pytest.mark.parametrize(
    ("repo", "token", "status"),
    [
        ("ada/model", None, 401),
        ("ada/model", "hf_nobody", 401),
        ("ada/model", "hf_reader", 403),
        ("ada/model", "hf_bob", 403),
        ("lab/model", "hf_fine", 403),
        ("ada/model", "hf_fine", None),
        ("lab/model", "hf_ada", None),
    ],
)
def test_what_may_not_be_written(repo: str, token: str | None, status: int | None, hub: LoopbackHub) -> None:
    for name, key, role in (("ada", "hf_ada", "write"), ("ada", "hf_reader", "read"), ("ada", "hf_fine", "fineGrained")):
        hub.user(name, key, role, orgs=["lab"])
    hub.user("bob", "hf_bob")
    hub.plant(repo, {})
    tries: list[Callable[[], object]] = [
        lambda: client.create_repo(f"{repo}-2", token=token),
        lambda: client.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"1", token=token),
    ]
    for attempt in tries:
        if status is None:
            attempt()
        else:
            with pytest.raises(errors.HfHubHTTPError) as failure:
                attempt()
            assert failure.value.response.status_code == status
    assert (f"{repo}-2" in hub.repos, hub.files(repo)) == ((True, {"a.txt": b"1"}) if status is None else (False, {}))


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, errors.HfHubHTTPError),
        (403, {}, errors.HfHubHTTPError),
        (403, {"X-Error-Code": "GatedRepo"}, errors.GatedRepoError),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, errors.DisabledRepoError),
        (400, {}, errors.BadRequestError),
        (413, {}, errors.HfHubHTTPError),
        (429, {"Retry-After": "7"}, errors.HfHubHTTPError),
        (500, {}, errors.HfHubHTTPError),
        (503, {}, errors.HfHubHTTPError),
    ],
)
def test_trouble_on_demand(status: int, headers: dict, error: type[errors.HfHubHTTPError], ada: LoopbackHub) -> None:
    ada.plant("ada/model", {})
    ada.trouble("POST .*/commit/main", status, headers=headers, body={"error": "no luck today"})
    upload = {"repo_id": "ada/model", "path_in_repo": "a.txt", "path_or_fileobj": b"1"}
    with pytest.raises(error, match="no luck today") as failure:
        client.upload_file(**upload)
    assert type(failure.value) is error
    assert failure.value.response.status_code == status
    assert ada.waits == []  # a commit is never tried twice
    assert ada.files("ada/model") == {}
    client.upload_file(**upload)
    assert ada.files("ada/model") == {"a.txt": b"1"}


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"Retry-After": "7"}, [8, 8]),
        (429, {"RateLimit": '"api";r=0;t=55'}, [56, 56]),
        (503, {"Retry-After": "7"}, [8, 8]),
        (500, {}, [1, 2]),
    ],
)
def test_the_client_waits_and_tries_again(status: int, headers: dict, waits: list[float], ada: LoopbackHub) -> None:
    ada.plant("ada/model", {})
    ada.trouble("/preupload/", status, times=2, headers=headers)
    client.upload_file(repo_id="ada/model", path_in_repo="a.txt", path_or_fileobj=b"1")
    assert ada.waits == waits
    assert [request.status for request in seen(ada, "/preupload/")] == [status, status, 200]


@pytest.mark.parametrize("card", ["---\nlicense: [mit\n---\n", "---\n- mit\n---\n", CARD.decode()])
def test_a_card_is_checked(card: str, ada: LoopbackHub) -> None:
    if card == CARD.decode():
        ada.card_errors.append('"license" must be one of ...')
    ada.plant("ada/model", {})
    with pytest.raises(ValueError, match=r"license|metadata"):
        client.upload_file(repo_id="ada/model", path_in_repo="README.md", path_or_fileobj=card.encode())
    assert {request.path for request in ada.log} == {"/api/validate-yaml"}


@pytest.mark.skipif(version("huggingface_hub") < "2", reason="older clients ask huggingface.co, whatever the endpoint")
def test_a_card_is_checked_before_it_is_sent(ada: LoopbackHub) -> None:
    client.ModelCard(CARD.decode()).validate()
    ada.card_errors.append('"license" must be one of ...')
    with pytest.raises(ValueError, match="must be one of"):
        client.ModelCard(CARD.decode()).validate()


def test_a_card_without_metadata_is_warned_about(ada: LoopbackHub) -> None:
    ada.plant("ada/model", {})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        client.upload_file(repo_id="ada/model", path_in_repo="README.md", path_or_fileobj=b"# A model")


# Hostile repositories


HOSTILE = ["../../evil.py", "/etc/evil", "C:\\evil", "..\\evil", ".git/config", "new\nline", "a//b", "per%cent?#"]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_planted(name: str, hub: LoopbackHub) -> None:
    hub.plant("eve/model", {name: b"evil"})
    assert client.list_repo_files("eve/model") == [name]
    if name.startswith(("..", "/", "C")):
        with pytest.raises(ValueError, match="Invalid filename"):
            client.hf_hub_download("eve/model", name)
        assert not seen(hub, "resolve")
    else:
        assert Path(client.hf_hub_download("eve/model", name)).read_bytes() == b"evil"


def test_lies_are_told(hub: LoopbackHub) -> None:
    lies = {"size.bin": {"size": 9}, "hash.bin": {"sha256": "0" * 64}, "link": {"type": "symlink"}, "text.bin": {"lfs": False}}
    hub.plant("eve/model", dict.fromkeys(lies, b"12345"), lies=lies)
    tree = {entry.path: entry for entry in client.list_repo_tree("eve/model")}
    assert (tree["size.bin"].size, tree["size.bin"].lfs.size, tree["hash.bin"].lfs.sha256) == (9, 9, "0" * 64)
    assert isinstance(tree["link"], client.hf_api.RepoFolder)
    assert tree["text.bin"].lfs is None
    with pytest.raises(OSError, match="should be of size 9 but has size 5"):
        client.hf_hub_download("eve/model", "size.bin")
    # The client believes what it is told of hashes: who cares must count them.
    path = Path(client.hf_hub_download("eve/model", "hash.bin"))
    assert (path.read_bytes(), path.resolve().name) == (b"12345", "0" * 64)


# The stand-in itself


def test_a_program_of_its_own_takes_the_stand_in_for_the_hub(tmp_path: Path) -> None:
    code = "import huggingface_hub as c; print(c.whoami()['name'], c.hf_hub_download('ada/no-cat', 'README.md'))"
    with LoopbackHub() as hub:
        hub.user("ada", "hf_ada")
        hub.plant("ada/no-cat", FILES, private=True)
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment(hub, tmp_path, "hf_ada"), check=True, capture_output=True, text=True
        )
    name, path = ran.stdout.split()
    assert name == "ada"
    assert Path(path).is_relative_to(tmp_path)
    assert Path(path).read_bytes() == CARD


def test_what_it_does_not_know_does_not_pass_for_the_hubs_answer() -> None:
    stand_in = LoopbackHub().__enter__()
    with pytest.raises(ConnectionError):
        urllib.request.urlopen(f"{stand_in.endpoint}/api/datasets")
    with pytest.raises(AssertionError, match="GET /api/datasets"):
        stand_in.__exit__()
