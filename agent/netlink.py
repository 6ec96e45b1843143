"""The frame of netlink messages (linux/netlink.h): pure, bytes in and bytes out.

A netlink library costs a process 17 MB, of the agent's 64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP: Final = 0x300
NLA_TYPE: Final = 0x3FFF  # without NLA_F_NESTED

HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
CODE: Final = struct.Struct("=i")  # of an error or an end: 0, or -errno
ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr

RECEIVE_BYTES: Final = 65536  # twice what the kernel puts into one answer


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    """Return a request of this kind."""
    size = HEADER.size + len(body)
    return HEADER.pack(size, kind, NLM_F_REQUEST | flags, 0, 0) + body


def messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and body of each message; the last may be cut."""
    at = 0
    while at + HEADER.size <= len(datagram):
        length, kind, *_ = HEADER.unpack_from(datagram, at)
        yield kind, datagram[at + HEADER.size : at + length]
        at += max(HEADER.size, (length + 3) & ~3)


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute, padded for the next one."""
    size = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute; the last may be cut."""
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        yield kind & NLA_TYPE, data[at + ATTRIBUTE.size : at + length]
        at += max(ATTRIBUTE.size, (length + 3) & ~3)
