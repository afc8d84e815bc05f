"""Push, pull, search and catalog against a real wire: huggingface_hub's own client and a stand-in for the Hub on loopback."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from PIL import Image
from safetensors.torch import save_file

import loopback_hub
from esd_lora.built_in import base_files
from esd_lora.cli import main
from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser
from esd_lora.erasers.header import Origin
from esd_lora.erasers.manifests import load_eraser, write_manifest
from esd_lora.erasers.measured import Measured
from esd_lora.erasers.stacking import Strength
from esd_lora.erasers.tensor_files import file_content, read_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.files import write_files
from esd_lora.formats.cards import Publication, Sample, render_card, save_with_card
from esd_lora.formats.licenses import license_of
from esd_lora.pictures import sample_files
from esd_lora.recipe import Neighbours
from esd_lora.sharing.catalog import catalog, search
from esd_lora.sharing.pulling import pull
from esd_lora.sharing.pushing import drafted, push
from esd_lora.wording import HubId
from loopback_hub import LoopbackHub
from random_erasers import build_header, random_eraser, random_pair

hub = loopback_hub.hub  # the fixture

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def ada(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The stand-in with somebody signed in."""
    hub.user("ada", "hf_ada_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_ada_secret")
    return hub


def eraser_for(base: str, *names: str) -> Eraser:
    """An eraser on two layers that Stable Diffusion has."""
    generator = torch.Generator().manual_seed(0)
    block = "mid_block.attentions.0.transformer_blocks.0.attn2"
    return Eraser(
        {f"{block}.to_{x}": random_pair((8, 6), rank, generator, torch.float32) for x, rank in {"k": 1, "v": 2}.items()},
        build_header(*names, base=base),
    )


@pytest.fixture
def no_cat(tmp_path: Path) -> Path:
    """An eraser with pictures, on a base whose licence is known."""
    folder = eraser_for(BASE, "a cat").save(tmp_path / "no-cat")
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    write_files(folder, sample_files(["a cat", "a dog"], pictures, pictures[::-1]))
    (folder / "train_log.jsonl").write_text("{}\n")
    (folder / "checkpoint.pt").write_bytes(b"not for others")
    return folder


def invoke(*args: object, **how: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], **how)


def fault(*args: object) -> str:
    """The sentence of a command that fails as a user's mistake should; never with the token in it."""
    result = invoke(*args)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "hf_ada_secret" not in result.output
    return result.stderr


def sent(hub: LoopbackHub) -> list[str]:
    """What carried content to the Hub."""
    return [
        f"{r.method} {r.path}" for r in hub.log if r.method == "PUT" or "/commit/" in r.path or r.path == "/api/repos/create"
    ]


# Push


def test_push_publishes_what_it_said(ada: LoopbackHub, no_cat: Path) -> None:
    result = invoke("push", no_cat, "ada/no-cat", "--kohya", "--yes")
    assert result.exit_code == 0, result.output
    assert f"pushed: {ada.endpoint}/ada/no-cat" in result.stdout
    files = {name: data for name, data in ada.files("ada/no-cat").items() if name != ".gitattributes"}
    pictures = [f"samples/{i}_{name}.png" for i in (1, 2) for name in ("base", "erased")]
    assert sorted(files) == sorted(["README.md", "recipe.yaml", WEIGHTS_NAME, "kohya/no-cat.safetensors", *pictures])
    for name, data in files.items():
        assert re.search(rf"{len(data):,} bytes  {re.escape(name)}", result.stdout), name
    assert "public: anyone can see and fetch it" in result.stdout
    assert "measured: no" in result.stdout
    assert f"erases a cat from {BASE}; licence creativeml-openrail-m" in result.stdout
    assert files[WEIGHTS_NAME] == (no_cat / WEIGHTS_NAME).read_bytes()
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "creativeml-openrail-m"
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert {"lora", "diffusers", "template:sd-lora", "concept-erasure", "esd", "erases:cat"} <= set(data["tags"])
    assert "instance_prompt" not in data
    shown = [(picture["text"], picture["output"]["url"]) for picture in data["widget"]]
    assert shown[:2] == [("a cat (base)", "samples/1_base.png"), ("a cat", "samples/1_erased.png")]
    assert "hf_ada_secret" not in result.output


def test_nothing_leaves_before_it_is_confirmed(ada: LoopbackHub, no_cat: Path) -> None:
    shown = invoke("push", no_cat, "ada/no-cat", "--dry-run")
    assert shown.exit_code == 0
    assert "# Eraser: a cat" in shown.stdout
    assert "nothing was sent" in shown.stdout
    assert ada.log == []
    assert invoke("push", no_cat, "ada/no-cat", input="n\n").stdout.endswith("nothing was sent\n")
    nobody = invoke("push", no_cat, "ada/no-cat", input="")
    assert (nobody.exit_code, nobody.stderr) == (1, "Aborted!\n")
    assert {request.method for request in ada.log} == {"GET"}
    assert invoke("push", no_cat, "ada/no-cat", input="y\n").exit_code == 0
    assert "ada/no-cat" in ada.repos


def test_pushing_again_sends_only_what_changed(ada: LoopbackHub, no_cat: Path) -> None:
    first = push(no_cat, "ada/no-cat", kohya=True)
    assert first is not None
    assert first.changed
    ada.log.clear()
    again = push(no_cat, "ada/no-cat", kohya=True)
    assert again is not None
    assert (again.changed, again.commit) == (False, first.commit)
    assert [line for line in sent(ada) if line.startswith("PUT")] == []
    (no_cat / "samples" / "2_base.png").unlink()
    (no_cat / "samples" / "2_erased.png").unlink()
    ada.log.clear()
    third = push(no_cat, "ada/no-cat")
    assert third is not None
    assert third.changed
    assert [line for line in sent(ada) if line.startswith("PUT")] == []
    left = set(ada.files("ada/no-cat"))
    assert "samples/1_base.png" in left
    assert not {"samples/2_base.png", "samples/2_erased.png", "kohya/no-cat.safetensors"} & left


