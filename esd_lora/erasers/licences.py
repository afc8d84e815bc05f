"""Licences of published erasers: an eraser is a part of a model, so its base's terms hold for the two."""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

from esd_lora.errors import EsdLoraError

_STABILITY = "stabilityai-ai-community=https://stability.ai/license"
_KNOWN = {
    "emoji": "apache-2.0",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": _STABILITY,
    "stabilityai/stable-diffusion-3.5-medium": _STABILITY,
    "stabilityai/stable-diffusion-3.5-large": _STABILITY,
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.1-dev": (
        "flux-1-dev-non-commercial-license=https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    ),
}
"""Base to its licence, as its page on the Hub states it."""


class Licence(NamedTuple):
    """A licence by the Hub's name for it, or one that the Hub has no name for, with its address."""

    name: str
    link: str | None = None

    @classmethod
    def read(cls, text: str) -> Licence:
        """`NAME` or `NAME=URL`."""
        name, _, link = text.partition("=")
        return cls(name, link or None)

    def front(self) -> dict[str, object]:
        """As the Hub's front matter has it."""
        return (
            {"license": "other", "license_name": self.name, "license_link": self.link} if self.link else {"license": self.name}
        )

    def told(self) -> str:
        """In Markdown."""
        return f"[{self.name}]({self.link})" if self.link else f"`{self.name}`"


def licence_of(base: str, said: str | None) -> Licence:
    """The licence that was asked for, or else that of the base; warns where the two are known to differ.

    Args:
        base: What the eraser was made for.
        said: The Hub's name of a licence (`openrail++`, `cc-by-nc-4.0`), or `NAME=URL` for one it has no name for.

    Raises:
        EsdLoraError: If none is said and that of the base is not known, or what is said is of neither form.
    """
    theirs = base_licence(base)
    if said is None:
        if theirs is None:
            raise EsdLoraError(
                f"the licence of base {base!r} is not known here. Look at its page and give --license NAME, or NAME=URL for one"
                " that the Hub has no name for."
            )
        return theirs
    ours = Licence.read(said)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*(=https://[\w./~#%-]+)?", said):
        raise EsdLoraError(
            f"--license {said!r}: expected the Hub's name of a licence, such as openrail++ or cc-by-nc-4.0, or NAME=https://..."
        )
    if ours == Licence("other"):
        raise EsdLoraError("--license other says nothing. Give its name and address: NAME=https://...")
    if theirs not in (None, ours):
        warnings.warn(
            f"{base} has the licence {theirs.name}, and this says {ours.name}. See that its terms let you.", stacklevel=2
        )
    return ours


def base_licence(base: str) -> Licence | None:
    """The licence of a base, if it is known here."""
    return Licence.read(_KNOWN[base]) if base in _KNOWN else None
