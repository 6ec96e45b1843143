"""Streams for the scanner, well-formed and spoilt, each with cuts, from a seed.

A stream is messages in a row by the grammar of RFC 9112, mostly small, now and then
near a limit of bpf/scanner.h; most streams are then spoilt in a place or two. The same
seed gives the same cases, on every machine.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from podspan.agent.http_head import MAX_HEAD, MAX_METHOD
from podspan.agent.kernel import grammar
from unit.native.scanner import SOURCE

T = TypeVar("T")


class Case(NamedTuple):
    """One stream, and where its bytes are cut."""

    data: bytes
    is_response: bool
    after_head: bool  # it answers HEAD
    cuts: tuple[int, ...]  # ascending; a piece may be empty


# In a pool an entry is as likely as it is often.
METHODS = [
    *[b"GET"] * 18,
    *[b"POST"] * 12,
    *(b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"CONNECT", b"!", b"x-y_z.1~"),
    *(b"M" * (MAX_METHOD - 1), b"M" * MAX_METHOD, b"M" * (MAX_METHOD + 1)),
]
TARGETS = [
    *[b"/", b"/orders/17?full=1&x=%20", b"/a"] * 8,
    *(b"*", b"http://shop:8080/cart", b"shop:443", b"/\xc3\xa9\x80\xff", b"/~|{}^`"),
    *(b"/" + b"t" * size for size in (254, 255, 256, 300)),
]
EMPTY_LINES = [*[b""] * 20, b"\r\n", b"\r\n\r\n"]
VERSIONS = [
    *[b"HTTP/1.1"] * 40,
    *[b"HTTP/1.0"] * 3,
    *(b"HTTP/1.9", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1"),
]
STATUSES = [
    *[b"200"] * 24,
    *(b"100", b"101", b"103", b"199", b"201", b"204", b"204", b"206", b"301", b"304"),
    *(b"304", b"404", b"500", b"503", b"000", b"007", b"999", b"99", b"2000"),
]
REASONS = [*[b" OK"] * 6, b" ", b"", b" Not Found", b" \xff\x01\t x "]

KEPT = grammar.text_fields(SOURCE)
KNOWN = [name.encode() for name in grammar.HEADERS]
TRACING = [name for name in KNOWN if b"b3" in name]
NEARLY = [b"hos", b"hostx", b"x-b3-traceidx", b"content-length-of-the-rest-of-it"]
OTHERS = [b"Accept", b"Cookie", b"x", b"!#$%&'*+-.^_`|~0", b"n" * 23, b"n" * 24]
FREE = [name for name in KNOWN if grammar.HEADERS[name.decode()][3]]
# Names whose value may be anything; framing headers come apart.
NAMES = [*FREE * 4, *TRACING * 2, *NEARLY, *OTHERS]

TRACE_ID = b"463ac35c9f6413ad48485a3953bb6124"
PLAIN = [
    *(TRACE_ID, TRACE_ID[:16], b"0020000000000001", b"1", b"0", b"d", b"true"),
    *(b"7f1c5b6e-1234-4abc-8def-0123456789ab", b"shop.default:8080", b"curl/8 (a b)"),
    *(b"", b"", b"a\tb  c", b"\xc3\xa9", b":", b"chunked", b"5"),
    TRACE_ID + b"-a2fb4a1d1a96d312-1-0020000000000001",
    b"00-" + TRACE_ID + b"-a2fb4a1d1a96d312-01",
]
BLANKS = [*[b" "] * 12, *[b""] * 4, b"\t", b"  ", b" \t "]
BLANKS_AFTER = [*[b""] * 12, b" ", b"\t", b" \t "]
NUMBERS = [*[b"%d"] * 24, b"0%d", b"%018d", b"%019d", b"%dx", b"+%d", b"%d, 1", b"%d 1"]
HUGE = [b"9" * 17, b"9" * 18, b"9" * 19, b"4294967295", b"4294967299", b""]
CODINGS = [
    *[b"chunked"] * 8,
    *(b"Chunked", b"CHUNKED", b"chunke", b"chunkedx", b"chunked x", b"gzip", b""),
    *(b"gzip, chunked", b"chunked, gzip", b"identity", b"cHuNkEd"),
]
SIZES = [*[b"%x"] * 12, b"%X", b"%03x", b"%08x", b"%014x", b"%015x", b"%016x"]
EXTENSIONS = [
    *[b""] * 24,
    *[b";a=b", b" ", b"\t", b";", b" ;q=\xff", b'; a="b;c"'] * 2,
    *(b";\0", b";a\n"),
]
HUGE_CHUNKS = [b"f" * 15, b"f" * 16, b"FFFFFFFF", b"100000005", b"aBcDeF012345678"]
TRAILERS = [
    *[b""] * 12,
    b"T: v\r\n",
    b"A: b\r\nContent-Length: 9\r\n",
    b"\x00\r\n",
    b" ",
]
FRAMINGS = [
    *["none"] * 10,
    *["length"] * 10,
    *["chunked"] * 8,
    *["length twice", "lengths differ", "any length", "any coding", "two codings"],
    *["both framings", "wrong length"],
]
HOSTILE = [
    *(b"\r", b"\n", b"\r\n", b"\n\r", b"\0", b" ", b"\t", b":", b";", b"\r\n\r\n"),
    *(b"g", b"0", b"\x7f", b"\x80", b"\x01", b",", b"\r\n ", b"\r\r", b"HTTP/1."),
]
COUNTS = [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12]
PIPELINED = [1, 1, 1, 1, 2, 2, 3, 5]
SPOILT = [0, 0, 0, 0, 0, 1, 1, 1, 2, 3]
CUTS = [0, 1, 1, 2, 2, 3, 5, 9]
LONG = 0.015  # share of streams
MANY = 270  # repeated lines: more than a byte can count

_STRUCTURE = re.compile(rb"[\r\n:; ]")


def cases(seed: str, count: int) -> Iterator[Case]:
    """`count` cases of `seed`; those of a smaller count are the first of a larger."""
    generator = _Generator(seed)
    return (generator.case() for _ in range(count))


class _Generator:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._unit = self._random.random
        self._earlier = b""  # a stream to take a piece of

    def case(self) -> Case:
        is_response = self._unit() < 0.4
        if self._unit() < 0.03:
            data = self._noise(is_response)
        else:
            data = self._messages(is_response)
        untouched = data
        for _ in range(self._pick(SPOILT)):
            data = self._spoilt(data)
        if len(untouched) < 1000:
            self._earlier = untouched
        return Case(data, is_response, self._unit() < 0.15, self._cuts(data))

    def _pick(self, pool: Sequence[T]) -> T:
        return pool[int(self._unit() * len(pool))]

    def _below(self, limit: int) -> int:
        return int(self._unit() * limit)

    def _noise(self, is_response: bool) -> bytes:
        """Random bytes, at once or after a good start."""
        start = self._start(is_response) if self._unit() < 0.7 else b""
        return start + self._random.randbytes(self._below(40))

    def _messages(self, is_response: bool) -> bytes:
        long = self._unit() < LONG
        count = self._pick(PIPELINED)
        spoken = self._below(count) if long else -1
        return b"".join(
            self._message(is_response, long=i == spoken) for i in range(count)
        )

    def _start(self, is_response: bool) -> bytes:
        pick = self._pick
        if is_response:
            return pick(VERSIONS) + b" " + pick(STATUSES) + pick(REASONS) + b"\r\n"
        before = pick(EMPTY_LINES) + pick(METHODS)
        return before + b" " + pick(TARGETS) + b" " + pick(VERSIONS) + b"\r\n"

    def _message(self, is_response: bool, long: bool) -> bytes:
        lines = [self._line() for _ in range(self._pick(COUNTS))]
        if lines and self._unit() < 0.15:
            lines.append(self._repeated(self._pick(lines)))
        framing, body = self._framed(long)
        for line in framing:
            lines.insert(self._below(len(lines) + 1), line)
        start = self._start(is_response)
        if long:
            self._fill(lines, len(start.lstrip(b"\r\n")))
        return start + b"".join(lines) + b"\r\n" + body

    def _line(self) -> bytes:
        name = self._pick(NAMES)
        return self._line_of(name, self._value(name))

    def _line_of(self, name: bytes, value: bytes) -> bytes:
        before, after = self._pick(BLANKS), self._pick(BLANKS_AFTER)
        return self._cased(name) + b":" + before + value + after + b"\r\n"

    def _repeated(self, line: bytes) -> bytes:
        """The same header once or more, with values of its own or the same."""
        name = line.partition(b":")[0]
        again = [line, self._line_of(name, self._value(name.lower()))]
        return b"".join(again[: self._pick([1, 2, 2])]) * self._pick([1, 1, 1, 2, 3])

    def _cased(self, name: bytes) -> bytes:
        kind = self._unit()
        if kind < 0.4:
            return name
        if kind < 0.7:
            return name.title()
        if kind < 0.9:
            return name.upper()
        return bytes(
            byte ^ 32 if 97 <= byte <= 122 and self._unit() < 0.5 else byte
            for byte in name
        )

    def _value(self, name: bytes) -> bytes:
        kind = self._unit()
        if kind < 0.87:
            return self._pick(PLAIN)
        if kind < 0.96:
            field = grammar.HEADERS.get(name.decode(), (None,) * 4)[3]
            size = KEPT[field][1] if field else 20
            return b"v" * (size + self._below(3) - 1)
        return self._random.randbytes(self._below(12))

    def _framed(self, long: bool) -> tuple[list[bytes], bytes]:
        """Header lines that frame a body, rightly or not, and the body."""
        kind = self._pick(FRAMINGS)
        if kind == "none":
            return [], b""
        if kind == "any length":
            return [self._length(0, self._pick(HUGE))], b""
        chunked = self._line_of(b"transfer-encoding", b"chunked")
        if kind in ("chunked", "any coding", "two codings"):
            other = self._line_of(
                b"transfer-encoding", self._nearly(self._pick(CODINGS))
            )
            lines = {"chunked": [chunked], "any coding": [other]}
            return lines.get(kind, [chunked, other]), self._chunks(long)
        body = self._body(long)
        size = len(body)
        if kind == "wrong length":
            size = max(0, size + self._below(5) - 2)
        lengths = [self._length(size)]
        if kind == "length twice":
            lengths.append(self._length(size))
        if kind == "lengths differ":
            lengths.append(self._length(size + self._below(2)))
        if kind == "both framings":
            return [*lengths, chunked], self._chunks(long)
        return lengths, body

    def _nearly(self, text: bytes) -> bytes:
        """As it is, or with a hostile byte or two."""
        if self._unit() < 0.9:
            return text
        at = self._below(len(text) + 1)
        return text[:at] + self._pick(HOSTILE) + text[at:]

    def _length(self, size: int, digits: bytes = b"") -> bytes:
        number = digits or self._pick(NUMBERS) % size
        return self._line_of(b"content-length", number)

    def _body(self, long: bool) -> bytes:
        if long and self._unit() < 0.3:
            return self._random.randbytes(20_000)
        if self._unit() < 0.1:
            return b"GET / HTTP/1.1\r\n\r\n"
        return self._random.randbytes(self._below(30))

    def _chunks(self, long: bool) -> bytes:
        chunks = []
        for _ in range(self._below(4)):
            data = self._body(long) or b"x"
            size = self._pick(SIZES) % len(data) + self._pick(EXTENSIONS)
            chunks += [self._nearly(size), b"\r\n", data, b"\r\n"]
        if self._unit() < 0.03:
            return b"".join(chunks) + self._pick(HUGE_CHUNKS) + b"\r\nabc"
        last = [b"0" * self._pick([*[1] * 10, 15, 16]), self._pick(EXTENSIONS), b"\r\n"]
        return b"".join([*chunks, *last, self._pick(TRAILERS), b"\r\n"])

    def _fill(self, lines: list[bytes], start: int) -> None:
        """Make the head about as long as it may be."""
        if self._unit() < 0.3:
            lines.append(self._line_of(self._pick(TRACING), b"1") * MANY)
        wanted = MAX_HEAD + self._pick([-1, 0, 0, 1, 1, 2])
        room = wanted - start - sum(map(len, lines)) - 2
        if room > 1000 and self._unit() < 0.1:
            lines.append(b"A: b\r\n" * (room // 8))
            room -= len(lines[-1])
        if room > 4:
            lines.insert(
                self._below(len(lines) + 1), b"A:" + b"a" * (room - 4) + b"\r\n"
            )

    def _place(self, data: bytes) -> int:
        """A place in `data`, as often as not where lines and fields begin and end."""
        at = self._below(len(data) + 1)
        if self._unit() < 0.5 and (match := _STRUCTURE.search(data, at)):
            return match.start() + self._below(2)
        return at

    def _spoilt(self, data: bytes) -> bytes:
        """Insert, replace, leave out, truncate, repeat, swap or splice at one place."""
        at = self._place(data)
        end = at + self._below(30)
        middle = at + (end - at) // 2
        kind = self._unit()
        if kind < 0.3:
            there = self._pick(HOSTILE) + data[at:]
        elif kind < 0.4:
            there = self._random.randbytes(1) + data[at + 1 :]
        elif kind < 0.6:
            there = data[at + self._pick([1, 1, 2, 5, 20]) :]
        elif kind < 0.7:
            there = b""
        elif kind < 0.8:
            there = data[at:end] + data[at:]
        elif kind < 0.9:
            there = data[middle:end] + data[at:middle] + data[end:]
        else:
            there = self._earlier[self._place(self._earlier) :]
        return data[:at] + there

    def _cuts(self, data: bytes) -> tuple[int, ...]:
        count = self._pick(CUTS)
        return tuple(sorted(self._place(data) for _ in range(count)))
