"""Is there a route back for connections that are opened in a client's name?

`podspan init` makes one for each family: a rule that sends what has the connection mark
to a table in which every address is at home (init/routing.py). By hand, because
importing a netlink library costs the agent 17 MB of its 64.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

from podspan.agent.netlink import (
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    RECEIVE_BYTES,
    attributes,
    message,
    messages,
)
from podspan.init.plan import CONNECTION_MARK, MARK_MASK, ROUTE_TABLE

# linux/rtnetlink.h, linux/fib_rules.h
RTM_NEWRULE: Final = 32
RTM_GETRULE: Final = 34
FRA_FWMARK: Final = 10
FRA_TABLE: Final = 15
FRA_FWMASK: Final = 16

RULE_SIZE: Final = 12  # struct fib_rule_hdr, the family first


def has_route_back(family: int) -> bool:
    """Look among the rules of the namespace that this thread is in.

    Raises OSError where the kernel does not tell.
    """
    body = bytes([family]) + bytes(RULE_SIZE - 1)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as netlink:
        netlink.send(message(RTM_GETRULE, body, NLM_F_DUMP))
        while True:
            for kind, rule in messages(netlink.recv(RECEIVE_BYTES)):
                if kind in {NLMSG_ERROR, NLMSG_DONE}:
                    return False
                if kind == RTM_NEWRULE and leads_back(rule):
                    return True


def leads_back(rule: bytes) -> bool:
    """Tell whether a rule is the one that init makes."""
    found = dict(attributes(rule[RULE_SIZE:]))
    wanted = {
        FRA_FWMARK: CONNECTION_MARK,
        FRA_FWMASK: MARK_MASK,
        FRA_TABLE: ROUTE_TABLE,
    }
    return all(
        found.get(kind) == value.to_bytes(4, sys.byteorder)
        for kind, value in wanted.items()
    )
