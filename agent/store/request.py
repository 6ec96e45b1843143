"""A request as the store reads it, strictly, and an answer as WSGI wants it.

Whoever reaches the port is not trusted. What cannot be read without guessing is
refused: percent signs that encode nothing, texts that are not UTF-8, NUL.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl

# As received, and unpacked.
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
MAX_UNPACKED_BYTES: Final = 64 * 1024 * 1024

# A gzip file may have several members, and each costs time, also an empty one.
MAX_MEMBERS: Final = 64

MAX_PARAMETERS: Final = 64

# PEP 3333: the headers that are in the environment without HTTP_.
UNPREFIXED: Final = ("Content-Type", "Content-Length")

PLAIN_TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"

_integer = re.compile(r"[+-]?[0-9]{1,19}").fullmatch
_bad_percent = re.compile(r"%(?![0-9A-Fa-f]{2})").search


class Refusal(Exception):
    """The request is not answered, with this status and for this reason."""

    def __init__(
        self, status: HTTPStatus, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class Response:
    """What to answer."""

    body: bytes = b""
    content_type: str = JSON
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


class Request:
    """One request, over its WSGI environment."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        """Raise Refusal where the path or the query cannot be read."""
        self._environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.query_text: str = environ.get("QUERY_STRING", "")
        # The server decodes the path, and leaves alone what is no encoding.
        if _bad_percent(environ["REQUEST_URI"]):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Invalid percent-encoding")
        self.path = _path(environ["PATH_INFO"])
        self._query = _parameters(self.query_text)

    def header(self, name: str) -> str:
        """Return a header's value; "" where it was not sent."""
        key = name.upper().replace("-", "_")
        if name not in UNPREFIXED:
            key = f"HTTP_{key}"
        value: str = self._environ.get(key, "")
        return value.strip()

    def text(self, name: str) -> str:
        """Return a parameter; "" where it is not there."""
        return self._query.get(name, "")

    def required(self, name: str) -> str:
        """Return a parameter, which has to be there; it may be empty."""
        if name not in self._query:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"Mandatory parameter is missing: {name}"
            )
        return self._query[name]

    def integer(self, name: str) -> int | None:
        """Return a parameter that is an integer of 64 bits; None where it is empty."""
        text = self.text(name)
        if not text:
            return None
        if not _integer(text) or not -(2**63) <= int(text) < 2**63:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"{name} is no integer: {text[:64]!r}"
            )
        return int(text)

    def body(self) -> bytes:
        """Return the body as it was sent; Refusal where it is too large."""
        body: bytes = self._environ["wsgi.input"].read(MAX_BODY_BYTES + 1)
        if len(body) > MAX_BODY_BYTES:
            raise _too_large(f"more than {MAX_BODY_BYTES} bytes")
        return body

    def unpacked(self, body: bytes, limit: int) -> bytes | None:
        """Return what the body says; None for more than `limit` bytes."""
        encoding = self.header("Content-Encoding").lower()
        if encoding in ("", "identity") or not body:
            return body if len(body) <= limit else None
        if encoding not in ("gzip", "x-gzip"):
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "Content-Encoding is neither gzip nor identity",
            )
        return gunzip(body, limit)


def gunzip(packed: bytes, limit: int) -> bytes | None:
    """Return what is packed; None for more than `limit` bytes. Refusal: no gzip."""
    unpacked = bytearray()
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            unpacked += inflater.decompress(packed, limit - len(unpacked) + 1)
        except zlib.error as exc:
            raise Refusal(HTTPStatus.BAD_REQUEST, "Cannot gunzip spans") from exc
        if len(unpacked) > limit:
            return None
        if not inflater.eof:
            raise Refusal(HTTPStatus.BAD_REQUEST, "Cannot gunzip spans: cut short")
        packed = inflater.unused_data
        if not packed:
            return bytes(unpacked)
    raise _too_large(f"more than {MAX_MEMBERS} gzip members")


def _too_large(what: str) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is too large: {what}"
    )


def _path(decoded: str) -> str:
    """Return the path of PATH_INFO, which holds a byte in each character."""
    try:
        path = decoded.encode("latin-1").decode()
    except UnicodeDecodeError as exc:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The path is not UTF-8") from exc
    if "\0" in path:
        raise Refusal(HTTPStatus.BAD_REQUEST, "NUL in the path")
    return path


def _parameters(query: str) -> dict[str, str]:
    """Return each parameter's first value."""
    try:
        pairs = parse_qsl(
            query.encode("latin-1").decode(),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except UnicodeDecodeError as exc:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The query is not UTF-8") from exc
    except ValueError as exc:
        raise Refusal(HTTPStatus.BAD_REQUEST, "Too many parameters") from exc
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if "\0" in name or "\0" in value:
            raise Refusal(HTTPStatus.BAD_REQUEST, "NUL in the query")
        parameters.setdefault(name, value)
    return parameters
