"""Hub requests with timeouts and retries.

huggingface_hub's client has no timeout and waits for an hour if the Hub asks for it. It retries downloads of lists and
uploads of large files, but neither the questions before training nor the commit.
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
from huggingface_hub import get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OIDCError
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from utils.core.errors import UserError

logger = logging.getLogger(__name__)

UNREADABLE = (json.JSONDecodeError, LookupError, TypeError, AttributeError)  # a page of a hotel's network, for one
# What the client raises when it cannot reach the Hub, is refused, or cannot read the answer.
FAILURES = (httpx2.HTTPError, OSError, ValueError, OIDCError, *UNREADABLE)
BROKEN = (httpx2.NetworkError, httpx2.RemoteProtocolError)  # the connection; often it works again soon
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a Hub that often works again soon
PAUSES = (1, 4, 16)  # seconds before another try, unless the Hub names them
LONGEST_PAUSE = 60  # seconds; a longer one counts as a refusal


@contextlib.contextmanager
def request_timeout(seconds: float) -> Iterator[None]:
    """Give up requests that get no answer for some time, and those that the Hub wants to delay for long."""
    own = get_session().event_hooks["request"]  # of the client: offline, it refuses requests
    hooks = {"request": [*own, functools.partial(_set_limit, seconds)], "response": [_refuse_endless_waits]}
    set_client_factory(functools.partial(httpx2.Client, event_hooks=hooks, follow_redirects=True, timeout=None))
    try:
        yield
    finally:
        options = {"event_hooks": {"request": own}, "follow_redirects": True, "timeout": None}
        set_client_factory(functools.partial(httpx2.Client, **options))


def _set_limit(seconds: float, request: httpx2.Request) -> None:
    """Set the timeout of a request, also of one that asks for none."""
    if request.extensions["timeout"]["read"] is None:
        request.extensions["timeout"] = httpx2.Timeout(seconds).as_dict()


def _refuse_endless_waits(response: httpx2.Response) -> None:
    """Raise an error where the client would wait for long, or would create a repository again and again."""
    is_long = response.status_code in BUSY and (_asked_pause(response) or 0) > LONGEST_PAUSE
    if is_long or (response.status_code == 409 and b"another conflicting operation" in response.read()):
        hf_raise_for_status(response)


def with_retries(ask: Callable[[], Any], passing: tuple[type[Exception], ...] = ()) -> Any:
    """Ask the Hub, and ask again after a pause if it is busy or the connection breaks.

    Args:
        ask: Makes the requests, and returns what is to be returned.
        passing: Errors of a broken connection that are worth a retry.

    Raises:
        Exception: What the last try raised, or the first error that is not worth a retry.
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


def find_token(token: str | None) -> str | None:
    """Return the given token, or else that of the environment or of `hf auth login`, if there is one."""
    try:
        token = (token or "").strip() or get_token()
    except FAILURES as error:
        raise UserError(f"The environment's login failed: {reason_of(error, token)}. Run `hf auth login`.") from None
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        # Must come before the first request, because the HTTP client's error would quote the token.
        raise UserError("The token has spaces or signs in it that no token has. Copy it again, the whole of it.")
    return token


def _find_cause(error: BaseException) -> BaseException:
    """Return the request's error that caused an upload's error, or else that error itself."""
    cause = error
    while cause and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__cause__
    return cause or error


def _asked_pause(response: httpx2.Response) -> int | None:
    """Return how many seconds the Hub asks to wait, if it says so."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = response.headers.get("Retry-After", "").strip()
    return int(seconds) if seconds.isdecimal() else None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about, if there was an answer."""
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
