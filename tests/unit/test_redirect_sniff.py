"""First bytes to a protocol: at the earliest byte, and however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.http_head import MalformedHead, parse_request
from podspan.agent.redirect.sniff import (
    HTTP2_PREFACE,
    Protocol,
    may_be_http2_server,
    sniff,
)

HTTP1, HTTP2, OPAQUE = Protocol.HTTP1, Protocol.HTTP2, Protocol.OPAQUE

# Each is decided by its last byte.
DECIDED = [
    (b"GET ", HTTP1),
    (b"x-y_z.1~ ", HTTP1),
    (b"ABCDEFGHIJKLMNOP ", HTTP1),
    (b"\r\n", HTTP1),  # an empty line before the request line
    (b"P ", HTTP1),
    (b"PRI /", HTTP1),
    (b"PRI *x", HTTP1),
    (b"PRI * HTTP/1", HTTP1),
    (b"PRIOR ", HTTP1),
    (HTTP2_PREFACE, HTTP2),
    (b"PRI \r", OPAQUE),
    (b"PRI *\r", OPAQUE),
    (b"PRI * x", OPAQUE),
    (b"PRI * HTTP/3", OPAQUE),
    (b"PRI * HTTP/2.1", OPAQUE),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r", OPAQUE),
    (b"ABCDEFGHIJKLMNOPQ", OPAQUE),
    (b" ", OPAQUE),
    (b"\n", OPAQUE),
    (b"\r\r", OPAQUE),
    (b"\x16", OPAQUE),  # TLS
    (b"\x00", OPAQUE),  # Kafka, PostgreSQL: a length
    (b"PING\r", OPAQUE),  # Redis, inline
    (b"*1\r", OPAQUE),  # Redis
    (b"SSH-2.0-OpenSSH_9", OPAQUE),
    (b"USER\t", OPAQUE),
    (b"caf\xc3", OPAQUE),
]


@pytest.mark.parametrize(("first", "protocol"), DECIDED)
def test_the_last_byte_decides_and_no_later_one_changes_it(first, protocol):
    for size in range(len(first)):
        assert sniff(first[:size]) is None
    assert sniff(first) is protocol
    for more in (b"\r\n", b"PRI * HTTP/2.0", b"/ HTTP/1.1\r\n\r\n", b"\x00" * 99):
        assert sniff(first + more) is protocol


def test_at_most_23_bytes_wait():
    assert sniff(HTTP2_PREFACE[:23]) is None
    for first, _ in DECIDED:
        assert len(first) <= len(HTTP2_PREFACE)


ALPHABET = st.sampled_from(b"PRI * HTTP/2.0\r\nSMGE/1 \t\x00\xff")
FIRST = st.lists(ALPHABET, max_size=30).map(bytes)


@given(
    start=st.integers(0, 24).map(lambda size: HTTP2_PREFACE[:size]),
    rest=FIRST | st.binary(),
)
def test_a_verdict_is_final_and_agrees_with_the_strict_parser(start, rest):
    data = start + rest
    verdicts = [sniff(data[:size]) for size in range(len(data) + 1)]
    decided = [verdict for verdict in verdicts if verdict]
    assert len(set(decided)) <= 1
    if len(data) >= 24:
        assert decided
    size = len(verdicts) - len(decided)  # of the shortest decided prefix
    if decided == []:
        return
    try:
        parse_request(data[:size])
        may_be_http1 = True
    except MalformedHead:
        may_be_http1 = False
    assert (decided[0] is HTTP1) == may_be_http1


@pytest.mark.parametrize("length", [0, 6, 18, 36])
def test_a_server_of_http2_may_speak_first(length):
    first = length.to_bytes(3, "big") + b"\x04\0\0\0\0\0" + bytes(length)
    assert all(may_be_http2_server(first[:end]) for end in range(len(first) + 1))


@pytest.mark.parametrize(
    "first",
    [
        b"220 mail ESMTP",
        b"SSH-2.0-OpenSSH",
        b"J\0\0\0\n8.0.36\0",  # MySQL: length, number, version
        b"\0\0\x06\x04\x01\0\0\0\0",  # the acknowledgement of SETTINGS
        b"\0\0\x06\x04\0\0\0\0\x01",  # of a stream
        b"\0\0\x08\x06\0\0\0\0\0",  # PING
    ],
)
def test_other_servers_that_speak_first_are_no_http2(first):
    assert not may_be_http2_server(first)