def test_large_files_go_in_parts(ada: LoopbackHub, no_cat: Path) -> None:
    ada.multipart_above = ada.part_size = 500
    push(no_cat, "ada/no-cat")
    assert ada.files("ada/no-cat")[WEIGHTS_NAME] == (no_cat / WEIGHTS_NAME).read_bytes()
    assert len([r for r in ada.log if r.method == "PUT" and r.length == 500]) > 2


def test_another_licence_than_the_base_has(ada: LoopbackHub, no_cat: Path) -> None:
    with pytest.warns(UserWarning, match="has the licence creativeml-openrail-m, and this says mit"):
        push(no_cat, "ada/no-cat", license="mit")
    text = ada.files("ada/no-cat")["README.md"].decode()
    assert "`mit`. The terms of the base" in text
    assert "(`creativeml-openrail-m`)" in text


def test_files_of_others_stay(ada: LoopbackHub, no_cat: Path) -> None:
    others = {"samples/mine.png": b"x", "notes.md": b"y", "kohya/style.safetensors": b"z", "samples/9_base.png": b"p"}
    old = {"samples/4_base.png": b"x", "kohya/no-cat.safetensors": b"y"}
    ada.plant("ada/no-cat", {**others, **old})
    shown = invoke("push", no_cat, "ada/no-cat", "--create-pr", "--yes").stdout
    assert "as a pull request" in shown
    assert "taken out" not in shown
    assert set(old) <= set(ada.files("ada/no-cat", "refs/pr/1"))
    shown = invoke("push", no_cat, "ada/no-cat", "--yes").stdout
    assert [line.split()[-1] for line in shown.splitlines() if "taken out" in line] == sorted(old)
    files = ada.files("ada/no-cat")
    assert {name: files[name] for name in others} == others
    assert not set(old) & set(files)


def test_pictures_of_something_else_are_not_taken(ada: LoopbackHub, no_cat: Path) -> None:
    eraser_for(BASE, "a hat").save(no_cat.parent / "hat")
    shutil.copy(no_cat.parent / "hat" / WEIGHTS_NAME, no_cat / "hat.safetensors")
    assert not [name for name in drafted(no_cat / "hat.safetensors", "ada/hat").files if name.startswith("samples/")]
    push(no_cat, "ada/no-cat")
    assert not [name for name in drafted("ada/no-cat", "ada/copy").files if name.startswith("samples/")]
    assert ada.log


def test_a_branch_and_a_pull_request(ada: LoopbackHub, no_cat: Path) -> None:
    push(no_cat, "ada/no-cat", revision="v2")
    assert WEIGHTS_NAME in ada.files("ada/no-cat", "v2")
    assert WEIGHTS_NAME not in ada.files("ada/no-cat")
    ada.user("bob", "hf_bob")
    ada.plant("bob/eraser", {"README.md": b"mine"})
    proposed = push(no_cat, "bob/eraser", create_pr=True)
    assert proposed is not None
    assert proposed.url.endswith("/bob/eraser/discussions/1")
    assert ada.files("bob/eraser") == {"README.md": b"mine"}
    assert WEIGHTS_NAME in ada.files("bob/eraser", "refs/pr/1")


def test_a_private_repository(ada: LoopbackHub, no_cat: Path) -> None:
    result = invoke("push", no_cat, "ada/secret", "--private", "--yes")
    assert "ada/secret, new, private" in result.stdout
    assert ada.repos["ada/secret"].private
    assert "ada/secret, private" in invoke("push", no_cat, "ada/secret", "--yes").stdout
    push(no_cat, "ada/open")
    assert "is there and public" in fault("push", no_cat, "ada/open", "--private", "--yes")
    assert "is there and public" in fault("push", no_cat, "ada/open", "--private", "--create-pr", "--yes")


