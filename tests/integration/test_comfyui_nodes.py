"""The ComfyUI nodes beside a stand-in: weights as a merge gives them, gates as esd-lora's, one sentence about what is wrong."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import comfy_stand_in
from comfy_cases import EXACT, FAMILIES, LAYERS, Case, largest_difference, loaded, stacked, write_case
from comfy_child import run_calls
from comfy_stand_in import ModelPatcher
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.cli.options import EraserType
from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.header import FORMAT, ErasedConcept
from esd_lora.erasers.stacking import Strength
from esd_lora.families import family_named
from esd_lora.gating import Gate
from random_erasers import build_header

GOLDEN = Path(__file__).parents[1] / "golden"
Load = Callable[[Path], ModuleType]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def nodes_on() -> Iterator[Load]:
    """Loads the nodes beside the stand-in, with a folder as models/loras."""
    with ExitStack() as stack:
        yield lambda loras: stack.enter_context(comfy_stand_in.loaded_nodes(loras))


def patcher_of(case: Case, change: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> ModelPatcher:
    weights = {name.removeprefix(case.prefix): change(tensor) for name, tensor in case.base().items()}
    return ModelPatcher(comfy_stand_in.build_model(case.family, weights, LAYERS[case.family]["prediction_type"]))


def test_weights_are_those_of_a_merge(case: Case, nodes_on: Load) -> None:
    nodes = nodes_on(case.folder / "loras")
    for chain, expected in zip(case.chains, case.expected, strict=True):
        model = patcher_of(case)
        result, _ = run_calls(nodes, model, chain)
        assert not model.patches, "the model that is given stays as it is"
        actual = {name.replace("diffusion_model.", case.prefix, 1): t for name, t in result.patched_weights().items()}
        assert largest_difference(actual, expected) < EXACT, chain


def test_weights_of_another_base_are_noticed(case: Case, nodes_on: Load) -> None:
    """Rows of joined weights among them; in half precision too, and not by what other patches did to a loaded model."""
    nodes, (own,), (kohya,) = nodes_on(case.folder / "loras"), *case.chains[:2]
    words = "; 8 of 8 weights compared are not those of owner/model, which it was trained on: look at what it erases here"
    same, other = patcher_of(case), patcher_of(case, lambda weight: weight + 1)
    for call in (own, kohya):
        assert words not in note_of(nodes, call, same)
        assert words in note_of(nodes, call, other)
    assert "compared" not in note_of(nodes, own, patcher_of(case, lambda weight: weight.half()))
    assert "compared" not in note_of(nodes, own, patcher_of(case, lambda weight: (weight + 1).bfloat16())), "cannot be told"
    other.backup = {name: SimpleNamespace(weight=weight) for name, weight in same.model.state_dict().items()}
    assert "compared" not in note_of(nodes, own, other)


def model_of(family: str, predicts: str = "epsilon", text: int = 768) -> ModelPatcher:
    """A model of one layer, that reads text."""
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    weights = {name: torch.zeros(4, text), "input_blocks.3.0.op.weight": torch.zeros(4, 4, 3, 3)}
    return ModelPatcher(comfy_stand_in.build_model(family, weights, predicts))


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PAIR = {f"{LAYER}.lora_down.weight": torch.ones(2, 768), f"{LAYER}.lora_up.weight": torch.ones(4, 2)}
HEADER = {"format": 4, "family": "sd", "prediction_type": "epsilon", "base": "owner/model", "concepts": [{"name": "a cat"}]}


def write(file: Path, tensors: dict[str, torch.Tensor], header: Any = None) -> str:
    """Write a LoRA file, an eraser's if there is a header, and return its name."""
    text = header if isinstance(header, str) else json.dumps(header)
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(separate, file, {"esd_lora": text} if header else None)
    return file.name


def note_of(nodes: ModuleType, call: dict[str, Any], model: Any = None, clip: Any = None) -> str:
    return run_calls(nodes, model or model_of("sd"), [call], clip)[1][0]


