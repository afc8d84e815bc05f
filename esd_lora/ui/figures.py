"""Pictures inside the page that say in words what they show, for those who do not see them."""

from __future__ import annotations

import base64
import html


def figure(png: bytes, alt: str) -> str:
    """Return a picture as HTML, as wide as its place, and no wider than it is.

    Args:
        png: The file's content.
        alt: What it shows, which is also written below it.
    """
    text, content = html.escape(alt), base64.b64encode(png).decode()
    return (
        f'<figure class="figure"><img src="data:image/png;base64,{content}" alt="{text}">'
        f'<figcaption aria-hidden="true">{text}</figcaption></figure>'
    )
