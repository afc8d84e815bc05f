"""Lists of requests: what is read, every fault with its line, and which requests cannot be met together."""

from __future__ import annotations

import json
import re
import warnings
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest

from esd_lora.cli.requests import STATUSES
from esd_lora.errors import EsdLoraError
from esd_lora.fleet import requests
from esd_lora.fleet.request import COLUMNS, Request, Status, setting_fault, setting_names
from esd_lora.fleet.requests import overlapping, read_requests, write_requests
from esd_lora.recipe_files import load_recipe

DOCS = Path(__file__).parents[2] / "docs" / "requests.md"
HEAD = "id,concept,synonyms,kind,keep,status"


def test_the_command_line_shows_every_status() -> None:
    assert get_args(Status) == STATUSES


def listed(folder: Path, *rows: str, head: str = HEAD) -> Path:
    """Write a CSV, and return it."""
    file = folder / "r.csv"
    file.write_text("\n".join([head, *rows]) + "\n", "utf-8")
    return file


def faults(file: Path) -> list[str]:
    """Return what is wrong with a list: a sentence for each fault, with `r.csv` for the file."""
    with pytest.raises(EsdLoraError) as raised:
        read_requests(file)
    first, *sentences = str(raised.value).replace(str(file), file.name).split("\n  ")
    assert first == "the requests have faults:"
    return sentences


def refusal(file: Path) -> str:
    """Return the one sentence with which a file is refused."""
    with pytest.raises(EsdLoraError) as raised:
        read_requests(file)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")
    return str(raised.value)


def request(id: str, concept: str, *synonyms: str, **fields: Any) -> Request:
    return Request(id=id, concept=concept, synonyms=synonyms, kind="object", **fields)


def test_csv_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "r.CSV"
    file.write_bytes(
        "\ufeffid, concept ,synonyms,kind,anchor,keep,basis,reference,received,due,private,train.steps,lora.ranks,train.lr\r\n"
        'no-cat,"a  cat",kitten; tom ;,object,a dog,"a fox;a pig in ink style",gdpr-17,"mail,\r\n17",2026-11-01,2026-12-01,yes,'
        '200,{xattn: 4},1e-4\r\n\r\n,,,,,,,,,,,,,\r\nno-tw,Käfer,,style,none,,,"said ""no""",,,,,,auto\r\n'.encode()
    )
    cat, beetle = read_requests(file)
    assert (cat.id, cat.concept, cat.synonyms, cat.kind) == ("no-cat", "a cat", ("kitten", "tom"), "object")
    assert (cat.anchor, cat.keep, cat.basis) == ("a dog", ("a fox", "a pig in ink style"), "gdpr-17")
    assert (cat.reference, cat.received, cat.due) == ("mail, 17", date(2026, 11, 1), date(2026, 12, 1))
    assert cat.private
    assert cat.settings == {"train.steps": 200, "lora.ranks": {"xattn": 4}, "train.lr": "1e-4"}  # as `-s` has it
    assert load_recipe("fast", cat.settings, base="emoji", concepts=["cat"]).train.lr == 1e-4
    assert beetle == Request(
        id="no-tw", concept="Käfer", kind="style", anchor="none", reference='said "no"', settings={"train.lr": "auto"}
    )
    assert [cat.line, beetle.line] == [2, 6]  # a cell and two rows of nothing take lines
    assert cat.status == beetle.status == "open"


def test_json_lines_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"id": "a", "concept": "cat", "kind": "object", "synonyms": ["kitten"], "anchor": null, "eta": 0}\r\n'
        b'\n{"id": "b", "concept": "Hut", "kind": "object", "synonyms": "hat;cap", "lora.conv_rank": null, "due": "2026-12-01"}'
    )
    first, second = read_requests(file)
    assert first == request("a", "cat", "kitten", settings={"eta": 0})
    assert second == request("b", "Hut", "hat", "cap", settings={"lora.conv_rank": None}, due="2026-12-01")
    assert [first.line, second.line] == [1, 3]


