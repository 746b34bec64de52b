"""Requests to the Hub that end: each has a time, and what may be well again soon is tried again.

huggingface_hub's client waits for an answer for ever, obeys a wish for an hour's pause, and tries few requests again:
those that ask how to upload and that send large files, but neither the questions before training nor the commit.
"""

import contextlib
import functools
import json
import logging
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OIDCError
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

logger = logging.getLogger(__name__)

UNREADABLE = (json.JSONDecodeError, LookupError, TypeError, AttributeError)  # a page of a hotel's network, for one
# What the client raises when it cannot reach the Hub, is refused, or cannot read the answer.
FAILURES = (httpx2.HTTPError, OSError, ValueError, OIDCError, *UNREADABLE)
BROKEN = (httpx2.NetworkError, httpx2.RemoteProtocolError)  # a connection that may be well again soon
BUSY = (408, 429, 500, 502, 503, 504)  # so may a Hub with such an answer
PAUSES = (1, 4, 16)  # seconds before another try, unless the Hub names them
LONGEST_PAUSE = 60  # a Hub that asks for more has refused


@contextlib.contextmanager
def request_timeout(seconds: float) -> Iterator[None]:
    """Let the client give up requests of which nothing comes for some time, and those that are to wait for long."""
    set_client_factory(functools.partial(_make_client, seconds))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _make_client(seconds: float) -> httpx2.Client:
    """Return the Hub's own client, with limits."""
    client = default_client_factory()
    before = [*client.event_hooks["request"], functools.partial(_set_limit, seconds)]
    client.event_hooks = {"request": before, "response": [_refuse_endless_waits]}
    return client


def _set_limit(seconds: float, request: httpx2.Request) -> None:
    """Limit a request that has no limit; some calls ask for none instead of taking the client's own."""
    if request.extensions["timeout"]["read"] is None:
        request.extensions["timeout"] = httpx2.Timeout(seconds).as_dict()


def _refuse_endless_waits(response: httpx2.Response) -> None:
    """Raise an error where the client would sleep as long as it is told, or create a repository again and again."""
    is_long = response.status_code in BUSY and (_asked_pause(response) or 0) > LONGEST_PAUSE
    if is_long or (response.status_code == 409 and b"another conflicting operation" in response.read()):
        hf_raise_for_status(response)


def with_retries(ask: Callable[[], Any], passing: tuple[type[Exception], ...] = ()) -> Any:
    """Ask the Hub, and again after a while when it is busy or the connection breaks.

    Args:
        ask: Makes the requests, and returns what is to be returned.
        passing: Errors of a broken connection after which it is worth asking again.

    Raises:
        Exception: What the last try raised, or the first one that is not worth another.
    """
    for usual in PAUSES:
        try:
            return ask()
        except Exception as error:  # those of upload threads have no base class in common
            cause = _find_cause(error)
            is_busy = status_of(cause) in BUSY
            pause = (is_busy and _asked_pause(cause.response)) or usual
            if pause > LONGEST_PAUSE or not (is_busy or isinstance(cause, passing)):
                raise
            words = f"answers {status_of(cause)}" if is_busy else f"cannot be reached ({reason_of(cause, None)})"
        logger.warning(f"The Hub {words}; trying again in {pause} s.")
        time.sleep(pause)
    return ask()


def _find_cause(error: BaseException) -> BaseException:
    """Return the error of the request that an upload's error comes from, or else that error itself."""
    cause = error
    while cause and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__cause__
    return cause or error


def _asked_pause(response: httpx2.Response) -> int | None:
    """Return after how many seconds the Hub wants to be asked again, if it says so."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = response.headers.get("Retry-After", "").strip()
    return int(seconds) if seconds.isdecimal() else None


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error is about, if there was one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def reason_of(error: BaseException, token: str | None) -> str:
    """Return in one line what an error says, without the token and without a full stop."""
    if isinstance(error, HfHubHTTPError):
        words = f"{status_of(error)} {error.server_message or str(error).strip().partition(chr(10))[0]}"
        if pause := _asked_pause(error.response):
            words = f"{words.rstrip('.')} (it wants {pause} s of pause)"
    elif isinstance(error, httpx2.TimeoutException):
        words = f"no answer within {error.request.extensions['timeout']['read']:g} s"
    elif isinstance(error, UNREADABLE):
        words = f"the answer is none of a Hub ({type(error).__name__}: {error})"
    else:
        words = str(error) or type(error).__name__
        if error.__cause__ and str(error.__cause__) not in words:
            words = f"{words.rstrip('.')}: {reason_of(error.__cause__, token)}"
    if token:
        words = words.replace(token, "<token>")
    return textwrap.shorten(words, 400, placeholder=" …").rstrip(".")