def test_a_cut_push_goes_on(ada: LoopbackHub, no_cat: Path) -> None:
    # Every try of the client is cut; what arrived before stays, and is not public.
    ada.cut(r"^PUT .*", 1000, times=50)
    ada.multipart_above = 10**9
    message = fault("push", no_cat, "ada/no-cat", "--yes")
    assert "Run the same command again" in message
    assert "the connection to the Hub failed on ada/no-cat" in message
    assert WEIGHTS_NAME not in ada.files("ada/no-cat")
    ada.calm()
    kept = set(ada.repos["ada/no-cat"].objects)
    ada.log.clear()
    assert invoke("push", no_cat, "ada/no-cat", "--yes").exit_code == 0
    puts = [r.path for r in ada.log if r.method == "PUT"]
    assert not [path for path in puts if any(oid in path for oid in kept)]
    assert ada.files("ada/no-cat")[WEIGHTS_NAME] == (no_cat / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize(
    ("token", "repo", "pattern", "status", "headers", "words"),
    [
        (None, "ada/x", None, 0, {}, "hf auth login"),
        ("hf_nobody", "ada/x", None, 0, {}, "does not know the token here"),
        ("hf_reader", "ada/x", None, 0, {}, "may not do that to ada/x"),
        ("hf_ada_secret", "bob/theirs", None, 0, {}, "may not do that to bob/theirs"),
        ("hf_ada_secret", "ada/x", "commit", 413, {}, "takes no file of that size"),
        ("hf_ada_secret", "ada/x", "preupload", 500, {}, "the Hub is in trouble (status 500"),
        ("hf_ada_secret", "ada/x", "create", 429, {"Retry-After": "77"}, "Try again in 77 seconds"),
        ("hf_ada_secret", "ada/x", "create", 429, {}, "Try again later"),
        ("hf_ada_secret", "ada/x", "commit", 403, {}, "write access"),
    ],
    ids=["no token", "unknown token", "read token", "not owned", "413", "500", "429 with wait", "429", "403"],
)
def test_what_the_hub_refuses_to_take(
    token: str | None,
    repo: str,
    pattern: str | None,
    status: int,
    headers: dict[str, str],
    words: str,
    ada: LoopbackHub,
    no_cat: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ada.user("reader", "hf_reader", role="read")
    ada.plant("bob/theirs", {"README.md": b"theirs"})
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if pattern:
        ada.trouble(pattern, status, times=50, headers=headers)
    message = fault("push", no_cat, repo, "--yes")
    assert words in message
    assert not token or token not in message
    assert ada.files("bob/theirs") == {"README.md": b"theirs"}


def test_a_card_that_the_hub_refuses(ada: LoopbackHub, no_cat: Path) -> None:
    ada.card_errors = ["license is not a known one"]
    assert "license is not a known one" in fault("push", no_cat, "ada/no-cat", "--yes")
    assert WEIGHTS_NAME not in ada.files("ada/no-cat")


def test_nobody_answers(hub: LoopbackHub, no_cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    for server in hub.servers:
        server.stop()
    assert "the connection to the Hub failed on ada/x" in fault("push", no_cat, "ada/x", "--yes")
    assert "the connection to the Hub failed on ada/x" in fault("pull", "ada/x", "-o", no_cat.parent / "out")
    assert not (no_cat.parent / "out").exists() or not any((no_cat.parent / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"base": "/home/me/model"}, [], "made for base '/home/me/model', which nobody else has"),
        ({"base": "owner/unknown"}, [], "licence of base 'owner/unknown' is not known"),
        ({}, ["--license", "My Own"], "expected the Hub's name of a licence"),
        ({}, ["--license", "other"], "says nothing"),
        ({}, ["--license", "mine=http://x"], "expected the Hub's name of a licence"),
        ({}, ["--base-model", "nowhere"], "made for base"),
    ],
)
def test_what_is_not_pushed(
    changes: dict[str, str], options: list[str], words: str, ada: LoopbackHub, no_cat: Path, tmp_path: Path
) -> None:
    eraser = Eraser.load(no_cat)
    folder = Eraser(eraser.pairs, eraser.header.model_copy(update=changes)).save(tmp_path / "changed")
    assert words in fault("push", folder, "ada/x", "--yes", *options)
    assert ada.log == []


def test_damaged_erasers_are_not_pushed(ada: LoopbackHub, no_cat: Path) -> None:
    tensors, metadata = read_tensors(no_cat / WEIGHTS_NAME)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, no_cat / WEIGHTS_NAME, metadata)
    assert "NaN" in fault("push", no_cat, "ada/x", "--yes")
    assert "no name of a repository" in fault("push", no_cat, "x", "--yes")
    eraser_for(BASE).save(no_cat)
    (no_cat / "samples" / "1_erased.png").write_bytes(b"no picture")
    assert "cannot be read as a picture, PNG (" in fault("push", no_cat, "ada/x", "--yes")
    assert ada.log == []


def test_no_path_of_this_machine_becomes_public(ada: LoopbackHub, tmp_path: Path) -> None:
    here = "/home/me/models/sd"
    eraser = eraser_for(here)
    recipes = tuple(
        recipe.model_copy(update={"base": here, "base_config": "/home/me/config"}) for recipe in eraser.header.recipes
    )
    header = eraser.header.model_copy(update={"base": here, "recipes": recipes})
    folder = Eraser(eraser.pairs, header).save(tmp_path / "one")
    push(folder, "ada/one", base_model=f"{BASE}@abc", kohya=True)
    for name, data in ada.files("ada/one").items():
        assert b"/home/me" not in data, name
    pushed = pull("ada/one", tmp_path / "two")
    header = Eraser.load(pushed.directory).header
    assert (header.base, header.base_revision, header.recipes[0].base) == (BASE, "abc", BASE)


def test_no_path_of_any_member_becomes_public(ada: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-sd").mkdir(parents=True)
    cat, hat = eraser_for(BASE, "a cat"), eraser_for(BASE, "a hat")
    here = hat.header.recipes[0].model_copy(
        update={
            "base": "models/my-sd",
            "base_config": "/opt/config",
            "neighbours": Neighbours(vocabulary="/srv/secret/words.txt", count=3),
        }
    )
    record = {"base": {"id": "/srv/copy"}, "variants": {"other": {"base": {"id": "models/my-sd"}}}, "note": "~/x/y.csv"}
    changes = {
        "recipes": (*cat.header.recipes, here),
        "origins": (Origin(how="imported", files={}, layout="kohya", notes={"ss_vae_name": "C:\\Users\\me\\vae.pt"}),),
        "evaluation": Measured(suite="s", date="2026-01-01", concepts=("/not/a/path",), variants={}, record=record),
    }
    Eraser(cat.pairs, cat.header.model_copy(update=changes)).save(tmp_path / "both")
    push(tmp_path / "both", "ada/both", kohya=True)
    for name, data in ada.files("ada/both").items():
        for part in (b"/srv", b"/opt", b"models/my-sd", b"Users", b"~/x"):
            assert part not in data, (name, part)
    header = Eraser.load(pull("ada/both", tmp_path / "pulled").directory).header
    assert header.recipes[1].base == BASE
    assert header.recipes[1].neighbours is not None
    assert header.recipes[1].neighbours.vocabulary == "words.txt"
    local = eraser_for("models/my-sd", "a cat").save(tmp_path / "local")
    assert "nobody else has under that name" in fault("push", local, "ada/x", "--yes", "--license", "mit")
    inside = eraser_for(BASE).header.model_copy(update={"versions": {"torch": f"{tmp_path}/torch"}})
    Eraser(cat.pairs, inside).save(tmp_path / "inside")
    push(tmp_path / "inside", "ada/inside")
    assert str(tmp_path).encode() not in ada.files("ada/inside")[WEIGHTS_NAME]


def test_sensitive_pages(ada: LoopbackHub, no_cat: Path) -> None:
    push(no_cat, "ada/no-cat", sensitive=True)
    files = ada.files("ada/no-cat")
    assert not [name for name in files if name.endswith("_base.png")]
    text = files["README.md"].decode()
    assert "c••" in text
    assert not re.search(r"\bcat\b", text.replace("ada/no-cat", ""), re.IGNORECASE)
    assert "esd-lora merge ada/no-cat" in text
    data = ModelCard(text).data.to_dict()
    assert "not-for-all-audiences" in data["tags"]
    assert not [tag for tag in data["tags"] if tag.startswith("erases:")]


@pytest.mark.parametrize(
    ("name", "prompt", "shown"),
    [
        ("a stable full of horses", "two horses in a stable", "two h••••• in a s•••••"),
        ("text on an image", "an image with text", "an i•••• with t•••"),
        ("the LoRA style", "a LoRA", "a L•••"),
        ("license plate", "license plates", "l•••••• p•••••"),
        ("nude", "three nudes", "three n••••"),
        ("裸体", "裸体 painting", "裸• painting"),
        ("xx", "xx", "x•"),
    ],
)
def test_masking_touches_no_key_tag_or_address(name: str, prompt: str, shown: str, ada: LoopbackHub, tmp_path: Path) -> None:
    eraser = eraser_for(BASE, name)
    concept = eraser.header.concepts[0].model_copy(update={"pairs": ((prompt, ""),)})
    folder = Eraser(eraser.pairs, eraser.header.model_copy(update={"concepts": (concept,)})).save(tmp_path / "one")
    write_files(folder, sample_files([prompt], [Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))]))
    push(folder, "ada/one", sensitive=True, kohya=True)
    files = ada.files("ada/one")
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["pipeline_tag"]) == ("creativeml-openrail-m", BASE, "text-to-image")
    assert {"template:sd-lora", "esd-lora", "lora"} <= set(data["tags"])
    assert [picture["text"] for picture in data["widget"]] == [shown]
    assert f"| {shown} | (empty prompt) |" in card.text
    assert "take `kohya/one.safetensors`" in card.text
    assert f'from_pretrained("{BASE}")' in card.text
    with Image.open(io.BytesIO(files["samples/1_erased.png"])) as picture:
        assert picture.info == {}


