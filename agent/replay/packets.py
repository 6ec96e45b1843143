"""Find the TCP segment in a captured packet.

Pure, and by struct: scapy's full dissection costs a hundred times as much. What is no
whole TCP segment is skipped by a reason, a counter's name:

    link_type   a link layer that is not known here
    not_ip      ARP, LLDP, a truncated Ethernet frame, ...
    not_tcp     UDP, ICMP, tunnels, ...
    fragment    a part of an IP datagram: no port in all but the first
    header_cut  the snapshot length ends before the TCP header does
    malformed   lengths that contradict each other
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from ipaddress import ip_address
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import NamedTuple

LINK_TYPE = "link_type"
NOT_IP = "not_ip"
NOT_TCP = "not_tcp"
FRAGMENT = "fragment"
HEADER_CUT = "header_cut"
MALFORMED = "malformed"
SKIPPED = (LINK_TYPE, NOT_IP, NOT_TCP, FRAGMENT, HEADER_CUT, MALFORMED)

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

_IPV4, _IPV6 = 0x0800, 0x86DD
_TCP = 6
_VLAN_TAGS = frozenset({0x8100, 0x88A8, 0x9100})  # 802.1Q, 802.1ad, and before it
_MOST_TAGS = 8

# IANA's extension headers (RFC 7045 section 1.1) with a length in units of 8 bytes,
# without the first 8: hop by hop, routing, destination, mobility, HIP, shim6.
_IPV6_EXTENSIONS = frozenset({0, 43, 60, 135, 139, 140})
_IPV6_FRAGMENT, _IPV6_AUTHENTICATION = 44, 51
_MOST_EXTENSIONS = 16

_u16 = Struct("!H").unpack_from
_ipv4 = Struct("!BxHHHxB2x4s4s").unpack_from
_ipv6 = Struct("!4xHBx16s16s").unpack_from
_tcp = Struct("!2s2sIIH").unpack_from


class Segment(NamedTuple):
    """A TCP segment. An end is its address and port as on the wire: 6 or 18 bytes."""

    source: bytes
    destination: bytes
    seq: int
    ack: int  # has a meaning with the flag ACK only
    flags: int
    data: bytes
    cut: int  # bytes of data behind these that are not in the capture
    # The same in each copy of a packet that was captured at several interfaces, and in
    # no retransmission: IPv4's identification and the TCP header with its timestamps.
    mark: bytes


class _Skip(Exception):
    """The packet has no segment for us. Never leaves this module."""


def segment_of(link_type: int, data: bytes, wire_length: int) -> Segment | str:
    """Return the segment in a packet, or the reason why it is skipped.

    `link_type` is one of the LINKTYPE_ values of tcpdump.org; `wire_length` is what the
    packet had before the snapshot length cut it.
    """
    find = _LINK_LAYERS.get(link_type)
    if find is None:
        return LINK_TYPE
    try:
        protocol, at = find(data)
        for _ in range(_MOST_TAGS):
            if protocol not in _VLAN_TAGS:
                break
            (protocol,) = _u16(data, at + 2)
            at += 4
        end = max(wire_length, len(data))
        if protocol == _IPV4:
            return _in_ipv4(data, at, end)
        if protocol == _IPV6:
            return _in_ipv6(data, at, end)
    except _Skip as skip:
        return str(skip)
    except (ValueError, IndexError, StructError):
        return HEADER_CUT if wire_length > len(data) else MALFORMED
    return NOT_IP


# An end is turned into text once per exchange; there are few.
@lru_cache(maxsize=4096)
def address_and_port(end: bytes) -> tuple[str, int]:
    """Return an end of a segment as text and number, IPv4 in IPv6 as IPv4."""
    address = ip_address(end[:-2])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int.from_bytes(end[-2:], "big")


def _in_ipv4(data: bytes, at: int, end: int) -> Segment:
    version, total, number, fragment, protocol, source, destination = _ipv4(data, at)
    if version >> 4 != 4:
        raise _Skip(MALFORMED)
    if protocol != _TCP:
        raise _Skip(NOT_TCP)
    if fragment & 0x3FFF:  # more to come, or not the first
        raise _Skip(FRAGMENT)
    # 0: the network card cuts it (segmentation offload), and fills in the length.
    ip_end = at + total if total else end
    tcp_at = at + 4 * (version & 15)
    ends = source, destination
    return _segment(data, tcp_at, (ip_end, end), ends, number.to_bytes(2, "big"))


def _in_ipv6(data: bytes, at: int, end: int) -> Segment:
    length, header, source, destination = _ipv6(data, at)
    if data[at] >> 4 != 6:
        raise _Skip(MALFORMED)
    at += 40
    ip_end = at + length if length else end  # 0: as in IPv4, or a jumbogram
    for _ in range(_MOST_EXTENSIONS):
        if header == _TCP:
            return _segment(data, at, (ip_end, end), (source, destination), b"")
        if header == _IPV6_FRAGMENT:
            # An atomic one (RFC 6946) is whole.
            if _u16(data, at + 2)[0] & 0xFFF9:
                raise _Skip(FRAGMENT)
            size = 8
        elif header == _IPV6_AUTHENTICATION:
            size = 4 * (data[at + 1] + 2)  # RFC 4302 section 2.2
        elif header in _IPV6_EXTENSIONS:
            size = 8 * (data[at + 1] + 1)
        else:
            raise _Skip(NOT_TCP)
        header = data[at]
        at += size
    raise _Skip(MALFORMED)


def _segment(
    data: bytes,
    at: int,
    until: tuple[int, int],
    addresses: tuple[bytes, bytes],
    number: bytes,
) -> Segment:
    """Return the segment at `at`; `until`: the ends of IP's packet and the wire's."""
    ip_end, wire_end = until
    source, destination = addresses
    source_port, destination_port, seq, ack, flags = _tcp(data, at)
    data_at = at + 4 * (flags >> 12)
    if flags >> 12 < 5 or data_at > ip_end or ip_end > wire_end:
        raise _Skip(MALFORMED)
    if data_at > len(data):
        raise _Skip(HEADER_CUT)
    payload = data[data_at:ip_end]
    return Segment(
        source + source_port,
        destination + destination_port,
        seq,
        ack,
        flags & 0x3F,
        payload,
        ip_end - data_at - len(payload),
        number + data[at:data_at],
    )


def _ethernet(data: bytes) -> tuple[int, int]:
    return (_u16(data, 12)[0], 14) if len(data) >= 14 else (0, 0)


def _linux_cooked(data: bytes) -> tuple[int, int]:
    return _u16(data, 14)[0], 16


def _linux_cooked_2(data: bytes) -> tuple[int, int]:
    return _u16(data, 0)[0], 20


def _loopback(data: bytes) -> tuple[int, int]:
    """BSD's: an address family in the byte order of whoever captured."""
    family = int.from_bytes(data[:4], "big")
    family = min(family, int.from_bytes(data[:4], "little"))
    return _FAMILIES.get(family, 0), 4


def _raw_ip(data: bytes) -> tuple[int, int]:
    return _VERSIONS.get(data[0] >> 4 if data else 0, 0), 0


# AF_INET; AF_INET6 of Linux, NetBSD and OpenBSD, FreeBSD, macOS.
_FAMILIES = {2: _IPV4, 10: _IPV6, 24: _IPV6, 28: _IPV6, 30: _IPV6}
_VERSIONS = {4: _IPV4, 6: _IPV6}

# https://www.tcpdump.org/linktypes.html; 12 and 14 are DLT_RAW in files of old BSDs.
_LINK_LAYERS: dict[int, Callable[[bytes], tuple[int, int]]] = {
    0: _loopback,
    1: _ethernet,
    12: _raw_ip,
    14: _raw_ip,
    101: _raw_ip,
    108: _loopback,
    113: _linux_cooked,
    228: _raw_ip,
    229: _raw_ip,
    276: _linux_cooked_2,
}
