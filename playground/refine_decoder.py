"""Stage 6: sharpen the VAE's decoder with the encoder frozen, so that the U-Net's latents keep their meaning."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

import draw
import parallel
from domain import BACKGROUNDS
from progress import Ema, Progress
from train_vae import loss_of_decoded, psnr

BATCH, LR, WARMUP = 32, 1.5e-3, 100


def refine_decoder(work: Path, steps: int) -> None:
    done = work / "vae_refined"
    if done.exists():
        return
    parallel.run(_refine, work, steps)
    (work / "vae_refined.partial").rename(done)


def _refine(rank: int, work: Path, steps: int) -> None:
    domain, others = draw.load(work)
    drawings = domain.flatten(0, 1)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    gradients = parallel.Gradients(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    ema = Ema([vae.decoder, vae.post_quant_conv], 0.998)
    progress = Progress(work / "decoder.pt", {"vae": vae}, optimizer, ema)
    first = progress.restore()
    if rank == 0:
        print(f"decoder before: {psnr(vae, domain):.2f} dB", flush=True)
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(40_000_000 + step)
        inside = torch.randint(len(drawings), (BATCH * 7 // 8,), generator=generator)
        outside = torch.randint(len(others), (BATCH - len(inside),), generator=generator)
        batch = torch.cat([drawings[inside], others[outside]])
        images = draw.jitter(batch, torch.randint(len(BACKGROUNDS), (BATCH,), generator=generator), generator)
        progress.set_rate(step, steps, WARMUP)
        images = parallel.share(images, rank)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample()
            decoded = vae.decode(latents).sample
        loss = loss_of_decoded(decoded.float(), images)
        loss.backward()
        gradients.step(optimizer)
        ema.update()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"decoder {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        if rank == 0 and (step + 1) % 250 == 0:
            print(f"decoder {step + 1}/{steps} live psnr {psnr(vae, domain):.2f} dB", flush=True)
            progress.save(step + 1)
    ema.copy_to_live()
    if rank == 0:
        vae.save_pretrained(work / "vae_refined.partial")
        print(f"decoder after: {psnr(vae, domain):.2f} dB on the domain")
