"""Erasing from pictures: of a thing without a name, its pictures say what to erase.

Their latents, noised, are training points beside walked trajectories. Where captions lie beside them (`1.txt` beside `1.png`),
these are the erased prompts. Where none do, words are learnt that mean what they show: embeddings of a token, optimised on the
frozen base as by Gal et al., *An Image is Worth One Word*, ICLR 2023, arXiv:2208.01618,

    word = argmin  mean |predict(x_t, t, "a picture of a <word>") - target|^2        over noised pictures, see `noising`

The same loss says what the base itself would call them: it is a classifier (Li et al., *Your Diffusion Model is Secretly a
Zero-Shot Classifier*, ICCV 2023, arXiv:2303.16203). A preserved prompt that explains the pictures nearly as well as the word
does is another name for it, and must not be preserved.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.bases.learnt_words import Embeddings, pack, placeholder_of, text_encoders
from esd_lora.closed_form import plain_prompts
from esd_lora.erasers.header import Shown
from esd_lora.errors import EsdLoraError
from esd_lora.files import hash_file, read_bounded
from esd_lora.latents import require_encodable, to_latents
from esd_lora.lessons import listed_prompts
from esd_lora.noising import BATCH, learn, noise_latents
from esd_lora.pictures import SUFFIXES, open_picture, picture_paths
from esd_lora.progress import advance, stage
from esd_lora.ranks import from_main
from esd_lora.recipe import Concept, PictureSpec, PromptPair, Recipe
from esd_lora.seeds import Stream, stream_seed
from esd_lora.trajectory import Condition, latents_per_batch, pick
from esd_lora.wording import mentions

FRAMES = ("a {}", "a picture of a {}", "{}")
"""What a word is learnt in; it is erased in the first, and in the recipe's frames around that."""
NAMED = 0.5
"""Share of what the learnt word explains of the pictures from which on a preserved prompt is another name for it."""
_ROUNDS = (8, 8, 16, 32)  # further points at which prompts are compared, and of those before a quarter stays
_LEAST = 8  # that stay
_LEAST_TO_HALVE = 4  # pictures
_START = 0.3
"""How far from the mean of the table a word begins, in units of its spread. With 1, 4 of 24 words for a cat and a rocket stayed
near where they began, and an eraser by two such left 53 % of the rocket (`benchmarks/from_pictures.py`)."""
_SURE = 2.0  # standard errors by which a prompt explains more than the empty one does
_MAX_CAPTION = 10_000  # bytes
_BEING_LEARNT = "<thing-00000000>"


class Picture(NamedTuple):
    """A picture of what is erased."""

    picture: Image
    """In RGB, of any size."""
    caption: str | None
    """What stands in the text file beside it."""
    sha256: str
    """SHA-256 of its file."""


class Pictured(NamedTuple):
    """What the pictures of a concept come to, on one base."""

    latents: dict[tuple[int, ...], Tensor]
    """Shape of latents to those of the pictures, [pictures, ...]."""
    rows: dict[str, list[int]]
    """Erased prompt to the pictures of it; prompts in frames are of the same."""
    shown: Shown
    """For the header."""
    compared: int = 0
    """Latents through the denoiser without gradients that this took."""
    learnt: int = 0
    """The same with gradients."""

    def shows(self, prompt: str) -> bool:
        """Return whether the pictures are of what a prompt asks for: one of theirs, in a frame or alone."""
        return any(text in prompt for text in self.rows)

    def latents_of(self, prompt: str, shape: Sequence[int]) -> Tensor:
        """Return the latents of the pictures of an erased prompt, [N, ...]: its own, or those of what stands in its frame."""
        inside = max((text for text in self.rows if text in prompt), key=len, default=None)
        latents = self.latents[tuple(shape)]
        return latents if inside is None else latents[self.rows[inside]]


def read_pictures(folder: str | Path) -> list[Picture]:
    """Return the pictures of a folder, by name.

    Raises:
        EsdLoraError: If there is no such folder, no picture in it, one that cannot be read, or some have captions and others
            have none.
    """
    if not Path(folder).is_dir():
        raise EsdLoraError(f"there is no folder {folder}. Expected one with pictures of what is to be erased.")
    files = picture_paths(Path(folder))
    if not files:
        raise EsdLoraError(f"{folder} holds no picture. Expected some of what is to be erased, as {', '.join(SUFFIXES)}.")
    pictures = [Picture(open_picture(file, behind="white"), _caption_of(file), hash_file(file)) for file in files]
    bare = [file.name for file, picture in zip(files, pictures, strict=True) if picture.caption is None]
    if 0 < len(bare) < len(files):
        raise EsdLoraError(
            f"{len(bare)} of {len(files)} pictures in {folder} have no caption ({bare[0]} the first). Give each a .txt beside"
            " it, or none: then a word is learnt."
        )
    return pictures