def test_card_from_hostile_words(tmp_path: Path) -> None:
    """Text of users stands in the card as text: no HTML, link, picture, table cell, heading, code or front matter of theirs."""
    evil = "x | y\n---\n\n# Fake\n<script>alert(1)</script> [l](http://e.vil) ![p](http://e.vil/p.png) `code` *bold* $base"
    eraser = eraser_for(BASE, evil)
    strings = [
        name
        for name, field in type(eraser.header).model_fields.items()
        if str(field.annotation).startswith(("<class 'str", "str |"))
    ]
    assert {"family", "scope", "objective", "prediction_type"} <= set(strings)
    changes = {name: evil for name in strings if name not in ("base", "created", "prefix", "family")}
    eraser.header.versions.clear()
    header = eraser.header.model_copy(update={**changes, "versions": {evil: evil}, "preserve": (evil,), "family": f"sd{evil}"})
    publication = Publication(HubId("ada/x"), license_of(BASE, None), [Sample(evil, "samples/1_erased.png")])
    card = render_card(Eraser(eraser.pairs, header), publication)
    front, _, body = card[4:].partition("\n---\n")
    assert set(yaml.safe_load(front)) == {
        *("library_name", "pipeline_tag", "license", "tags", "base_model", "base_model_relation", "widget"),
    }
    prose = re.sub(r"(`{3,})\w+\n.*?\n\1\n", "", body, flags=re.DOTALL)
    prose = re.sub(r"(?<!\\)`[^`\n]*`", "code", prose)
    assert "<" not in prose.replace("&lt;", "")
    assert "# Fake" not in "\n".join(line for line in prose.splitlines() if line.startswith("#") and "Eraser:" not in line)
    assert not re.search(r"(?<!\\)\]\(http://e", prose)
    assert not [line for line in prose.splitlines() if line.startswith("---")]
    for row in (line for line in prose.splitlines() if line.startswith("| x")):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4)
    (tmp_path / "card.md").write_text(card)
    assert "e.vil" in body


def test_a_stack_of_many_has_a_short_heading() -> None:
    eraser = eraser_for(BASE, *(f"concept {i}" for i in range(150)))
    card = render_card(eraser, Publication(HubId("ada/x"), license_of(BASE, None)))
    heading = next(line for line in card.splitlines() if line.startswith("# Eraser"))
    assert heading.endswith("concept 11 and 138 more")
    assert len([tag for tag in ModelCard(card).data.to_dict()["tags"] if tag.startswith("erases:")]) == 12


@pytest.mark.parametrize("revision", ["a b", "../x", "x\n", "-x"])
def test_names_of_branches(revision: str, ada: LoopbackHub, no_cat: Path) -> None:
    assert "is no name of a branch" in fault("push", no_cat, "ada/x", "--revision", revision, "--yes")
    assert ada.log == []


def test_pushing_to_a_pull_request_that_is_there(ada: LoopbackHub, no_cat: Path) -> None:
    ada.plant("ada/x", {"notes.md": b"mine"})
    push(no_cat, "ada/x", create_pr=True)
    shutil.rmtree(no_cat / "samples")
    push(no_cat, "ada/x", revision="refs/pr/1")
    assert "samples/1_base.png" not in ada.files("ada/x", "refs/pr/1")
    card = ada.files("ada/x", "refs/pr/1")["README.md"].decode()
    assert "esd-lora merge ada/x --base" in card
    assert "refs/pr" not in card
    assert set(ada.files("ada/x")) == {"notes.md"}
    push(no_cat, "ada/x", revision="v2")
    assert "esd-lora merge ada/x@v2" in ada.files("ada/x", "v2")["README.md"].decode()
    assert 'load_lora_weights("ada/x", revision="v2")' in ada.files("ada/x", "v2")["README.md"].decode()


