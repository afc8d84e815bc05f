"""Names and words: mentions of a concept, masks, slugs for file names, ids on the Hub, text that may be printed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from esd_lora.files import PICKLES

_DOT = "\u2022"
_JOINERS = "\u200c\u200d"
_LONGEST_SLUG = 80  # characters; file systems take 255 bytes
_FILE_ENDINGS = (".safetensors", ".json", ".yaml", ".yml", ".md", ".png", *PICKLES)


def without_article(name: str) -> str:
    """Return a name without its article: `a cat` is `cat`."""
    return re.sub(r"^(an?|the)\s+", "", name.strip(), flags=re.IGNORECASE)


def name_key(name: str) -> str:
    """Return what all ways to write a name have in common: without article, and whatever its case, width and spaces."""
    return without_article(" ".join(unicodedata.normalize("NFKC", name).split())).casefold()


def frames_of(prompts: Sequence[str]) -> dict[str, int]:
    """Return what stands around a prompt in longer ones of the same list, with `{}` in its place, in order, and how often.

    Where a prompt holds several others ("a bus in ink style", beside "a bus" and "ink style"), the frame counts that stands
    around most: "{} in ink style", as dogs and keys stand in it too, and not "a bus in {}". Among equals it is the first.
    """
    around: dict[str, list[str]] = {whole: [] for whole in prompts}
    for part in prompts:
        alone = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)")
        for whole in prompts:
            if whole != part and part in whole and (frame := alone.sub("{}", whole, count=1)) != whole:
                around[whole].append(frame)
    holds = Counter(frame for frames in around.values() for frame in frames)
    best = [max(frames, key=lambda f: (holds[f], -f.index("{}"))) for frames in around.values() if frames]
    return {frame: holds[frame] for frame in best}


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern that finds any of some words in a text, in singular or plural and in any case.

    Args:
        words: One or more; where several fit, the earliest counts.
    """
    return re.compile("|".join(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)" for word in words), re.IGNORECASE)


def mentions(text: str, names: Iterable[str]) -> bool:
    """Return whether a prompt holds one of the names: as whole words, singular or plural, without article."""
    words = [without_article(name) for name in names]
    return bool(words) and whole_words(words).search(text) is not None


def mask_of(names: Iterable[str]) -> Callable[[str], str]:
    """Return a function that masks names in a text: the first letter stays, the rest is dots.

    Each name is masked as a whole, and so is every word of it that says something by itself, in singular or plural.
    """
    words: set[str] = set()
    for name in names:
        telling = {word for word in re.findall(r"\w+", name) if len(word) > 2 or not word.isascii()}
        words |= telling | {without_article(name)} - {""}
    pattern = whole_words(sorted(words, key=len, reverse=True)) if words else None

    def mask_word(word: str) -> str:
        return word[0] + _DOT * (len(word) - 1) if len(word) > 1 else _DOT

    def mask(text: str) -> str:
        return pattern.sub(lambda match: " ".join(map(mask_word, match[0].split())), text) if pattern else text

    return mask


def slug(text: str) -> str:
    """Return a concept's name as part of a file name: letters and digits of any script, the rest as `-`, cut to 80."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text))
    name = "-".join(words)[:_LONGEST_SLUG].encode()[: 2 * _LONGEST_SLUG].decode(errors="ignore").strip("-")
    return name or "eraser"


def eraser_name(concepts: Iterable[str]) -> str:
    """Return what an eraser is called as a file or folder: `no-cat`, `no-cat-dog`."""
    return slug(" ".join(["no", *map(without_article, concepts)]))


def printable(text: str) -> str:
    """Return a stranger's text as a terminal or a page may have it: what would be obeyed, or is not seen, is shown by its code.

    That is all of Unicode's categories Cc (escapes, line breaks), Cf (a change of direction, zero width), Zl, Zp, Cs (what is
    no UTF-8), Co and Cn. Spaces of every script stay, and of Cf the two joiners, without which Persian, the scripts of India
    and many emoji are misspelt.
    """
    return "".join(character if _is_seen(character) else repr(character)[1:-1] for character in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def is_text(text: str) -> bool:
    """Return whether all of a text can be written in UTF-8, which half a character or a byte of a file's name cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_one_line(text: str) -> str:
    """Return a text as `printable` does, its line breaks and runs of spaces made one space."""
    return printable(" ".join(text.split()))


def printable_lines(text: str) -> str:
    """Return a text of several lines as a terminal or a page may have it; its line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def printable_value(value: Any) -> Any:
    """Return a value of a page, printable where it is text: for jinja2's `finalize`; what was escaped stays so."""
    return type(value)(printable_lines(value)) if isinstance(value, str) else value


class HubId(NamedTuple):
    """The id of a repository on the Hugging Face Hub: `owner/name`, or `owner/name@revision`."""

    repo: str
    revision: str | None = None
    """Branch, tag, commit or `refs/pr/1`; the main branch unless given."""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @classmethod
    def read(cls, text: str) -> HubId | None:
        """Return the id that a text is, or `None` where it is none, but a path."""
        repo, at, revision = text.partition("@")
        named = not at or re.fullmatch(r"[A-Za-z0-9][\w./-]*", revision, re.ASCII)
        return cls(repo, revision or None) if named and is_hub_id(repo) else None


def is_hub_id(name: str) -> bool:
    """Return whether a name is `owner/name`, and not a file's."""
    match = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
    return match is not None and not name.lower().endswith(_FILE_ENDINGS)
