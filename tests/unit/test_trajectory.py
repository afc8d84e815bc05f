"""Walks and the buffer; that a walk is guided DDIM is held against golden/reference.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from esd_lora.trajectory import Condition, Points, TrajectoryBuffer, concatenate, in_float64, pick, walk

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
STEPS, GUIDANCE = 6, 3.0
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROMPTED, NULL = ({"strength": torch.tensor(strength, dtype=torch.float64)} for strength in ([0.5, 0.7], [0.1, 0.1]))


class Recorder:
    """A denoiser that predicts a share of what it sees, and remembers it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.seen.append((x_t, t))
        return x_t * condition["strength"].view(-1, 1, 1, 1)


def ready(scheduler: Any) -> Any:
    scheduler.set_timesteps(STEPS)
    return scheduler


def ddim() -> Any:
    return ready(DDIMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False))


def euler() -> Any:
    return ready(EulerDiscreteScheduler(**SCHEDULE, steps_offset=1))


def test_euler_s_denoiser_sees_scaled_latents() -> None:
    scheduler, denoiser = euler(), Recorder()
    walk(denoiser, scheduler, NOISE, PROMPTED, NULL, guidance=GUIDANCE)
    sigmas = scheduler.sigmas
    # Euler's method by hand (Karras et al., arXiv:2206.00364, algorithm 1): x moves along the predicted noise.
    x = NOISE * (sigmas[0] ** 2 + 1) ** 0.5
    for i, (seen, _) in enumerate(denoiser.seen):
        scaled = x / (sigmas[i] ** 2 + 1) ** 0.5
        for half in seen.chunk(2):
            torch.testing.assert_close(half, scaled, rtol=1e-5, atol=1e-6)  # diffusers keeps sigmas in float32
        null, prompted = (scaled * told["strength"].view(-1, 1, 1, 1) for told in (NULL, PROMPTED))
        x = x + (sigmas[i + 1] - sigmas[i]) * (null + GUIDANCE * (prompted - null))
    assert len(denoiser.seen) == STEPS


@pytest.mark.parametrize("make", [ddim, euler])
def test_point_is_what_the_denoiser_saw_and_said(make: Callable[[], Any]) -> None:
    scheduler, denoiser = make(), Recorder()
    points = walk(denoiser, scheduler, NOISE, PROMPTED, NULL, guidance=GUIDANCE)
    assert len(points) == STEPS
    for point, grid, (seen, ts) in zip(points, scheduler.timesteps, denoiser.seen, strict=True):
        assert torch.equal(torch.cat([point.x_t, point.x_t]), seen)
        assert ts.tolist() == [grid.item()] * 4
        assert point.t.tolist() == [grid.item()] * 2
        assert point.null is not None
        assert point.prompted is not None
        assert torch.equal(point.null, point.x_t * NULL["strength"].view(-1, 1, 1, 1))
        assert torch.equal(point.prompted, point.x_t * PROMPTED["strength"].view(-1, 1, 1, 1))


@pytest.mark.parametrize("make", [ddim, euler])
@pytest.mark.parametrize("stop", range(STEPS))
def test_stop_is_reached_and_not_predicted_at(make: Callable[[], Any], stop: int) -> None:
    whole = walk(Recorder(), make(), NOISE, PROMPTED, NULL, guidance=GUIDANCE)
    denoiser = Recorder()
    points = walk(denoiser, make(), NOISE, PROMPTED, NULL, guidance=GUIDANCE, stop=stop)
    assert len(points) == stop + 1
    assert len(denoiser.seen) == stop
    assert torch.equal(points[-1].x_t, whole[stop].x_t)
    assert torch.equal(points[-1].t, whole[stop].t)
    assert points[-1].null is points[-1].prompted is None
    assert all(point.null is not None for point in points[:-1])


def test_walk_keeps_no_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    points = walk(lambda x_t, *_: x_t * weight, ddim(), NOISE, PROMPTED, NULL, guidance=GUIDANCE)
    assert not any(tensor.requires_grad for point in points for tensor in point)


def test_conditions_are_picked_and_joined_by_row() -> None:
    a, b = {"text": torch.arange(6).view(3, 2)}, {"text": torch.full((1, 2), 9)}
    assert pick(a, torch.tensor([2, 0, 2]))["text"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert concatenate(a, b)["text"].tolist() == [[0, 1], [2, 3], [4, 5], [9, 9]]


def numbered(*numbers: int) -> Points:
    """Points that carry one number in all their places."""
    values = torch.tensor(numbers)
    latents = values.view(-1, 1).float()
    return Points(latents, values, values, -latents, latents[:, :0])


@pytest.mark.parametrize(("count", "most"), [(1, 1), (4, 1), (5, 1), (6, 2), (15, 3)])
def test_sample_repeats_only_when_it_must(count: int, most: int) -> None:
    drawn = TrajectoryBuffer(numbered(*range(5))).sample(count, torch.Generator().manual_seed(3))
    times = drawn.t.bincount(minlength=5)
    assert times.sum() == count
    assert times.max() == most
    assert times.max() - times.min() <= 1
    assert torch.equal(drawn.x_t[:, 0], drawn.t.float())  # what belongs together stays together
    assert torch.equal(drawn.target[:, 0], -drawn.t.float())
    assert torch.equal(drawn.lesson, drawn.t)


def test_sample_is_decided_by_its_generator() -> None:
    buffer = TrajectoryBuffer(numbered(*range(50)))
    first, again, other = (buffer.sample(10, torch.Generator().manual_seed(seed)).t.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_groups_are_joined_in_order() -> None:
    joined = Points.join([numbered(3, 1), numbered(2)])
    assert joined.t.tolist() == joined.lesson.tolist() == [3, 1, 2]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_float64_is_made_where_there_is_any(device: str) -> None:
    tensor = Mock(device=torch.device(device))
    made = in_float64(tensor)
    assert made is (tensor.cpu.return_value if device == "mps" else tensor).double.return_value
