"""Pictures and lines of a terminal inside the page, with words for those who do not see them, and reached by keys."""

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


def lines_of_terminal(text: str, label: str) -> str:
    """Return text as a terminal shows it, to be read, reached by keys and copied; nothing where there is none.

    Args:
        text: Any number of lines.
        label: What it is, written above it.
    """
    if not text:
        return ""
    name = html.escape(label)
    return (
        f'<p class="terminal-label">{name}</p><pre class="terminal" tabindex="0" aria-label="{name}">{html.escape(text)}</pre>'
    )
