"""Licenses of published erasers: an eraser is a part of a model, so its base's terms hold for the two."""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

from esd_lora.errors import EsdLoraError

_STABILITY = "stabilityai-ai-community=https://stability.ai/license"
_BASE_LICENSES = {
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
"""Base to its license, as its page on the Hub states it."""


class License(NamedTuple):
    """A license by the Hub's name for it, or one that the Hub has no name for, with its address."""

    name: str
    link: str | None = None

    @classmethod
    def read(cls, text: str) -> License:
        """Return the license that `NAME` or `NAME=URL` stands for."""
        name, _, link = text.partition("=")
        return cls(name, link or None)

    def front_matter(self) -> dict[str, object]:
        """Return the keys that the Hub reads it from."""
        return (
            {"license": "other", "license_name": self.name, "license_link": self.link} if self.link else {"license": self.name}
        )

    def markdown(self) -> str:
        """Return its name in Markdown, with a link where it has an address."""
        return f"[{self.name}]({self.link})" if self.link else f"`{self.name}`"


def license_of(base: str, chosen: str | None) -> License:
    """Return the license that was chosen for an eraser, or else that of its base; warn where the two are known to differ.

    Args:
        base: What the eraser was made for.
        chosen: The Hub's name of a license (`openrail++`, `cc-by-nc-4.0`), or `NAME=URL` for one it has no name for.

    Raises:
        EsdLoraError: If none is chosen and that of the base is not known, or `chosen` is of neither form.
    """
    of_base = base_license(base)
    if chosen is None:
        if of_base is None:
            raise EsdLoraError(
                f"the licence of base {base!r} is not known here. Look at its page and give --license NAME, or NAME=URL for one"
                " that the Hub has no name for."
            )
        return of_base
    result = License.read(chosen)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*(=https://[\w./~#%-]+)?", chosen):
        raise EsdLoraError(
            f"--license {chosen!r}: expected the Hub's name of a licence, such as openrail++ or cc-by-nc-4.0, or"
            " NAME=https://..."
        )
    if result == License("other"):
        raise EsdLoraError("--license other says nothing. Give its name and address: NAME=https://...")
    if of_base not in (None, result):
        warnings.warn(
            f"{base} has the licence {of_base.name}, and this says {result.name}. See that its terms let you.", stacklevel=2
        )
    return result


def base_license(base: str) -> License | None:
    """Return the license of a base, or `None` where it is not known here."""
    return License.read(_BASE_LICENSES[base]) if base in _BASE_LICENSES else None
