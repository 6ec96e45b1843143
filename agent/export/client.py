"""POST to one destination: one request at a time, on a connection that is kept open.

What proves who we are is read again when its file changes: mounted secrets rotate.
"""

from __future__ import annotations

import logging
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import unquote, urlsplit

import urllib3
from podspan.agent.errors import UsageError
from podspan.agent.export.destination import (
    Destination,
    headers_from_file,
    tls_context,
)

log = logging.getLogger(__name__)

# Of an answer, which is an empty message or says what is wrong.
MAX_ANSWER_BYTES = 64 * 1024

# A word of a header that is shorter is `Bearer`, or nobody's secret.
SECRET_LEAST = 7

# Tell a mesh, and our own kernel programs, not to trace the upload of traces.
UNTRACED = {"b3": "0", "x-b3-sampled": "0"}

T = TypeVar("T")


class NoAnswer(Exception):
    """The destination was not reached, or did not answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # its first MAX_ANSWER_BYTES


class Fresh(Generic[T]):
    """A value made of files, made again when one of them changes.

    A file that is then missing or wrong leaves the value as it was: it may be in the
    middle of its change.
    """

    def __init__(self, make: Callable[[], T], *files: Path | None) -> None:
        self._make = make
        self._files = [path for path in files if path is not None]
        self._seen = self._stamps()
        self._value = make()

    def get(self) -> T:
        """Return the value as the files have it now."""
        stamps = self._stamps()
        if stamps != self._seen:
            self._seen = stamps
            try:
                self._value = self._make()
            except UsageError as exc:
                log.warning("%s; going on as before: hint=%r", exc, exc.hint)
        return self._value

    def _stamps(self) -> list[tuple[int, ...]]:
        stamps: list[tuple[int, ...]] = []
        for path in self._files:
            try:
                stat = path.stat()
            except OSError:
                stamps.append((0,))
            else:
                stamps.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
        return stamps


class Client:
    """Sends requests to one destination."""

    def __init__(self, destination: Destination) -> None:
        """Read all files once; raises UsageError."""
        self._url = destination.url
        file = destination.headers_file

        def headers() -> dict[str, str]:
            given = {name.lower(): text for name, text in destination.headers.items()}
            return given | (headers_from_file(file) if file else {})

        self._headers = Fresh(headers, file)
        self._tls = Fresh(
            lambda: tls_context(destination),
            destination.ca_file,
            destination.cert_file,
            destination.key_file,
        )
        self._pool_tls: ssl.SSLContext | None = None
        self._pool: urllib3.PoolManager | None = None

    def post(self, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
        """Send one request; raises NoAnswer."""
        pool = self._connections()
        until_s = time.monotonic() + timeout_s
        try:
            response = pool.request(
                "POST",
                self._url,
                body=body,
                headers={**self._headers.get(), **headers, **UNTRACED},
                timeout=urllib3.Timeout(total=timeout_s),
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except urllib3.exceptions.HTTPError as exc:
            raise NoAnswer(_reason(exc)) from exc
        names = {name.lower(): text for name, text in response.headers.items()}
        return Answer(response.status, names, _start_of(response, until_s))

    def redacted(self, text: str) -> str:
        """Return a text of the destination's, or of the library's, without secrets."""
        secrets = []
        for value in (urlsplit(self._url).query, *self._headers.get().values()):
            for form in (value, unquote(value)):
                secrets += [form, *re.split(r"[\s=,;&]+", form)]
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= SECRET_LEAST:
                text = text.replace(secret, "...")
        return text

    def close(self) -> None:
        """Close the connection."""
        if self._pool is not None:
            self._pool.clear()

    def _connections(self) -> urllib3.PoolManager:
        tls = self._tls.get()
        if self._pool is None or tls is not self._pool_tls:
            self.close()
            self._pool = urllib3.PoolManager(maxsize=1, retries=False, ssl_context=tls)
            self._pool_tls = tls
        return self._pool


def _start_of(response: urllib3.BaseHTTPResponse, until_s: float) -> bytes:
    """Return the first MAX_ANSWER_BYTES of the body, as far as they come in time.

    The status has answered: a body that breaks off is no reason to send again. One that
    goes on is not waited for; that connection is not used again.
    """
    start = b""
    try:
        while part := response.read1(MAX_ANSWER_BYTES + 1 - len(start)):
            start += part
            if len(start) > MAX_ANSWER_BYTES or time.monotonic() >= until_s:
                response.close()
                break
    except urllib3.exceptions.HTTPError:
        response.close()
    finally:
        response.release_conn()
    return start[:MAX_ANSWER_BYTES]


def _reason(exc: urllib3.exceptions.HTTPError) -> str:
    """Return what urllib3 means, without its objects' addresses."""
    text = str(exc)
    return text.rpartition(": ")[2] if "object at 0x" in text else text
