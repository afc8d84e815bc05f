"""The words a base learns from: captions of drawings, and the tokenizer they need."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from domain import BACKGROUNDS, OBJECTS, STYLES, TEMPLATES, with_article


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


def make_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with the merges that the domain's own captions need: any text still tokenises.

    Args:
        folder: Where it is written.
        length: Of every prompt, in tokens.
    """
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
    names = (
        alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(names))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """The ids of captions, [N, tokens]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
