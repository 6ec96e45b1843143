"""The gate's bytes: packets built by scapy, messages by hand, and rubbish."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.netlink import ATTRIBUTE, HEADER
from podspan.agent.redirect.gate import (
    NFQA_PACKET_HDR,
    NFQA_PAYLOAD,
    Flow,
    Held,
    flow_of,
    parse,
)
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop

PACKET = 3 << 8  # NFNL_SUBSYS_QUEUE, NFQNL_MSG_PACKET
V4 = Flow("10.1.2.3", 40000, "192.0.2.9", 443)
V6 = Flow("fd00::1", 40000, "2001:db8::9", 443)


@pytest.mark.parametrize(
    ("packet", "flow"),
    [
        (IP(src=V4.source, dst=V4.destination) / TCP(sport=40000, dport=443), V4),
        (
            IP(
                src=V4.source,
                dst=V4.destination,
                options=[IPOption(b"\x94\x04\x00\x00")],
            )
            / TCP(sport=40000, dport=443, options=[("MSS", 1460), ("SAckOK", b"")]),
            V4,
        ),
        (IPv6(src=V6.source, dst=V6.destination) / TCP(sport=40000, dport=443), V6),
        (IP() / UDP(), None),
        (IPv6() / IPv6ExtHdrHopByHop() / TCP(), None),
    ],
)
def test_whose_syn_it_is(packet, flow):
    assert flow_of(bytes(packet)) == flow


def test_every_packet_of_a_datagram_is_told():
    packet = bytes(IP(src=V4.source, dst=V4.destination) / TCP(sport=40000, dport=443))
    datagram = (
        message(7, packet)
        + other_message()
        + message(8, b"")
        + message(9, packet, hook=0)
    )

    assert list(parse(datagram)) == [
        Held(7, False, V4),
        Held(8, False, None),
        Held(9, True, V4),
    ]


@given(st.binary(max_size=100))
def test_no_packet_is_too_odd(packet):
    flow_of(packet)


@given(st.binary(max_size=60), st.binary(max_size=200))
def test_rubbish_around_a_packet_ends(before, payload):
    """Attributes of any size and kind before the payload: told, or left out."""
    for held in parse(message(1, payload, extra=before)):
        assert held.number == 1


def message(number: int, payload: bytes, extra: bytes = b"", hook: int = 3) -> bytes:
    body = bytes(4) + attribute(
        NFQA_PACKET_HDR, struct.pack("!IHB", number, 0x800, hook)
    )
    body += attribute(200, extra) + attribute(NFQA_PAYLOAD, payload)
    return HEADER.pack(HEADER.size + len(body), PACKET, 0, 0, 0) + body


def other_message() -> bytes:
    return HEADER.pack(HEADER.size + 4, 3, 0, 0, 0) + bytes(4)


def attribute(kind: int, value: bytes) -> bytes:
    size = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)
