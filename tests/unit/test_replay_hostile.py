"""Captures that somebody wrote on purpose: no crash, no hang, each skip counted."""

import gzip
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from podspan.agent.errors import ReplayError
from podspan.agent.replay.capture import Capture, Packet
from podspan.agent.replay.packets import ACK, FIN, RST, SYN
from podspan.agent.span import zipkin_json
from podspan.agent.store.zipkin_v2 import parse_json
from scapy.utils import RawPcapWriter
from unit.replay_wire import (
    B3,
    ETHERNET,
    START_NS,
    Talk,
    captured,
    chunked,
    pcapng_bytes,
    replayed,
    request,
    response,
)

# Of one core that others use too; each case takes a hundredth of it.
DEADLINE_S = 20


def check(packets):
    """Replay; the spans are such as the store takes."""
    started_s = time.monotonic()
    spans, summary = replayed(packets)
    assert time.monotonic() - started_s < DEADLINE_S
    assert summary.packets == len(packets)
    assert summary.spans == len(spans)
    parse_json(f"[{','.join(map(zipkin_json, spans))}]".encode())
    return spans, summary.skipped


def said(*words):
    """A whole connection in which these are said: side and bytes."""
    talk = Talk().handshake()
    for side, data in words:
        talk.say(side, data)
    return captured(talk.bye())


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GET, OK = request("/", more=B3), response()

HTTP = [
    pytest.param(
        [("c", GET), ("s", CHUNKED + b"f" * 16 + b"\r\n")], id="a chunk of 2**64"
    ),
    pytest.param(
        [("c", GET), ("s", CHUNKED + b"-1\r\n")], id="a chunk of less than none"
    ),
    pytest.param(
        [("c", GET), ("s", CHUNKED + b"1;" + b"x" * 40_000)], id="an endless line"
    ),
    pytest.param(
        [("c", request("/", more=b"Content-Length: " + b"9" * 18 + b"\r\n"))],
        id="a body of 10**18",
    ),
    pytest.param(
        [("c", request("/", more=b"Content-Length: 1\r\nContent-Length: 2\r\n"))],
        id="two lengths",
    ),
    pytest.param(
        [("c", b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000)], id="an endless head"
    ),
    pytest.param([("c", b"GET " + b"/" * 40_000)], id="an endless target"),
    pytest.param([("c", b"\r\n" * 20_000)], id="empty lines only"),
    pytest.param([("c", GET * 600)], id="pipelined"),
    pytest.param(
        [("c", GET), ("s", b"HTTP/1.1 100 X\r\n\r\n" * 2000)], id="always 100"
    ),
    pytest.param([("c", GET), ("s", b"HTTP/1.1 000 X\r\n\r\n")], id="status 0"),
    pytest.param([("c", GET), ("s", b"HTTP/1.1 999 X\r\n\r\n")], id="status 999"),
    pytest.param([("c", b"G\x00T / HTTP/1.1\r\n\r\n")], id="NUL"),
    pytest.param(
        [("c", request("/\xff\xfe", host="\x80\x81" * 200, more=B3)), ("s", OK)],
        id="no UTF-8",
    ),
    pytest.param(
        [("c", request("/", host='"><script>alert(1)</script>', more=B3)), ("s", OK)],
        id="HTML",
    ),
    pytest.param([("c", request("/", host="[::1", more=B3)), ("s", OK)], id="bracket"),
    pytest.param(
        [("c", request("/", more=b"X-B3-TraceId: " + b"0" * 32 + b"\r\n")), ("s", OK)],
        id="a trace id of zeros",
    ),
    pytest.param(
        [("c", request("/", more=b"X-B3-SpanId: " + b"a" * 9000 + b"\r\n")), ("s", OK)],
        id="a long span id",
    ),
    pytest.param(
        [("s", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ("c", OK)], id="inside out"
    ),
    pytest.param([("c", OK), ("s", GET)], id="roles exchanged"),
    pytest.param(
        [("c", request("x:1", method="CONNECT") * 9), ("s", OK)], id="tunnels"
    ),
]


@pytest.mark.parametrize("words", HTTP)
def test_what_is_said_against_the_rules(words):
    check(said(*words))
    mid_stream = said(*words)[3:]
    check(mid_stream)


def test_bytes_one_by_one_take_no_longer_than_they_should():
    talk = Talk().handshake().say("c", b"GET / HTTP/1.1\r\nA: " + b"x" * 16_300, size=1)
    _, skipped = check(captured(talk))
    assert skipped == {}


def flags():
    return st.sampled_from(
        [0, SYN, ACK, FIN, RST, SYN | ACK, FIN | ACK, SYN | FIN, 0x3F]
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from("cs"),
            flags(),
            st.sampled_from([b"", b"x", GET, OK, GET[:9], chunked(b"abc")]),
            st.one_of(st.integers(0, (1 << 32) - 1), st.integers(-300, 300)),
        ),
        max_size=40,
    )
)
@settings(max_examples=150, deadline=None)
def test_segments_of_any_flags_and_numbers(segments):
    talk = Talk().handshake()
    for side, flag, data, seq in segments:
        near = abs(seq) <= 300
        talk.segment(side, flag, data, talk._next[side] + seq if near else seq)
        if near and seq == 0:
            talk._next[side] += len(data)
    check(captured(talk))