def _caption_of(file: Path) -> str | None:
    """Return what the text file beside a picture says, in one line; `None` where there is none."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        text = " ".join(read_bounded(beside, _MAX_CAPTION).decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise EsdLoraError(f"{beside} cannot be read as a caption ({error}). Mend or remove it.") from error
    if not text:
        raise EsdLoraError(f"{beside} is an empty caption. Say in it what the picture shows, or remove it.")
    return text


def check_pictures(recipe: Recipe) -> None:
    """Refuse a recipe whose pictures cannot be read, before a base is loaded for it.

    Raises:
        EsdLoraError: As `read_pictures` does.
    """
    for concept in recipe.concepts:
        if concept.images is not None:
            read_pictures(concept.images)


def learn_pictures(base: Base, recipe: Recipe, shapes: Sequence[tuple[int, ...]]) -> tuple[Recipe, dict[int, Pictured]]:
    """Return a recipe that says in prompts what its pictures show, and what these come to, by the number of the concept.

    The base knows the learnt words from then on.

    Args:
        base: The loaded base, with its text encoders and its VAE, and without an adapter.
        recipe: Some of its concepts may have pictures.
        shapes: Of latents that are trained on; words are learnt in the first.

    Raises:
        EsdLoraError: If pictures cannot be read or encoded.
    """
    known: dict[int, Pictured] = {}
    concepts = list(recipe.concepts)
    for number, concept in enumerate(concepts):
        if concept.images is not None:
            require_encodable(base, "Erase by prompts instead.")
            pictures = read_pictures(concept.images)
            latents = encode_pictures(base, [each.picture for each in pictures], shapes)
            seed = stream_seed(recipe.train.seed, Stream.WORDS, number)
            known[number] = pictured = _learn_concept(base, recipe, concept, pictures, latents, seed)
            concepts[number] = _in_prompts(concept, pictured)
    recipe = recipe.model_copy(update={"concepts": tuple(concepts)})
    if isinstance(recipe.preserve, tuple):
        names = [name for pictured in known.values() for name in pictured.shown.names]
        kept = tuple(prompt for prompt in recipe.preserve if not mentions(prompt, names))
        recipe = recipe.model_copy(update={"preserve": kept})
    return recipe, known


def rehearse_pictures(base: Base, recipe: Recipe, shapes: Sequence[tuple[int, ...]]) -> tuple[Recipe, dict[int, Pictured]]:
    """Return what `learn_pictures` does, without a look at what the pictures show: what it takes is counted, and not done."""
    known: dict[int, Pictured] = {}
    concepts = list(recipe.concepts)
    for number, concept in enumerate(concepts):
        if concept.images is not None:
            assert recipe.pictures is not None, "checked with the recipe"
            pictures = read_pictures(concept.images)
            texts = [FRAMES[0].format(f"<thing-{number:04d}{word:04d}>") for word in range(recipe.pictures.words)]
            rows = rows_of_captions(pictures) or {text: list(range(len(pictures))) for text in texts}
            latents = {shape: torch.zeros(len(pictures), *shape, device=base.model.device) for shape in shapes}
            shown = Shown(pictures=tuple(picture.sha256 for picture in pictures))
            work = _work(len(_comparable(base, recipe, concept)), 0 if pictures[0].caption else len(texts), recipe.pictures)
            known[number] = Pictured(latents, rows, shown, *work)
            concepts[number] = _in_prompts(concept, known[number])
    return recipe.model_copy(update={"concepts": tuple(concepts)}), known


def _work(candidates: int, words: int, spec: PictureSpec) -> tuple[int, int]:
    """Return the latents through the denoiser without and with gradients that pictures will take.

    Args:
        candidates: Prompts that are compared with them.
        words: That are learnt; none where there are captions.
        spec: Steps.
    """
    compared = (1 + max(words, 1)) * sum(_ROUNDS)
    for count in _ROUNDS:
        compared += candidates * count
        candidates = min(candidates, max(_LEAST, candidates // 4))
    return compared, words * spec.steps * BATCH


def _comparable(base: Base, recipe: Recipe, concept: Concept) -> list[str]:
    """Return the preserved prompts that say one thing each, and do not name the concept."""
    return plain_prompts([text for text in listed_prompts(recipe, base.keep) if not concept.named_in(text)])


def rows_of_captions(pictures: Sequence[Picture]) -> dict[str, list[int]]:
    """Return each caption with the pictures that have it; nothing where there are none."""
    captions = [picture.caption for picture in pictures if picture.caption is not None]
    return {text: [row for row, own in enumerate(captions) if own == text] for text in captions}


def encode_pictures(base: Base, pictures: Sequence[Image], shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """Return the latents of pictures in each shape, [N, ...], cut around their middle; as float32 or better."""
    scale = base.family.pixels_per_latent(base.pipe)
    with base.vae_in_place(), stage("encoding pictures", len(pictures) * len(shapes), "picture"):
        latents: dict[tuple[int, ...], Tensor] = {}
        for shape in shapes:
            latents[shape] = to_latents(base, pictures, (shape[-1] * scale, shape[-2] * scale)).to(base.model.device)
            advance(len(pictures))
    return latents


def _in_prompts(concept: Concept, pictured: Pictured) -> Concept:
    """Return a concept that says in prompts what its pictures show; others that it names stay."""
    prompts = (*(PromptPair(prompt=text) for text in pictured.rows), *concept.prompts)
    return concept.model_copy(update={"prompts": prompts, "synonyms": (*concept.synonyms, *pictured.shown.names)})


def _learn_concept(
    base: Base,
    recipe: Recipe,
    concept: Concept,
    pictures: Sequence[Picture],
    latents: dict[tuple[int, ...], Tensor],
    seed: int,
) -> Pictured:
    """Return what the pictures of a concept come to: their captions or learnt words, and what the base calls them."""
    spec, times, native = recipe.pictures, recipe.train.trajectory_steps, next(iter(latents.values()))
    assert spec is not None, "checked with the recipe"
    captions = [picture.caption for picture in pictures if picture.caption is not None]
    rows = rows_of_captions(pictures)
    classifier = PictureClassifier(base, native, times, seed)
    candidates = _comparable(base, recipe, concept)
    gains = classifier.compare(candidates)
    words: dict[str, Embeddings] = {}
    if not rows:
        if recipe.train.gradient_checkpointing:
            base.model.enable_gradient_checkpointing()
        try:
            words = from_main(lambda: learn_words(base, native, spec, times, seed))
        finally:
            if recipe.train.gradient_checkpointing:
                base.model.disable_gradient_checkpointing()
        base.words |= words
        rows = {FRAMES[0].format(placeholder): list(range(len(pictures))) for placeholder in words}
    own = max(classifier.gain(each) for each in ([captions] if captions else [[text] * len(native) for text in rows]))
    if not own.sure:
        warnings.warn(
            f"the prompts for the pictures of {concept.name!r} explain them hardly better than the empty prompt does, so base"
            f" {base.id!r} may not draw this at all: look at a picture of {next(iter(rows))!r} (esd-lora generate), give more"
            " or clearer pictures, or learn for longer (-s pictures.steps).",
            stacklevel=2,
        )
    named = {text: round(gain.mean / own.mean, 3) for text, gain in gains.items() if own.sure and gain.sure}
    named = {text: share for text, share in named.items() if share > NAMED}
    shown = Shown(
        pictures=tuple(picture.sha256 for picture in pictures),
        words={placeholder: pack(word) for placeholder, word in words.items()},
        explained_by=named,
    )
    return Pictured(latents, rows, shown, classifier.evaluations, len(words) * spec.steps * BATCH)


class Gain(NamedTuple):
    """How much better than under the empty prompt pictures are explained under another one."""

    mean: float
    """Mean over the points of the difference of mean squared errors."""
    error: float
    """Standard error of that."""

    @property
    def sure(self) -> bool:
        """Whether it is more than chance."""
        return self.mean > _SURE * self.error

    @classmethod
    def of(cls, differences: Tensor) -> Gain:
        """Return the gain of differences at points, [N]."""
        return cls(float(differences.mean()), float(differences.std() / len(differences) ** 0.5))


class PictureClassifier:
    """Says how well prompts explain pictures to a base: all of them at the same noised pictures.

    Args:
        base: As it stands.
        latents: Of the pictures, [N, ...].
        times: Number of times on the grid.
        seed: Of the noise and the times.
    """

    def __init__(self, base: Base, latents: Tensor, times: int, seed: int):
        self.base = base
        self.evaluations = 0
        """Number of latents through the denoiser so far."""
        self._points = noise_latents(base, latents, times, sum(_ROUNDS), torch.Generator().manual_seed(seed))
        self._null = self._errors([""] * len(latents), slice(None))

    def gain(self, captions: Sequence[str]) -> Gain:
        """Return how much better than the empty prompt captions explain the pictures, one for each picture."""
        return Gain.of(self._null - self._errors(captions, slice(None)))

    def compare(self, prompts: Sequence[str]) -> dict[str, Gain]:
        """Return the prompts that explain the pictures best with how much better than the empty one they do, the best first.

        Prompts are compared at a few points, the best of them at more.
        """
        differences = dict.fromkeys(prompts, self._null[:0])
        begin, pictures = 0, int(self._points.lesson.max()) + 1
        with stage("comparing prompts with the pictures", len(prompts) * _ROUNDS[0], "point"):
            for count in _ROUNDS if prompts else ():
                part = slice(begin, begin + count)
                for prompt, before in differences.items():
                    further = self._null[part] - self._errors([prompt] * pictures, part)
                    differences[prompt] = torch.cat([before, further])
                    advance(count)
                ranked = sorted(differences, key=lambda prompt: (-float(differences[prompt].mean()), prompt))
                differences = {prompt: differences[prompt] for prompt in ranked[: max(_LEAST, len(ranked) // 4)]}
                begin += count
        return {prompt: Gain.of(each) for prompt, each in differences.items()}

    @torch.no_grad()
    def _errors(self, captions: Sequence[str], part: slice) -> Tensor:
        """Return the mean squared error at some of the points, [N], under the caption of each one's picture."""
        x_t, t, row, target, _ = (tensor[part] for tensor in self._points)
        texts = list(dict.fromkeys(captions))
        condition = self.base.encode(texts)
        errors: list[Tensor] = []
        for i in range(0, len(t), size := latents_per_batch(x_t.shape[1:])):
            rows = slice(i, i + size)
            own = torch.tensor([texts.index(captions[int(number)]) for number in row[rows].tolist()], device=row.device)
            prediction = self.base.predict(x_t[rows], t[rows], pick(condition, own))
            self.evaluations += len(own)
            errors.append((prediction - target[rows]).square().flatten(1).mean(1).cpu())
        return torch.cat(errors)