def test_every_fault_at_once(tmp_path: Path) -> None:
    file = listed(
        tmp_path,
        "no-cat,cat,,objekt,,,200",
        "x/y,,,object,2026-12-01,,many",
        "a,1,2",
        "ok,dog,,object,1.12.2026,2026-12-01,[2",
        "NO-DOG,pig,,object,2026-12-01,2026-12-02,",
        "no-dog,bee,,object,,,",
        head="id,concept,synonym,kind,due,received,train.step",
    )
    assert faults(file) == [
        "r.csv:1: synonym: unknown column (did you mean 'synonyms'?)",
        "r.csv:1: train.step: unknown column (did you mean 'train.steps'?)",
        "r.csv:2: kind: expected 'person', 'style', 'character', 'object' or 'unsafe', found 'objekt' (did you mean 'object'?)",
        "r.csv:3: id: expected a name for a folder: up to 64 of a-z, A-Z, 0-9, '.', '_' and '-', the first a letter or digit,"
        " found 'x/y'",
        "r.csv:3: concept: missing",
        "r.csv:4: 3 fields, expected 7 as in the head. Quote a cell with a comma in it",
        "r.csv:5: due: expected a day such as 2026-11-30, found '1.12.2026'",
        "r.csv:6: due: 2026-12-01 is before 2026-12-02, the day it was received",
    ]