def test_nothing_of_a_stranger_commands_the_terminal(ada: LoopbackHub, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\ncat\n  erases nothing\u202e"
    folder = eraser_for(BASE, evil).save(tmp_path / "evil")
    for command in (
        ["push", folder, "ada/x", "--dry-run"],
        ["push", folder, "ada/x", "--yes"],
        ["inspect", folder],
        ["catalog", folder, "--no-cache"],
    ):
        shown = invoke(*command).stdout.partition("The card:")[0]
        assert "owned" in shown
        assert all(line.isprintable() for line in shown.splitlines()), command
        assert not [line for line in shown.splitlines() if line.startswith("  erases nothing")]
    ada.plant("bob/evil", {f"{evil}.safetensors": b"x"})
    message = fault("pull", "bob/evil", "-o", tmp_path / "out")
    assert "leads out of its directory" in message
    assert message.strip().isprintable()


# Pull


def test_pull_gives_the_same_eraser(ada: LoopbackHub, no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/no-cat")
    ada.plant("ada/no-cat", {"evil.pt": b"\x80\x04pickle", "run.py": b"import os", ".env": b"x=1"})
    result = invoke("pull", "ada/no-cat", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "left out: 'evil.pt'" in result.stderr
    there = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert there == sorted(
        ["README.md", "recipe.yaml", WEIGHTS_NAME, *(f"samples/{i}_{n}.png" for i in "12" for n in ("base", "erased"))]
    )
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (no_cat / WEIGHTS_NAME).read_bytes()
    assert "already exists" in fault("pull", "ada/no-cat", "-o", tmp_path / "out")
    assert invoke("pull", "ada/no-cat", "-o", tmp_path / "out", "--force").exit_code == 0


@pytest.mark.usefixtures("ada")
def test_a_revision_by_name(no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/no-cat", revision="v2")
    assert "no such branch" in fault("pull", "ada/no-cat@v3", "-o", tmp_path / "out")
    assert "holds no eraser" in fault("pull", "ada/no-cat", "-o", tmp_path / "out")
    assert pull("ada/no-cat@v2", tmp_path / "out").files
    assert load_eraser("ada/no-cat@v2").names == ["a cat"]


def test_a_gated_and_a_private_repository(
    ada: LoopbackHub, no_cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {WEIGHTS_NAME: (no_cat / WEIGHTS_NAME).read_bytes()}
    ada.plant("bob/gated", weights, gated=True)
    ada.plant("bob/private", weights, private=True)
    assert "is gated: accept its terms on" in fault("pull", "bob/gated", "-o", tmp_path / "out")
    assert "no repository bob/private on the Hub, or your token may not see it" in fault(
        "pull", "bob/private", "-o", tmp_path / "out"
    )
    assert "no repository bob/none on the Hub" in fault(
        "generate", "a cat", "--base", "emoji", "--eraser", "bob/none:0.5", "-o", tmp_path / "p"
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "log in to see it" in fault("pull", "bob/private", "-o", tmp_path / "out")
    assert "is no repository on the Hub" in fault("pull", "no-cat", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def bomb() -> bytes:
    """A pickle that would leave a trace."""
    return b"cos\nsystem\n(S'touch pwned'\ntR."


@pytest.mark.parametrize(
    ("files", "lies", "words"),
    [
        ({"../../evil.json": b"{}"}, {}, "leads out of its directory"),
        ({"/etc/evil.json": b"{}"}, {}, "leads out of its directory"),
        ({"a\\..\\evil.md": b""}, {}, "leads out of its directory"),
        ({"a/../../evil.png": b""}, {}, "leads out of its directory"),
        ({"evil\n.md": b""}, {}, "leads out of its directory"),
        ({"C:evil.md": b""}, {}, "leads out of its directory"),
        ({WEIGHTS_NAME: struct.pack("<Q", 2**30) + b"{}"}, {}, "header of 1,073,741,824 bytes"),
        ({WEIGHTS_NAME: bomb()}, {}, "no safetensors file"),
        ({WEIGHTS_NAME: b"PK\x03\x04" + bytes(50)}, {}, "is a pickle"),
        ({"huge.png": b"x"}, {"huge.png": {"size": 10**12}}, "too large for an eraser's"),
        ({"more.safetensors": b"x" * 99}, {"more.safetensors": {"sha256": "0" * 64}}, "as the Hub announced"),
        ({"notes.md": b"hello"}, {"notes.md": {"oid": "0" * 40}}, "as the Hub announced"),
        ({"notes.md": b"hello"}, {"notes.md": {"size": 3}}, "Consistency check failed"),
        ({f"{i}.md": b"" for i in range(600)}, {}, "more than 500"),
    ],
    ids=[
        *("up", "absolute", "backslash", "up inside", "newline", "drive", "1 GB header", "pickle", "zip", "huge"),
        *("wrong sha256", "wrong oid", "wrong size", "many"),
    ],
)
def test_poisoned_repositories(
    files: dict[str, bytes],
    lies: dict[str, dict[str, Any]],
    words: str,
    ada: LoopbackHub,
    no_cat: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    ada.plant("bob/evil", {WEIGHTS_NAME: (no_cat / WEIGHTS_NAME).read_bytes(), **files}, lies=lies)
    before = set(tmp_path.rglob("*"))
    assert words in fault("pull", "bob/evil", "-o", work / "out")
    assert set(tmp_path.rglob("*")) - before <= {work / "out"}
    assert not any(work.rglob("out/*"))
    # What is wrong stays wrong the second time, when something of it may lie in the cache.
    assert words in fault("pull", "bob/evil", "-o", work / "out")


def test_code_in_yaml_and_html_in_the_card_stay_text(ada: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "!!python/object/apply:os.system ['touch pwned']\n"
    ada.plant("bob/evil", {"stack.yaml": f"stack: {evil}".encode(), "README.md": b"<script>x</script>"})
    assert "no stack manifest" in fault("pull", "bob/evil", "-o", tmp_path / "out")
    outside = "stack:\n- {file: ../../../../../etc, weight: 1}\n"
    ada.plant("bob/evil", {"stack.yaml": outside.encode()})
    assert "outside its directory" in fault("pull", "bob/evil", "-o", tmp_path / "out")
    assert "outside its directory" in fault("inspect", "bob/evil")
    assert not (tmp_path / "pwned").exists()


def test_a_poisoned_file_does_not_stay_in_the_cache(ada: LoopbackHub, no_cat: Path) -> None:
    good = (no_cat / WEIGHTS_NAME).read_bytes()
    ada.plant("bob/flip", {WEIGHTS_NAME: good}, lies={WEIGHTS_NAME: {"sha256": "1" * 64}})
    with pytest.raises(EsdLoraError, match="as the Hub announced"):
        load_eraser("bob/flip")
    ada.plant("bob/flip", {WEIGHTS_NAME: good})
    assert load_eraser("bob/flip").names == ["a cat"]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", ["README.md", "samples/1_base.png", "x.md"])
def test_a_pull_that_cannot_be_finished_changes_nothing(ada: LoopbackHub, no_cat: Path, tmp_path: Path, inside: str) -> None:
    """Where a file should go there is a folder, or a file where a folder should."""
    push(no_cat, "ada/no-cat")
    ada.plant("ada/no-cat", {"x.md/y.md": b"", "new.md": b""} if inside == "x.md" else {"new.md": b""})
    out = save_with_card(eraser_for(BASE, "a hat"), tmp_path / "out")
    if inside == "README.md":
        (out / inside).unlink()
        (out / inside).mkdir()
    else:
        (out / inside.partition("/")[0]).write_bytes(b"in the way")
    before = tree(out)
    assert "cannot be put there" in fault("pull", "ada/no-cat", "-o", out, "--force")
    assert tree(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "no-cat"}


@pytest.mark.usefixtures("ada")
def test_pull_over_another_eraser(no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/no-cat")
    out = eraser_for(BASE, "a hat").save(tmp_path / "out")
    for name in ("checkpoint.pt", "mine.txt", "stack.yaml"):
        (out / name).write_bytes(b"here before")
    assert invoke("pull", "ada/no-cat", "-o", out, "--force").exit_code == 0
    assert Eraser.load(out).names == ["a cat"]
    assert {"checkpoint.pt", "mine.txt"} <= set(tree(out))
    assert "stack.yaml" not in tree(out)
    assert "no repository ada/none" in fault("pull", "ada/none", "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    assert "is a file, expected a directory" in fault("pull", "ada/no-cat", "-o", tmp_path / "file")


@pytest.mark.parametrize("repo", ["ada/no--cat", "ada/a..b", "ada/x.git", f"ada/{'x' * 120}"])
def test_names_that_the_client_does_not_take(repo: str, ada: LoopbackHub, no_cat: Path, tmp_path: Path) -> None:
    assert "is no name that the Hub takes" in fault("pull", repo, "-o", tmp_path / "out")
    assert "is no name that the Hub takes" in fault("inspect", repo)
    assert "is no name that the Hub takes" in fault("push", no_cat, repo, "--yes")
    assert ada.log == []


def test_a_mistyped_path(hub: LoopbackHub) -> None:
    assert "there is no path out/no-cta here, and there is no repository" in fault("inspect", "out/no-cta")
    requests = len(hub.log)
    with pytest.raises(EsdLoraError, match="no eraser at out/no-cta"):
        load_eraser(Path("out/no-cta"))
    assert len(hub.log) == requests, "a Path is never a Hub id"
    assert "no eraser at" in fault("export", "x" * 300, "--layout", "kohya", "-o", "out.safetensors")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"format": ' + "9" * 5000 + "}", "has format 999999999"),
        ('{"format": "x"}', "damaged header"),
        ("[" * 100_000, "damaged header"),
        ('"\\ud800"', "damaged header"),
    ],
)
def test_damaged_headers(header: str, words: str, no_cat: Path) -> None:
    tensors = Eraser.load(no_cat).state_dict()
    (no_cat / WEIGHTS_NAME).write_bytes(file_content(tensors, {"format": "pt", "esd_lora": header}))
    assert words in fault("inspect", no_cat)
    assert invoke("catalog", no_cat, "--no-cache").stdout == "none found\n"


@pytest.mark.parametrize(
    "text",
    [
        "stack: [{file: 2020-13-45}]",
        "2024-99-99: x",
        f"stack: [{{file: a, weight: {'9' * 5000}}}]",
        'stack: [{file: "a\\0b"}]',
        f"stack: [{{file: {'a' * 300}}}]",
    ],
    ids=["date", "key", "digits", "nul", "long"],
)
def test_strange_manifests(text: str, ada: LoopbackHub, tmp_path: Path) -> None:
    ada.plant("bob/evil", {"stack.yaml": text.encode()})
    for command in (["pull", "bob/evil", "-o", tmp_path / "out"], ["inspect", "bob/evil"]):
        assert re.search("no stack manifest|outside its directory|no eraser at", fault(*command))


def test_manifests_that_multiply(ada: LoopbackHub, no_cat: Path, tmp_path: Path) -> None:
    files = {"e/" + WEIGHTS_NAME: (no_cat / WEIGHTS_NAME).read_bytes()}
    for level in range(4):
        below = "e" if level == 3 else f"{level + 1}.yaml"
        name = f"{level}.yaml" if level else "stack.yaml"
        files[name] = f"stack: [{', '.join(['{file: ' + below + '}'] * 11)}]".encode()
    ada.plant("bob/bomb", files)
    assert "stands for more than 1000 erasers" in fault("pull", "bob/bomb", "-o", tmp_path / "out")


def test_a_repository_that_changes_meanwhile(
    ada: LoopbackHub, no_cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between listing and fetching the card is changed: it is listed anew. If that goes on, it is told."""
    push(no_cat, "ada/no-cat")
    left, listed, listing = [1], set[str](), HfApi.list_repo_tree

    def changing(api: HfApi, repo_id: str, **kwargs: Any) -> Any:
        entries = list(listing(api, repo_id, **kwargs))
        listed.add(kwargs["revision"])
        if left[0] > 0:
            left[0] -= 1
            ada.plant("ada/no-cat", {"README.md": f"changed {left[0]}".encode()})
        return entries

    monkeypatch.setattr(HfApi, "list_repo_tree", changing)
    pulled = pull("ada/no-cat", tmp_path / "out")
    assert (pulled.directory / "README.md").read_bytes() == b"changed 0"
    left[0] = 9
    with pytest.raises(EsdLoraError, match="as the Hub announced"):
        pull("ada/no-cat", tmp_path / "again")
    fetched = {request.path.split("/")[4] for request in ada.log if request.path.endswith("README.md")}
    assert fetched
    assert fetched <= listed, "what was not listed and checked is not fetched"
    assert not isinstance(try_to_load_from_cache("ada/no-cat", WEIGHTS_NAME), str), "nor used when the Hub is away"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_and_an_eraser_in_the_cache(status: int, ada: LoopbackHub, no_cat: Path) -> None:
    push(no_cat, "ada/no-cat")
    load_eraser("ada/no-cat")
    ada.trouble("GET /api", status, times=99)
    assert load_eraser("ada/no-cat").names == ["a cat"]
    with pytest.raises(EsdLoraError, match=r"too many requests|in trouble"):
        load_eraser("ada/other")


@pytest.mark.usefixtures("ada")
def test_no_manifest_of_hub_ids(no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/no-cat")
    result = invoke("stack", "ada/no-cat", "ada/no-cat@main", "-o", tmp_path / "both.yaml")
    assert result.exit_code == 1
    assert "Pull it first" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "both.yaml").exists()


def test_a_token_is_never_shown(ada: LoopbackHub, no_cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ada.trouble("GET /api/models", 400, body={"error": "you sent hf_ada_secret"})
    assert "you sent ***" in fault("pull", "ada/x", "-o", tmp_path / "out")
    ada.card_errors = ["hf_ada_secret is in it"]
    assert "*** is in it" in fault("push", no_cat, "ada/x", "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_m\u00fcller")
    assert "characters that no token has" in fault("pull", "ada/x", "-o", tmp_path / "out")


def test_a_wrong_endpoint(hub: LoopbackHub, tmp_path: Path) -> None:
    environment = loopback_hub.environment(hub, tmp_path, None) | {"HF_ENDPOINT": "nonsense"}
    command = [str(Path(sys.executable).with_name("esd-lora")), "pull", "ada/x", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the connection to the Hub failed on ada/x")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\nrest", b"no picture"])
def test_pictures_that_are_none(content: bytes, no_cat: Path) -> None:
    (no_cat / "samples" / "1_base.png").write_bytes(content)
    assert "cannot be read as a picture, PNG (" in fault("push", no_cat, "ada/x", "--dry-run")


def test_a_picture_too_large_and_one_of_another_kind(no_cat: Path) -> None:
    Image.new("RGB", (8, 8)).save(no_cat / "samples" / "1_base.png", "JPEG")
    assert "cannot be read as a picture, PNG (" in fault("push", no_cat, "ada/x", "--dry-run")
    Image.new("1", (20_000, 20_000)).save(no_cat / "samples" / "1_base.png")
    assert "more than 67,108,864 pixels" in fault("push", no_cat, "ada/x", "--dry-run")


# Hub ids wherever an eraser is


@pytest.mark.usefixtures("ada")
def test_hub_ids_are_erasers(tiny_dir: Path, cat_dir: Path, car_dir: Path, tmp_path: Path) -> None:
    for name, folder in {"cat": cat_dir, "car": car_dir}.items():
        push(folder, f"ada/{name}", base_model=BASE)
    local = invoke(
        "generate", "a cat", "--base", tiny_dir, "--eraser", f"{cat_dir}:0.5", "-o", tmp_path / "local", "--steps", 2
    )
    there = invoke("generate", "a cat", "--base", tiny_dir, "--eraser", "ada/cat:0.5", "-o", tmp_path / "hub", "--steps", 2)
    assert (local.exit_code, there.exit_code) == (0, 0), there.output
    name = "000_seed0.png"
    assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert invoke("stack", "ada/cat", "ada/car@main:2", "-o", tmp_path / "both").exit_code == 0
    assert Eraser.load(tmp_path / "both").names == ["a cat", "a car"]
    assert invoke("merge", "ada/cat", "--base", tiny_dir, "-o", tmp_path / "merged").exit_code == 0
    assert (tmp_path / "merged" / "model_index.json").is_file()
    assert "erases" in invoke("inspect", "ada/cat").stdout
    assert "identical" in invoke("diff", "ada/cat", "ada/cat@main").stdout or invoke("diff", "ada/cat", cat_dir).exit_code == 0
    assert invoke("export", "ada/cat", "--layout", "kohya", "-o", tmp_path / "cat.safetensors").exit_code == 0


def test_cached_erasers_need_no_hub(ada: LoopbackHub, no_cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(no_cat, "ada/no-cat")
    expected = load_eraser("ada/no-cat").state_dict()
    for server in ada.servers:
        server.stop()
    loaded = load_eraser("ada/no-cat").state_dict()
    assert all(loaded[name].equal(expected[name]) for name in expected)
    with pytest.raises(EsdLoraError, match="the connection to the Hub failed on ada/other"):
        load_eraser("ada/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_eraser("ada/no-cat").names == ["a cat"]
    with pytest.raises(EsdLoraError, match="HF_HUB_OFFLINE is set"):
        load_eraser("ada/other")


def test_stacks_by_manifest_on_the_hub(ada: LoopbackHub, no_cat: Path, tmp_path: Path) -> None:
    random_eraser({"conv": 1}, "a hat").save(tmp_path / "hat")
    write_manifest(tmp_path / "stack.yaml", [no_cat, tmp_path / "hat"], [Strength(1.0), Strength(0.5)])
    files = {
        place.relative_to(tmp_path).as_posix(): place.read_bytes()
        for place in tmp_path.rglob("*")
        if place.suffix in (".yaml", ".safetensors")
    }
    ada.plant("bob/stack", files)
    assert load_eraser("bob/stack").names == ["a cat", "a hat"]
    pulled = pull("bob/stack", tmp_path / "pulled")
    assert load_eraser(pulled.directory).names == ["a cat", "a hat"]


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("ada/no-cat", ("ada/no-cat", None)),
        ("ada/no-cat@v1.0", ("ada/no-cat", "v1.0")),
        ("ada/no-cat@refs/pr/1", ("ada/no-cat", "refs/pr/1")),
        ("no-cat", None),
        ("./no-cat", None),
        ("a/b/c", None),
        ("/abs/path", None),
        ("out/cat.safetensors", None),
        ("out/stack.yaml", None),
        ("../up", None),
        ("~/home", None),
        ("ada/no-cat@", None),
        ("ada/no cat", None),
    ],
)
def test_hub_ids(text: str, repo: tuple[str, str | None] | None) -> None:
    assert HubId.read(text) == repo


def test_a_path_comes_before_a_repository(hub: LoopbackHub, no_cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(no_cat.parent.parent)
    assert load_eraser(f"{no_cat.parent.name}/no-cat").names == ["a cat"]
    assert hub.log == []


def test_from_training_to_plain_diffusers_elsewhere(ada: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, measure, attach, push; then, with an empty cache, pull, and load with diffusers alone: the same picture."""
    quick = {"steps": 4, "trajectories": 2, "preserve_trajectories": 1, "trajectory_steps": 4, "lr": 0.01, "preview_every": 4}
    settings = [part for key, value in quick.items() for part in ("-s", f"train.{key}={value}")]
    trained = tmp_path / "no-cat"
    measure = ["--base", "emoji", "--suite", "emoji-object", "--limit", 2, "-s", "steps=3", "-o", tmp_path / "measured"]
    for command in (
        ["train", "--concept", "a cat", "--base", "emoji", *settings, "-o", trained],
        ["evaluate", trained, *measure, "--attach"],
        ["push", trained, "ada/no-cat", "--yes"],
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
    loopback_hub.connect(ada, tmp_path / "elsewhere", monkeypatch)
    assert invoke("pull", "ada/no-cat", "-o", tmp_path / "pulled").exit_code == 0
    pulled = Eraser.load(tmp_path / "pulled")
    assert pulled.header.evaluation is not None
    assert pulled.header.evaluation.suite == "emoji-object"
    card = (tmp_path / "pulled" / "README.md").read_text("utf-8")
    assert "## Measured: is it gone" in card
    assert "| target | erased | accuracy |" in card
    assert "| a cat | ![](samples/1_base.png) | ![](samples/1_erased.png) |" in card
    assert ModelCard(card).data.to_dict()["license"] == "apache-2.0"

    def picture(lora: object | None) -> bytes:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(base_files("emoji")).to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(lora)
        random = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=3, generator=random, height=64, width=64).images[0].tobytes()

    loopback_hub.connect(ada, tmp_path / "third", monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert picture("ada/no-cat") == picture(trained) != picture(None)


# Search and catalog


def test_search(ada: LoopbackHub, no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/no-cat")
    eraser = eraser_for("owner/other", "Van Gogh")
    folder = eraser.save(tmp_path / "gogh")
    push(folder, "ada/no-gogh", license="mit")
    ada.plant("bob/lora", {"README.md": b"---\ntags: [lora]\n---\n"})
    assert {eraser.repo for eraser in search()} == {"ada/no-cat", "ada/no-gogh"}
    assert (
        [eraser.repo for eraser in search(concept="A CAT")]
        == [eraser.repo for eraser in search(concept="cat")]
        == ["ada/no-cat"]
    )
    (gogh,) = search(concept="van Gogh")
    assert (gogh.repo, gogh.erases, gogh.base) == ("ada/no-gogh", ["van gogh"], "owner/other")
    assert [eraser.repo for eraser in search(base=BASE)] == ["ada/no-cat"]
    assert [eraser.repo for eraser in search("gogh")] == ["ada/no-gogh"]
    assert search(tags=("nothing",)) == []
    shown = invoke("search", "--concept", "a cat").stdout.splitlines()
    assert shown[0].split()[:2] == ["repository", "erases"]
    assert shown[1].split()[0] == "ada/no-cat"
    assert json.loads(invoke("search", "gogh", "--json").stdout)["erasers"][0]["repo"] == "ada/no-gogh"
    assert invoke("search", "nothing-of-the-kind").stdout == "none found\n"


@pytest.mark.usefixtures("ada")
def test_catalog(no_cat: Path, tmp_path: Path) -> None:
    push(no_cat, "ada/on-hub")
    load_eraser("ada/on-hub")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / WEIGHTS_NAME).write_bytes(b"no tensors")
    shutil.copytree(no_cat, tmp_path / ".venv" / "copy")
    entries = catalog([tmp_path])
    assert [entry.place for entry in entries] == [
        str(no_cat),
        "ada/on-hub@main",
    ]
    assert entries[0].row()[1:4] == ["a cat", BASE, "xattn"]
    assert [entry.place for entry in catalog([tmp_path], cache=False)] == [str(no_cat)]
    shown = invoke("catalog", tmp_path).stdout
    assert str(no_cat) in shown
    assert shown.splitlines()[0].split() == ["where", "erases", "base", "scope", "layers", "size", "measured"]
    assert json.loads(invoke("catalog", tmp_path, "--json").stdout)["erasers"][0]["header"]["base"] == BASE
    assert "no folder" in fault("catalog", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert invoke("catalog", empty, "--no-cache").stdout == "none found\n"
