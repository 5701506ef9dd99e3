"""Requests to an OpenAI-compatible endpoint, which may fail in every way, and lie.

One request is tried several times. No redirect is followed, no credential is sent but the key of
the environment, and an answer has a deadline and a limit of bytes. What was not answered is a
`Failure` with its reason, never a value. Imports no JAX.
"""

import asyncio
import functools
import http
import os
import re
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2  # imported where somebody is asked: it takes 0.1 s

Value = TypeVar("Value")
_REFUSED = (*range(300, 400), 400, 401, 403, 404, 405, 407)  # asking again would not help
_HOST = r"[\w-]{1,63}(\.[\w-]{1,63})*\.?"  # the last point stands for the root
_MOST_BYTES = 2**20  # of an answer's body, decompressed


class Endpoint(NamedTuple):
    """Whom to ask, and how long.

    One request takes num_tries * (timeout + 60 s) at most, and what the system's own search for a
    host's address takes beyond it.
    """

    url: str  # up to /v1; /chat/completions is added
    key_variable: str  # of the environment; a local server needs none
    timeout: float  # seconds for one try, from the connection to the last byte
    num_tries: int
    who: str = "the endpoint"  # in messages
    url_option: str = "--url"  # what the URL and the model were set by, in messages
    model_option: str = "--model"


class Failure(NamedTuple):
    """Why a request has no answer."""

    reason: str  # printable, and without the key
    status: int = 0  # the HTTP status of a refusal, else 0
    is_final: bool = False  # asking again would not help


def ask(
    endpoint: Endpoint,
    content: bytes,
    read: Callable[[bytes], Value | Failure],
    wait: Callable[[float], None] = time.sleep,
) -> Value | Failure:
    """Return what `read` makes of the answer to a request, or the last failure.

    Args:
      content: the request's body, JSON.
      read: takes an answer's body; a `Failure` that is not final is asked again.
      wait: takes the seconds before the next try: those that the server asks for, or twice as many
        each time, but 60 at most.

    Raises:
      ValueError: URL, key, or the environment's proxy cannot be used.
    """
    check_url(endpoint.url, endpoint.url_option)
    key = key_of(endpoint.key_variable)
    found: Value | Failure = Failure("never asked")
    for attempt in range(endpoint.num_tries):
        answer = asyncio.run(_post(endpoint, key, content))
        if answer.status in _REFUSED:
            return Failure(_refusal(endpoint, key, answer), answer.status, is_final=True)
        if answer.status == 200 and answer.whole:
            found = read(answer.body)
        else:
            found = Failure(_lack(endpoint, key, answer))
        if not isinstance(found, Failure) or found.is_final:
            break
        if attempt + 1 < endpoint.num_tries:
            after = answer.retry_after
            wait(min(float(after) if after.isdecimal() else 2.0 ** min(attempt, 6), 60.0))
    return found


def check_url(url: str, option: str) -> None:
    """Raise ValueError unless it can be an endpoint's; a password in it is not repeated."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.port != 0 and parts.netloc[-1:] != ":"
        host = parts.hostname or ""  # a name, an IPv4 address, or an IPv6 one of brackets
        good = good and (":" in host or re.fullmatch(_HOST, host) is not None)
    except ValueError:  # brackets, or a port that is none
        good = False
    secret = any(mark in url for mark in "@?#")
    if not good or secret or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            f"{option}{'' if secret else f' = {url!r}'}: needs http:// or https://, a host"
            " and perhaps a port and a path. A name, a password or a key (@ ? #) would be written"
            " into files and logs: keys come from the environment"
        )


def key_of(variable: str) -> str:
    """Return the key of the environment, or ''."""
    key = os.environ.get(variable, "")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"${variable} has a space, a line break or another character that no key has"
            " (it is not shown here)"
        )
    return key


class _Answer(NamedTuple):
    """What a server said, as far as it came."""

    status: int = 0  # 0: nothing
    retry_after: str = ""
    body: bytes = b""
    whole: bool = False


async def _post(endpoint: Endpoint, key: str, content: bytes) -> _Answer:
    """Return the answer to one request: no redirect is followed, no other credential is sent."""
    import httpx2

    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    client, answer, body = _client(), _Answer(), bytearray()
    try:
        # The time limits of httpx2 are for each read: a server that drips would hold us forever.
        async with (
            asyncio.timeout(endpoint.timeout),
            client,
            client.stream("POST", url, content=content, headers=headers) as response,
        ):
            answer = _Answer(response.status_code, response.headers.get("Retry-After", ""))
            if response.headers.get("Content-Encoding", "gzip").lower() not in ("gzip", "identity"):
                return answer  # several layers could unpack for hours without a byte for us
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > _MOST_BYTES:
                    return answer
        return answer._replace(body=bytes(body), whole=True)
    except (httpx2.InvalidURL, UnicodeError) as error:  # a host that no name can be
        raise ValueError(f"{endpoint.url_option} = {endpoint.url!r}: not a URL: {error}") from error
    except (httpx2.HTTPError, httpx2.StreamError, OSError):  # nobody there, too slow, or cut off
        return answer


def _client() -> "httpx2.AsyncClient":
    """Return a client with the environment's proxy and certificates."""
    import httpx2

    try:
        return httpx2.AsyncClient(verify=_certificates(), timeout=None, follow_redirects=False)
    except (ValueError, OSError, ImportError, httpx2.InvalidURL) as error:
        # Its text, and a trace with it, could show the proxy's password.
        raise ValueError(
            f"the environment's proxy or certificates cannot be used ({type(error).__name__}):"
            " check $HTTP_PROXY, $HTTPS_PROXY, $ALL_PROXY, $NO_PROXY, $SSL_CERT_FILE and"
            " $SSL_CERT_DIR"
        ) from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    import httpx2

    return httpx2.create_ssl_context()


def _lack(endpoint: Endpoint, key: str, answer: _Answer) -> str:
    """Say what an answer lacks, which is no refusal and cannot be read."""
    if not answer.status:
        return f"no answer: nobody there, or not within {endpoint.timeout:g} s"
    what = f"HTTP {answer.status} {_phrase(answer.status)}".strip()
    if answer.status == 200:
        return f"{what}, cut off, packed as nobody asked, or above {_MOST_BYTES:,} bytes"
    return what + _said(key, answer)


def _refusal(endpoint: Endpoint, key: str, answer: _Answer) -> str:
    hint = "; redirects are not followed" if 300 <= answer.status < 400 else ""
    return (
        f"{endpoint.who} at {endpoint.url} refuses requests: HTTP {answer.status}"
        f" {_phrase(answer.status)}{hint}; check {endpoint.url_option}, {endpoint.model_option} and"
        f" ${endpoint.key_variable}" + _said(key, answer)
    )


def _said(key: str, answer: _Answer) -> str:
    """Return the start of what the server said: without the key or control codes."""
    said = answer.body.decode("utf-8", "replace")
    said = said.replace(key, "***") if key else said
    said = "".join(c if c.isprintable() else " " for c in said[:300])
    return f". It said: {said}" if said.strip() else ""


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""