def test_faults_of_recipe_overrides(tmp_path: Path) -> None:
    file = listed(
        tmp_path,
        "a,cat,object,many,[2,,1",
        "b,dog,object,200,,xatn,",
        "c,pig,object,-1,*x,,.inf",
        "d,bee,object,,0,re:(,1",
        head="id,concept,kind,train.steps,lora.rank,scope,train.guidance",
    )
    where = [sentence.split(" ")[:2] for sentence in faults(file)]
    assert where == [
        ["r.csv:2:", "lora.rank:"],
        ["r.csv:2:", "train.steps:"],
        ["r.csv:3:", "scope:"],
        ["r.csv:4:", "lora.rank:"],
        ["r.csv:4:", "train.steps:"],
        ["r.csv:4:", "train.guidance:"],
        ["r.csv:5:", "lora.rank:"],
        ["r.csv:5:", "scope:"],
    ]
    assert "unknown scope (did you mean 'xattn'?)" in faults(file)[2]
    assert "or 'auto', found 'many'" in faults(file)[1]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1]", "holds list, expected an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: it is nested too deep"),
        ('{"id": "a", "concept": 3, "kind": "object"}', "concept: expected text, found 3"),
        ('{"id": "a", "concept": "\\ud800", "kind": "object"}', "concept: expected text without characters that are not seen"),
        (
            '{"id": "a", "concept": "x\\u202ey", "kind": "object"}',
            "concept: expected text without characters that are not seen",
        ),
        ('{"id": "a", "concept": " ", "kind": "object"}', "concept: expected text, found ''"),
        ('{"id": "a", "concept": "c", "kind": "object", "synonyms": ["a;b"]}', "synonyms.0: expected a name without ';'"),
        ('{"id": "a", "concept": "c", "kind": "object", "settings": {}}', "settings: unknown column"),
        ('{"id": "a", "concept": "c", "kind": "object", "line": 3}', "line: unknown column"),
        ('{"id": "a", "concept": "c", "kind": "object", "base": "x"}', "base: unknown column"),
        ('{"id": "a", "concept": "c", "kind": "object", "concepts.name": "x"}', "concepts.name: unknown column"),
        ('{"id": "a", "concept": "c", "kind": "object", "due": 0}', "due: expected a day such as 2026-11-30, found 0"),
        ('{"id": "a", "concept": "c", "kind": "object", "private": "perhaps"}', "private: expected true or false"),
        ('{"id": "a", "concept": "c", "kind": "object", "eta": 1e999}', "eta: expected a finite number, or 'auto'"),
        ('{"id": "a", "concept": "c", "kind": "object", "preserve": ["\\ud800"]}', "preserve: "),
        (
            '{"id": "a", "concept": "c", "kind": "object", "train.optimizer_args": {"a": 1e999}}',
            "train.optimizer_args: expected",
        ),
    ],
    ids=lambda value: value[-40:] if value.startswith(("{", "[")) else "",
)
def test_lines_that_are_no_requests(line: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(f"\n{line}\n", "utf-8")
    (sentence,) = faults(file)
    assert sentence.startswith(f"r.jsonl:2: {fault}")


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    assert "there is no list of requests" in refusal(tmp_path / "r.csv")
    assert "is no list of requests by its name" in refusal(tmp_path / "r.xlsx")
    for content, sentence in (
        (b"", "is empty"),
        (b"\xff\xfe", "cannot be read"),
        (b"id;concept;kind\na;b;object\n", "r.csv:1: columns are separated by ';', expected ','"),
        (b'id,concept,kind\n\na,"b,object\n', "r.csv:3: not valid CSV"),
    ):
        (tmp_path / "r.csv").write_bytes(content)
        assert sentence in refusal(tmp_path / "r.csv")


def test_head_without_what_every_request_says(tmp_path: Path) -> None:
    file = listed(tmp_path, "a,b,c", head="id,due,due")
    assert faults(file) == [
        "r.csv:1: due: stands 2 times. Keep one",
        "r.csv:1: concept: missing column",
        "r.csv:1: kind: missing column",
    ]


def test_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = listed(tmp_path, *(f"id-{i},name {i},,object,," for i in range(5)))
    monkeypatch.setattr(requests, "MAX_REQUESTS", 4)
    assert "has more than 4 requests" in refusal(file)
    monkeypatch.setattr(requests, "MAX_BYTES", 20)
    assert "has more than 20 bytes" in refusal(file)


def test_no_more_faults_are_told_than_are_read(tmp_path: Path) -> None:
    rows = faults(listed(tmp_path, *("?,,,,," for _ in range(20_000))))
    assert len(rows) == 51
    assert rows[-1] == "and more than 50 others"
    assert len(faults(listed(tmp_path, head=",".join(f"c{i}" for i in range(20_000))))) == 51


def test_ids_are_told_apart_by_folders_that_know_no_case(tmp_path: Path) -> None:
    file = listed(tmp_path, "no-cat,cat,,object,,", "No-Cat,dog,,object,,")
    assert faults(file) == ["r.csv:3: id: 'No-Cat' is that of r.csv:2 too. Give each its own"]


def test_same_concept_is_open_once(tmp_path: Path) -> None:
    file = listed(tmp_path, "a,a cat,,object,,", "b,The  CAT,,style,,open")
    assert faults(file) == ["r.csv:3: concept: 'The CAT' is open as a at r.csv:2 too. Keep one of the two"]
    for status in ("ambiguous", "done"):
        file = listed(tmp_path, "a,a cat,,object,,", f"b,The  CAT,,style,,{status}")
        with pytest.warns(UserWarning, match="share names: 'cat'"):
            assert [request.status for request in read_requests(file)] == ["open", status]
    for status in ("refused", "withdrawn"):
        assert len(read_requests(listed(tmp_path, "a,a cat,,object,,", f"b,The  CAT,,style,,{status}"))) == 2


def test_names_that_overlap_are_told_with_their_lines(tmp_path: Path) -> None:
    file = listed(tmp_path, "a,cat,kitten,object,,", "b,dog,,object,,", "c,tiger,a Kitten;big cat,object,,")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(read_requests(file)) == 3
    (sentence,) = [str(warning.message) for warning in caught]
    assert sentence == f"a ({file}:2), c ({file}:4) share names: 'kitten'. Are they one request, or namesakes?"


def test_groups_hang_together_by_way_of_others() -> None:
    cat, dog, tiger, lion = (
        request("a", "cat", "kitten"),
        request("b", "dog"),
        request("c", "tiger", "big cat"),
        request("d", "lion", "The Kitten", "BIG CAT"),
    )
    assert overlapping([cat, dog, tiger, lion]) == ((cat, tiger, lion),)
    assert overlapping([cat, dog, tiger]) == ()
    assert overlapping([dog, dog]) == ((dog, dog),)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            ["a,cat,,object,the Dog,", "b,a dog,,object,,"],
            "r.csv:3: concept: 'a dog' must be kept, says a at r.csv:2. Drop one of the two, or mark one as ambiguous",
        ),
        (
            ["b,puppy,dog,object,,", "a,cat,,object,fox;dog,done"],
            "r.csv:2: synonyms: 'dog' must be kept, says a at r.csv:3. Drop one of the two, or mark one as ambiguous",
        ),
        (
            ["a,cat,,object,a cat,"],
            "r.csv:2: concept: 'cat' must be kept, says a at r.csv:2. Drop one of the two, or mark one as ambiguous",
        ),
    ],
    ids=["concept", "synonym of what a done one keeps", "itself"],
)
def test_what_is_kept_is_not_erased(rows: list[str], sentence: str, tmp_path: Path) -> None:
    assert faults(listed(tmp_path, *rows)) == [sentence]


def test_only_what_holds_contradicts(tmp_path: Path) -> None:
    for status in ("ambiguous", "refused", "withdrawn"):
        assert read_requests(listed(tmp_path, f"a,cat,,object,dog,{status}", "b,dog,,object,,"))
    assert read_requests(listed(tmp_path, "a,cat,,object,dog,done", "b,dog,,object,,done"))
    assert read_requests(listed(tmp_path, "a,cat,,object,a dog in ink style,", "b,dog,,object,,"))  # another prompt


