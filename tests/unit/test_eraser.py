"""The eraser file: what is in it, what is refused, and that it is never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from esd_lora.erasers.eraser import WEIGHTS_NAME, Eraser, LoraPair, hash_weight
from esd_lora.erasers.header import FORMAT, HEADER_KEY, EraserHeader
from esd_lora.erasers.tensor_files import read_tensors, writing_tensors
from esd_lora.errors import EsdLoraError
from esd_lora.formats.cards import render_card, save_with_card
from esd_lora.formats.exporting import export
from esd_lora.recipe_files import load_recipe
from random_erasers import SHAPES, build_header, random_eraser


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An eraser's directory."""
    return random_eraser({"conv": 2, "mid.attn2.to_k": 3}).save(tmp_path / "eraser")


def refusal(path: Path) -> str:
    """The one sentence that loading `path` is refused with."""
    with pytest.raises(EsdLoraError) as caught:
        Eraser.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def rewrite(directory: Path, tensors: dict[str, torch.Tensor] | None = None, header: str | None = None) -> Path:
    """The file with other tensors or another header text."""
    file = directory / WEIGHTS_NAME
    with safe_open(file, framework="pt") as opened:
        old = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    save_file(old if tensors is None else tensors, file, metadata if header is None else {HEADER_KEY: header})
    return file


def test_keys_are_those_of_diffusers(saved: Path) -> None:
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    assert shapes == {
        "unet.conv.lora_A.weight": (2, 2, 3, 3),
        "unet.conv.lora_B.weight": (3, 2, 1, 1),
        "unet.mid.attn2.to_k.lora_A.weight": (3, 3),
        "unet.mid.attn2.to_k.lora_B.weight": (4, 3),
    }


def test_header_is_json_under_one_key(saved: Path) -> None:
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"format", HEADER_KEY}
    header = json.loads(metadata[HEADER_KEY])
    assert header["format"] == FORMAT
    assert header["concepts"][0]["pairs"] == [["a cat", ""]]
    assert header["recipes"][0]["train"]["steps"] == 4


def test_directory_holds_weights_and_recipe(saved: Path) -> None:
    eraser = Eraser.load(saved)
    assert load_recipe(saved / "recipe.yaml") == eraser.header.recipes[0]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == eraser.files()
    assert set(eraser.files()) == {WEIGHTS_NAME, "recipe.yaml"}


def test_directory_for_people_holds_the_card_too(saved: Path, tmp_path: Path) -> None:
    eraser = Eraser.load(saved)
    folder = save_with_card(eraser, tmp_path / "with" / "card")
    assert (folder / "README.md").read_text("utf-8") == render_card(eraser)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"} == eraser.files()


def test_file_loads_as_its_directory_does(saved: Path) -> None:
    assert Eraser.load(saved / WEIGHTS_NAME).header == Eraser.load(saved).header


def test_same_eraser_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    """Metadata in no order of chance: two saves have one hash."""
    eraser = Eraser.load(saved)
    contents = {(eraser.save(tmp_path / str(i)) / WEIGHTS_NAME).read_bytes() for i in range(8)}
    kohya = {export(eraser, tmp_path / f"{i}.safetensors", layout="diffusers").read_bytes() for i in range(8)}
    assert len(contents) == len(kohya) == 1


