import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.replay.packets import (
    ACK,
    FRAGMENT,
    HEADER_CUT,
    LINK_TYPE,
    MALFORMED,
    NOT_IP,
    NOT_TCP,
    SKIPPED,
    Segment,
    address_and_port,
    segment_of,
)
from unit.replay_wire import (
    ETHERNET,
    LOOP,
    NULL,
    RAW,
    SLL,
    SLL2,
    framed,
    ip_packet,
)

V4 = (("10.0.0.1", 40000), ("10.0.0.2", 80))
V6 = (("fd00::1", 40000), ("fd00::2", 80))
LINK_TYPES = (ETHERNET, SLL, SLL2, NULL, LOOP, RAW)


def of(link_type, frame, wire_length=None):
    return segment_of(link_type, frame, wire_length or len(frame))


@pytest.mark.parametrize("ends", [V4, V6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("link_type", LINK_TYPES)
def test_the_segment_is_the_same_under_every_link_layer(link_type, ends):
    frame = framed(link_type, ip_packet(ends, 7, 9, ACK, b"data"))
    segment = of(link_type, frame)
    assert isinstance(segment, Segment)
    assert address_and_port(segment.source) == ends[0]
    assert address_and_port(segment.destination) == ends[1]
    assert segment[2:7] == (7, 9, ACK, b"data", 0)


@pytest.mark.parametrize("tags", [(0x8100,), (0x88A8, 0x8100), (0x9100, 0x8100)])
@pytest.mark.parametrize("link_type", [ETHERNET, SLL, SLL2])
def test_vlan_tags_are_passed_over(link_type, tags):
    plain = ip_packet(V4, 7, 9, ACK, b"data")
    tagged = of(link_type, framed(link_type, plain, tags))
    assert tagged == of(link_type, framed(link_type, plain))


def test_scapy_reads_the_same():
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    packet = (
        Ether()
        / IP(src="1.2.3.4", dst="5.6.7.8", id=77, options=b"\x01" * 8)
        / TCP(sport=1, dport=2, seq=3, ack=4, flags="PA", options=[("NOP", None)] * 4)
        / b"body"
    )
    segment = of(ETHERNET, bytes(packet))
    assert isinstance(segment, Segment)
    assert segment[2:7] == (3, 4, 0x18, b"body", 0)
    assert address_and_port(segment.source) == ("1.2.3.4", 1)


def test_ipv6_extension_headers_are_passed_over():
    from scapy.layers.inet import TCP
    from scapy.layers.inet6 import (
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
        IPv6ExtHdrHopByHop,
    )

    packet = (
        IPv6(src="fd00::1", dst="fd00::2")
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrFragment(offset=0, m=0)
        / TCP(sport=1, dport=2, flags="A")
        / b"body"
    )
    segment = of(RAW, bytes(packet))
    assert isinstance(segment, Segment)
    assert segment.data == b"body"


def test_padding_of_ethernet_is_no_data():
    frame = framed(ETHERNET, ip_packet(V4, 7, 9, ACK, b"")) + bytes(6)
    assert of(ETHERNET, frame).data == b""


def test_a_length_of_zero_is_the_network_cards_to_fill_in():
    ip = bytearray(ip_packet(V4, 7, 9, ACK, b"data"))
    ip[2:4] = bytes(2)
    assert of(RAW, bytes(ip)).data == b"data"


def test_what_the_snapshot_length_cut_is_told():
    ip = ip_packet(V4, 7, 9, ACK, b"0123456789")
    segment = of(RAW, ip[:-7], len(ip))
    assert (segment.data, segment.cut) == (b"012", 7)


def test_a_copy_has_the_same_mark_and_a_retransmission_another():
    copies = [
        of(link, framed(link, ip_packet(V4, 7, 9, ACK, b"data", number=5)))
        for link in (ETHERNET, SLL2)
    ]
    again = of(RAW, ip_packet(V4, 7, 9, ACK, b"data", number=6))
    assert copies[0].mark == copies[1].mark != again.mark


def changed(ends, at, value):
    ip = bytearray(ip_packet(ends, 7, 9, ACK, b"data"))
    ip[at : at + len(value)] = value
    return bytes(ip)


ARP = b"\x02" * 12 + b"\x08\x06" + bytes(28)
WHOLE = ip_packet(V4, 7, 9, ACK, b"data")
V6_FRAGMENT = (
    changed(V6, 6, b"\x2c")[:40] + struct.pack("!BBHI", 6, 0, 8, 1) + bytes(40)
)

SKIPS = [
    pytest.param(105, WHOLE, LINK_TYPE, id="802.11"),
    pytest.param(ETHERNET, ARP, NOT_IP, id="arp"),
    pytest.param(ETHERNET, b"", NOT_IP, id="empty"),
    pytest.param(RAW, b"", NOT_IP, id="empty raw"),
    pytest.param(NULL, bytes(40), NOT_IP, id="unknown family"),
    pytest.param(ETHERNET, b"\x02" * 12 + b"\x81\x00" * 40, NOT_IP, id="tags only"),
    pytest.param(RAW, changed(V4, 9, b"\x11"), NOT_TCP, id="udp"),
    pytest.param(RAW, changed(V6, 6, b"\x3a"), NOT_TCP, id="icmp6"),
    pytest.param(RAW, changed(V4, 6, b"\x20\x00"), FRAGMENT, id="first fragment"),
    pytest.param(RAW, changed(V4, 6, b"\x00\x10"), FRAGMENT, id="later fragment"),
    pytest.param(RAW, V6_FRAGMENT, FRAGMENT, id="ipv6 fragment"),
    pytest.param(
        RAW, changed(V4, 2, b"\xff\xff"), MALFORMED, id="longer than the wire"
    ),
    pytest.param(RAW, changed(V4, 2, b"\x00\x01"), MALFORMED, id="shorter than itself"),
    pytest.param(RAW, changed(V4, 32, b"\x00"), MALFORMED, id="no TCP header"),
    pytest.param(RAW, WHOLE[:30], MALFORMED, id="ends in TCP"),
    pytest.param(RAW, changed(V6, 6, b"\x00")[:40] + bytes(900), MALFORMED, id="chain"),
]


@pytest.mark.parametrize(("link_type", "frame", "reason"), SKIPS)
def test_what_is_no_segment_is_skipped_by_reason(link_type, frame, reason):
    assert of(link_type, frame) == reason


def test_a_snapshot_shorter_than_the_headers_is_told_as_such():
    for size in range(1, 20 + 32):
        assert segment_of(RAW, WHOLE[:size], len(WHOLE)) == HEADER_CUT


@given(
    st.sampled_from([*LINK_TYPES, 12, 14, 228, 229, 999]),
    st.binary(max_size=120),
    st.integers(0, 1 << 32),
)
def test_any_bytes_are_a_segment_or_a_reason(link_type, data, wire_length):
    found = segment_of(link_type, data, wire_length)
    assert isinstance(found, Segment) or found in SKIPPED


@given(st.sampled_from([V4, V6]), st.integers(0, 90), st.binary(min_size=1, max_size=4))
def test_a_packet_with_wrong_bytes_is_a_segment_or_a_reason(ends, at, wrong):
    found = of(RAW, changed(ends, at, wrong))
    assert isinstance(found, Segment) or found in SKIPPED
