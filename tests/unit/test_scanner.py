"""bpf/scanner.h against agent/http_head.py: the same verdict, however bytes are cut."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from podspan.agent.http_head import (
    Body,
    body_framing,
    parse_request,
    parse_response,
)
from podspan.agent.kernel import grammar
from unit.native.mutants import CELL_MUTANTS, SOURCE_MUTANTS, with_cell
from unit.native.scanner import SOURCE, Native, Verdict, lookup_tables
from unit.native.stream_model import read_stream

# Always the same examples: a failure is a change's, not the day's.
FUZZ = settings(derandomize=True, deadline=None, max_examples=800)

GET = b"GET / HTTP/1.1\r\n"
POST = b"POST /orders HTTP/1.1\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
TRACE = b"463ac35c9f6413ad48485a3953bb6124"
B3 = (
    b"X-B3-TraceId: " + TRACE + b"\r\nX-B3-SpanId: a2fb4a1d1a96d312\r\n"
    b"X-B3-ParentSpanId: 0020000000000001\r\nX-B3-Sampled: 1\r\nX-B3-Flags: 1\r\n"
)


def of_size(start: bytes, size: int) -> bytes:
    """A head of `size` bytes."""
    return start + b"A: " + b"a" * (size - len(start) - 7) + b"\r\n\r\n"


REQUESTS = {
    "get": GET + b"Host: x:80\r\nUser-Agent: curl/8 (a b)\r\n\r\n",
    "no headers": b"* * HTTP/1.0\r\n\r\n",
    "empty lines before": b"\r\n\r\n" + GET + b"Host: x\r\n\r\n",
    "longest method": b"ABCDEFGHIJKLMNOP / HTTP/1.9\r\n\r\n",
    "method too long": b"ABCDEFGHIJKLMNOPQ / HTTP/1.1\r\n\r\n",
    "raw UTF-8": GET + b"Host: \xc3\xa9\x80\xff\r\n\r\n",
    "target cut": b"GET /" + b"t" * 300 + b" HTTP/1.1\r\n\r\n",
    "values cut": GET
    + b"Host: %b\r\nUser-Agent: %b\r\nX-Request-Id: %b\r\n\r\n"
    % (b"h" * 65, b"u" * 300, b"r" * 41),
    "values that just fit": GET
    + b"Host: %b\r\nUser-Agent: %b\r\nX-Request-Id: %b\r\n\r\n"
    % (b"h" * 64, b"u" * 96, b"r" * 40),
    "b3": GET + B3 + b"x-request-id: 7f1c5b6e\r\n\r\n",
    "b3 upper case": GET + B3.upper() + b"\r\n",
    "b3 twice": GET + B3 + B3.replace(b"a", b"b") + b"\r\n",
    "other contexts": GET
    + b"b3: 463ac35c9f6413ad48485a3953bb6124-a2fb4a1d1a96d312-1-0020000000000001\r\n"
    + b"traceparent: 00-463ac35c9f6413ad48485a3953bb6124-a2fb4a1d1a96d312-01\r\n"
    + b"x-client-trace-id: 7f1c5b6e\r\n\r\n",
    "b3 thrice": GET + B3 * 3 + b"b3: 0\r\nB3: 1\r\nhost: a\r\nhost: b\r\n\r\n",
    "first of two is empty": GET
    + b"Host:\r\nHost: b\r\nX-B3-SpanId: \r\n"
    + B3
    + b"\r\n",
    "spaces": GET + b"Host: \t a \t b \t \r\nUser-Agent:\t\r\nX-Request-Id:r\r\n\r\n",
    "long names": GET
    + b"Content-Length-Of-The-Rest: 5\r\nHost-and-more-than-24-bytes: x\r\n"
    + b"x-b3-traceid" * 2
    + b": no\r\n"
    + b"x-b3-parentspanidx: no\r\nHos: no\r\nhostx: no\r\nHost: yes\r\n\r\n",
    "name of 24": GET + b"n" * 24 + b": 1\r\n" + b"Host" + b"n" * 20 + b": 1\r\n\r\n",
    "post": POST + b"content-length: \t 5 \t\r\n\r\nhello",
    "post of nothing": POST + b"Content-Length: 0\r\n\r\n",
    "length twice": POST + b"Content-Length: 3\r\nContent-Length: 03\r\n\r\nabc",
    "lengths differ": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "zero and no zero": POST + b"Content-Length: 0\r\nContent-Length: 1\r\n\r\na",
    "length list": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "length empty": POST + b"Content-Length: \r\n\r\n",
    "length signed": POST + b"Content-Length: +3\r\n\r\nabc",
    "length hex": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "length spaced": POST + b"Content-Length: 3 3\r\n\r\nabc",
    "18 digits": POST + b"Content-Length: 999999999999999999\r\n\r\nabc",
    "19 digits": POST + b"Content-Length: 0000000000000000003\r\n\r\nabc",
    "chunked": POST + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    "chunks of all digits": POST + CHUNKED + b"0f\r\n" + b"x" * 15 + b"\r\n"
    b"1A\r\n" + b"y" * 26 + b"\r\nb;x=1\r\n" + b"z" * 11 + b"\r\nC\t\r\n"
    b"\r\n0;final\r\n\x00\r\n\r\n000\r\n\r\n",
    "trailers": POST + CHUNKED + b"1\r\n\r\r\n0\r\nA: b\r\nContent-Length: 9\r\n\r\n",
    "empty extension": POST + CHUNKED + b"1 ;\r\na\r\n0\r\n\r\n",
    "15 chunk digits": POST + CHUNKED + b"fffffffffffffff\r\nabc",
    "16 chunk digits": POST + CHUNKED + b"0000000000000001\r\na",
    "chunk without size": POST + CHUNKED + b"\r\n",
    "chunk LF": POST + CHUNKED + b"1\na\r\n",
    "chunk wrong digit": POST + CHUNKED + b"1g\r\n",
    "chunk too long": POST + CHUNKED + b"1\r\nab\r\n",
    "chunk end": POST + CHUNKED + b"1\r\na\n",
    "extension NUL": POST + CHUNKED + b"1;\0\r\na",
    "trailer LF": POST + CHUNKED + b"0\r\nA: b\n\r\n",
    "chunked in any case": POST + b"tRANSFER-eNCODING:\tCHUNked \r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\n" + CHUNKED + b"0\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip": POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "no coding": POST + b"Transfer-Encoding:\r\n\r\nabc",
    "almost chunked": POST + b"Transfer-Encoding: chunkedx\r\n\r\n0\r\n\r\n",
    "chunke": POST + b"Transfer-Encoding: chunke\r\n\r\n0\r\n\r\n",
    "chunked x": POST + b"Transfer-Encoding: chunked x\r\n\r\n0\r\n\r\n",
    "both framings": POST + b"Content-Length: 3\r\n" + CHUNKED + b"0\r\n\r\n",
    "both framings, other way": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "pipelined": GET + b"Host: a\r\n\r\n\r\n" + POST + b"Content-Length: 2\r\n\r\nhi"
    b"PUT / HTTP/1.1\r\n" + CHUNKED + b"1\r\na\r\n0\r\n\r\n" + GET + B3 + b"\r\n" + GET,
    "LF only": b"GET / HTTP/1.1\nHost: x\n\n",
    "LF ends a header": GET + b"Host: x\n\r\n",
    "LF ends a head": GET + b"Host: x\r\n\n",
    "bare CR": GET + b"Host: x\ry\r\n\r\n",
    "bare CR at the end": GET + b"Host: x\r\n\r\r\n",
    "folded": GET + b"Host: x\r\n y\r\n\r\n",
    "space before colon": GET + b"Host : x\r\n\r\n",
    "no colon": GET + b"Host\r\n\r\n",
    "no name": GET + b": x\r\n\r\n",
    "NUL": GET + b"Host: a\0\r\n\r\n",
    "NUL first": GET + b"Host: \0\r\n\r\n",
    "NUL in target": b"GET /\0 HTTP/1.1\r\n\r\n",
    "DEL in target": b"GET /\x7f HTTP/1.1\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/1.1": b"GET / http/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "16383": of_size(GET, 16383),
    "16384": of_size(GET, 16384),
    "16385": of_size(GET, 16385),
    "16384 after an empty line": b"\r\n" + of_size(GET, 16384),
    "16385 after an empty line": b"\r\n" + of_size(GET, 16385),
    "16384 twice": of_size(GET, 16384) * 2,
    "long head, then long trailers": of_size(
        POST + b"Transfer-Encoding: chunked\r\n", 16384
    )
    + b"0\r\n"
    + b"T: t\r\n" * 9
    + b"\r\n",
}

RESPONSES = {
    "ok": OK + b"Content-Length: 5\r\n\r\nhello",
    "nothing": OK + b"Content-Length: 0\r\n\r\n",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\na",
    "empty reason": b"HTTP/1.0 404 \r\nContent-Length: 1\r\n\r\na",
    "any reason": b"HTTP/1.1 500 \x01\t\xff \r\nContent-Length: 1\r\n\r\na",
    "until close": OK + b"Server: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\na",
    "304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n" + OK,
    "100": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\na",
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + CHUNKED + b"0\r\n\r\n",
    "chunked": OK + CHUNKED + b"3\r\nabc\r\n0\r\nT: x\r\n\r\n" + OK + CHUNKED + b"0",
    "both framings": OK + b"Content-Length: 3\r\n" + CHUNKED + b"0\r\n\r\n",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": OK + b"Transfer-Encoding: gzip\r\n" + CHUNKED + b"0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\n" + CHUNKED + b"0\r\n\r\n",
    "gzip": OK + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "lengths differ": OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "bodiless, wrong length": b"HTTP/1.1 204 X\r\nContent-Length: x\r\n\r\n",
    "chunked, wrong length": OK + b"Content-Length: x\r\n" + CHUNKED + b"0\r\n\r\n",
    "b3 echoed": OK + B3 + b"Host: x\r\nContent-Length: 2\r\n\r\nab",
    "status 000": b"HTTP/1.1 000 \r\nContent-Length: 1\r\n\r\na",
    "status 99": b"HTTP/1.1 99 \r\n\r\n",
    "status 2000": b"HTTP/1.1 2000 OK\r\n\r\n",
    "empty line before": b"\r\n" + OK,
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "LF": b"HTTP/1.1 200 OK\n\n",
    "NUL": b"HTTP/1.1 200 O\0K\r\n\r\n",
    "16384": of_size(OK + b"Content-Length: 0\r\n", 16384),
    "16385": of_size(OK + b"Content-Length: 0\r\n", 16385),
}

STREAMS = [
    *((data, False, False) for data in REQUESTS.values()),
    *((data, True, False) for data in RESPONSES.values()),
    *((data, True, True) for data in RESPONSES.values() if len(data) < 1000),
]
IDS = [
    *(f"request: {name}" for name in REQUESTS),
    *(f"response: {name}" for name in RESPONSES),
    *(f"response to HEAD: {name}" for name in RESPONSES if len(RESPONSES[name]) < 1000),
]


def as_the_model_says_it(verdict: Verdict) -> Verdict:
    """The model does not tell in which place of a head the bytes end."""
    outside = {"UNTIL_EOF", "OPAQUE", "BODY"}
    in_head = verdict.state not in outside and not re.match(
        "CHUNK|TRAILER", verdict.state
    )
    return replace(verdict, state="HEAD") if in_head else verdict


@cache
def expected_of(data: bytes, is_response: bool, after_head: bool) -> Verdict:
    return read_stream(data, is_response, after_head)


def verdict_of(native: Native, data: bytes, is_response: bool, after_head: bool):
    return as_the_model_says_it(native.scan(data, is_response, after_head=after_head))


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Native:
    return Native(tmp_path_factory.mktemp("scanner"))


@pytest.mark.parametrize(("data", "is_response", "after_head"), STREAMS, ids=IDS)
def test_a_stream_says_what_the_reference_says(native, data, is_response, after_head):
    expected = expected_of(data, is_response, after_head)
    assert verdict_of(native, data, is_response, after_head) == expected


@pytest.mark.parametrize(("data", "is_response", "after_head"), STREAMS, ids=IDS)
def test_the_verdict_is_the_same_however_the_bytes_are_cut(
    native, data, is_response, after_head
):
    whole = native.scan(data, is_response, after_head=after_head)
    assert native.scan_bytes(data, is_response, after_head) == whole
    step = 1 if len(data) < 20_000 else 101
    assert native.differing_cut(data, is_response, after_head, step) == 0


@pytest.mark.parametrize(("data", "is_response", "after_head"), STREAMS, ids=IDS)
def test_every_beginning_of_a_stream_says_what_the_reference_says(
    native, data, is_response, after_head
):
    sizes = range(len(data)) if len(data) < 1000 else (*range(40), len(data) - 1)
    for size in sizes:
        expected = read_stream(data[:size], is_response, after_head)
        assert verdict_of(native, data[:size], is_response, after_head) == expected


def test_heads_of_16384_bytes_pass_and_longer_ones_do_not(native):
    for start, is_response in ((GET, False), (OK, True)):
        [event, *_] = native.scan(of_size(start, 16384), is_response).events
        assert (event.kind, event.size) == ("head", 16384)
        [event] = native.scan(of_size(start, 16385), is_response).events
        assert (event.kind, event.at) == ("opaque", 16385)


def test_a_first_value_is_kept_and_a_second_ignored(native):
    verdict = native.scan(REQUESTS["b3 twice"], is_response=False)
    headers = verdict.events[0].headers
    assert headers["trace_id"].kept == TRACE
    assert headers["span_id"].kept == b"a2fb4a1d1a96d312"
    assert headers["sampled"].kept == b"1"


def test_a_place_in_the_head_is_that_of_the_value(native):
    data = b"\r\n" + REQUESTS["b3"]
    [event, _] = native.scan(data, is_response=False).events
    head = data[2:]
    for value in event.headers.values():
        assert head[value.at : value.at + value.length] == value.kept


# --- where the scanner may differ: native/stream_model.py says why ---

ACCEPTED = [
    # what http_head.py says; what the scanner says
    (RESPONSES["gzip, chunked"], True, Body.CHUNKED, "UNTIL_EOF"),
    (RESPONSES["two codings"], True, Body.CHUNKED, "UNTIL_EOF"),
    (RESPONSES["chunked twice"], True, Body.CHUNKED, "UNTIL_EOF"),
    (REQUESTS["gzip, chunked"], False, Body.CHUNKED, "OPAQUE"),
    (RESPONSES["bodiless, wrong length"], True, Body.NONE, "OPAQUE"),
    (RESPONSES["chunked, wrong length"], True, Body.CHUNKED, "OPAQUE"),
]


@pytest.mark.parametrize(("data", "is_response", "reference", "scanner"), ACCEPTED)
def test_an_accepted_difference(native, data, is_response, reference, scanner):
    head: Any = (parse_response if is_response else parse_request)(data)
    status = head.status if is_response else None
    assert body_framing(b"GET", status, head.headers).body is reference
    assert native.scan(data, is_response).state == scanner


# --- generated streams ---

names = st.sampled_from(
    [*(name.encode() for name in grammar.HEADERS), b"accept", b"x-b3-traceidx", b"hos"]
).flatmap(
    lambda name: st.sampled_from([name, name.upper(), name.title(), name + b"-" * 20])
)
plain = st.sampled_from(
    [
        *(b"", b"1", b"5", b"05", b"18", b"9" * 19),
        *(b"chunked", b"Chunked", b"gzip, chunked", b"gzip"),
        *(b"a b", b"example:80", TRACE, TRACE[:16], b"x" * 70, b"\xc3\xa9"),
    ]
)
blank = st.sampled_from([b"", b" ", b" ", b"\t ", b"  "])
values = plain | st.binary(max_size=40)
lengths = st.integers(0, 30).map(lambda number: b"%d" % number)


@st.composite
def header_lines(draw):
    kind = draw(st.integers(0, 9))
    if kind == 0:
        name, value = b"Content-Length", draw(lengths)
    elif kind == 1:
        name, value = b"Transfer-Encoding", b"chunked"
    else:
        name, value = draw(names), draw(values if kind > 7 else plain)
    return name + b":" + draw(blank) + value + draw(blank) + b"\r\n"


@st.composite
def chunked_bodies(draw):
    body = b""
    for data in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=3)):
        size = draw(st.sampled_from([b"%x", b"%X", b"%03x"])) % len(data)
        body += size + draw(st.sampled_from([b"", b"", b";a=b", b" "])) + b"\r\n"
        body += data + b"\r\n"
    return body + b"0\r\n" + draw(st.sampled_from([b"", b"", b"T: v\r\n"])) + b"\r\n"


@st.composite
def messages(draw, is_response):
    if is_response:
        status = draw(st.sampled_from([200, 200, 200, 100, 204, 304, 404, 503, 7]))
        start = b"HTTP/1.%d %03d" % (draw(st.integers(0, 1)), status)
        start += draw(st.sampled_from([b"", b" ", b" OK", b" \xff \t"])) + b"\r\n"
    else:
        method = draw(st.sampled_from([b"GET", b"POST", b"!", b"M" * 16, b"M" * 17]))
        target = draw(st.sampled_from([b"/", b"*", b"/a?b=c", b"/" + b"t" * 200]))
        before = draw(st.sampled_from([b"", b"", b"\r\n", b"\r\n\r\n"]))
        start = before + method + b" " + target + b" HTTP/1.1\r\n"
    head = start + b"".join(draw(st.lists(header_lines(), max_size=6)))
    framed = draw(st.integers(0, 3))
    if framed == 0:
        body = draw(st.binary(max_size=30))
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if framed == 1:
        return head + CHUNKED + draw(chunked_bodies())
    return head + b"\r\n" + (draw(st.binary(max_size=30)) if framed == 2 else b"")


hostile = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b";", b"\r\n\r\n", b"g", b"\x7f"]
) | st.binary(min_size=1, max_size=2)


@st.composite
def streams(draw):
    """(bytes, is_response): messages in a row, often spoilt in a place or two."""
    is_response = draw(st.booleans())
    data = b"".join(draw(st.lists(messages(is_response), min_size=1, max_size=3)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 2))
        data = data[:at] + draw(st.just(b"") | hostile) + data[at + gone :]
    return data, is_response


def cuts_of(draw, data):
    return sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))


@FUZZ
@given(st.data(), streams(), st.booleans())
def test_generated_streams_say_what_the_reference_says(native, data, stream, head):
    sent, is_response = stream
    expected = read_stream(sent, is_response, head)
    cuts = cuts_of(data.draw, sent)
    found = native.scan(sent, is_response, cuts, head)
    assert as_the_model_says_it(found) == expected
    assert native.scan_bytes(sent, is_response, head) == found
    assert native.scan(sent, is_response, after_head=head) == found


@FUZZ
@given(st.binary(max_size=60), st.sampled_from([b"", GET, OK, POST + CHUNKED]))
@example(b"\x80", GET)
def test_random_bytes_say_what_the_reference_says(native, noise, before):
    for is_response in (False, True):
        data = before + noise
        expected = read_stream(data, is_response)
        assert verdict_of(native, data, is_response, False) == expected
        assert native.differing_cut(data, is_response) == 0


HEAD_STATES = [
    name.removeprefix("SCAN_")
    for name, number in grammar.enumerators(SOURCE, "scan_state").items()
    if number < grammar.enumerators(SOURCE, "scan_state")["SCAN_HEAD_DONE"]
]


@cache
def ways_into(native: Native, state: str) -> list[tuple[bytes, bytes, bool]]:
    """(bytes that lead to `state`, what followed them, is_response), the shortest."""
    ways = [
        (data[:size], data[size:], is_response)
        for data, is_response, after_head in STREAMS
        if len(data) < 1000 and not after_head
        for size in range(len(data))
        if native.scan(data[:size], is_response).state == state
    ]
    return sorted(ways, key=lambda way: len(way[0]))[:3]


def continued(native: Native, state: str) -> Iterator[tuple[bytes, bool, bool]]:
    """Every byte in `state`: in place of what followed, before it, and at a line end.

    So it shows where each byte leads, and what it has done.
    """
    for before, after, is_response in ways_into(native, state):
        for byte in range(256):
            start = before + bytes([byte])
            for rest in (b"", after[1:], after, b"\r\n\r\n"):
                yield start + rest, is_response, False


@pytest.mark.parametrize("state", HEAD_STATES)
def test_every_byte_in_every_state(native, state):
    streams = list(continued(native, state))
    assert streams
    for stream in streams:
        assert verdict_of(native, *stream) == expected_of(*stream)


# --- the tests are able to fail ---


def finds_a_difference(
    native: Native, streams: Iterable[tuple[bytes, bool, bool]] = STREAMS
) -> bool:
    for stream in streams:
        try:
            if verdict_of(native, *stream) != expected_of(*stream):
                return True
        except AssertionError:  # a response wrote over its request
            return True
    return False


def test_the_scanner_itself_differs_in_nothing(native):
    assert not finds_a_difference(native)


@pytest.mark.parametrize(("old", "new"), SOURCE_MUTANTS.values(), ids=SOURCE_MUTANTS)
def test_a_mutant_of_the_source_is_found(tmp_path, old, new):
    assert old in SOURCE
    assert finds_a_difference(Native(tmp_path, SOURCE.replace(old, new)))


@pytest.mark.parametrize(("state", "byte", "following", "action"), CELL_MUTANTS)
def test_a_mutant_of_the_table_is_found(native, state, byte, following, action):
    mutant = with_cell(lookup_tables(SOURCE), state, byte, following, action)
    assert finds_a_difference(native.with_tables(mutant))


@pytest.mark.parametrize("state", HEAD_STATES)
def test_no_cell_of_the_table_can_change_unnoticed(native, state):
    right = lookup_tables(SOURCE)
    numbers = grammar.enumerators(SOURCE, "scan_state")
    opaque = bytes([numbers["SCAN_OPAQUE"], 0])
    stay = bytes([numbers[f"SCAN_{state}"], 0])
    streams = [*continued(native, state), *STREAMS]
    for byte_class in set(right[2 * 64 * 32 :][:256]):
        place = 2 * (32 * numbers[f"SCAN_{state}"] + byte_class)
        spoilt = bytearray(right)
        cell = spoilt[place : place + 2]
        spoilt[place : place + 2] = stay if cell == opaque else opaque
        mutant = native.with_tables(bytes(spoilt))
        assert finds_a_difference(mutant, streams), byte_class


@pytest.mark.parametrize("name", grammar.HEADERS)
def test_a_header_that_is_not_known_is_missed(native, name):
    spoilt = lookup_tables(SOURCE).replace(
        name.encode() + b"\0", b"-" * len(name) + b"\0"
    )
    assert finds_a_difference(native.with_tables(spoilt))
