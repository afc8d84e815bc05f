"""Stage 4: the judge, trained on jittered drawings that are blurred, noised, recoloured and shifted."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import draw
from domain import BACKGROUNDS, OBJECTS, STYLES
from esd_lora.evaluation.detectors.judge import JudgeNet

BATCH, LR = 100, 2e-3


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a small diffusion model does to a drawing: softness, grain, off colours, a missing patch.

    Half of the images of a batch get each of blur, noise, colour cast and a grey patch of up to 14 pixels.
    """

    def half() -> torch.Tensor:
        return (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).float()

    soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    amount = half() * torch.rand(len(images), 1, 1, 1, generator=generator)
    images = torch.lerp(images, soft, amount)
    images = images + half() * 0.15 * torch.randn(images.shape, generator=generator)
    gain = 1 + half() * 0.2 * (torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1)
    images = (images * gain + half() * 0.1 * torch.randn(len(images), 3, 1, 1, generator=generator)).clamp(-1, 1)
    position = torch.arange(draw.SIZE)
    left, top = torch.randint(0, draw.SIZE - 14, (2, len(images), 1), generator=generator)
    size = torch.randint(4, 15, (len(images), 1), generator=generator)
    across = (position >= left) & (position < left + size)
    down = (position >= top) & (position < top + size)
    patch = (down[:, None, :, None] & across[:, None, None, :]).float() * half()
    return images * (1 - patch)


def train_judge(work: Path, steps: int) -> None:
    done = work / "judge.safetensors"
    if done.exists():
        return
    domain, _ = draw.load(work)
    drawings = domain.flatten(0, 1)
    torch.manual_seed(0)
    judge = JudgeNet(len(OBJECTS), len(STYLES))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=1e-2, fused=True)

    def sample(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randint(len(drawings), (count,), generator=generator)
        backgrounds = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
        images = degrade(draw.jitter(drawings[picked], backgrounds, generator), generator)
        return images, picked // len(STYLES), picked % len(STYLES)

    for step in range(steps):
        images, objects, styles = sample(BATCH, step)
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        object_logits, style_logits = judge(images)
        loss = F.cross_entropy(object_logits, objects) + F.cross_entropy(style_logits, styles)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"judge {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    judge.eval()
    images, objects, styles = sample(4000, 1_000_000)  # seeds no step used
    with torch.no_grad():
        object_logits, style_logits = judge(images)
    right = [
        (logits.argmax(1) == truth).float().mean().item()
        for logits, truth in ((object_logits, objects), (style_logits, styles))
    ]
    print(f"judge on 4000 held-out degraded jitters: objects {right[0]:.2%}, styles {right[1]:.2%}")
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, done)
