"""HTTP heads: whole, cut anywhere, and hostile."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.http_head import (
    MAX_HEAD,
    Body,
    Framing,
    MalformedHead,
    RequestHead,
    ResponseHead,
    body_framing,
    parse_request,
    parse_response,
    values,
)

REQUEST = b"GET /a?b=c HTTP/1.1\r\nHost: x:80\r\nX-Empty:\r\nN:\t v w \t\r\n\r\n"
RESPONSE = b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n"

VALID_REQUESTS = [
    REQUEST,
    b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"* * HTTP/1.9\r\n\r\n",
    b"ABCDEFGHIJKLMNOP x HTTP/1.0\r\n\r\n",
    b"CONNECT a:443 HTTP/1.1\r\n\r\n",
    b"GET \x80\xff~! HTTP/1.1\r\n!#$%&'*+-.^_`|~09AZaz: \x01\x7f\x80\xff\r\n\r\n",
]
VALID_RESPONSES = [
    RESPONSE,
    b"HTTP/1.1 200\r\n\r\n",
    b"HTTP/1.1 200 \r\n\r\n",
    b"HTTP/1.1 000 \x01\t\xff\r\n\r\n",
]

# Each ends in the byte that cannot be right.
MALFORMED_REQUESTS = [
    b"\n",
    b"\rG",
    b"\r\n\r\r",
    b" ",
    b"\x16",
    b"GET\r",
    b"GET\t",
    b"G(",
    b"ABCDEFGHIJKLMNOPQ",
    b"GET  ",
    b"GET /\r",
    b"GET /\n",
    b"GET /\x00",
    b"GET /\x7f",
    b"GET / h",
    b"GET / HTTP/2",
    b"GET / HTTP/1.x",
    b"GET / HTTP/1.1 ",
    b"GET / HTTP/1.1\n",
    b"GET / HTTP/1.1\rH",
    b"GET / HTTP/1.1\r\n ",
    b"GET / HTTP/1.1\r\n\t",
    b"GET / HTTP/1.1\r\n:",
    b"GET / HTTP/1.1\r\n\n",
    b"GET / HTTP/1.1\r\n\rx",
    b"GET / HTTP/1.1\r\nHost ",
    b"GET / HTTP/1.1\r\nHost\r",
    b"GET / HTTP/1.1\r\nHost: a\n",
    b"GET / HTTP/1.1\r\nHost: a\rb",
    b"GET / HTTP/1.1\r\nHost: a\x00",
    b"GET / HTTP/1.1\r\nHost: a\r\n ",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\r",
]
MALFORMED_RESPONSES = [
    b"\r",
    b"h",
    b"HTTP/2",
    b"HTTP/1.a",
    b"HTTP/1.1\r",
    b"HTTP/1.1  ",
    b"HTTP/1.1 x",
    b"HTTP/1.1 20 ",
    b"HTTP/1.1 2000",
    b"HTTP/1.1 200\n",
    b"HTTP/1.1 200 OK\n",
    b"HTTP/1.1 200 OK\x00",
    b"HTTP/1.1 200 OK\r\n\n",
]

CASES: list[tuple[Any, bytes]] = [
    *((parse_request, head) for head in VALID_REQUESTS),
    *((parse_response, head) for head in VALID_RESPONSES),
]
MALFORMED: list[tuple[Any, bytes]] = [
    *((parse_request, data) for data in MALFORMED_REQUESTS),
    *((parse_response, data) for data in MALFORMED_RESPONSES),
]


def test_a_request():
    assert parse_request(REQUEST) == RequestHead(
        method=b"GET",
        target=b"/a?b=c",
        minor=1,
        headers=((b"Host", b"x:80"), (b"X-Empty", b""), (b"N", b"v w")),
        size=len(REQUEST),
    )


def test_a_response():
    assert parse_response(RESPONSE) == ResponseHead(
        minor=0,
        status=404,
        reason=b"Not Found",
        headers=((b"Content-Length", b"0"),),
        size=len(RESPONSE),
    )


@pytest.mark.parametrize(("parse", "head"), CASES)
def test_a_valid_head_is_found_at_its_last_byte_and_not_before(parse, head):
    for size in range(len(head)):
        assert parse(head[:size]) is None
    found = parse(head)
    assert found is not None
    assert found.size == len(head)
    assert parse(head + b"\x00body\r\n\r\n") == found


@pytest.mark.parametrize(("parse", "data"), MALFORMED)
def test_a_wrong_byte_is_reported_when_it_is_there(parse, data):
    assert parse(data[:-1]) is None
    for following in (b"", b"x", b"\r\n\r\n"):
        with pytest.raises(MalformedHead):
            parse(data + following)


@pytest.mark.parametrize("parse", [parse_request, parse_response])
@pytest.mark.parametrize("skipped", [b"", b"\r\n" * 20_000])
def test_a_head_of_the_greatest_size_passes_and_one_more_byte_does_not(parse, skipped):
    start = b"GET / HTTP/1.1\r\nA: "
    if parse is parse_response:
        start, skipped = b"HTTP/1.1 200 OK\r\nA: ", b""
    fits = start + b"a" * (MAX_HEAD - len(start) - 4) + b"\r\n\r\n"
    assert parse(skipped + fits[:-1]) is None
    assert parse(skipped + fits).size == len(skipped) + MAX_HEAD
    too_long = skipped + fits[:-4] + b"a\r\n\r\n"
    assert parse(too_long[: len(skipped) + MAX_HEAD]) is None
    with pytest.raises(MalformedHead, match="longer"):
        parse(too_long)


heads = st.lists(
    st.sampled_from(
        [b"GET", b"POST", b" ", b"/", b"HTTP/1.", b"1", b"200", b"\r\n", b"\r", b"\n",
         b"Host", b":", b"a", b"\t", b"\x00", b"\x80"]
    ),
    max_size=20,
).map(b"".join)  # fmt: skip
tails = st.binary(max_size=40) | heads


def verdict(parse, data):
    try:
        return parse(data)
    except MalformedHead:
        return "malformed"


@given(
    st.sampled_from([parse_request, parse_response]),
    st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\nA:"]),
    tails,
)
def test_a_verdict_never_changes_when_more_bytes_come(parse, start, tail):
    data = start + tail
    settled = None
    for size in range(len(data) + 1):
        now = verdict(parse, data[:size])
        assert settled in (None, now)
        settled = now


def test_values_are_found_whatever_the_case():
    headers = ((b"A", b"1"), (b"b", b"2"), (b"a", b"3"))
    assert values(headers, b"a") == [b"1", b"3"]


def length(*texts):
    return tuple((b"Content-Length", text) for text in texts)


def coding(*texts):
    return tuple((b"transfer-encoding", text) for text in texts)


NONE = Framing(Body.NONE)
CHUNKED = Framing(Body.CHUNKED)
UNTIL_CLOSE = Framing(Body.UNTIL_CLOSE)


@pytest.mark.parametrize(
    ("method", "status", "headers", "framing"),
    [
        (b"GET", None, (), NONE),
        (b"POST", None, length(b"0"), Framing(Body.LENGTH, 0)),
        (b"POST", None, length(b"007", b"7"), Framing(Body.LENGTH, 7)),
        (b"POST", None, length(b"9" * 18), Framing(Body.LENGTH, 10**18 - 1)),
        (b"POST", None, coding(b"chunked"), CHUNKED),
        (b"POST", None, coding(b"gzip ,\tCHUNKED"), CHUNKED),
        (b"POST", None, coding(b"gzip", b"chunked"), CHUNKED),
        (b"HEAD", None, length(b"5"), Framing(Body.LENGTH, 5)),
        (b"GET", 200, (), UNTIL_CLOSE),
        (b"GET", 200, length(b"5"), Framing(Body.LENGTH, 5)),
        (b"GET", 200, coding(b"chunked"), CHUNKED),
        (b"GET", 200, coding(b"chunked") + length(b"5"), CHUNKED),
        (b"GET", 200, coding(b"chunked, gzip"), UNTIL_CLOSE),
        (b"GET", 200, coding(b"chunked,"), UNTIL_CLOSE),
        (b"GET", 200, coding(b"chunked", b"gzip"), UNTIL_CLOSE),
        (b"GET", 200, coding(b""), UNTIL_CLOSE),
        (b"HEAD", 200, length(b"5"), NONE),
        (b"HEAD", 200, coding(b"chunked"), NONE),
        (b"GET", 100, (), NONE),
        (b"GET", 199, length(b"5"), NONE),
        (b"GET", 204, length(b"5"), NONE),
        (b"GET", 304, length(b"x"), NONE),
        (b"CONNECT", 200, length(b"5"), NONE),
        (b"CONNECT", 299, coding(b"chunked"), NONE),
        (b"CONNECT", 407, length(b"5"), Framing(Body.LENGTH, 5)),
    ],
)
def test_framing(method, status, headers, framing):
    assert body_framing(method, status, headers) == framing


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (None, coding(b"chunked") + length(b"5")),
        (None, coding(b"gzip")),
        (None, coding(b"chunked, identity")),
        (None, coding(b"xchunked")),
        (None, coding(b"")),
        (200, length(b"5", b"6")),
        (200, length(b"5, 5")),
        (200, length(b"")),
        (200, length(b"+5")),
        (200, length(b"-5")),
        (200, length(b"0x5")),
        (200, length(b"5_0")),
        (200, length("\N{ARABIC-INDIC DIGIT FIVE}".encode())),
        (200, length(b"1" * 19)),
        (None, length(b"1" * 10_000)),
    ],
)
def test_contradicting_framing_is_malformed(status, headers):
    with pytest.raises(MalformedHead):
        body_framing(b"POST", status, headers)
