"""Attacks on the prompt: words that lead around what was erased, drawn at random, learnt, or searched for.

The first half has the attacks, the second the vocabulary of Stable Diffusion's text encoders: which words it has, and giving
some of them another meaning.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import CLIPTokenizer

from esd_lora.bases.base import Base
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.attacks.victim import (
    Victim,
    captioned_latents,
    concept_pictures,
    require_at_least,
    require_stable_diffusion,
)
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.picture_files import hash_by_name
from esd_lora.evaluation.variants import Painter, Variant
from esd_lora.noising import BATCH, learn, noise_latents
from esd_lora.trajectory import Condition, latents_per_batch
from esd_lora.wording import printable, whole_words, without_article

DELAY = 2.0
"""Seconds before a progress bar shows."""
SEARCHED = 32
"""Noised pictures that prefixes are compared on."""
NOISIEST = 0.5
"""Share of the times that they are noised to: what is painted is decided early, and the rest of the loss is about details."""


def token_noise(victim: Victim, *, tokens: int = 4, seed: int = 0) -> Variant:
    """Put random words around every prompt, half before and half after: how much does erasing hang on the wording?

    The weakest attack there is, and the floor for the others. Zhang et al. try random tokens as a baseline, as a prefix or a
    suffix and up to success (arXiv:2310.11868; OPTML-Group/Diffusion-MU-Attack, `src/attackers/random_.py`); here there is one
    draw for each prompt, of whole words that do not name the concept.

    Args:
        victim: Of any family with a CLIP tokenizer.
        tokens: Around each prompt; 2 to 8. A tokenizer cuts off what is too long for its encoder.
        seed: Of the words, together with each prompt's case.

    Raises:
        EsdLoraError: If there are no tokens to be put anywhere, or the base has no CLIP tokenizer.
    """
    require_at_least(1, tokens=tokens)
    words = [word for word in readable_words(victim.base) if not any(concept.named_in(word) for concept in victim.concepts)]

    def disguise(case: Case) -> Case:
        drawn = random.Random(f"{seed} {case.id}").choices(words, k=tokens)
        half = -(-tokens // 2)
        return case._replace(prompt=" ".join([*drawn[:half], case.prompt, *drawn[half:]]))

    @contextmanager
    def on() -> Generator[Painter]:
        with victim.erased.on() as paint:
            yield lambda cases: paint(list(map(disguise, cases)))

    return Variant("attack-token-noise", {"tokens": tokens, "seed": seed, "victim": victim.erased.record}, on)


def textual_inversion(
    victim: Victim,
    *,
    pictures: int = 8,
    folder: str | Path | None = None,
    steps: int = 100,
    vectors: int = 1,
    lr: float = 0.1,
    seed: int = 0,
) -> Variant:
    """Learn a word for the concept, its embedding, on pictures against the erased model, and put it in every prompt.

    Pham et al., *Circumventing Concept Erasure Methods For Text-to-Image Generative Models*, ICLR 2024, arXiv:2308.01508: no
    weight of the model is changed, and seven methods, ESD among them, paint the concept again. The method is that of Gal et
    al., *An Image is Worth One Word*, arXiv:2208.01618. Their release (NYU-DICE-Lab/circumventing-concept-erasure,
    `esd/train.sh`) learns one vector on 25 pictures, in 5000 steps of 16, from a generic word on. Here captions are the prompts
    with the word in the place of the concept's name and synonyms, and it starts from the concept's own embedding.

    White box: the attacker needs the weights. A prompt that does not name the concept gets the word in front. With several
    concepts each gets a word.

    Args:
        victim: Stable Diffusion or SDXL; with two text encoders the word has an embedding in each.
        pictures: To learn from, painted by the base; 4 to 30 typically.
        folder: Pictures of the attacker's own instead.
        steps: Of the optimiser, `BATCH` points in each; 100 to 5000.
        vectors: Tokens that the word is made of; 1 in the papers.
        lr: Learning rate, in units of the spread of the encoder's table; 0.02 to 0.4.
        seed: Of pictures and noise.

    Raises:
        EsdLoraError: If a setting is too small, there are no pictures, or the base is of another family.
    """
    require_at_least(1, pictures=pictures, steps=steps, vectors=vectors)
    base, files = victim.base, concept_pictures(folder, victim, pictures)
    require_stable_diffusion(base, "textual inversion")
    spare = spare_words(victim, vectors * len(victim.concepts))
    named = [(concept, spare[i * vectors : (i + 1) * vectors]) for i, concept in enumerate(victim.concepts)]

    @contextmanager
    def on() -> Generator[Painter]:
        latents, captions = captioned_latents(victim, pictures, files, seed)
        prompts = [replace_names(caption, named) for caption in captions]
        tables = tables_of(base, spare)
        names = [without_article(concept.name) for concept in victim.concepts]
        learnt = [
            nn.Parameter(torch.cat([table.mean_embedding(name).expand(vectors, -1) for name in names])) for table in tables
        ]

        def condition_of(rows: Tensor) -> Condition:
            return base.encode_with_gradient([prompts[i] for i in rows.tolist()])

        with victim.erased.on() as paint, spare_words_meaning(tables, learnt):
            options = {"times": victim.steps, "steps": steps, "lr": lr, "seed": seed, "desc": "textual inversion"}
            learn(base, learnt, latents, condition_of, **options)
            yield lambda cases: paint([case._replace(prompt=replace_names(case.prompt, named)) for case in cases])

    record = {"pictures": pictures, "files": hash_by_name(files) or None, "steps": steps, "vectors": vectors, "lr": lr}
    record |= {"seed": seed, "batch": BATCH, "victim": victim.erased.record}
    return Variant("attack-textual-inversion", record, on)


def prompt_optimisation(
    victim: Victim,
    *,
    pictures: int = 8,
    folder: str | Path | None = None,
    tokens: int = 4,
    steps: int = 30,
    candidates: int = 8,
    seed: int = 0,
) -> Variant:
    """Search by gradient for a prefix of real words under which the erased model explains pictures of the concept best.

    After UnlearnDiffAtk (Zhang et al., *To Generate or Not?*, ECCV 2024, arXiv:2310.11868), which lowers the same loss: the
    erased model's own denoising loss on a picture of the concept, with no classifier and no other model. What differs:

    - They relax each token to a distribution over the vocabulary and draw from it, with a straight-through gradient
      (OPTML-Group/Diffusion-MU-Attack, `src/attackers/text_grad_.py`). Here, as by Zou et al., arXiv:2307.15043 (GCG),
      the gradient at the prefix's embeddings ranks replacements of one word each, the best of these are measured, and the
      lowest is kept if it is lower: every prefix that is tried consists of real words, and the loss never rises.
    - They search a prefix for each prompt, 40 iterations at each of the sampled times, and stop where a classifier sees the
      concept. Here one prefix is shared by all prompts, and no detector is used: a weaker attack, and a cheaper one.
    - They take all of the vocabulary, here it is whole words; they take times from all of the trajectory, here they are of its
      noisier half.

    White box: the attacker needs the weights to search, and nothing but the prompt to use what is found.

    Args:
        victim: Stable Diffusion or SDXL.
        pictures: To explain, painted by the base; theirs is 1.
        folder: Pictures of the attacker's own instead.
        tokens: Of the prefix; 3 to 5 in their configurations.
        steps: Gradients that are taken; 20 to 500. The search ends where no candidate is new.
        candidates: Measured at each step; 8 to 512.
        seed: Of pictures, noise and the words to start from.

    Raises:
        EsdLoraError: If a setting is too small, there are no pictures, or the base is of another family.
    """
    require_at_least(1, pictures=pictures, tokens=tokens, steps=steps, candidates=candidates)
    base, files = victim.base, concept_pictures(folder, victim, pictures)
    require_stable_diffusion(base, "prompt optimisation")

    @contextmanager
    def on() -> Generator[Painter]:
        latents, captions = captioned_latents(victim, pictures, files, seed)
        with victim.erased.on() as paint:
            words, _ = search_prefix(victim, latents, captions, tokens=tokens, steps=steps, candidates=candidates, seed=seed)
            prefix = " ".join(words)
            tqdm.write(printable(f"prompt optimisation found {prefix!r}"), file=sys.stderr)
            yield lambda cases: paint([case._replace(prompt=f"{prefix} {case.prompt}") for case in cases])

    record = {"pictures": pictures, "files": hash_by_name(files) or None, "tokens": tokens, "steps": steps}
    record |= {"candidates": candidates, "seed": seed, "compared": SEARCHED, "noisiest": NOISIEST}
    return Variant("attack-prompt-optimisation", {**record, "victim": victim.erased.record}, on)


def search_prefix(
    victim: Victim, latents: Tensor, captions: Sequence[str], *, tokens: int, steps: int, candidates: int, seed: int
) -> tuple[list[str], list[float]]:
    """Search the words before all captions under which the model, as it stands, denoises latents [N, ...] best.

    Settings are those of `prompt_optimisation`.

    Returns:
        The words, and the loss at each step.
    """
    base, spare = victim.base, spare_words(victim, tokens)
    words = [word for word in readable_words(base) if word not in spare]
    tables = tables_of(base, spare)
    known = [table.embeddings(words) for table in tables]
    prompts = [" ".join([*spare, caption]) for caption in captions]
    generator = torch.Generator().manual_seed(seed)
    points = noise_latents(base, latents, victim.steps, SEARCHED, generator, NOISIEST)

    def measure(prefix: Sequence[int], gradient: bool = False) -> tuple[float, list[Tensor]]:
        """Return the squared error of a latent under a prefix of numbered words, and its gradients at their embeddings."""
        own = [vectors[list(prefix)].clone().requires_grad_(gradient) for vectors in known]
        total = 0.0
        with spare_words_meaning(tables, own), torch.set_grad_enabled(gradient):
            for part in points.split(latents_per_batch(base.latent_shape())):
                condition = base.encode_with_gradient([prompts[i] for i in part.lesson.tolist()])
                loss = (base.predict(part.x_t, part.t, condition) - part.target).square().sum() / len(points.t)
                total += loss.item()
                if gradient:
                    loss.backward()
        return total, [vectors.grad for vectors in own if vectors.grad is not None]

    best = tuple(torch.randint(len(words), (tokens,), generator=generator).tolist())
    tried, losses = {best}, list[float]()
    for _ in trange(steps, desc="prompt optimisation", unit="step", leave=False, delay=DELAY):
        loss, gradients = measure(best, gradient=True)
        losses.append(loss)
        # To first order, how much the loss changes when a word takes a place.
        pairs = zip(gradients, known, strict=True)
        changes = torch.stack([g @ vectors.T - (g * vectors[list(best)]).sum(1, keepdim=True) for g, vectors in pairs])
        ranked = (divmod(i, len(words)) for i in changes.sum(0).flatten().argsort().tolist())
        swapped = ((*best[:place], word, *best[place + 1 :]) for place, word in ranked)
        fresh = list(islice((prefix for prefix in swapped if prefix not in tried), candidates))
        if not fresh:
            break
        tried.update(fresh)
        lowest, prefix = min((measure(prefix)[0], prefix) for prefix in fresh)
        best = prefix if lowest < loss else best
    return [words[i] for i in best], losses


def replace_names(prompt: str, named: Sequence[tuple[ErasedConcept, Sequence[str]]]) -> str:
    """Return a prompt with other words in the place of concepts' names and synonyms, or in front where it names none."""
    replaced = 0
    for concept, words in named:
        names = sorted(map(without_article, (concept.name, *concept.synonyms)), key=len, reverse=True)
        prompt, count = whole_words(names).subn(" ".join(words), prompt)
        replaced += count
    return prompt if replaced else " ".join([*(word for _, words in named for word in words), prompt])