def test_gaps_that_never_close_are_bounded_in_memory():
    talk = Talk().handshake()
    for at in range(2000):
        talk.segment("c", ACK, b"x" * 9000, talk._next["c"] + 10 + at * 20_000)
    _, skipped = check(captured(talk))
    assert skipped["gap_bytes"] > 1_000_000


def test_a_flood_of_connections_is_bounded():
    ports = [(f"10.1.{n >> 8}.{n & 255}", 40000) for n in range(3000)]
    packets = []
    for client in ports:
        packets += captured(Talk(client).handshake().say("c", GET))
    spans, summary = replayed(packets, max_open=100)
    assert summary.skipped["given_up"] == 2900
    assert summary.spans == len(spans)


def written(path, how):
    talk = Talk().handshake().exchange(GET, OK).exchange(GET, CHUNKED + chunked(b"abc"))
    packets = captured(talk.bye())
    if how == "pcapng":
        return pcapng_bytes(packets)
    with RawPcapWriter(str(path), linktype=ETHERNET) as writer:
        writer.write_header(None)
        for packet in packets:
            sec, rest = divmod(packet.at_ns, 1_000_000_000)
            writer.write_packet(packet.data, sec=sec, usec=rest // 1000)
    data = path.read_bytes()
    return gzip.compress(data) if how == "gzip" else data


@pytest.fixture(scope="module", params=["pcap", "pcapng", "gzip"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "file"
    return path, written(path, request.param)


@given(seed=st.integers(0, 1 << 40))
@settings(max_examples=150, deadline=None)
def test_a_capture_with_wrong_bytes_is_replayed_or_refused(file, seed):
    path, data = file
    chance = random.Random(seed)
    wrong = bytearray(data)
    for _ in range(chance.choice([1, 2, 5, 50])):
        at = chance.randrange(len(wrong))
        what = chance.choice(["set", "cut", "insert", "double"])
        if what == "set":
            wrong[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        elif what == "cut":
            del wrong[at : at + chance.randrange(1, 40)]
        elif what == "insert":
            wrong[at:at] = struct.pack("<I", chance.choice([0, 1 << 31, 0xFFFFFFFF, 7]))
        else:
            wrong[at:at] = wrong[at : at + chance.randrange(1, 200)]
        if not wrong:
            break
    path.write_bytes(wrong)
    try:
        with Capture(path) as capture:
            packets = list(capture.packets())
            assert capture.damage in ("", "cut", "damaged")
    except ReplayError:
        return
    check(packets)


@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=100)), max_size=20))
@settings(deadline=None)
def test_any_frames_are_counted(frames):
    packets = [Packet(START_NS + at, ETHERNET, data, len(data)) for at, data in frames]
    _, skipped = check(packets)
    assert sum(skipped.values()) >= len(packets) or not skipped.get("not_ip")