def test_notes_say_what_was_done(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    concepts = [{"name": "a cat"}, {"name": "a hat", "weight": -0.5}]
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, {**HEADER, "concepts": concepts})
    style = write(tmp_path / "style.safetensors", PAIR)
    assert note_of(nodes, loaded(eraser)) == (
        "no-cat.safetensors: removes a cat and amplifies a hat (stored at -0.5), at strength 1 (1 weights changed)."
    )
    assert note_of(nodes, loaded(eraser, -2, "mid=0.5")) == (
        "no-cat.safetensors: removes a hat (stored at -0.5) and amplifies a cat, at strength -2, mid x 0.5 (1 weights changed)."
    )
    assert "is a LoRA and no eraser of esd-lora, so nothing says what it does" in note_of(nodes, loaded(style))
    both = note_of(nodes, stacked((eraser, 1, ""), (style, 1, ""), (eraser, 1, "")))
    assert len(both.splitlines()) == 3
    assert both.splitlines()[2].startswith("no-cat.safetensors: once more, so both strengths add up: removes")
    assert note_of(nodes, stacked()) == "Nothing is stacked: choose an eraser."


def test_text_of_a_stranger_is_shown_by_its_codes(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    concepts = [{"name": "a\n\x1b[31mcat"}]
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, {**HEADER, "concepts": concepts, "base": "\x1b[2J"})
    assert r"removes a\n\x1b[31mcat, at" in note_of(nodes, loaded(eraser))
    with pytest.raises(ValueError, match=r"Diffusion 1 or 2 \(\\x1b\[2J\), and the model connected is SDXL"):
        note_of(nodes, loaded(eraser), model_of("sdxl"))


def test_strength_zero_leaves_the_model_alone(nodes_on: Load, tmp_path: Path) -> None:
    nodes, model = nodes_on(tmp_path), model_of("sd")
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, HEADER)
    for call in (loaded(eraser, 0), loaded(eraser, 1, "mid=0"), stacked((eraser, 0, "")), stacked()):
        assert run_calls(nodes, model, [call])[0] is model