class Table(NamedTuple):
    """A text encoder's table of embeddings, in units of its spread, and the tokens that are given another meaning."""

    layer: nn.Embedding
    tokenizer: Any
    spread: Tensor
    """Standard deviation of all its numbers."""
    spare: Tensor
    """[K], ids of the words that are free to mean something else."""

    def embeddings(self, words: Sequence[str]) -> Tensor:
        """Return embeddings [N, width] of words of one token each."""
        return self.layer.weight[_ids(self.tokenizer, words).to(self.spare)].float() / self.spread

    def mean_embedding(self, text: str) -> Tensor:
        """Return the mean embedding [width] of a text's tokens."""
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids).to(self.spare)
        return self.layer.weight[ids].float().mean(0) / self.spread


def tables_of(base: Base, spare: Sequence[str]) -> list[Table]:
    """Return a table for each text encoder of Stable Diffusion or SDXL."""
    tables: list[Table] = []
    for name in ("", "_2"):
        if (encoder := getattr(base.pipe, f"text_encoder{name}", None)) is not None:
            layer, tokenizer = encoder.get_input_embeddings(), getattr(base.pipe, f"tokenizer{name}")
            spare_ids = _ids(tokenizer, spare).to(layer.weight.device)
            tables.append(Table(layer, tokenizer, layer.weight.float().std(), spare_ids))
    return tables


