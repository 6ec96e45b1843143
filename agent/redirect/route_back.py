"""Is there a route back for connections that are opened in a client's name?

`podspan init` makes one for each family: a rule that sends what has the connection mark
to a table in which every address is at home (init/routing.py). By hand, because
importing a netlink library costs the agent 17 MB of its 64.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

from podspan.init.plan import CONNECTION_MARK, MARK_MASK, ROUTE_TABLE

# linux/netlink.h, linux/rtnetlink.h, linux/fib_rules.h
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
RTM_NEWRULE: Final = 32
RTM_GETRULE: Final = 34
FRA_FWMARK: Final = 10
FRA_TABLE: Final = 15
FRA_FWMASK: Final = 16

HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
RULE_SIZE: Final = 12  # struct fib_rule_hdr, the family first
ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
RECEIVE_BYTES: Final = 65536


def has_route_back(family: int) -> bool:
    """Look among the rules of the namespace that this thread is in.

    Raises OSError where the kernel does not tell.
    """
    body = bytes([family]) + bytes(RULE_SIZE - 1)
    size = HEADER.size + len(body)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as netlink:
        netlink.send(
            HEADER.pack(size, RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body
        )
        while True:
            for kind, rule in messages(netlink.recv(RECEIVE_BYTES)):
                if kind in {NLMSG_ERROR, NLMSG_DONE}:
                    return False
                if kind == RTM_NEWRULE and leads_back(rule):
                    return True


def messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and body of each message of a datagram."""
    at = 0
    while at + HEADER.size <= len(answer):
        length, kind, *_ = HEADER.unpack_from(answer, at)
        yield kind, answer[at + HEADER.size : at + length]
        at += max(HEADER.size, (length + 3) & ~3)


def leads_back(rule: bytes) -> bool:
    """Tell whether a rule is the one that init makes."""
    found = dict(_attributes(rule[RULE_SIZE:]))
    wanted = {
        FRA_FWMARK: CONNECTION_MARK,
        FRA_FWMASK: MARK_MASK,
        FRA_TABLE: ROUTE_TABLE,
    }
    return all(found.get(kind) == value for kind, value in wanted.items())


def _attributes(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        yield (
            kind,
            int.from_bytes(data[at + ATTRIBUTE.size : at + length], sys.byteorder),
        )
        at += max(ATTRIBUTE.size, (length + 3) & ~3)