def test_text_encoder_of_a_style(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    text = SimpleNamespace(state_dict=lambda: {"layers.0.q_proj.weight": torch.zeros(3, 5)})
    pair = {
        "lora_te_layers_0_q_proj.lora_down.weight": torch.ones(1, 5),
        "lora_te_layers_0_q_proj.lora_up.weight": torch.ones(3, 1),
    }
    style = write(tmp_path / "style.safetensors", {**PAIR, **pair})
    clip = comfy_stand_in.Clip(cond_stage_model=text)
    node = nodes.NODE_CLASS_MAPPINGS["EsdLoadEraser"]()
    _, changed, note = node.load(model_of("sd"), style, -0.5, "", clip)
    assert torch.equal(changed.patcher.patched_weights()["layers.0.q_proj.weight"], torch.full((3, 5), -0.5))
    assert "with 1 weights of the text encoder" in note
    assert not clip.patcher.patches
    _, none, note = node.load(model_of("sd"), style, -0.5, "")
    assert none is None
    assert "1 layers of the text encoder are left out: connect its CLIP" in note
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, HEADER)
    assert node.load(model_of("sd"), eraser, 1.0, "", clip)[1] is clip


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another family": (
        {"header": {**HEADER, "family": "sdxl"}},
        "was made for SDXL .owner/model., and the model connected is Stable",
    ),
    "an unknown family": ({"header": {**HEADER, "family": "sana"}}, "was made for sana"),
    "another prediction": (
        {"header": {**HEADER, "prediction_type": "v_prediction"}},
        "predicts v_prediction, and the one connected",
    ),
    "another size": ({"model": ("sd", "epsilon", 1024)}, r"a weight of 4 x 768, and this model's has 4 x 1024"),
    "no layer": ({"tensors": {k.replace("mid_block", "mid"): t for k, t in PAIR.items()}}, "none of its layers fits a weight"),
    "a layer too many": (
        {"tensors": PAIR | {k.replace("to_k", "to_v"): t for k, t in PAIR.items()}},
        "1 of its 2 layers fit no weight of this one",
    ),
    "a layer that is in ComfyUI's table alone": (
        {"tensors": PAIR | {k.replace(LAYER, "lora_unet_down_blocks_3_downsamplers_0_conv"): t for k, t in PAIR.items()}},
        "1 of its 2 layers fit no weight of this one",
    ),
    "an unknown block": ({"blocks": "up.1=0"}, r"has no layer in 'up.1'. It has some in mid_block.attentions"),
    "a misspelt block": ({"blocks": "mid_blok=0"}, r"no layer in 'mid_blok'"),
    "no factor": ({"blocks": "mid"}, "'mid' is not BLOCK=FACTOR"),
    "no number": ({"blocks": "mid=half"}, "'mid=half' is not BLOCK=FACTOR"),
    "infinity": ({"blocks": "mid=inf"}, "is not BLOCK=FACTOR"),
    "a block twice": ({"blocks": "mid=1,mid=0"}, "'mid' stands there twice"),
    "a damaged header": ({"header": "{"}, "damaged header"),
    "a header of depth": ({"header": "[" * 10_000}, "damaged header"),
    "no concepts": ({"header": {**HEADER, "concepts": None}}, "damaged header"),
    "a newer format": ({"header": {**HEADER, "format": 6}}, "has format 6, and these nodes read up to 5"),
    "another kind of LoRA": ({"tensors": {f"{LAYER}.hada_w1_a": torch.ones(2, 2)}}, "no tensor of a plain LoRA"),
    "half a pair": ({"tensors": {f"{LAYER}.lora_up.weight": torch.ones(4, 2)}}, "has one factor and lacks the other"),
    "factors of other ranks": ({"tensors": {**PAIR, f"{LAYER}.lora_up.weight": torch.ones(4, 3)}}, "do not fit each other"),
    "NaN": ({"tensors": {**PAIR, f"{LAYER}.lora_up.weight": torch.full((4, 2), torch.nan)}}, "holds NaN or infinity"),
    "alphas": ({"tensors": {**PAIR, f"{LAYER}.alpha": torch.ones(2)}}, "an alpha of 2 values"),
    "nothing": ({"tensors": {}, "header": None}, "holds no layer"),
}
"""What is wrong with a file or a call, and the sentence about it."""


@pytest.mark.parametrize("wrong", WRONG)
def test_one_sentence_about_what_is_wrong(wrong: str, nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    changes, message = WRONG[wrong]
    eraser = write(tmp_path / "no-cat.safetensors", changes.get("tensors", PAIR), changes.get("header", HEADER))
    model = model_of(*changes.get("model", ("sd",)))
    error = sys.modules["esd_lora_comfyui.errors"].EraserError
    with pytest.raises(error, match=message) as caught:
        run_calls(nodes, model, [loaded(eraser, 1, changes.get("blocks", ""))])
    assert "\n" not in str(caught.value)
    assert not model.patches


def test_files_that_cannot_be_read(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "pickle.pt").write_bytes(b"")
    error = sys.modules["esd_lora_comfyui.errors"].EraserError
    for name, message in (
        ("gone.safetensors", "not in models/loras"),
        ("broken.safetensors", "damaged"),
        ("pickle.pt", "hold code"),
    ):
        with pytest.raises(error, match=message):
            run_calls(nodes, model_of("sd"), [loaded(name)])


def test_models_that_are_not_known_are_told_by_their_layers(nodes_on: Load, tmp_path: Path) -> None:
    """An EDM model predicts what esd-lora has no word for; a relative of a family has a class of its own."""
    nodes = nodes_on(tmp_path)
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, HEADER)
    assert "removes a cat" in note_of(nodes, loaded(eraser), model_of("sd", "edm"))
    relative = model_of("sd")
    relative.model.__class__ = type("Relative", (type(relative.model),), {})
    assert "removes a cat" in note_of(nodes, loaded(eraser), relative)


