"""Builds the learned bases and their judge: `playground/build.py --work DIR [--base NAME] [STAGE ...]`; see README.md."""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads on a busy machine: spinning costs up to 5x
import torch

STAGES = {
    "emoji": ("fetch", "draw", "vae", "judge", "denoiser", "decoder", "export", "sheet"),
    "emoji-xl": ("fetch", "draw", "denoiser", "export", "sheet"),
    "emoji-flow": ("fetch", "draw", "denoiser", "export", "sheet"),
}
"""What makes a base: `emoji` brings the VAE and the judge that the others share."""
STEPS = {"emoji": 5000, "emoji-xl": 3500, "emoji-flow": 4000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="; ".join(f"{k}: {', '.join(v)}" for k, v in STAGES.items()))
    parser.add_argument("--base", default="emoji", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="intermediate files; a stage done there is not redone")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, help=f"of the denoiser; default: {STEPS}")
    parser.add_argument("--decoder-steps", type=int, default=1200)
    parser.add_argument("--judge-steps", type=int, default=700)
    options = parser.parse_args()
    stages = STAGES[options.base]
    if unknown := set(options.stages) - set(stages):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(stages)}")
    torch.set_num_threads(2)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stages or stages:
        print(f"== {stage}", flush=True)
        if stage == "fetch":
            from fetch import fetch

            fetch(options.work)
        elif stage == "draw":
            from draw import draw

            draw(options.work)
        elif stage == "vae":
            from train_vae import train_vae

            train_vae(options.work, options.vae_steps)
        elif stage == "judge":
            from train_judge import train_judge

            train_judge(options.work, options.judge_steps)
        elif stage == "denoiser":
            from train_base import train_base

            train_base(options.work, options.base, options.steps or STEPS[options.base])
        elif stage == "decoder":
            from refine_decoder import refine_decoder

            refine_decoder(options.work, options.decoder_steps)
        elif stage == "export":
            from export import export

            export(options.work, options.base)
        elif stage == "sheet":
            from sheet import sheet

            sheet(options.work, options.base)


if __name__ == "__main__":
    main()
