"""What the Hugging Face Hub answers when it does not do what it was asked, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from esd_lora.errors import EsdLoraError

_TOKEN = "Log in with `hf auth login`, or set HF_TOKEN."


@contextmanager
def reporting_hub_errors(what: str, again: str = "Try again.") -> Generator[None]:
    """Has what the Hub refuses, and that nobody answers, end in one sentence.

    Args:
        what: The repository, for the message.
        again: What to do when the connection broke.
    """
    from huggingface_hub import errors

    # httpx's HTTPError, or httpx2's: versions of the client differ.
    transport = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    library = import_module(transport.__module__.partition(".")[0])
    try:
        yield
    except (OSError, RuntimeError, ValueError, transport, library.InvalidURL) as error:
        cause, said = _told(error, what, again)
        token = _token()
        raise EsdLoraError(said.replace(token, "***") if token else said) from cause


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _told(error: Exception, what: str, again: str) -> tuple[BaseException, str]:
    """What is behind an error of the client, and the sentence for it.

    The client wraps what stopped a transfer: RuntimeError around an upload, LocalEntryNotFoundError around a download.
    """
    from huggingface_hub import constants, errors

    reasons = list(_causes(error))
    answer = next((reason for reason in reasons if isinstance(reason, errors.HfHubHTTPError)), None)
    if answer is not None:
        return answer, _refusal(answer, what)
    if isinstance(error, errors.HFValidationError):
        return error, f"{what} is no name that the Hub takes: {_first_line(error)}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return error, f"the Hub wants to know who asks, and there is no token here. {_TOKEN}"
    if isinstance(error, UnicodeError):
        return error, f"the token here has characters that no token has. {_TOKEN}"
    if isinstance(error, ValueError):  # the Hub finds fault with a card, or answers what is no JSON
        return error, f"the Hub and its client do not agree on {what}: {' '.join(str(error).split())}"
    if constants.HF_HUB_OFFLINE:
        return error, f"HF_HUB_OFFLINE is set, so the Hub was not asked about {what}. Unset it, or take what lies here."
    reason = _first_line(reasons[-1]) or type(reasons[-1]).__name__
    return error, f"the connection to the Hub failed on {what} ({reason}). {again}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: Any, what: str) -> str:
    from huggingface_hub import constants, errors

    status, token = error.response.status_code, _token()
    said = " ".join((error.server_message or _first_line(error)).split())
    page = f"{constants.ENDPOINT}/{what.partition('@')[0]}"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms on {page}, then ask again{'' if token else f'. {_TOKEN}'}"
    if isinstance(error, errors.DisabledRepoError):
        return f"{what} was disabled on the Hub. Its page says why: {page}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: there is no such branch, tag or commit. Its page lists those there are: {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        hidden = "or your token may not see it. Look at the name." if token else f"or one must log in to see it. {_TOKEN}"
        return f"there is no repository {what} on the Hub, {hidden}"
    if status == 401:
        return f"the Hub does not know {'the token here' if token else 'who asks'} ({said}). {_TOKEN}"
    if status == 403:
        return f"the token here may not do that to {what} ({said}). Take one with write access to it, or another repository."
    if status == 404:
        return f"{what}: the Hub has no such thing ({said}). Look at the name."
    if status in (409, 412):
        return f"{what} was changed by someone else in the meantime ({said}). Look at it, and try again."
    if status == 413:
        return f"{what}: the Hub takes no file of that size ({said}). Lower the eraser's rank with esd-lora stack --max-rank."
    if status == 429:
        wait = _wait(error.response.headers)
        return f"the Hub has had too many requests from here. Try again {f'in {wait} seconds' if wait else 'later'}."
    if status >= 500:
        return f"the Hub is in trouble (status {status}: {said}). Try again later."
    return f"the Hub refused {what} (status {status}: {said}). Look at what it says."


def _wait(headers: Any) -> str | None:
    """Seconds to wait, from `Retry-After: 30` or `RateLimit: "api";r=0;t=30`."""
    for header, pattern in (("retry-after", r"^(\d+)$"), ("ratelimit", r"\bt=(\d+)")):
        if found := re.search(pattern, headers.get(header, "")):
            return found[1]
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
