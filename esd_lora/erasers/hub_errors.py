"""Errors of the Hugging Face Hub and its client, in one sentence each."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from esd_lora.erasers.hub_answers import checked_answers, wait_of
from esd_lora.errors import EsdLoraError

_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."
_SENTENCES: dict[str | int, str] = {
    "GatedRepoError": "{what} is gated: accept its terms on {page}, then ask again{gate}",
    "DisabledRepoError": "{what} was disabled on the Hub. Its page says why: {page}",
    "RevisionNotFoundError": "{what}: there is no such branch, tag or commit. Its page lists those there are: {page}",
    "RepositoryNotFoundError": "there is no repository {what} on the Hub, {hidden}",
    401: "the Hub does not know {who} ({reason}). " + _LOGIN,
    403: "the token here may not do that to {what} ({reason}). Take one with write access to it, or another repository.",
    404: "{what}: the Hub has no such thing ({reason}). Look at the name.",
    **dict.fromkeys((409, 412), "{what} was changed by someone else in the meantime ({reason}). Look at it, and try again."),
    413: "{what}: the Hub takes no file of that size ({reason}). Lower the eraser's rank with esd-lora stack --max-rank.",
    429: "the Hub has had too many requests from here. Try again {wait}.",
    400: "the Hub refused {what} (status {status}: {reason}). Look at what it says.",
    500: "the Hub is in trouble (status {status}: {reason}). Try again later.",
    "HFValidationError": "{what} is no name that the Hub takes: {reason}",
    "LocalTokenNotFoundError": "the Hub wants to know who asks, and there is no token here. " + _LOGIN,
    "UnicodeError": "the token here has characters that no token has. " + _LOGIN,
    # The Hub finds fault with a card, answers what is no JSON, or JSON of another shape.
    **dict.fromkeys(
        ("ValueError", "TypeError", "AttributeError", "LookupError", "ArithmeticError", "AssertionError", "RecursionError"),
        "the Hub and its client do not agree on {what}: {reason}",
    ),
    "offline": "HF_HUB_OFFLINE is set, so the Hub was not asked about {what}. Unset it, or take what lies here.",
    "connection": "the connection to the Hub failed on {what} ({origin}). {again}",
}
"""Class of an error, or else status of an answer (400 and 500 stand for all that are not here), to the sentence for it."""


@contextmanager
def reporting_hub_errors(what: str, again: str = "Try again.", *, largest: int = 0) -> Generator[None]:
    """Check what the Hub answers; turn its refusals, and a connection that fails, into one sentence without the token in it.

    Args:
        what: The repository, for the message.
        again: What to do when the connection broke.
        largest: Bytes of the largest file that is fetched.

    Raises:
        EsdLoraError: With the sentence. Its `__cause__` is the Hub's answer if there was one, else the client's error.
    """
    from huggingface_hub import constants, errors, get_token

    # httpx's HTTPError, or httpx2's: versions of the client differ.
    transport = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    library = import_module(transport.__module__.partition(".")[0])
    # The last ones are what the client raises of JSON of another shape.
    shapes = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
    try:
        with checked_answers(largest):
            yield
    except (OSError, RuntimeError, transport, library.InvalidURL, *shapes) as error:
        token, causes = get_token(), [error]
        while isinstance(cause := causes[-1].__cause__, Exception):  # the client wraps what stopped a transfer
            causes.append(cause)
        answer: Any = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
        names = [kind.__name__ for kind in type(answer or error).__mro__]
        keys: list[str | int] = [*names, "offline" if constants.HF_HUB_OFFLINE else "connection"]
        reason, status, wait = str(error), 0, 0
        if not isinstance(error, (OSError, RuntimeError, ValueError, transport)):
            reason = f"{type(error).__name__}: {reason}"  # of which the text alone says little
        if answer is not None:
            reason, status = answer.server_message or _first_line(answer), answer.response.status_code
            wait = wait_of(answer.response.headers)
            keys = [*names[: names.index("HfHubHTTPError")], status, 500 if status >= 500 else 400]
        sentence = next(_SENTENCES[key] for key in keys if key in _SENTENCES).format(
            what=what,
            again=again,
            status=status,
            reason=" ".join(reason.split()),
            origin=_first_line(causes[-1]) or type(causes[-1]).__name__,
            page=f"{constants.ENDPOINT}/{what.partition('@')[0]}",
            gate="" if token else f". {_LOGIN}",
            who="the token here" if token else "who asks",
            hidden="or your token may not see it. Look at the name." if token else f"or one must log in to see it. {_LOGIN}",
            wait=f"in {wait} seconds" if wait else "later",
        )
        raise EsdLoraError(sentence.replace(token, "***") if token else sentence) from (answer or error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