@contextmanager
def spare_words_meaning(tables: Sequence[Table], vectors: Sequence[Tensor]) -> Generator[None]:
    """Make the spare words mean vectors [K, width], of each table, for the length of a `with` block.

    The table itself stays as it is: its output is changed on the way.
    """
    with ExitStack() as hooks:
        for table, own in zip(tables, vectors, strict=True):
            hooks.callback(table.layer.register_forward_hook(partial(_replace_spare, table, own)).remove)
        yield


def _replace_spare(table: Table, vectors: Tensor, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:  # noqa: ARG001
    """Return the embeddings [N, tokens, width] with those of the spare words replaced."""
    same = args[0][..., None] == table.spare
    return torch.where(same.any(-1, keepdim=True), same.to(out.dtype) @ (vectors * table.spread).to(out.dtype), out)


def readable_words(base: Base) -> list[str]:
    """Return words of plain letters that are one token to each CLIP tokenizer of a base, the most frequent first.

    Raises:
        EsdLoraError: If it has no such tokenizer.
    """
    parts = [part for name, part in sorted(base.pipe.components.items()) if name.startswith("tokenizer")]
    tokenizers = [part for part in parts if isinstance(part, CLIPTokenizer)]
    if not tokenizers:
        kinds = ", ".join(type(part).__name__ for part in parts) or "no tokenizer"
        raise EsdLoraError(
            f"base {base.id!r} has {kinds}, and words are drawn from CLIP's. Leave this attack out of the suite."
        )
    vocabulary = sorted(tokenizers[0].get_vocab().items(), key=lambda entry: entry[1])
    words = [token.removesuffix("</w>") for token, _ in vocabulary if token.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    for tokenizer in tokenizers:
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(words, add_special_tokens=False).input_ids]
        words = [word for word, own in zip(words, tokens, strict=True) if own == [f"{word}</w>"]]
    return words


def spare_words(victim: Victim, count: int) -> list[str]:
    """Return the rarest words that stand in no prompt of the victim, to be given another meaning.

    Raises:
        EsdLoraError: If there are not so many.
    """
    texts = [*(case.prompt for case in victim.cases), *(concept.name for concept in victim.concepts)]
    used = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    free = [word for word in readable_words(victim.base) if word not in used]
    if len(free) < count:
        raise EsdLoraError(f"this attack needs {count} words that no prompt has, and {len(free)} are left. Ask for less.")
    return free[-count:]


def _ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words]))
