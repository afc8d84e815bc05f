"""What Flux.2 and Z-Image have of their own: texts of any length, siblings told apart, kohya's names in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from esd_lora.families import family_of
from esd_lora.formats.exporting import export
from toy_denoisers import eraser_on_all_layers
from toys import load_toy, make_toy, save_toy

PROMPTS = ["", "a cat", "a very long prompt of a cat in rain"]
"""Prompts of 15, 20 and 50 tokens with the template's, which Z-Image fills up to 32 and 64."""


@torch.no_grad()
def test_texts_of_any_length_in_one_batch_are_read_as_alone(tmp_path: Path) -> None:
    """The pipeline's own call of the denoiser, with the text encoder's output as it is; padded and masked in the batch."""
    base = load_toy(save_toy("z-image", tmp_path / "toy"), dtype=torch.float64)
    x_t = torch.randn(len(PROMPTS), *base.latent_shape(), generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([900.0, 500.0, 100.0])
    condition = base.encode(PROMPTS)
    lengths = condition["prompt_attention_mask"].sum(1)
    assert len({-(-int(length) // 32) for length in lengths}) > 1
    together = base.predict(x_t, t, condition)
    texts, _ = base.pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=64)
    assert [len(text) for text in texts] == lengths.tolist()
    for i, text in enumerate(texts):
        (alone,) = base.pipe.transformer([x_t[i].unsqueeze(1)], (1000 - t[i : i + 1]) / 1000, [text], return_dict=False)[0]
        torch.testing.assert_close(together[i], -alone.squeeze(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "sampling"),
    [
        ("flux2-klein", {}, (50, 4.0)),
        ("flux2-klein", {"is_distilled": True}, (4, 1.0)),
        ("flux2-dev", {}, (50, 4.0)),
        ("z-image", {}, (8, 0.0)),
        ("z-image", {"shift": 6.0}, (50, 5.0)),
    ],
)
def test_distilled_siblings_are_told_apart(name: str, changes: dict[str, Any], sampling: tuple[int, float]) -> None:
    pipe = make_toy(name)
    pipe.register_to_config(**{key: value for key, value in changes.items() if key != "shift"})
    pipe.scheduler.register_to_config(**{key: value for key, value in changes.items() if key == "shift"})
    assert family_of(type(pipe).__name__).default_sampling(pipe) == sampling


def test_guidance_that_is_added_is_one_less_than_elsewhere(tmp_path: Path) -> None:
    """The pipeline's picture by its scale 2 is the walk's by 3: both predict null + 3 (prompt - null)."""
    base = load_toy(save_toy("z-image", tmp_path / "toy"))
    predictions: list[torch.Tensor] = []
    step = base.pipe.scheduler.step
    base.pipe.scheduler.step = lambda flow, *rest, **options: predictions.append(flow) or step(flow, *rest, **options)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, **base.family.call_kwargs(base.pipe)}
    noise = torch.randn(1, *base.latent_shape(), generator=generator)
    base.pipe(prompt="a cat", guidance_scale=2.0, num_inference_steps=1, latents=noise, output_type="latent", **size)
    with torch.no_grad():
        null, prompted = base.predict(noise.repeat(2, 1, 1, 1), torch.full((2,), 1000.0), base.encode(["", "a cat"])).split(1)
    torch.testing.assert_close(predictions[0], null + 3 * (prompted - null), rtol=1e-4, atol=1e-5)
    assert base.family.unguided == 0


@pytest.mark.parametrize(("family", "toy"), [("flux2", "flux2-dev"), ("z-image", "z-image")])
def test_kohya_s_files_load_in_plain_diffusers(family: str, toy: str, tmp_path: Path) -> None:
    pipe: DiffusionPipeline = make_toy(toy)
    eraser = eraser_on_all_layers(family, pipe.transformer)
    file = export(eraser, tmp_path / "k.safetensors", layout="kohya")
    converted = type(pipe).lora_state_dict(str(file))
    for module, pair in eraser.pairs.items():
        down, up = (converted.pop(f"transformer.{module}.lora_{factor}.weight") for factor in "AB")
        torch.testing.assert_close(up @ down, pair.delta(), rtol=1e-4, atol=1e-5, msg=lambda text, m=module: f"{m}: {text}")
    assert not converted


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2-klein", "flux2-dev"])
def test_prediction_in_float64_is_the_pipeline_s(name: str, tmp_path: Path) -> None:
    """Tokens, positions, time and guidance: what the denoiser returns in the pipeline's own call, in batches of one size."""
    base = load_toy(save_toy(name, tmp_path / "toy"), dtype=torch.float64)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    base.model.register_forward_hook(
        lambda _module, _args, kwargs, output: calls.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    options = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    size = {"height": 64, "width": 128, **base.family.call_kwargs(base.pipe)}
    base.pipe(prompt="a cat in the rain", guidance_scale=1.0, **options, **size)

    def unpacked(tokens: torch.Tensor) -> torch.Tensor:
        return base.pipe._unpatchify_latents(tokens.transpose(1, 2).unflatten(2, (4, 8)))

    condition, times = base.encode(["a cat in the rain"]), base.pipe.scheduler.timesteps
    assert len(calls) == len(times) == 3
    for (x_t, flow), t in zip(calls[:3], times, strict=True):
        torch.testing.assert_close(base.predict(unpacked(x_t), t[None], condition), unpacked(flow), rtol=1e-9, atol=1e-9)
