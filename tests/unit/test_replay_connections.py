"""What networks and captures do to packets, and what it must not do to spans."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from podspan.agent.replay.capture import Packet
from podspan.agent.replay.packets import ACK, SYN
from unit.replay_wire import (
    B3,
    ETHERNET,
    LOOP,
    NULL,
    RAW,
    SLL,
    SLL2,
    START_NS,
    Talk,
    captured,
    chunked,
    replayed,
    request,
    response,
    shuffled,
)

CHUNKED = b"Transfer-Encoding: chunked\r\n"
CALLS = [
    (request("/a", more=B3), response(body=b"x" * 4000)),
    (request("/b", method="POST", body=b"y" * 5000), response(201)),
    (request("/c", method="HEAD"), response(body=b"")),
    (
        request("/d", method="PUT", more=CHUNKED) + chunked(b"z" * 2000, b"z"),
        b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunked(b"q" * 3000),
    ),
]


def conversation(size=1448, **place):
    """Each of CALLS in turn; packets come together, so that cuts change no time."""
    talk = Talk(**place).handshake()
    for number, (asked, answered) in enumerate(CALLS, 1):
        for side, text, half in (("c", asked, 0), ("s", answered, 5)):
            for at in range(0, len(text), size):
                # `segment` adds a step to this.
                talk.at_ns = START_NS + number * 10_000_000 + half * 1_000_000
                talk.say(side, text[at : at + size], size, ack=False)
    talk.at_ns += 1_000_000
    return talk.bye()


PACKETS = captured(conversation())
EXPECTED, _ = replayed(PACKETS)
HEADS = [n for n, packet in enumerate(PACKETS) if b"Host: " in packet.data]


def test_the_conversation_has_its_calls():
    assert [span.tags["http.method"] for span in EXPECTED[::2]] == [
        "GET",
        "POST",
        "HEAD",
        "PUT",
    ]
    assert all(span.tags["http.status_code"] in ("200", "201") for span in EXPECTED)


@pytest.mark.parametrize("size", [1, 7, 100, 536, 9000, 65000])
def test_the_spans_are_the_same_however_the_streams_are_cut(size):
    spans, summary = replayed(captured(conversation(size)))
    assert spans == EXPECTED
    assert summary.skipped == {}


@pytest.mark.parametrize("link_type", [ETHERNET, SLL, SLL2, NULL, LOOP, RAW])
def test_the_spans_are_the_same_under_every_link_layer(link_type):
    assert replayed(captured(conversation(), link_type=link_type))[0] == EXPECTED


@pytest.mark.parametrize("tags", [(0x8100,), (0x88A8, 0x8100)])
def test_the_spans_are_the_same_in_a_vlan(tags):
    assert replayed(captured(conversation(), tags=tags))[0] == EXPECTED


@given(st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_the_spans_are_the_same_when_packets_are_written_out_of_order(seed):
    assert replayed(shuffled(PACKETS, seed))[0] == EXPECTED


@given(st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_the_spans_are_the_same_when_packets_are_captured_twice(seed):
    """As with tcpdump -i any; the copy comes a little later."""
    chance = Random(seed)
    copies = [
        packet._replace(at_ns=packet.at_ns + chance.randint(0, 40_000))
        for packet in PACKETS
        if chance.random() < 0.7
    ]
    spans, summary = replayed(sorted(PACKETS + copies, key=lambda one: one.at_ns))
    assert spans == EXPECTED
    assert set(summary.skipped) <= {"copies"}


def without_retransmits(spans):
    for span in spans:
        span.tags.pop("podspan.retransmits", None)
    return spans


@given(st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_the_spans_are_the_same_when_the_network_repeats_reorders_and_overlaps(seed):
    chance = Random(seed)
    talk = Talk().handshake()
    for number, (asked, answered) in enumerate(CALLS, 1):
        for side, text, half in (("c", asked, 0), ("s", answered, 5)):
            begin = talk._next[side]
            cuts = sorted({0, *chance.choices(range(len(text)), k=8), len(text)})
            parts = [(a, b) for a, b in pairwise(cuts)]
            parts += [(max(a - 20, 0), b) for a, b in parts if chance.random() < 0.3]
            chance.shuffle(parts)
            for start, end in parts:
                talk.at_ns = START_NS + number * 10_000_000 + half * 1_000_000
                talk.segment(side, ACK, text[start:end], begin + start)
            talk._next[side] += len(text)
    talk.at_ns += 1_000_000
    packets = captured(talk.bye())
    packets.sort(key=lambda packet: packet.at_ns)
    spans, summary = replayed(packets)
    assert without_retransmits(spans) == EXPECTED
    assert not set(summary.skipped) - {"copies"}


def test_a_retransmission_is_counted_where_it_was_sent():
    talk = Talk().handshake().say("c", CALLS[0][0], ack=False)
    talk.segment("c", ACK, CALLS[0][0], talk._next["c"] - len(CALLS[0][0]))
    (client, server), _ = replayed(captured(talk.say("s", response()).bye()))
    assert client.tags["podspan.retransmits"] == "1"
    assert "podspan.retransmits" not in server.tags


def test_ports_that_are_used_again_are_another_connection():
    first = Talk().handshake().exchange(*CALLS[0])  # its end is not captured
    again = Talk(isn=(77, 99), at_ns=first.at_ns).handshake().exchange(*CALLS[2]).bye()
    spans, summary = replayed(captured(first, again))
    assert [span.tags["http.method"] for span in spans] == [
        "GET",
        "GET",
        "HEAD",
        "HEAD",
    ]
    assert summary.connections == 2
    late = Talk(isn=(77, 99), at_ns=again.at_ns)
    late.segment("c", ACK, b"late")
    _, summary = replayed(captured(first, again, late))
    assert summary.skipped == {"late": 1}


def test_a_capture_that_begins_in_the_middle_finds_the_next_request():
    for begin in range(len(PACKETS)):
        spans, summary = replayed(PACKETS[begin:])
        targets = [span.tags["http.url"] for span in spans if span.kind == "CLIENT"]
        known = [span.tags["http.url"] for span in EXPECTED if span.kind == "CLIENT"]
        assert targets == known[len(known) - len(targets) :], begin
        assert len(targets) >= sum(at >= begin for at in HEADS), begin
        assert summary.packets == len(PACKETS) - begin
        for span in spans:
            assert span.trace_id in {one.trace_id for one in EXPECTED}


def test_what_the_capture_lost_costs_the_calls_that_it_was_part_of_at_most():
    """Whichever packet is missing: no span is made up, and the others are there."""
    whole = {(span.span_id, span.kind) for span in EXPECTED}
    talk = Talk().handshake()
    for call in CALLS:
        talk.exchange(*call)
    packets = captured(talk.bye())
    for missing in range(len(packets)):
        spans, summary = replayed(packets[:missing] + packets[missing + 1 :])
        seen = {(span.span_id, span.kind) for span in spans}
        assert seen <= whole, missing
        assert len(seen) >= len(whole) - 2, missing
        assert {"out_of_step", "end_unseen", "gap_bytes"} >= set(summary.skipped)


def test_a_snapshot_length_that_cuts_bodies_costs_nothing_but_their_bytes():
    talk = Talk().handshake()
    for asked, answered in CALLS[:2]:
        talk.exchange(asked, answered)
    packets = captured(talk.bye())
    spans, summary = replayed(packets)
    cut, summary = replayed(
        [packet._replace(data=packet.data[:400]) for packet in packets]
    )
    assert [span.tags["response_size"] for span in cut] == [
        span.tags["response_size"] for span in spans
    ]
    assert summary.skipped["snaplen_bytes"] == summary.skipped["gap_bytes"] > 0


def test_a_snapshot_length_that_cuts_heads_is_counted():
    packets = [packet._replace(data=packet.data[:90]) for packet in PACKETS]
    spans, summary = replayed(packets)
    assert spans == []
    assert summary.skipped["no_request"] == 1
    assert summary.skipped["snaplen_bytes"] > 0


def test_connections_are_bounded_and_the_longest_idle_is_given_up():
    talks = []
    at_ns = START_NS
    for port in range(10):
        talk = Talk(("10.0.0.1", 40000 + port), at_ns=at_ns).handshake()
        talk.say("c", request("/"))
        at_ns = talk.at_ns
        talks.append(talk)
    for talk in talks[5:]:
        talk.at_ns = at_ns
        at_ns = talk.say("s", response()).bye().at_ns
    spans, summary = replayed(captured(*talks), max_open=5)
    assert summary.skipped == {"given_up": 5, "end_unseen": 5}
    assert len(spans) == 20


@pytest.mark.parametrize(
    ("events", "skipped"),
    [
        (lambda talk: talk.handshake().bye(), {"silent": 1}),
        (lambda talk: talk.segment("c", SYN), {"unanswered": 1}),
        (lambda talk: talk.say("c", b"\x00\x01"), {"no_request": 1}),
    ],
)
def test_connections_that_carry_nothing_are_counted(events, skipped):
    talk = Talk()
    events(talk)
    _, summary = replayed(captured(talk))
    assert summary.skipped == skipped


def test_who_called_is_not_guessed_where_ports_do_not_tell():
    for port, count in ((2000, 0), (40000, 2)):
        talk = Talk(client=("10.0.0.1", port))
        for _ in range(10):
            talk.say("c", b"\x00\x01").say("s", b"\x00")
        spans, summary = replayed(captured(talk))
        assert len(spans) == count
        assert summary.skipped == ({} if count else {"role_unknown": 1})


def test_a_packet_to_its_own_sender_is_skipped():
    talk = Talk(client=("10.0.0.1", 80), server=("10.0.0.1", 80)).handshake()
    _, summary = replayed(captured(talk))
    assert summary.skipped == {"malformed": 3}


def test_skipped_packets_are_counted_by_reason():
    other = Packet(START_NS, ETHERNET, bytes(60), 60)
    _, summary = replayed([other, other._replace(link_type=105), *PACKETS])
    assert summary.skipped == {"not_ip": 1, "link_type": 1}
