"""What the Hugging Face Hub answers, checked before its client acts on it.

The client takes a file's ETag and commit for names below its cache, reads an answer whole whatever its size, follows pages for
as long as there is a next one, and sleeps for as long as it is asked to. That is well between it and the Hub; what else answers
in the Hub's place (a mirror in HF_ENDPOINT, a proxy) could have it write anywhere, or never come back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from esd_lora.errors import EsdLoraError, shortened

_MAX_JSON = 16 * 2**20  # bytes of all answers but files within one block; a thousand models and their files come to a third
_MAX_PAGES = 200  # answers that are no files, within one block
_MAX_WAIT = 300  # seconds: the Hub counts requests over five minutes


class _Block:
    """What was answered within one block so far."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.pages = self.size = 0

    def check(self, response: Any) -> None:
        """Check an answer of which the headers are there, and have its body checked as it comes.

        Raises:
            EsdLoraError: If no client should act on it.
        """
        method, path, headers = response.request.method, response.request.url.path, response.headers
        self.pages += path.startswith("/api/")
        if self.pages > _MAX_PAGES:
            raise EsdLoraError(f"the Hub does not come to an end: it gave more than {_MAX_PAGES} answers. Do not trust it.")
        if method == "HEAD" and "/resolve/" in path:
            for name in ("etag", "x-linked-etag"):
                _require(headers, name, r'(W/)?"?[\w.-]{1,128}"?')
            _require(headers, "x-repo-commit", "[0-9a-f]{40}")
        self._bound(response, is_file=method == "GET" and response.is_success and not path.startswith("/api/"))
        if response.is_error and wait_of(headers) > _MAX_WAIT:
            from huggingface_hub.utils import hf_raise_for_status

            response.read()
            hf_raise_for_status(response)  # as the client does in the end, without the wait before it

    def _bound(self, response: Any, *, is_file: bool) -> None:
        """Have an answer's bytes counted as the client reads them."""
        read: Callable[..., Iterator[bytes]] = response.iter_bytes

        def bounded(chunk_size: int | None = None) -> Iterator[bytes]:
            largest = max(
                (block.largest for block in _blocks), default=0
            )  # another thread's file may be larger than this one's
            left = largest if is_file else _MAX_JSON - self.size
            for chunk in read(chunk_size):
                left -= len(chunk)
                self.size += 0 if is_file else len(chunk)
                if left < 0:
                    most = f"{largest:,} bytes of a file" if is_file else f"{_MAX_JSON:,} bytes"
                    raise EsdLoraError(f"the Hub does not come to an end: it sent more than {most}. Do not trust it.")
                yield chunk

        response.iter_bytes = bounded


def _require(headers: Any, name: str, pattern: str) -> None:
    value = headers.get(name)
    if value is not None and (not re.fullmatch(pattern, value, re.ASCII) or not value.strip('W/".')):
        raise EsdLoraError(f"the Hub answered with {name} {shortened(repr(value))}, which is none. Do not trust it.")


def wait_of(headers: Any) -> int:
    """Return for how many seconds the Hub asks to wait, 0 if it does not: `Retry-After: 30` or `RateLimit: "api";r=0;t=30`."""
    seconds = re.search(r"^\s*(\d{1,10})", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d{1,10})", headers.get("ratelimit", "")
    )
    return int(seconds[1]) if seconds else 0


_blocks: list[_Block] = []  # those that run now: the client is one for the whole process


def _check(response: Any) -> None:
    for block in _blocks:
        block.check(response)


class _Checking:
    """Makes the client as it was made before, with every answer checked; the client makes itself anew when connecting fails."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        client = self.make()
        client.event_hooks["response"].append(_check)
        return client


@contextmanager
def checked_answers(largest: int = 0) -> Generator[None]:
    """Have every answer of the Hub to this process checked for as long as the block runs.

    Args:
        largest: Bytes of the largest file that is fetched.

    Raises:
        EsdLoraError: If one could do harm, or does not end.
    """
    from huggingface_hub import set_client_factory

    make = cast(
        "Any", import_module("huggingface_hub.utils._http")
    )._GLOBAL_CLIENT_FACTORY  # which cannot be asked for otherwise
    if not isinstance(make, _Checking):
        set_client_factory(_Checking(make))
    block = _Block(largest)
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)
