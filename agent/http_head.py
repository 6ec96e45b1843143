"""Parse the head of an HTTP/1.x message, strictly.

The bytes so far in, a head out. The kernel's byte scanner (bpf/scanner.h) is
tested against this module, so every rule is explicit; RFC 9112 unless noted.

Head (section 2.1)
- CRLFs before a request line are skipped (section 2.2); before a status line not.
- A head is at most 16384 bytes, without what is skipped before it.
- Request line: METHOD SP TARGET SP "HTTP/1." DIGIT CRLF. METHOD: 1 to 16 token
  characters. TARGET: at least one byte of 0x21-0x7e or 0x80-0xff.
- Status line: "HTTP/1." DIGIT SP 3DIGIT [SP REASON] CRLF.
- Header line: NAME ":" VALUE CRLF. NAME: at least one token character (RFC 9110
  section 5.6.2), so neither a space before the colon nor a folded line passes.
- VALUE and REASON: any byte but NUL, CR and LF. Spaces and tabs around VALUE are not
  part of it.
- A line ends in CRLF: a bare CR or LF is malformed anywhere.
- A byte that cannot be right is reported when it is there, not when its line ends: of
  every malformed input there is one shortest malformed prefix.

Framing (section 6.3): see `body_framing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

MAX_HEAD = 16384
MAX_METHOD = 16

Headers = tuple[tuple[bytes, bytes], ...]

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]*")
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]*")
_TEXT = re.compile(rb"[^\x00\r\n]*")
# More digits might not fit the kernel's 64 bits; no body is that long.
_LENGTH = re.compile(rb"[0-9]{1,18}")
_OWS = b" \t"


class MalformedHead(ValueError):
    """The peer's bytes are no HTTP/1.x head, or its framing headers contradict."""


class _NeedMore(Exception):
    """The bytes end where more may follow. Never leaves this module."""


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head; `size` counts from the first byte given to the parser."""

    method: bytes
    target: bytes
    minor: int
    headers: Headers
    size: int


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's head; `size` counts from the first byte given to the parser."""

    minor: int
    status: int
    reason: bytes
    headers: Headers
    size: int


