"""What the Hugging Face Hub answers when it does not do what it was asked, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

from esd_lora.errors import EsdLoraError

_TOKEN = "Log in with `hf auth login`, or set HF_TOKEN."


@contextmanager
def asked(what: str, again: str = "Try again.") -> Generator[None]:
    """Has what the Hub refuses, and that nobody answers, end in one sentence.

    Args:
        what: The repository, for the message.
        again: What to do when the connection broke.
    """
    from huggingface_hub import constants, errors

    # httpx's HTTPError, or httpx2's: versions of the client differ.
    transport = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except errors.HFValidationError as error:
        raise EsdLoraError(f"{what} is no name that the Hub takes: {_first_line(error)}") from error
    except errors.LocalTokenNotFoundError as error:
        raise EsdLoraError(f"the Hub wants to know who asks, and there is no token here. {_TOKEN}") from error
    except ValueError as error:  # the client's, when the Hub finds fault with a card, or answers what is no JSON
        raise EsdLoraError(f"the Hub and its client do not agree on {what}: {' '.join(str(error).split())}") from error
    except (OSError, RuntimeError, transport) as error:
        # The client wraps what stopped a transfer: RuntimeError around an upload, LocalEntryNotFoundError around a download.
        reasons = list(_causes(error))
        answer = next((reason for reason in reasons if isinstance(reason, errors.HfHubHTTPError)), None)
        if answer is not None:
            raise EsdLoraError(_refusal(answer, what)) from answer
        if constants.HF_HUB_OFFLINE:
            raise EsdLoraError(f"{what} was not fetched: HF_HUB_OFFLINE is set, and it is not in the cache.") from error
        if not any(isinstance(reason, (ConnectionError, TimeoutError, transport)) for reason in reasons):
            raise
        reason = _first_line(reasons[-1]) or type(reasons[-1]).__name__
        raise EsdLoraError(f"the connection to the Hub failed on {what} ({reason}). {again}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: Any, what: str) -> str:
    from huggingface_hub import constants, errors, get_token

    status, token = error.response.status_code, get_token()
    said = " ".join((error.server_message or _first_line(error)).split())
    said = said.replace(token, "***") if token else said
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
