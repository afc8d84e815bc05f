"""Stage 3: the VAE, 64x64 pixels to 8x8 latents of 8 channels."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import draw
from domain import BACKGROUNDS
from progress import Ema, Progress

BATCH, LR, WARMUP = 32, 2e-3, 100
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (24, 48, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}


def loss_of(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return loss_of_decoded(decoded.float(), images) + 2e-4 * kl


def loss_of_decoded(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 and L2 of pixels, L1 of edges (sharpness), L1 of 8x8 means (flat colours, which pixels alone lose)."""
    error = decoded - images
    pixels = error.abs().mean() + error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colours = F.avg_pool2d(error, 8).abs().mean()
    return pixels + 0.5 * edges + 2 * colours


@torch.no_grad()
def psnr(vae: AutoencoderKL, domain: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over one fresh jitter of every drawing of the domain, on random backgrounds."""
    generator = torch.Generator().manual_seed(10_000)
    drawings = domain.flatten(0, 1)
    images = draw.jitter(drawings, torch.randint(len(BACKGROUNDS), (len(drawings),), generator=generator), generator)
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(50)])
    return -10 * math.log10(((decoded.clamp(-1, 1) - images) / 2).square().mean().item())


def train_vae(work: Path, steps: int) -> None:
    done = work / "vae"
    if done.exists():
        return
    domain, others = draw.load(work)
    drawings = domain.flatten(0, 1)
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    ema = Ema([vae], 0.998)
    progress = Progress(work / "vae.pt", {"vae": vae}, optimizer, ema)
    for step in range(progress.restore(), steps):
        generator = torch.Generator().manual_seed(step)
        inside = torch.randint(len(drawings), (BATCH * 3 // 4,), generator=generator)
        outside = torch.randint(len(others), (BATCH - len(inside),), generator=generator)
        batch = torch.cat([drawings[inside], others[outside]])
        images = draw.jitter(batch, torch.randint(len(BACKGROUNDS), (BATCH,), generator=generator), generator)
        progress.set_rate(step, steps, WARMUP)
        loss = loss_of(vae, images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if (step + 1) % 50 == 0:
            print(f"vae {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        if (step + 1) % 250 == 0:
            print(f"vae {step + 1}/{steps} live psnr {psnr(vae, domain):.2f} dB", flush=True)
            progress.save(step + 1)
    ema.copy_to_live()
    # Stable Diffusion's convention: scaled latents have unit variance.
    generator = torch.Generator().manual_seed(20_000)
    images = draw.jitter(drawings, torch.randint(len(BACKGROUNDS), (len(drawings),), generator=generator), generator)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(50)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(done)
    print(f"vae: {psnr(vae, domain):.2f} dB on the domain, scaling factor {vae.config.scaling_factor:.4f}")