class Body(Enum):
    """How the end of a message's body is known."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until-close"


@dataclass(frozen=True, slots=True)
class Framing:
    """Where the body ends; `length` has a meaning for Body.LENGTH only."""

    body: Body
    length: int = 0


def parse_request(data: bytes) -> RequestHead | None:
    """Return the head at the start of `data`, or None while it may still become one."""
    scan = _Scan(data)
    try:
        scan.skip_empty_lines()
        scan.begin()
        method = scan.run(_TOKEN, "method", most=MAX_METHOD)
        scan.expect(b" ", "method")
        target = scan.run(_TARGET, "target")
        scan.expect(b" HTTP/1.", "version")
        minor = scan.digit("version")
        scan.expect(b"\r\n", "request line")
        headers = scan.headers()
    except _NeedMore:
        scan.check_room()
        return None
    return RequestHead(method, target, minor, headers, scan.at)


def parse_response(data: bytes) -> ResponseHead | None:
    """Return the head at the start of `data`, or None while it may still become one."""
    scan = _Scan(data)
    scan.begin()
    try:
        scan.expect(b"HTTP/1.", "version")
        minor = scan.digit("version")
        scan.expect(b" ", "version")
        hundreds, tens, ones = (scan.digit("status") for _ in range(3))
        reason = scan.reason()
        scan.expect(b"\r\n", "status line")
        headers = scan.headers()
    except _NeedMore:
        scan.check_room()
        return None
    status = 100 * hundreds + 10 * tens + ones
    return ResponseHead(minor, status, reason, headers, scan.at)


def values(headers: Headers, name: bytes) -> list[bytes]:
    """Return the values of every header called `name` (lower-case), in order."""
    return [value for header, value in headers if header.lower() == name]


def body_framing(
    request_method: bytes, status: int | None, headers: Headers
) -> Framing:
    """Return how the body ends; `status` is None for a request. RFC 9112 section 6.3.

    - A response to HEAD, and a response 1xx, 204 or 304, has no body whatever its
      headers say. A 2xx response to CONNECT has none either; what follows it, as what
      follows 101, is no HTTP.
    - Transfer-Encoding, all its lines taken as one list: if what follows the last
      comma is `chunked`, case aside, the body is chunked; else a response goes on
      until close and a request is malformed.
    - Transfer-Encoding and Content-Length: a request is malformed; in a response the
      first counts.
    - Content-Length: 1 to 18 digits. Lines that repeat the same number count once;
      others are malformed.
    - Neither: a request has no body, a response goes on until close.
    """
    if status is not None and (
        request_method == b"HEAD"
        or status in (204, 304)
        or 100 <= status <= 199
        or (request_method == b"CONNECT" and 200 <= status <= 299)
    ):
        return Framing(Body.NONE)

    codings = values(headers, b"transfer-encoding")
    lengths = values(headers, b"content-length")
    if codings:
        if status is None and lengths:
            raise MalformedHead("Transfer-Encoding and Content-Length")
        last = codings[-1].rpartition(b",")[2].strip(_OWS)
        if last.lower() == b"chunked":
            return Framing(Body.CHUNKED)
        if status is None:
            raise MalformedHead("Transfer-Encoding does not end in chunked")
        return Framing(Body.UNTIL_CLOSE)
    if lengths:
        return Framing(Body.LENGTH, _content_length(lengths))
    return Framing(Body.NONE if status is None else Body.UNTIL_CLOSE)


def _content_length(lengths: Iterable[bytes]) -> int:
    numbers = set()
    for text in lengths:
        if not _LENGTH.fullmatch(text):
            raise MalformedHead("Content-Length is no number of 1 to 18 digits")
        numbers.add(int(text))
    if len(numbers) > 1:
        raise MalformedHead("Content-Length is repeated and differs")
    return numbers.pop()


class _Scan:
    """A position in the bytes of a head."""

    __slots__ = ("at", "data", "full")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.full = False

    def begin(self) -> None:
        """Let the head begin here: what lies too far behind is not looked at."""
        end = self.at + MAX_HEAD
        self.full = len(self.data) > end
        self.data = self.data[:end]

    def check_room(self) -> None:
        """Raise unless the head may still go on."""
        if self.full:
            raise MalformedHead(f"head is longer than {MAX_HEAD} bytes")

    def peek(self) -> int:
        """Return the next byte."""
        if self.at == len(self.data):
            raise _NeedMore
        return self.data[self.at]

    def run(self, allowed: re.Pattern[bytes], what: str, most: int = MAX_HEAD) -> bytes:
        """Take all bytes that are allowed here: at least one, and at most `most`."""
        taken = self.text(allowed)
        if len(taken) > most:
            raise MalformedHead(f"{what} is longer than {most} bytes")
        self.peek()  # only the byte that follows shows that this was all
        if not taken:
            raise MalformedHead(f"{what} has a wrong first byte at {self.at}")
        return taken

    def digit(self, what: str) -> int:
        """Take one decimal digit."""
        digit = self.peek() - ord("0")
        if not 0 <= digit <= 9:
            raise MalformedHead(f"{what} has no digit at {self.at}")
        self.at += 1
        return digit

    def expect(self, literal: bytes, what: str) -> None:
        """Take exactly these bytes."""
        for byte in literal:
            if self.peek() != byte:
                raise MalformedHead(f"{what} has a wrong byte at {self.at}")
            self.at += 1

    def skip_empty_lines(self) -> None:
        """Take the CRLFs before a request line."""
        while self.peek() == ord("\r"):
            self.expect(b"\r\n", "empty line")

    def reason(self) -> bytes:
        """Take what stands between the status and the end of its line."""
        if self.peek() != ord(" "):
            return b""
        self.at += 1
        return self.text()

    def text(self, allowed: re.Pattern[bytes] = _TEXT) -> bytes:
        """Take all bytes that are allowed here, perhaps none."""
        start = self.at
        if match := allowed.match(self.data, start):
            self.at = match.end()
        return self.data[start : self.at]

    def headers(self) -> Headers:
        """Take header lines and the empty line that ends them."""
        headers = []
        while self.peek() != ord("\r"):
            name = self.run(_TOKEN, "header name")
            self.expect(b":", "header name")
            value = self.text().strip(_OWS)
            self.expect(b"\r\n", "header line")
            headers.append((name, value))
        self.expect(b"\r\n", "empty line")
        return tuple(headers)