def test_other_files_of_the_directory_stay(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    Eraser.load(saved).save(saved)
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("module", sorted(SHAPES))
def test_delta_is_the_product_in_the_weights_shape(module: str) -> None:
    pair = random_eraser({module: 2}).pairs[module]
    assert pair.rank == 2
    assert pair.shape == SHAPES[module]
    x = torch.randn(1, SHAPES[module][1], *([6, 6] if len(pair.shape) == 4 else []), dtype=torch.float64)
    if len(pair.shape) == 4:
        convolve = torch.nn.functional.conv2d
        expected, result = convolve(convolve(x, pair.down), pair.up), convolve(x, pair.delta())
    else:
        expected, result = x @ pair.down.T @ pair.up.T, x @ pair.delta().T
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_delta_of_half_precision_is_summed_in_float32() -> None:
    pair = random_eraser({"conv": 3}, dtype=torch.float16).pairs["conv"]
    assert torch.equal(pair.delta(), LoraPair(pair.down.float(), pair.up.float()).delta())


def test_missing_directory(tmp_path: Path) -> None:
    assert "no eraser" in refusal(tmp_path / "nothing")
    assert WEIGHTS_NAME in refusal(tmp_path)


def test_file_that_is_not_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for content, words in ((b"", "damaged"), (b"PK\x03\x04 not one", "pickle"), (b"\xff" * 64, "damaged")):
        file.write_bytes(content)
        assert words in refusal(file)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_file(saved: Path, share: float) -> None:
    file = saved / WEIGHTS_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert "damaged" in refusal(file)


def test_lora_of_another_tool(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, file, metadata)
        assert "not an eraser" in refusal(file)


@pytest.mark.parametrize("number", [FORMAT + 1, FORMAT + 1.0, int("9" * 4000), 1e300])
def test_newer_format(saved: Path, number: float) -> None:
    newer = build_header().model_dump(mode="json") | {"format": number, "concepts": "in another way"}
    message = refusal(rewrite(saved, header=json.dumps(newer)))
    assert f"format {f'{number}'[:9]}" in message
    assert "Upgrade" in message


def test_newer_format_in_quotes(saved: Path) -> None:
    newer = build_header().model_dump(mode="json") | {"format": f"{FORMAT + 1}"}
    assert f"has format {FORMAT + 1}, this version reads up to {FORMAT}" in refusal(rewrite(saved, header=json.dumps(newer)))


@pytest.mark.parametrize(
    "changes",
    [
        {"base": 'a "format": 99 of a base', "format": FORMAT},
        {"cost": {"format": 99.0}, "format": FORMAT},
        {"versions": {"format": "99"}, "format": FORMAT},
        {"cost": {"format": 99.0}},
    ],
    ids=["in a text", "in a field", "in a field as text", "nowhere else"],
)
def test_the_format_is_the_headers_own(saved: Path, changes: dict[str, object]) -> None:
    """What stands elsewhere in the header, before the number or without it, is no format."""
    fields = build_header('"format": 99').model_dump(mode="json")
    del fields["format"]
    header = Eraser.load(rewrite(saved, header=json.dumps(changes | {**fields, **changes}))).header
    assert (header.format, header.concepts[0].name) == (FORMAT, '"format": 99')


def test_a_format_given_twice_is_the_last_one(saved: Path) -> None:
    fields = build_header().model_dump_json().removeprefix("{")
    assert Eraser.load(rewrite(saved, header=f'{{"format": 99, {fields}')).header.format == FORMAT


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"format": 1, "family": 3}'])
def test_damaged_header(saved: Path, text: str) -> None:
    assert "damaged header" in refusal(rewrite(saved, header=text))


WHOLE = random_eraser({"conv": 2}).state_dict()
DOWN, UP = "unet.conv.lora_A.weight", "unet.conv.lora_B.weight"
NO_PAIRS = {
    "without up": {DOWN: WHOLE[DOWN]},
    "without down": {UP: WHOLE[UP]},
    "another rank": {DOWN: WHOLE[DOWN], UP: WHOLE[UP][:, :1].contiguous()},
    "flat": {DOWN: WHOLE[DOWN], UP: WHOLE[UP].flatten()},
    "another prefix": {key.replace("unet", "transformer"): value for key, value in WHOLE.items()},
    "a stranger": {**WHOLE, "unet.conv.alpha": torch.ones(())},
    "nothing": {},
}


