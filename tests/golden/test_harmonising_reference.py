"""Harmonising against a plain loop: hooks instead of peft, one batch at a time, every number written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esd_lora.adapter import add_adapter, read_pairs
from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser, LoraPair
from esd_lora.erasers.header import ErasedConcept
from esd_lora.erasers.tensor_files import hash_tensors
from esd_lora.fusing import harmonising
from esd_lora.fusing.harmonising import harmonise
from esd_lora.lessons import take_turns
from esd_lora.pseudo_words import PseudoWords
from esd_lora.recipe import LoraSpec
from esd_lora.trajectory import Points, TrajectoryBuffer
from random_erasers import eraser_on

KEPT = ["a dog", "a hat", "a house"]
SCOPE, RANK = "xattn", 3
STEPS, BATCH, LR, PUSH, SHAKE, TRAJECTORIES, POINTS, GUIDANCE, SEED = 12, 4, 1e-3, 1.5, 0.6, 2, 3, 2.5, 7


@contextmanager
def with_update(base: Base, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add `x down^T up^T` to what linear layers return."""
    layers = dict(base.model.named_modules())
    hooks = [
        layers[path].register_forward_hook(lambda _, args, out, down=down, up=up: out + args[0] @ down.T @ up.T)
        for path, (down, up) in pairs.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


class Reference:
    """What harmonising comes to, and how often the model is called on the way."""

    def __init__(self, base: Base, members: list[Eraser], prompts: list[list[str]]) -> None:
        self.base, self.evaluations, self.losses = base, 0, list[float]()
        self.texts = list(dict.fromkeys(["", *KEPT, *(text for texts in prompts for text in texts)]))
        self.encoded = base.encode(self.texts)["prompt_embeds"]
        noise = torch.Generator().manual_seed(SEED)
        taught = [self.walk(*pair, noise) for pair in zip(prompts, members, strict=True)]
        erasing, keeping = TrajectoryBuffer(Points.join(taught)), TrajectoryBuffer(self.walk(KEPT, None, noise))
        self.pairs = {path: tuple(torch.nn.Parameter(factor.clone()) for factor in pair) for path, pair in fresh(base).items()}
        self.train(erasing, keeping)

    def predict(self, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        self.evaluations += len(x_t)
        return self.base.predict(x_t, t, {"prompt_embeds": embeds})

    @torch.no_grad()
    def walk(self, prompts: list[str], member: Eraser | None, noise: torch.Generator) -> Points:
        numbers = torch.tensor([self.texts.index(prompt) for prompt in prompts])
        x = torch.randn(len(prompts), *self.base.latent_shape(), generator=noise)
        scheduler = self.base.family.scheduler(self.base.pipe, POINTS, self.base.latent_shape())
        points = []
        for t in scheduler.timesteps:
            times = t.expand(len(x))
            null = self.predict(x, times, self.encoded[:1].expand(len(x), -1, -1))
            prompted = self.predict(x, times, self.encoded[numbers])
            points.append(Points(x, times, numbers, prompted, x[:, :0]))
            x = scheduler.step(null + GUIDANCE * (prompted - null), t, x).prev_sample
        if member is not None:
            with with_update(self.base, {path: (pair.down, pair.up) for path, pair in member.pairs.items()}):
                alone = [self.predict(p.x_t, p.t, self.encoded[p.lesson]) for p in points]
            points = [p._replace(target=p.target + PUSH * (a - p.target)) for p, a in zip(points, alone, strict=True)]
        return Points.join(points)

    def train(self, erasing: TrajectoryBuffer, keeping: TrajectoryBuffer) -> None:
        words = PseudoWords(self.base, KEPT)
        kept_texts = self.base.encode(KEPT)["prompt_embeds"]
        centred = kept_texts - kept_texts.mean(0)
        optimizer = torch.optim.Adam([factor for pair in self.pairs.values() for factor in pair], lr=LR)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(SEED * 100_003 + step)
            erased, kept = erasing.sample(BATCH, generator), keeping.sample(BATCH, generator)
            first = kept.lesson[: BATCH // 2]
            shaken = words.encode([self.texts[i] for i in first.tolist()], generator)["prompt_embeds"]
            mixture = torch.randn(len(first), len(KEPT), generator=generator) / len(KEPT) ** 0.5
            shaken = shaken + SHAKE * torch.einsum("np,ptw->ntw", mixture.to(centred), centred)
            with torch.no_grad():
                base_there = self.predict(kept.x_t[: BATCH // 2], kept.t[: BATCH // 2], shaken)
            target = torch.cat([erased.target, base_there, kept.target[BATCH // 2 :]])
            embeds = torch.cat([self.encoded[erased.lesson], shaken, self.encoded[kept.lesson[BATCH // 2 :]]])
            with with_update(self.base, self.pairs):
                student = self.predict(torch.cat([erased.x_t, kept.x_t]), torch.cat([erased.t, kept.t]), embeds)
            loss = (student - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = LR * (STEPS - step) / STEPS
            optimizer.step()
            self.losses.append(loss.item())


def fresh(base: Base) -> dict[str, LoraPair]:
    """Return the factors that an update begins with."""
    add_adapter(base, base.family.modules(base.model, SCOPE), LoraSpec(rank=RANK, alpha=RANK), SEED)
    pairs = read_pairs(base.model)
    base.model.unload_lora()
    return pairs


def member(base: Base, seed: int, *prompts: str) -> Eraser:
    layers = base.family.modules(base.model, "xattn")
    eraser = eraser_on(base.model, layers, prompts[0], seed=seed, base_hashes=base.hashes(layers))
    concept = ErasedConcept(name=prompts[0], synonyms=(), pairs=tuple((prompt, "") for prompt in prompts), eta=1.0)
    pairs = {path: LoraPair(pair.down.double(), 0.1 * pair.up.double()) for path, pair in eraser.pairs.items()}
    return Eraser(pairs, eraser.header.model_copy(update={"concepts": (concept,)}))


def test_harmonising_is_the_plain_loop(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(tiny_dir, device="cpu", dtype=torch.float64)
    many = ["a cat", *(f"a cat and {number} mice" for number in range(7))]
    members = sorted((member(base, 0, *many), member(base, 1, "a car")), key=lambda m: hash_tensors(m.state_dict()))
    # A member with eight prompts has three times the trajectories of one with one; each takes its prompts in turns.
    walked = {"a cat": take_turns(many, 3 * TRAJECTORIES), "a car": ["a car"] * TRAJECTORIES}
    reference = Reference(base, members, [walked[each.names[0]] for each in members])
    clock = count(100, 3)
    monkeypatch.setattr(harmonising.time, "monotonic", lambda: float(next(clock)))
    settings = {"steps": STEPS // len(members), "batch_size": BATCH, "lr": LR, "push": PUSH, "shake": SHAKE, "seed": SEED}
    walks = {"trajectories": TRAJECTORIES, "keep_trajectories": 3, "trajectory_steps": POINTS, "guidance": GUIDANCE}
    shape = {"scope": SCOPE, "rank": RANK}
    better = harmonise(members, base, keep=KEPT, progress=False, **shape, **settings, **walks)
    (record,) = better.header.distillations
    assert record.trajectories == tuple(len(walked[each.names[0]]) for each in members)
    assert record.evaluations == reference.evaluations
    assert record.seconds == 3
    assert record.first_loss == pytest.approx(sum(reference.losses[:2]) / 2, rel=1e-6)
    assert record.last_loss == pytest.approx(sum(reference.losses[-2:]) / 2, rel=1e-6)
    start = fresh(base)
    assert better.pairs.keys() == start.keys()
    for path, pair in better.pairs.items():
        for factor, trained, before in zip(pair, reference.pairs[path], start[path], strict=True):
            expected = trained.detach()
            assert float((factor - expected).norm()) <= 1e-6 * float((expected - before).norm()), path
