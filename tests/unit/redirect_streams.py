"""Conversations of HTTP/1 from a seed, and what has to become of them.

Built from parts that know what arrives in their place, so the model needs no parser.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from fuzz.generator import Case
from podspan.agent.exchange import FLAG_SAMPLED, Link
from podspan.agent.http_head import Headers
from podspan.agent.redirect.http1 import Http1
from podspan.agent.redirect.inject import Direction, Given, Propagation
from podspan.agent.redirect.layer import Side
from unit.context_rows import PARENT, PARENT_ID, SPAN, SPAN_ID, TRACE, TRACE_ID
from unit.native.stream_model import read_stream
from unit.redirect_relay import Relay

UUID = b"7f1c5b6e-0f5a-9f0e-9c3d-1a2b3c4d5e6f"
# What every request becomes a part of: a child of SPAN whose own id is PARENT.
GIVEN = Given(TRACE_ID, PARENT_ID, SPAN_ID, FLAG_SAMPLED, Link.HEADER, UUID)

REQUEST_ID = b"x-request-id: " + UUID
PARENT_LINE = b"x-b3-parentspanid: " + SPAN
ALL_LINES = [
    REQUEST_ID,
    b"x-b3-traceid: " + TRACE,
    b"x-b3-spanid: " + PARENT,
    PARENT_LINE,
    b"x-b3-sampled: 1",
]

# A line as it is sent, and as it arrives.
Line = tuple[bytes, bytes | None]
FORWARDED: list[Line] = [
    (b"X-B3-TraceId:" + TRACE, b"X-B3-TraceId:" + TRACE),
    (b"x-b3-SPANID: \t" + SPAN + b" \t", b"x-b3-SPANID: \t" + PARENT + b" \t"),
    (b"X-B3-Sampled:", b"X-B3-Sampled:1"),
    (b"X-B3-SpanId: " + PARENT, None),
]
OTHERS = [
    *(b"Host: shop:80", b"Accept:", b"X-Tab:\ta \t", b"cookie: x-b3-spanid: 1; b3=0"),
    *(b"User-Agent: \xc3\xa9\x80\xff\x01", b"x-b3: 1", b"aCCept-Language:en"),
]
METHODS = [*[b"GET"] * 4, *[b"POST"] * 3, b"HEAD", b"PUT", b"DELETE", b"M" * 16]
MALFORMED = [
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
    b"GET / HTTP/2.0\r\n\r\n",
    b"GET /\r\n",
    b"\x16\x03\x01\x02\x00",
    b"SET a b\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"a" * 16384,
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"
    b"\r\n0\r\n\r\n",
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
]
BAD_CHUNKS = [
    *(b"\r\n", b"1\na\r\n", b"1\r\nab\r\n", b"g\r\n", b"-1\r\n", b" 1\r\na\r\n"),
    *(b"1;\0\r\na\r\n", b"0\r\nA: b\n\r\n", b"0000000000000001\r\na\r\n", b"1x\r\n"),
    b"1;" + b"x" * 16384 + b"\r\na\r\n0\r\n\r\n",
]
BAD_RESPONSES = [
    *(b"HTTP/2 200\r\n\r\n", b"\r\nHTTP/1.1 200\r\n\r\n", b"SSH-2.0-x\r\n"),
    b"HTTP/1.1 200\nContent-Length: 0\n\n",
    b"HTTP/1.1 200\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"HTTP/1.0 200\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    b"HTTP/1.1 200\r\nA: " + b"a" * 16384,
]
ANOTHER = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


class Part(NamedTuple):
    """Bytes from DOWN, and what arrives once all of them are there.

    Of a head nothing arrives before, of other parts byte by byte.
    """

    sent: bytes
    arrives: bytes
    is_head: bool = False


class After(NamedTuple):
    """Bytes from `at` on may come once the other side has sent `others`."""

    at: int
    others: int


@dataclass
class Conversation:
    """Two streams, when their bytes may come, and what has to become of them."""

    parts: list[Part] = field(default_factory=list)
    down: bytes = b""
    up: bytes = b""
    after: dict[Side, list[After]] = field(
        default_factory=lambda: {Side.DOWN: [], Side.UP: []}
    )
    borders: dict[Side, set[int]] = field(
        default_factory=lambda: {Side.DOWN: {0}, Side.UP: {0}}
    )
    known: set[int] = field(default_factory=set)  # offsets of heads with a context
    asked: list[int] = field(default_factory=list)  # offsets of all heads
    given: list[int] = field(default_factory=list)  # offsets that were asked for
    counts: Counter[str] = field(default_factory=Counter)
    opaque: bool = False
    vague_from: int | None = None  # where what is held is not for the model to say

    @property
    def arrives(self) -> bytes:
        return b"".join(part.arrives for part in self.parts)

    def give(self, offset: int, headers: Headers) -> Given | None:
        """As the layer asks for it."""
        self.given.append(offset)
        return GIVEN if offset in self.known else None

    def arrived_of(self, size: int) -> bytes:
        """What has arrived when `size` bytes have come from DOWN."""
        arrived = []
        for part in self.parts:
            if size >= len(part.sent):
                arrived.append(part.arrives)
            elif not part.is_head:
                arrived.append(part.sent[:size])
            size = max(0, size - len(part.sent))
        return b"".join(arrived)

    def say(self, sent: bytes, arrives: bytes | None = None) -> None:
        """DOWN sends; `arrives` where it is a head."""
        is_head = arrives is not None
        self.parts.append(Part(sent, sent if arrives is None else arrives, is_head))
        self.down += sent

    def answer(self, data: bytes) -> None:
        self.up += data

    def wait(self, side: Side) -> None:
        """What `side` sends next comes after all that the other has sent so far."""
        place = After(len(self.down), len(self.up))
        if side is Side.UP:
            place = After(place.others, place.at)
        self.after[side].append(place)

    def border(self, side: Side) -> None:
        self.borders[side].add(len(self.down if side is Side.DOWN else self.up))


class Builder:
    """Makes one conversation."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.it = Conversation()

    def build(self) -> Conversation:
        for _ in range(self.rng.randrange(4)):
            self.exchange()
        ends: list[Callable[[], None]] = [
            *(self.nothing, self.tunnel, self.connect, self.until_close),
            *(self.unfinished, self.malformed, self.early, self.bad_chunks),
            *(self.bad_response, self.unasked, self.refused),
        ]
        self.rng.choice(ends)()
        return self.it

    def exchange(self) -> None:
        rng, it = self.rng, self.it
        for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
            it.say(b"\r\n", b"\r\n")  # as a head: half of it waits
        kind = rng.choice(["plain"] * 5 + ["upgrade refused", "CONNECT refused"])
        framing, body = self.body()
        if kind == "CONNECT refused":
            method, framing, body = b"CONNECT", [], b""
        else:
            method = rng.choice(METHODS)
        if kind == "upgrade refused":
            framing.append(b"uPGRADE: h2c")
        expects = bool(body) and rng.random() < 0.3
        if expects:
            framing.append(b"Expect: 100-continue")
        self.request(method, framing)
        it.wait(Side.UP)
        if expects:
            it.answer(b"HTTP/1.1 100 Continue\r\n\r\n")
            it.border(Side.UP)
            it.wait(Side.DOWN)
        if body:
            it.say(body)
        it.border(Side.DOWN)
        self.response(method)
        if kind != "plain":
            it.wait(Side.DOWN)

    def request(self, method: bytes, lines: Iterable[bytes]) -> None:
        """A head; it may have a context, and one may be known."""
        rng, it = self.rng, self.it
        others = rng.sample(OTHERS, rng.randrange(4))
        pairs: list[Line] = [(line, line) for line in [*others, *lines]]
        more = ALL_LINES
        if rng.random() < 0.4:
            for pair in FORWARDED:
                pairs.insert(rng.randrange(len(pairs) + 1), pair)
            # Whichever comes first is the one that counts.
            spans = [
                i for i, (line, _) in enumerate(pairs) if b"-spanid:" in line.lower()
            ]
            spans = [i for i in spans if pairs[i] in FORWARDED]
            if pairs[spans[0]] != FORWARDED[1]:
                pairs[spans[0]], pairs[spans[1]] = pairs[spans[1]], pairs[spans[0]]
            more = [REQUEST_ID, PARENT_LINE]
        start = b"%b /%b HTTP/1.%d" % (
            method,
            b"t" * rng.randrange(9),
            rng.randrange(2),
        )
        if any(line.lower().startswith(b"transfer-encoding") for line in lines):
            start = start[:-1] + b"1"
        sent = [start, *(line for line, _ in pairs), b"", b""]
        kept = [line for _, line in pairs if line is not None]
        arrives = [start, *kept, *more, b"", b""]
        offset = len(it.down) + len(b"\r\n".join(sent))
        it.asked.append(offset)
        if rng.random() < 0.8:
            it.known.add(offset)
        else:
            arrives = sent
            it.counts["no_context"] += 1
        it.say(b"\r\n".join(sent), b"\r\n".join(arrives))

    def body(self) -> tuple[list[bytes], bytes]:
        """Header lines that frame a body, and the body."""
        kind = self.rng.randrange(4)
        if kind < 2:
            return [], b""
        if kind == 2:
            body = self.content()
            return [b"content-LENGTH: %d" % len(body)], body
        return [b"Transfer-Encoding:CHUNKED"], self.chunks()

    def content(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.2:
            return ANOTHER * rng.randrange(3)
        return rng.randbytes(rng.choice([0, 1, 5, 40, 40, 3000]))

    def chunks(self) -> bytes:
        rng = self.rng
        chunks = []
        for _ in range(rng.randrange(4)):
            content = self.content() or b"x"
            extension = rng.choice([b"", b"", b";a=b", b" ;", b"\t"])
            chunks.append(b"%X%b\r\n%b\r\n" % (len(content), extension, content))
        trailers = rng.choice([b"", b"", b"A: b\r\n", b"x-b3-sampled: 0\r\nC: d\r\n"])
        return b"".join([*chunks, b"00;last\r\n", trailers, b"\r\n"])

    def response(self, method: bytes) -> None:
        """An answer that is not the last on the connection."""
        rng, it = self.rng, self.it
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            it.answer(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n")
            it.border(Side.UP)
        framing, body = self.body()
        bodiless = rng.random() < 0.2 and method != b"CONNECT"
        status = rng.choice([204, 304]) if bodiless else rng.choice([200, 404, 503])
        if method == b"CONNECT":
            status = 407
        if bodiless or method == b"HEAD":
            framing, body = [b"Content-Length: 5"] * (status != 204), b""
        elif not framing:
            framing = [b"Content-Length: 0"]
        lines = [b"HTTP/1.1 %d" % status, b"Server: a", *framing, b"", b""]
        it.answer(b"\r\n".join(lines) + body)
        it.border(Side.UP)

    def vague(self) -> None:
        """From here on it is not said what is held back, only what arrives."""
        self.it.vague_from = len(self.it.down)

    def ends_opaque(self, reason: str = "") -> None:
        self.it.opaque = True
        if reason:
            self.it.counts[reason] += 1
        for side in Side:
            self.it.borders[side].add(1 << 60)

    def both_talk(self) -> None:
        """Bytes that look like requests and responses, and are not."""
        self.it.say(ANOTHER * 2 + self.content())
        self.it.answer(b"HTTP/1.1 200\r\n\r\n" + self.content())

    def nothing(self) -> None:
        pass

    def tunnel(self) -> None:
        self.request(b"GET", [b"Upgrade: websocket"])
        self.it.wait(Side.UP)
        self.it.answer(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        self.it.wait(Side.DOWN)
        self.both_talk()
        self.ends_opaque()

    def connect(self) -> None:
        self.request(b"CONNECT", [b"Content-Length: 7"])
        self.it.wait(Side.UP)
        self.it.answer(b"HTTP/1.0 299 x\r\nContent-Length: 9\r\n\r\n")
        self.it.wait(Side.DOWN)
        self.both_talk()
        self.ends_opaque()

    def until_close(self) -> None:
        self.request(b"GET", [])
        self.it.wait(Side.UP)
        self.it.answer(b"HTTP/1.1 200 OK\r\n\r\n" + self.content())
        self.ends_opaque()

    def unfinished(self) -> None:
        self.vague()
        self.it.say(ANOTHER[: self.rng.randrange(1, len(ANOTHER))])

    def malformed(self) -> None:
        self.vague()
        self.it.say(self.rng.choice(MALFORMED) + ANOTHER + self.content())
        self.it.wait(Side.UP)
        self.it.answer(self.content())
        self.ends_opaque("request_unparsed")

    def early(self) -> None:
        lines = self.rng.choice([[], [b"Upgrade: x"]])
        self.request(b"GET" if lines else b"CONNECT", lines)
        self.it.say(ANOTHER + self.content())
        self.it.wait(Side.UP)
        self.it.answer(self.content())
        self.ends_opaque("request_early")

    def bad_chunks(self) -> None:
        self.request(b"POST", [b"Transfer-Encoding: chunked"])
        self.it.say(b"2\r\nab\r\n" + self.rng.choice(BAD_CHUNKS) + ANOTHER)
        self.ends_opaque("request_unparsed")

    def bad_response(self) -> None:
        self.request(b"GET", [])
        self.it.wait(Side.UP)
        self.it.answer(self.rng.choice(BAD_RESPONSES) + self.content() + b"\r\n\r\n")
        self.it.wait(Side.DOWN)
        self.both_talk()
        self.ends_opaque("response_unparsed")

    def unasked(self) -> None:
        # Half a head is there: it is let go.
        self.vague()
        self.it.say(ANOTHER[:-3])
        self.it.wait(Side.UP)
        self.it.answer(b"HTTP/1.1 408 Timeout\r\nConnection: close\r\n\r\n")
        self.it.wait(Side.DOWN)
        self.it.say(ANOTHER[-3:] + ANOTHER)
        self.ends_opaque("response_unasked")

    def refused(self) -> None:
        body = ANOTHER
        lines = [b"Expect: 100-continue", b"Content-Length: %d" % len(body)]
        self.request(b"PUT", lines)
        self.it.wait(Side.UP)
        self.it.answer(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
        self.it.wait(Side.DOWN)
        self.it.say(body + ANOTHER)
        self.ends_opaque("request_refused")


def play(it: Conversation, relay: Relay, rng: random.Random) -> None:
    """Let the bytes come in pieces, as soon or as late as they may."""
    streams = {Side.DOWN: it.down, Side.UP: it.up}
    most = rng.choice([1, 7, 100, 100_000])
    while relay.came != {side: len(stream) for side, stream in streams.items()}:
        side = rng.choice([Side.DOWN, Side.UP])
        at = relay.came[side]
        others = relay.came[side.other]
        ends = [after.at for after in it.after[side] if after.others > others]
        end = min([len(streams[side]), at + rng.randint(1, most), *ends])
        if end <= at:
            continue
        relay.feed(side, streams[side][at:end])
        assert relay.arrived[Side.DOWN] == it.up[: relay.came[Side.UP]]
        if it.vague_from is None or relay.came[Side.DOWN] <= it.vague_from:
            expected = it.arrived_of(relay.came[Side.DOWN])
            assert relay.arrived[Side.UP] == expected


def cut(data: bytes, cuts: tuple[int, ...]) -> list[bytes]:
    places = [0, *cuts, len(data)]
    return [data[begin:end] for begin, end in pairwise(places) if begin < end]


def heads_that_count(case: Case) -> list[int]:
    """Where the heads end into which may be written, by the scanner's reference."""
    ends = []
    for event in read_stream(case.data, is_response=False).events:
        if event.kind != "head":
            continue
        if event.body == "OPAQUE" or (event.body == "CHUNK_FIRST" and event.minor == 0):
            break
        ends.append(event.at)
        if event.method == b"CONNECT":
            break
    return ends


def edited_heads(case: Case) -> list[int]:
    """Where the heads end for which the layer asks; it must let pass all else."""
    offsets: list[int] = []

    def give(offset: int, headers: Headers) -> None:
        offsets.append(offset)

    relay = Relay(Http1(Direction.OUTBOUND, give, Propagation()))
    for piece in cut(case.data, case.cuts):
        relay.feed(Side.DOWN, piece)
    relay.end(Side.DOWN)
    assert relay.arrived[Side.UP] == case.data, case
    return offsets