def test_requests_are_equal_that_say_the_same() -> None:
    first, second = request("a", "cat", line=2), request("a", "cat", line=5)
    assert first == second
    assert len({first, second}) == 1
    assert first != request("a", "cat", due="2026-11-30")
    assert first != "a"
    assert Request.of_record(first.record(), 7) == first
    assert Request.model_validate_json(first.model_dump_json()) == first


def test_settings_are_plain_and_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="expected numbers, text, lists and mappings alone"):
        request("a", "cat", settings={"train.optimizer_args": {"x": date(2026, 11, 30)}})
    with pytest.raises(ValueError, match="concept is a field of the request"):
        request("a", "cat", settings={"concept": "dog"})


def test_every_field_of_a_recipe_may_be_overridden() -> None:
    recipe = load_recipe("thorough", base="emoji", concepts=["cat"]).model_dump(mode="json")
    recipe["neighbours"] = {"vocabulary": ["a dog"], "count": 3}
    for name in setting_names():
        value: Any = recipe
        for part in name.split("."):
            value = value[part]
        assert setting_fault(name, value) is None, name
    left_out = {"base", "base_config", "anchor", "concepts"}
    assert {name.split(".")[0] for name in setting_names()} == recipe.keys() - left_out
    assert "did you mean 'train.steps'?" in str(setting_fault("train.step", 3))


def test_name_of_code_is_data_until_it_is_allowed(tmp_path: Path) -> None:
    file = listed(tmp_path, "a,cat,object,os:system", head="id,concept,kind,objective")
    (cat,) = read_requests(file)
    with pytest.raises(EsdLoraError, match="no file runs by itself"):
        load_recipe("fast", cat.settings, base="emoji", concepts=[cat.concept])


def test_view_is_what_a_person_reads(tmp_path: Path) -> None:
    cat = request("a", "cat", "kitten", "tom", settings={"train.lr": 1e-5, "eta": 1}, private=True)
    write_requests([cat, request("b", "dog, wet", due="2026-12-01", settings={"lora.conv_rank": None})], tmp_path / "v.csv")
    assert (tmp_path / "v.csv").read_text("utf-8").split("\n") == [
        "id,concept,synonyms,kind,anchor,keep,basis,reference,received,due,status,private,eta,lora.conv_rank,train.lr",
        "a,cat,kitten;tom,object,,,,,,,open,true,1,,1.0e-05",
        'b,"dog, wet",,object,,,,,,2026-12-01,open,false,,null,',
        "",
    ]
    odd = request("a", "=HYPERLINK(1)", "-2+3", reference="@x", settings={"eta": -1.5})
    write_requests([odd], tmp_path / "v.csv")
    assert "a,'=HYPERLINK(1),'-2+3,object,,,,'@x,,,open,false,-1.5" in (tmp_path / "v.csv").read_text("utf-8").split("\n")
    assert read_requests(tmp_path / "v.csv") == (odd,)
    write_requests([cat], tmp_path / "v.jsonl")
    assert json.loads((tmp_path / "v.jsonl").read_text("utf-8")) == cat.record()
    with pytest.raises(EsdLoraError, match=r"Expected \.csv, or \.jsonl"):
        write_requests([cat], tmp_path / "v.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.csv", "v.jsonl"]


def test_documentation_lists_every_column_and_its_example_is_read(tmp_path: Path) -> None:
    text = DOCS.read_text("utf-8")
    columns, states = text.split("## States")
    assert tuple(re.findall(r"^\| `(\w+)` \|", columns, re.MULTILINE)) == COLUMNS
    assert tuple(re.findall(r"^\| `(\w+)` \|", states, re.MULTILINE)) == get_args(Status)
    (example,) = re.findall(r"<<'END'\n(id,.*?\n)END\n", text, re.DOTALL)
    file = tmp_path / "requests.csv"
    file.write_text(example, "utf-8")
    read = read_requests(file)
    assert [(r.concept, r.kind) for r in read[:3]] == [("a cat", "object"), ("a pizza", "object"), ("twemoji", "style")]
    assert [r.status for r in read[3:]] == ["ambiguous"] * 2
    for one in read:
        assert load_recipe("instant", one.settings, base="emoji", concepts=[one.concept])
