"""What a byte stream says, by agent/http_head.py and RFC 9112: the scanner's reference.

Gives the same `Verdict` as native/scanner.py. The heads are http_head.py's alone; what
is added here is where heads lie in a stream, and chunks (RFC 9112 section 7.1).

Two differences are accepted, and only these; each answers something that is malformed
or rare, and costs a trace, not a byte:

- Transfer-Encoding. http_head.py takes every list that ends in `chunked`; the scanner
  knows `chunked` alone. After `gzip, chunked` (or chunked twice) it follows a response
  until the connection ends, and a request no further than its head.
- Content-Length that is malformed or contradicts itself. http_head.py does not look at
  it where it decides nothing: in a response without a body, or beside
  Transfer-Encoding. The scanner stops at its first wrong byte wherever it stands.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from podspan.agent import b3, http_head
from podspan.agent.http_head import Body, Headers, MalformedHead
from podspan.agent.kernel.grammar import HEADERS, text_fields
from unit.native.scanner import AGAIN_MAX, SOURCE, Event, Value, Verdict

KEPT = text_fields(SOURCE)
BODY_STATES = {
    Body.NONE: "DONE",
    Body.CHUNKED: "CHUNK_FIRST",
    Body.UNTIL_CLOSE: "UNTIL_EOF",
}


@dataclass(frozen=True)
class _Stopped(Exception):
    """Bytes end, or stop being HTTP/1, after `at`. Never leaves this module."""

    at: int
    state: str
    skip: int = 0


def read_stream(data: bytes, is_response: bool, after_head: bool = False) -> Verdict:
    """Return what the scanner has to say of `data`; `after_head`: it answers HEAD."""
    events: list[Event] = []
    at = 0
    try:
        while True:
            at = _message(data, at, is_response, after_head, events)
            events.append(Event("message", at))
    except _Stopped as stopped:
        if stopped.state == "OPAQUE":
            events.append(Event("opaque", stopped.at))
        return Verdict(events, stopped.state, stopped.skip)


def _message(
    data: bytes, start: int, is_response: bool, after_head: bool, events: list[Event]
) -> int:
    event, framing = _head(data[start:], start, is_response, after_head)
    events.append(event)
    at = event.at
    if event.body == "OPAQUE":
        raise _Stopped(at, "OPAQUE")
    if event.body == "UNTIL_EOF":
        raise _Stopped(len(data), "UNTIL_EOF")
    if framing is Body.CHUNKED:
        return _chunks(data, at)
    missing = event.length - (len(data) - at)
    if missing > 0:
        raise _Stopped(len(data), "BODY", missing)
    return at + event.length


def _head(
    data: bytes, start: int, is_response: bool, after_head: bool
) -> tuple[Event, Body]:
    parse = http_head.parse_response if is_response else http_head.parse_request
    wrong = _first_malformed(parse, data)
    trouble = _length_trouble(data if wrong is None else data[: wrong - 1])
    if trouble is not None:
        _check_that_trouble_counts(parse, data, trouble, after_head)
        raise _Stopped(start + trouble, "OPAQUE")
    if wrong is not None:
        raise _Stopped(start + wrong, "OPAQUE")
    head = parse(data)
    if head is None:
        raise _Stopped(start + len(data), "HEAD")

    skipped = 0
    while data.startswith(b"\r\n", skipped):
        skipped += 2
    status = getattr(head, "status", None)
    asked = b"HEAD" if after_head else b"GET"
    body, length, state = Body.NONE, 0, "OPAQUE"
    try:
        framing = http_head.body_framing(asked, status, head.headers)
        body, length = framing.body, framing.length
        state = "BODY" if length else BODY_STATES.get(body, "DONE")
    except MalformedHead:
        assert not is_response or status is None
    if body is Body.CHUNKED and not _chunked_alone(head.headers):
        state = "UNTIL_EOF" if is_response else "OPAQUE"  # accepted, see above
    again = [] if is_response else _repeated_b3(data[skipped : head.size])
    event = Event(
        "head",
        start + head.size,
        size=head.size - skipped,
        minor=head.minor,
        status=status or 0,
        method=getattr(head, "method", b""),
        target=getattr(head, "target", b"")[: KEPT["target"][1]],
        headers=_first_values(data[skipped : head.size], is_response),
        again=min(len(again), 255),
        again_at=tuple(again[:AGAIN_MAX]),
        body=state,
        length=length,
    )
    return event, body


def _first_malformed(parse, data: bytes) -> int | None:
    """Length of the shortest malformed prefix."""

    def malformed(size: int) -> bool:
        try:
            parse(data[:size])
        except MalformedHead:
            return True
        return False

    if not malformed(len(data)):
        return None
    low, high = 0, len(data)  # not malformed, malformed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if malformed(middle) else (middle, high)
    return high


def _lines(head: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """(place, line, whether its CR has come) of each header line so far."""
    at = 0
    while head.startswith(b"\r\n", at):
        at += 2
    at = head.find(b"\r\n", at) + 2
    if at == 1:
        return
    while at < len(head) and head[at : at + 1] != b"\r":
        end = head.find(b"\r", at)
        yield at, head[at:end] if end >= 0 else head[at:], end >= 0
        if end < 0:
            return
        at = end + 2


def _first_values(head: bytes, is_response: bool) -> dict[str, Value]:
    """The first of each header that is kept, with its place in `head`."""
    found: dict[str, Value] = {}
    for at, line, _ in _lines(head):
        name, _, rest = line.partition(b":")
        header, _, repeats, text = HEADERS.get(
            name.lower().decode("latin-1"), (None, None, True, None)
        )
        if header is None or repeats or text in found:
            continue
        value = rest.strip(b" \t")
        place = at + len(name) + 1 + len(rest) - len(rest.lstrip(b" \t"))
        kept = b"" if is_response else value[: KEPT[str(text)][1]]
        found[str(text)] = Value(at, place if value else 0, len(value), kept)
    return found


def _repeated_b3(head: bytes) -> list[int]:
    """The places of B3 header lines that repeat one."""
    seen: set[bytes] = set()
    places = []
    for at, line, _ in _lines(head):
        name = line.partition(b":")[0].lower()
        if name in seen:
            places.append(at)
        elif name in b3.NAMES:
            seen.add(name)
    return places


_LENGTH_SO_FAR = re.compile(rb"[ \t]*(?:[0-9]{1,18}[ \t]*|)")


def _length_trouble(head: bytes) -> int | None:
    """Bytes up to where Content-Length is found malformed, or to differ."""
    first: int | None = None
    for at, line, complete in _lines(head):
        name, colon, value = line.partition(b":")
        if name.lower() != b"content-length" or not colon:
            continue
        place = at + len(name) + 1
        match = _LENGTH_SO_FAR.match(value)
        assert match
        if match.end() < len(value):
            return place + match.end() + 1
        if not complete:
            return None
        digits = value.strip(b" \t")
        if not digits or first not in (None, int(digits)):
            return place + len(value) + 1
        first = int(digits)
    return None


def _check_that_trouble_counts(parse, data: bytes, at: int, after_head: bool) -> None:
    """Where http_head.py sees a head that is well framed, it has to be accepted."""
    try:
        head = parse(data)
    except MalformedHead:
        return
    if head is None:
        return
    status = getattr(head, "status", None)
    asked = b"HEAD" if after_head else b"GET"
    try:
        framing = http_head.body_framing(asked, status, head.headers)
    except MalformedHead:
        return
    codings = http_head.values(head.headers, b"transfer-encoding")
    assert status is not None
    assert framing.body is Body.NONE or codings, "accepted, see above"


def _chunked_alone(headers: Headers) -> bool:
    codings = http_head.values(headers, b"transfer-encoding")
    return [coding.lower() for coding in codings] == [b"chunked"]


# RFC 9112 section 7.1, with at most 15 digits; what follows the size is not looked at
# if it begins with a semicolon or, as nginx takes it, a space or tab.
_HEX = re.compile(rb"[0-9A-Fa-f]*")
_TEXT = re.compile(rb"[^\0\r\n]*")


class _Chunks:
    """A position in a chunked body."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at

    def peek(self, state: str) -> bytes:
        if self.at == len(self.data):
            raise _Stopped(self.at, state)
        return self.data[self.at : self.at + 1]

    def run(self, allowed: re.Pattern[bytes]) -> bytes:
        match = allowed.match(self.data, self.at)
        assert match
        self.at = match.end()
        return match[0]

    def expect(self, literal: bytes, *states: str) -> None:
        for i, state in enumerate(states):
            if self.peek(state) != literal[i : i + 1]:
                raise _Stopped(self.at + 1, "OPAQUE")
            self.at += 1

    def size(self) -> int:
        self.peek("CHUNK_FIRST")
        start = self.at
        digits = self.run(_HEX)
        if len(digits) > 15:
            raise _Stopped(start + 16, "OPAQUE")
        if not digits:
            raise _Stopped(self.at + 1, "OPAQUE")
        state = "CHUNK_SIZE"
        if self.peek(state) in (b";", b" ", b"\t"):
            self.run(_TEXT)
            state = "CHUNK_EXTENSION"
        self.expect(b"\r\n", state, "CHUNK_LF")
        return int(digits, 16)

    def trailers(self) -> None:
        while self.peek("TRAILER_FIRST") != b"\r":
            if not self.run(_TEXT):
                raise _Stopped(self.at + 1, "OPAQUE")
            self.expect(b"\r\n", "TRAILER", "TRAILER_LF")
        self.expect(b"\r\n", "TRAILER_FIRST", "TRAILERS_LF")


def _chunks(data: bytes, at: int) -> int:
    chunks = _Chunks(data, at)
    while size := chunks.size():
        missing = size - (len(data) - chunks.at)
        if missing > 0:
            raise _Stopped(len(data), "CHUNK_DATA", missing)
        chunks.at += size
        chunks.expect(b"\r\n", "CHUNK_CR", "CHUNK_DATA_LF")
    chunks.trailers()
    return chunks.at