def test_layers_of_a_style_that_fit_nothing_are_counted(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    style = write(tmp_path / "style.safetensors", PAIR | {k.replace("to_k", "to_v"): t for k, t in PAIR.items()})
    assert "1 layers fit no weight of this model and are left out" in note_of(nodes, loaded(style))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_format_is_read(number: int, nodes_on: Load) -> None:
    nodes_on(GOLDEN)
    files = sys.modules["esd_lora_comfyui.files"]
    assert files.FORMAT == FORMAT
    file, eraser = GOLDEN / f"format_{number}.safetensors", Eraser.load(GOLDEN / f"format_{number}.safetensors")
    ours = files.read_lora(file, file.name)
    assert [(c.name, c.synonyms, c.weight) for c in ours.header.concepts] == [
        (c.name, c.synonyms, c.weight) for c in eraser.header.concepts
    ]
    assert (ours.header.family, ours.header.prediction_type) == (eraser.header.family, eraser.header.prediction_type)
    for module, pair in eraser.pairs.items():
        factors = ours.layers[f"{eraser.header.prefix}.{module}"]
        assert torch.equal((factors.up @ factors.down).reshape(pair.shape), pair.delta())


def test_blocks_are_the_words_of_the_command_line(nodes_on: Load, tmp_path: Path) -> None:
    nodes_on(tmp_path)
    strengths = sys.modules["esd_lora_comfyui.strengths"]
    modules = list(family_named("sd").original_layers())
    for text in (
        "mid=0.5,up.1=0",
        "down = 2, down_blocks.1.attentions=-1",
        "up=0.5,up.1=2,up.1.attentions.0.transformer_blocks.0=0",
    ):
        _, weight, blocks = EraserType().convert(f"no-cat:0.75,{text}", None, None)
        assert strengths.parse_blocks(text) == blocks
        ours, theirs = strengths.Strength(weight, blocks), Strength(weight, blocks)
        assert [ours.at(module) for module in modules] == [theirs.at(module) for module in modules]
    assert strengths.parse_blocks(" \n") == {}


def test_a_file_that_changes_is_read_anew(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, HEADER)
    calls = {"EsdLoadEraser": loaded(eraser), "EsdStackErasers": stacked((eraser, 1, "")), "EsdGateByPrompt": loaded(eraser)}

    def stamps() -> list[str]:
        return [nodes.NODE_CLASS_MAPPINGS[name].IS_CHANGED(**call["inputs"]) for name, call in calls.items()]

    before = stamps()
    assert before == stamps()
    os.utime(tmp_path / eraser, ns=(1, 1))
    assert not set(before) & set(stamps())


def gate(eraser: str, prompt: str, **inputs: Any) -> dict[str, Any]:
    """Return a call of the gate."""
    return {"node": "EsdGateByPrompt", "inputs": {"eraser": eraser, "prompt": prompt, **inputs}}


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu", vae=False)


def test_similarities_are_those_of_esd_lora(emoji: Base, nodes_on: Load, tmp_path: Path) -> None:
    nodes_on(tmp_path)
    gating = sys.modules["esd_lora_comfyui.gating"]
    clip = comfy_stand_in.Clip(emoji.pipe, skip=-2)
    names, prompts = (
        ("a balloon key", "cat"),
        ("a tiger", "three Cats at sea", "rain, fish of house", "", "balloon keys", "catalogue"),
    )
    concept = ErasedConcept(name=names[0], synonyms=names[1:], pairs=(), eta=None)
    for threshold in (0.5, 0.95, 1):
        theirs = Gate(emoji, [Eraser({}, build_header().model_copy(update={"concepts": (concept,)}))], threshold=threshold)
        for prompt in prompts:
            near = gating.nearness(clip, prompt, names)
            assert near.similarity == pytest.approx(theirs.similarities(prompt)[0], abs=1e-6), prompt
            assert gating.factor(near.similarity, threshold) == pytest.approx(theirs(prompt)[0], abs=1e-5 / (1.001 - threshold))
    assert clip.skip == -2, "the CLIP that is given stays as it is"


def test_weights_in_a_prompt_do_not_count(nodes_on: Load, tmp_path: Path) -> None:
    nodes_on(tmp_path)
    bare = sys.modules["esd_lora_comfyui.gating"].without_weights
    assert bare("a (red:1.2) cat, ((old)) (at sea : 0.5)") == "a red cat, old at sea "
    assert bare(r"sonic \(hedgehog\), 16:9") == "sonic (hedgehog), 16:9"


def test_gate_is_on_for_its_concept_alone(emoji: Base, nodes_on: Load, tmp_path: Path) -> None:
    nodes, clip, model = nodes_on(tmp_path), comfy_stand_in.Clip(emoji.pipe), model_of("sd")
    eraser = write(tmp_path / "no-cat.safetensors", PAIR, {**HEADER, "concepts": [{"name": "a cat", "synonyms": ["a kitten"]}]})
    off, (note,) = run_calls(nodes, model, [gate(eraser, "a house")], clip)
    assert off is model
    assert re.fullmatch(
        r"no-cat.safetensors: of the prompt 'house' is nearest to '(cat|kitten)' \(similarity 0\.\d{3}, threshold 0\.95\):"
        r" off, and the model stays as it was\.",
        note,
    )
    for prompt in ("a (kitten:1.3) at sea", "two CATS"):
        on, (note,) = run_calls(nodes, model, [gate(eraser, prompt, strength=0.5)], clip)
        assert on.patches[0][1][0].equal(torch.full((4, 2), 0.5))
        assert re.search(
            r"the prompt names '(cat|kitten)' \(similarity 1.000, threshold 0.95\): on at 100%, removes a cat", note
        )
    near = sys.modules["esd_lora_comfyui.gating"].nearness(clip, "a house", ["cat", "kitten"]).similarity
    part, (note,) = run_calls(nodes, model, [gate(eraser, "a house", threshold=near - 0.1)], clip)
    assert float(part.patches[0][1][0][0, 0]) == pytest.approx(0.1 / (1.1 - near), rel=1e-4)
    further, (note,) = run_calls(nodes, model, [gate(eraser, "a house", names="hut, house")], clip)
    assert further.patches
    assert "names 'house'" in note


def test_gate_needs_to_know_what_is_removed(emoji: Base, nodes_on: Load, tmp_path: Path) -> None:
    nodes, clip = nodes_on(tmp_path), comfy_stand_in.Clip(emoji.pipe)
    style = write(tmp_path / "style.safetensors", PAIR)
    error = sys.modules["esd_lora_comfyui.errors"].EraserError
    with pytest.raises(error, match="does not say what it removes"):
        run_calls(nodes, model_of("sd"), [gate(style, "a cat")], clip)
    assert run_calls(nodes, model_of("sd"), [gate(style, "a cat", names="cat")], clip)[0].patches
    with pytest.raises(error, match="none of its layers fits"):  # whether it is on or not
        run_calls(
            nodes,
            model_of("sdxl"),
            [gate(write(tmp_path / "no.safetensors", {f"x{k}": t for k, t in PAIR.items()}), "", names="cat")],
            clip,
        )


def test_texts_of_many_lengths_are_refused(nodes_on: Load, tmp_path: Path) -> None:
    nodes = nodes_on(tmp_path)

    class Long(comfy_stand_in.Clip):
        def clone(self) -> Long:
            return self

        def encode_from_tokens(self, tokens: str) -> torch.Tensor:
            return torch.zeros(1, len(tokens), 2)

    eraser = write(tmp_path / "no-cat.safetensors", PAIR, HEADER)
    with pytest.raises(sys.modules["esd_lora_comfyui.errors"].EraserError, match="gate on models whose texts have one length"):
        run_calls(nodes, model_of("sd"), [gate(eraser, "a dog")], Long())