@pytest.mark.parametrize("tensors", NO_PAIRS.values(), ids=NO_PAIRS)
def test_keys_that_are_no_pairs(saved: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert "Fetch or train it again" in refusal(rewrite(saved, tensors=tensors))


def card_of(header: EraserHeader) -> str:
    """The card of an eraser that has this header."""
    return render_card(Eraser(random_eraser({"conv": 1, "shortcut": 2}).pairs, header))


def test_card_says_what_and_from_where() -> None:
    header = build_header("Van Gogh", base="owner/model", base_revision="abc123", preserve=("a dog", "a hat"))
    card = card_of(header)
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "diffusers"
    assert front["base_model"] == "owner/model"
    assert front["base_model_relation"] == "adapter"
    assert {"lora", "esd-lora", "stable-diffusion"} <= set(front["tags"])
    assert "# Eraser: Van Gogh" in text
    assert "| Van Gogh | (empty prompt) |" in text
    assert "`owner/model` at `abc123`" in text
    assert "Prompts held in place during training: 2" in text
    assert "instance_prompt" not in front  # an eraser has no trigger word


def test_card_says_strengths_and_what_is_amplified() -> None:
    cat, dog, hat = build_header("cat", "dog", "hat").concepts
    weak = dog.model_copy(update={"weight": 0.5, "blocks": {"mid_block": 0.0}})
    card = card_of(build_header(concepts=(cat, weak, hat.model_copy(update={"weight": -1.0}))))
    assert "that removes cat, dog (at strength 0.5, mid_block x 0) and amplifies hat (at strength -1)." in card


def test_card_of_unknown_prompts_has_no_empty_table() -> None:
    card = card_of(build_header(concepts=(build_header().concepts[0].model_copy(update={"pairs": (), "eta": None}),)))
    assert "Its prompts are not known." in card
    assert "|" not in card.split("---\n", 2)[2]


def test_card_of_a_local_base_points_to_no_page() -> None:
    front = yaml.safe_load(card_of(build_header(base="/some/where")).split("---\n")[1])
    assert "base_model" not in front


def test_card_cuts_a_long_pool_short() -> None:
    concept = build_header().concepts[0].model_copy(update={"pairs": tuple((f"cat {i}", "dog") for i in range(20))})
    card = card_of(build_header(concepts=(concept,)))
    assert "| cat 11 | dog |" in card
    assert "cat 12" not in card
    assert "and 8 more" in card


def test_card_keeps_its_table_whatever_the_prompt_holds() -> None:
    concept = build_header().concepts[0].model_copy(update={"pairs": (("[cat|dog]\nsitting", "a | b"),)})
    card = card_of(build_header(concepts=(concept,)))
    row = next(line for line in card.splitlines() if "[cat" in line)
    assert row.endswith("|")
    assert row.replace("\\|", "").count("|") == 3


def test_hash_is_the_same_for_a_base_and_its_float16_variant() -> None:
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert hash_weight(weight) == hash_weight(weight.half()) == hash_weight(weight.T.contiguous().T)
    changed = weight.clone()
    changed[3, 2] += 0.01
    assert hash_weight(changed) != hash_weight(weight)
    assert len(hash_weight(weight)) == 16


def test_tensors_are_written_one_by_one(tmp_path: Path) -> None:
    """In any order and of any types: as safetensors writes and reads them."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    tensors = {name: torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in dtypes.items()}
    tensors |= {"bytes": torch.arange(7, dtype=torch.uint8), "empty": torch.zeros(0, 4)}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with writing_tensors(tmp_path / "file.safetensors", shapes, {"a": "b"}) as write:
        for name in reversed(tensors):
            write(name, tensors[name])
    read, metadata = read_tensors(tmp_path / "file.safetensors")
    assert metadata == {"a": "b"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_header_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eraser = random_eraser({"conv": 1}, "a cat")
    monkeypatch.setattr("esd_lora.erasers.header._MAX_TEXT", len(eraser.header.to_json()) - 1)
    with pytest.raises(EsdLoraError, match="the header of 1 members would have"):
        eraser.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