def learn_words(base: Base, latents: Tensor, spec: PictureSpec, times: int, seed: int) -> dict[str, Embeddings]:
    """Return words that mean what pictures show, by their placeholders.

    A word says more than the thing: whatever else its pictures have in common. So there are several, each learnt from a half of
    the pictures, and what erasing finds in all of them is the thing. Each begins near the mean of the table, and not with a
    word that is near, of which something would be left, to be kept under its own name.

    Args:
        base: Frozen.
        latents: Of the pictures, [N, ...].
        spec: Number of words, steps and rate.
        times: Number of times on the grid.
        seed: Of noise, times and random starts.
    """
    seeds = (stream_seed(seed, Stream.WORDS, number) for number in range(spec.words))
    halves = _halves(len(latents), spec.words, seed)
    learnt = [
        _learn_word(base, latents[half], spec, times, own, f"word {number} of {spec.words}")
        for number, (half, own) in enumerate(zip(halves, seeds, strict=True), 1)
    ]
    return {placeholder_of(word): word for word in learnt}


def _halves(pictures: int, words: int, seed: int) -> list[Tensor]:
    """Return the pictures that each word is learnt from: halves of them, two that come to all and then two others.

    All of them where there is one word, or halves would be too few.
    """
    if words == 1 or pictures < _LEAST_TO_HALVE:
        return [torch.arange(pictures)] * words
    generator = torch.Generator().manual_seed(seed)
    pairs = (torch.randperm(pictures, generator=generator).tensor_split(2) for _ in range(-(-words // 2)))
    return [half for pair in pairs for half in pair][:words]


def _learn_word(base: Base, latents: Tensor, spec: PictureSpec, times: int, seed: int, which: str) -> Embeddings:
    """Return the embeddings of one word."""
    weights = {
        name: encoder.get_input_embeddings().weight.detach().float() for name, encoder in text_encoders(base.pipe).items()
    }
    spread = {name: weight.std() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    begun = {
        name: weight.mean(0) + _START * weight.std(0) * torch.randn(weight.shape[1], generator=generator).to(weight)
        for name, weight in weights.items()
    }
    learnt = {name: nn.Parameter(vector / spread[name]) for name, vector in begun.items()}
    frames = [frame.format(_BEING_LEARNT) for frame in FRAMES]

    def condition_of(rows: Tensor) -> Condition:
        base.words[_BEING_LEARNT] = {name: vector * spread[name] for name, vector in learnt.items()}
        drawn = torch.randint(len(frames), (len(rows),), generator=generator)
        return pick(base.encode_with_gradient(frames), drawn.to(rows.device))

    options = {"steps": spec.steps, "lr": spec.lr, "seed": seed % 2**31, "desc": f"learning from pictures, {which}"}
    try:
        learn(base, list(learnt.values()), latents, condition_of, times=times, **options)
    finally:
        base.words.pop(_BEING_LEARNT, None)
    return {name: (vector * spread[name]).detach().cpu() for name, vector in learnt.items()}
