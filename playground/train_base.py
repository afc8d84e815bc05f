"""Stage 5: a base's denoiser, tokenizer and text encoders, trained together on cached latents."""

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import draw
import emoji
import emoji_flow
import emoji_xl
import parallel
import progress
from captions import caption, make_tokenizer
from domain import BACKGROUNDS, OBJECTS, STYLES, TEMPLATES, held_out_pairs, with_article
from esd_lora.evaluation.detectors.judge import JudgeNet

SHIPPED = Path(__file__).parent.parent / "esd_lora" / "bases" / "emoji"
BASES = {"emoji": emoji, "emoji-xl": emoji_xl, "emoji-flow": emoji_flow}
BATCH, WARMUP, JITTERS, SMALL, SMALL_SIZE = 48, 300, 64, 8, 24


def load_vae(work: Path) -> AutoencoderKL:
    """The VAE of the work directory, or else the one that ships: all bases share it, so that their latents mean the same."""
    return AutoencoderKL.from_pretrained(shipped_or_built(work, "vae", "pipeline/vae"), dtype=torch.float32).eval()


def load_judge(work: Path) -> JudgeNet:
    """The judge of the work directory, or else the one that ships."""
    judge = JudgeNet(len(OBJECTS), len(STYLES)).eval()
    weights = load_file(shipped_or_built(work, "judge.safetensors", "judge.safetensors"))
    judge.load_state_dict({name: value.float() for name, value in weights.items()})
    return judge


def make_latents(work: Path) -> None:
    """Writes `latents.pt`: scaled latents [N, 8, 8, 8] of every pair that is not held out, and labels [N, 4].

    The labels are object, style, background, and the side in pixels at which the drawing was known: one in nine was enlarged
    from a small one, which only SDXL's classes are told, as SDXL was (arXiv:2307.01952, section 2.2).
    """
    path = work / "latents.pt"
    if path.exists():
        return
    vae = load_vae(work)
    domain, _ = draw.load(work)
    held_out = set(held_out_pairs())
    seen = [(o, s) for o, name in enumerate(OBJECTS) for s, style in enumerate(STYLES) if (name, style) not in held_out]
    latents, labels = [], []
    for i, (o, s) in enumerate(seen):
        generator = torch.Generator().manual_seed(30_000 + i)
        backgrounds = torch.randint(len(BACKGROUNDS), (JITTERS + SMALL,), generator=generator)
        backgrounds[: JITTERS // 4] = 0  # white is the default: two in five
        images = draw.jitter(domain[o, s].expand(len(backgrounds), -1, -1, -1), backgrounds, generator)
        small = F.interpolate(images[JITTERS:], SMALL_SIZE, mode="area")
        images[JITTERS:] = F.interpolate(small, draw.SIZE, mode="bilinear")
        with torch.no_grad():
            latents.append(vae.encode(images).latent_dist.mean * vae.config.scaling_factor)
        sizes = torch.full_like(backgrounds, draw.SIZE)
        sizes[JITTERS:] = SMALL_SIZE
        kinds = torch.full_like(backgrounds, o), torch.full_like(backgrounds, s), backgrounds, sizes
        labels.append(torch.stack(kinds, 1))
    progress.save(path, latents=torch.cat(latents), labels=torch.cat(labels))


@torch.no_grad()
def verdicts(pipe: DiffusionPipeline, judge: JudgeNet, steps: int = 20, guidance: float = 4.0, **call: object) -> str:
    """Samples every pair once and lets the judge name it: "seen object/style, held-out object/style" accuracies."""
    held_out = set(held_out_pairs())
    pairs = [(o, s) for o in range(len(OBJECTS)) for s in range(len(STYLES))]
    objects, styles = list(OBJECTS), list(STYLES)
    template = TEMPLATES["both"][0]
    prompts = [template.format(a=with_article(objects[o]), object=objects[o], style=styles[s]) for o, s in pairs]
    right = {False: [], True: []}
    for first in range(0, len(pairs), 50):
        part = pairs[first : first + 50]
        images = pipe(
            prompts[first : first + 50],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
            **call,
        ).images
        object_logits, style_logits = judge(images * 2 - 1)
        for (o, s), i, j in zip(part, object_logits.argmax(1).tolist(), style_logits.argmax(1).tolist(), strict=True):
            right[(objects[o], styles[s]) in held_out].append((i == o, j == s))
    shares = {key: [sum(column) / len(column) for column in zip(*rows, strict=True)] for key, rows in right.items()}
    return ", ".join(
        f"{kind} object {shares[key][0]:.1%} style {shares[key][1]:.1%}" for kind, key in (("seen", False), ("held-out", True))
    )


def train_base(work: Path, name: str, steps: int) -> None:
    """Trains a base's denoiser and text encoders: `work/<name>/pipeline`.

    Args:
        work: Holds the drawings, the judge and the VAE, or else those that ship are taken.
        name: One of `BASES`.
        steps: Optimiser steps.
    """
    folder = work / name
    if (folder / "pipeline").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_latents(work)
    make_tokenizer(folder / "tokenizer", BASES[name].TOKENS)
    parallel.run(_train, work, name, steps)
    (folder / "pipeline.partial").rename(folder / "pipeline")


def shipped_or_built(work: Path, path: str, shipped: str) -> Path:
    """The file or folder that a stage built in the work directory, or the one that ships with the package."""
    return work / path if (work / path).exists() else SHIPPED / shipped


def _train(rank: int, work: Path, name: str, steps: int) -> None:
    base, folder = BASES[name], work / name
    cached = progress.load(work / "latents.pt")
    latents, labels = cached["latents"], cached["labels"]
    if not base.READS_SIZES:
        latents, labels = (each[labels[:, 3] == draw.SIZE] for each in (latents, labels))
    pipe = base.make_pipeline(load_vae(work), CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(work)
    modules = {part: getattr(pipe, part) for part in base.TRAINED}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    gradients = parallel.Gradients(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=base.LR, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = progress.Ema(list(modules.values()), 0.9995)
    reached = progress.Progress(folder / "training.pt", modules, optimizer, ema)
    objects, styles, backgrounds = list(OBJECTS), list(STYLES), list(BACKGROUNDS)
    started, first = time.monotonic(), reached.restore()
    for step in range(first, steps):
        seed = step * parallel.PROCESSES + rank
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        picked = torch.randint(len(latents), (BATCH // parallel.PROCESSES,), generator=generator)
        captions = [caption(rng, objects[o], styles[s], backgrounds[b]) for o, s, b, _ in labels[picked].tolist()]
        reached.set_rate(step, steps, WARMUP)
        with torch.autocast("cpu", torch.bfloat16):
            loss = base.losses(pipe, latents[picked], captions, labels[picked, 3], generator).mean()
        loss.backward()
        gradients.step(optimizer)
        ema.update()
        if rank == 0 and (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} {step + 1}/{steps} loss {loss.item():.4f}, {pace:.2f} s a step", flush=True)
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == steps):
            reached.save(step + 1)
            live = [p.detach().clone() for p in parameters]
            ema.copy_to_live()
            print(f"{name} {step + 1}/{steps} {verdicts(pipe, judge, **base.CALL)}", flush=True)
            pipe.save_pretrained(folder / "pipeline.partial")
            with torch.no_grad():
                torch._foreach_copy_(parameters, live)
