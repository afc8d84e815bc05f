"""Builds the emoji base and its judge: `python playground/build.py --work DIR [STAGE ...]`; see README.md."""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads on a busy machine: spinning costs up to 5x
import torch

STAGES = ("fetch", "draw", "vae", "judge", "unet", "decoder", "export", "sheet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: all of {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, required=True, help="intermediate files; a stage done there is not redone")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--decoder-steps", type=int, default=1200)
    parser.add_argument("--judge-steps", type=int, default=700)
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    torch.set_num_threads(2)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stages or STAGES:
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
        elif stage == "unet":
            from train_unet import train_unet

            train_unet(options.work, options.unet_steps)
        elif stage == "decoder":
            from refine_decoder import refine_decoder

            refine_decoder(options.work, options.decoder_steps)
        elif stage == "export":
            from export import export

            export(options.work)
        elif stage == "sheet":
            from sheet import sheet

            sheet(options.work)


if __name__ == "__main__":
    main()
