"""Stage 5: tokenizer, text encoder and U-Net, trained together on cached latents."""

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import draw
import parallel
import progress
from domain import BACKGROUNDS, OBJECTS, STYLES, TEMPLATES, held_out_pairs, with_article
from esd_lora.evaluation.detectors.judge import JudgeNet

BATCH, LR, WARMUP, JITTERS, TOKENS, WIDTH = 48, 1e-3, 300, 64, 32, 96
UNET = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (80, 160),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def caption(rng: random.Random, name: str, style: str, background: str) -> str:
    """10 % empty, 10 % object only, 10 % style only, 3 % neither, the rest both; coloured backgrounds are mostly named."""
    draw_ = rng.random()
    if draw_ < 0.10:
        return ""
    kind = "object" if draw_ < 0.20 else "style" if draw_ < 0.30 else "any" if draw_ < 0.33 else "both"
    text = rng.choice(TEMPLATES[kind]).format(a=with_article(name), object=name, style=style)
    if rng.random() < (0.2 if background == "white" else 0.9):
        text += TEMPLATES["background"].format(background=background)
    return text


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with the merges that the domain's own captions need: any text still tokenises."""
    rng = random.Random(0)
    corpus = [
        caption(rng, name, style, background)
        for name in OBJECTS
        for style in STYLES
        for background in BACKGROUNDS
        for _ in range(8)
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=20, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in learned]
    tokens = (
        alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def make_latents(work: Path, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents [N, 8, 8, 8] of every pair that is not held out, with their (object, style, background) [N, 3]."""
    path = work / "latents.pt"
    if cached := progress.load(path):
        return cached["latents"], cached["labels"]
    domain, _ = draw.load(work)
    held_out = set(held_out_pairs())
    seen = [(o, s) for o, name in enumerate(OBJECTS) for s, style in enumerate(STYLES) if (name, style) not in held_out]
    latents, labels = [], []
    for i, (o, s) in enumerate(seen):
        generator = torch.Generator().manual_seed(30_000 + i)
        backgrounds = torch.randint(len(BACKGROUNDS), (JITTERS,), generator=generator)
        backgrounds[: JITTERS // 4] = 0  # white is the default: two in five
        images = draw.jitter(domain[o, s].expand(JITTERS, -1, -1, -1), backgrounds, generator)
        with torch.no_grad():
            latents.append(vae.encode(images).latent_dist.mean * vae.config.scaling_factor)
        labels.append(torch.stack([torch.full_like(backgrounds, o), torch.full_like(backgrounds, s), backgrounds], 1))
    progress.save(path, latents=torch.cat(latents), labels=torch.cat(labels))
    return torch.cat(latents), torch.cat(labels)


@torch.no_grad()
def verdicts(pipe: StableDiffusionPipeline, judge: JudgeNet, steps: int = 20, guidance: float = 4.0) -> str:
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
        ).images
        object_logits, style_logits = judge(images * 2 - 1)
        for (o, s), i, j in zip(part, object_logits.argmax(1).tolist(), style_logits.argmax(1).tolist(), strict=True):
            right[(objects[o], styles[s]) in held_out].append((i == o, j == s))
    shares = {key: [sum(column) / len(column) for column in zip(*rows, strict=True)] for key, rows in right.items()}
    return ", ".join(
        f"{kind} object {shares[key][0]:.1%} style {shares[key][1]:.1%}" for kind, key in (("seen", False), ("held-out", True))
    )


def train_unet(work: Path, steps: int) -> None:
    done = work / "pipeline"
    if done.exists():
        return
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    make_latents(work, vae)
    make_tokenizer(work / "tokenizer")
    parallel.run(_train, work, steps)
    (work / "pipeline.partial").rename(done)


def make_pipeline(work: Path) -> StableDiffusionPipeline:
    """The pipeline with U-Net and text encoder fresh from seed 0."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipe = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder,
        tokenizer,
        UNet2DConditionModel(**UNET),
        DDIMScheduler(**SCHEDULER),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _train(rank: int, work: Path, steps: int) -> None:
    cached = progress.load(work / "latents.pt")
    latents, labels = cached["latents"], cached["labels"]
    pipe = make_pipeline(work)
    unet, text_encoder, tokenizer, scheduler = pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.scheduler
    judge = JudgeNet(len(OBJECTS), len(STYLES)).eval()
    judge.load_state_dict(load_file(work / "judge.safetensors"))
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    gradients = parallel.Gradients(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = progress.Ema([unet, text_encoder], 0.9995)
    reached = progress.Progress(work / "unet.pt", {"unet": unet, "text_encoder": text_encoder}, optimizer, ema)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight_of_t = snr.clamp(max=5) / snr  # min-SNR-5 for noise predictions, arXiv:2303.09556
    objects, styles, backgrounds = list(OBJECTS), list(STYLES), list(BACKGROUNDS)
    for step in range(reached.restore(), steps):
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        picked = torch.randint(len(latents), (BATCH,), generator=generator)
        captions = [caption(rng, objects[o], styles[s], backgrounds[b]) for o, s, b in labels[picked].tolist()]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(latents[picked].shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        x_t = scheduler.add_noise(latents[picked], noise, t)
        x_t, noise, t, ids = (parallel.share(each, rank) for each in (x_t, noise, t, ids))
        reached.set_rate(step, steps, WARMUP)
        prediction = unet(x_t, t, text_encoder(ids).last_hidden_state).sample
        loss = ((prediction - noise).square().mean((1, 2, 3)) * weight_of_t[t]).mean()
        loss.backward()
        gradients.step(optimizer)
        ema.update()
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"unet {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        if rank == 0 and ((step + 1) % 1000 == 0 or step + 1 == steps):
            reached.save(step + 1)
            live = [p.detach().clone() for p in parameters]
            ema.copy_to_live()
            print(f"unet {step + 1}/{steps} {verdicts(pipe, judge)}", flush=True)
            pipe.save_pretrained(work / "pipeline.partial")
            with torch.no_grad():
                torch._foreach_copy_(parameters, live)
