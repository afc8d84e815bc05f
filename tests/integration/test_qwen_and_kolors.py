"""What Qwen-Image's and Kolors' texts and guidance have of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from esd_lora.bases import loading
from esd_lora.bases.base import Base
from esd_lora.cli import main
from esd_lora.erasers.eraser import Eraser
from esd_lora.errors import EsdLoraError
from toys import load_toy, save_toy

PROMPTS = ["a cat", "", "a dog in the rain, at night"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("qwen-image", tmp_path_factory.mktemp("toys") / "qwen-image")


@pytest.fixture(scope="module")
def kolors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("kolors", tmp_path_factory.mktemp("toys") / "kolors")


def latents(base: Base, count: int) -> torch.Tensor:
    return torch.randn(count, *base.latent_shape(), generator=torch.Generator().manual_seed(0), dtype=base.model.dtype)


@torch.no_grad()
def test_padded_texts_predict_what_each_does_alone(qwen: Path) -> None:
    """In float64, but for the places of tokens, which the model turns by in float32."""
    base = load_toy(qwen, dtype=torch.float64)
    x_t, t = latents(base, 3), torch.tensor([900.0, 500.0, 20.0])
    together = base.predict(x_t, t, base.encode(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        text, mask = base.pipe.encode_prompt(prompt or " ")
        assert mask is None, "a text alone has no padding"
        packed = base.pipe.transformer(
            hidden_states=base.pipe._pack_latents(x_t[i : i + 1], 1, *base.latent_shape()),
            timestep=t[i : i + 1] / 1000,
            encoder_hidden_states=text,
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]
        alone = base.pipe._unpack_latents(packed, 64, 64, 8)[:, :, 0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(together[0], together[1], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_what_is_masked_is_not_read(qwen: Path) -> None:
    base = load_toy(qwen)
    condition = base.encode(PROMPTS)
    assert condition["prompt_embeds_mask"].sum(1).tolist() == [9, 6, 25], "words and the end of the template"
    x_t, t = latents(base, 3), torch.full((3,), 500)
    noise = torch.randn_like(condition["prompt_embeds"]) * (1 - condition["prompt_embeds_mask"])[..., None]
    other = {**condition, "prompt_embeds": condition["prompt_embeds"] + noise}
    torch.testing.assert_close(base.predict(x_t, t, other), base.predict(x_t, t, condition), rtol=1e-5, atol=1e-6)


def test_guidance_is_against_a_space_and_off_at_one(qwen: Path) -> None:
    family = load_toy(qwen).family
    assert family.guidance_kwargs(4.0, 2) == {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
    assert family.guidance_kwargs(1.0, 2) == {"true_cfg_scale": 1.0}


def test_a_text_without_words_is_not_the_other_side_of_guidance(qwen: Path) -> None:
    base = load_toy(qwen)
    null, text = base.encode([""]), base.family.encode_text(base.pipe, [""])
    assert null["prompt_embeds_mask"].sum() == text["prompt_embeds_mask"].sum() + 1


@torch.no_grad()
def test_kolors_pads_on_the_left_of_one_length(kolors: Path) -> None:
    """Longer texts keep their ends; the pooled text is the last token's, from the encoder's last layer."""
    base = load_toy(kolors)
    condition = base.encode(PROMPTS)
    assert condition["prompt_embeds"].shape == (3, 256, 16)
    ids = base.pipe.tokenizer(PROMPTS, padding="max_length", max_length=256, return_tensors="pt")
    assert ids["attention_mask"][0].tolist() == [0] * 248 + [1] * 8
    layers = base.pipe.text_encoder(**ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(condition["prompt_embeds"], layers[-2].transpose(0, 1))
    torch.testing.assert_close(condition["pooled_prompt_embeds"], layers[-1][-1])


@pytest.mark.parametrize("name", ["qwen", "kolors"])
def test_closed_form_by_the_command(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The one layer that reads text itself changes, and nothing else."""
    folder = request.getfixturevalue(name)
    args = ["train", "instant", "--base", str(folder), "--concept", "a cat", "-s", "preserve=[a dog, a hat, a house]"]
    result = CliRunner().invoke(main, [*args, "-s", "train.preview_every=0", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    moved = {path for path, pair in Eraser.load(tmp_path / "out").pairs.items() if pair.up.any()}
    assert moved == {{"qwen": "txt_in", "kolors": "encoder_hid_proj"}[name]}


def test_kolors_says_what_to_install(kolors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(EsdLoraError, match=r"'kolors' needs sentencepiece, which is not installed: .*kolors"):
        load_toy(kolors)


@pytest.mark.parametrize("library", ["kolors", "elsewhere"])
def test_an_index_names_libraries_of_its_own_pipeline_alone(library: str, qwen: Path, tmp_path: Path) -> None:
    """diffusers takes files of code from the directory for libraries that it does not know."""
    index = tmp_path / "model_index.json"
    index.write_text((qwen / "model_index.json").read_text().replace('"transformers",', f'"{library}",', 1))
    with pytest.raises(EsdLoraError, match="expected a class of diffusers or transformers"):
        loading.load_base(tmp_path)
