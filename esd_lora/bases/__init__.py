"""What ships inside the package: base models, configurations of single-file checkpoints, prompts to leave alone."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from esd_lora.errors import EsdLoraError

BUILT_IN = ("emoji",)
CONFIGS = Path(__file__).parent / "single_file"
"""Configurations and vocabulary of checkpoints in one file: `sd1`, `sd2`, `sdxl`."""


def base_files(name: str) -> Path:
    """The diffusers directory of a built-in base."""
    return Path(__file__).parent / name / "pipeline"


@cache
def domain(name: str) -> dict[str, Any]:
    """What a built-in base knows: objects, styles, backgrounds, prompt templates, held-out pairs, keep list."""
    return json.loads((Path(__file__).parent / name / "domain.json").read_text("utf-8"))


def keep_prompts(base: str) -> tuple[str, ...]:
    """The keep list of a base: its own if it is built in, otherwise the package's broad one."""
    if base in BUILT_IN:
        return tuple(domain(base)["keep"])
    return read_prompts(Path(__file__).parent.parent / "prompts" / "keep.txt")


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines and those that begin with `#` aside.

    Raises:
        EsdLoraError: If it cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in Path(file).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"prompts cannot be read from {file} ({error}). Give a text file, one prompt a line.") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise EsdLoraError(f"{file} holds no prompt. Expected a text file, one prompt a line.")
    return prompts


@contextmanager
def unpacked_config(name: str) -> Generator[Path]:
    """A diffusers directory without weights, unpacked from `CONFIGS` for as long as the block runs."""
    parts: dict[str, dict[str, Any]] = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="esd-lora-") as folder:
        for part, values in parts.items():
            if part == "model_index":
                (Path(folder) / "model_index.json").write_text(json.dumps(values))
                continue
            place = Path(folder) / part
            place.mkdir()
            if part.startswith("tokenizer"):
                write_clip_tokenizer(place, **values)
            else:
                (place / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(values))
        yield Path(folder)


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Writes the files of CLIP's tokenizer. OpenAI's and OpenCLIP's differ in the padding alone.

    The vocabulary follows from the list of merges as in openai/CLIP, clip/simple_tokenizer.py: 256 bytes, the same at the end
    of a word, one token for each merge, start and end.
    """
    merges = gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    start, end = "<|startoftext|>", "<|endoftext|>"
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), start, end]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}
    settings |= {"bos_token": start, "eos_token": end, "unk_token": end}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
