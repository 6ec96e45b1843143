"""TCP sockets of a network namespace, as sock_diag(7) tells them.

By hand, because importing a netlink library costs the agent 17 MB of its 64, and
pyroute2's (0.9) takes a refusal for a socket: it tells messages by their family, and
NLMSG_ERROR is 2, as AF_INET is.

Blind: which end opened a connection; the kernel does not keep that.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from podspan.agent.errors import FeatureMissing, NoPrivilege
from podspan.agent.netlink import (
    CODE,
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    RECEIVE_BYTES,
    attributes,
    message,
    messages,
)

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
NETLINK_SOCK_DIAG: Final = 4  # linux/netlink.h


SOCK_DIAG_BY_FAMILY: Final = 20  # linux/sock_diag.h
# include/net/tcp_states.h
TCP_ESTABLISHED: Final = 1
TCP_LISTEN: Final = 10

# linux/inet_diag.h. ULP_INFO comes to CAP_NET_ADMIN that asks for INFO.
INET_DIAG_INFO: Final = 2
INET_DIAG_SKV6ONLY: Final = 11
INET_DIAG_ULP_INFO: Final = 19
INET_ULP_INFO_NAME: Final = 1

# struct inet_diag_req_v2; ports, addresses, interface and cookie 0: all sockets.
REQUEST: Final = struct.Struct("=BBBxI48x")
# struct inet_diag_msg: family, state, timer, retrans; ports and addresses in network
# order, interface, cookie; expires, rqueue, wqueue, uid, inode.
MESSAGE: Final = struct.Struct("=4B2s2s16s16sI2I5I")


_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """A TCP socket that listens or is established. IPv4 in IPv6 is IPv4 here."""

    listening: bool
    inode: int  # in sockfs; 0 where no descriptor was ever made, as before accept(2)
    cookie: int  # as SO_COOKIE: never used again until the next boot
    local: IPv4Address | IPv6Address
    local_port: int
    peer: IPv4Address | IPv6Address
    peer_port: int
    v6only: bool  # an IPv6 listener that takes no IPv4
    ulp: str  # the upper layer protocol: "tls", "mptcp"; "" without


def tcp_sockets(netns_fd: int) -> list[TcpSocket]:
    """Return what listens and what is established in a namespace, IPv4 and IPv6.

    Raises NoPrivilege where the namespace may not be entered, FeatureMissing where the
    kernel has no tcp_diag.
    """
    # A namespace is entered by a thread: by one that ends there.
    with ThreadPoolExecutor(1, "sock_diag") as visitor:
        return visitor.submit(_visit, netns_fd).result()


def parse(answer: bytes) -> Iterator[TcpSocket | None]:
    """Yield the sockets of one datagram, and None where the last one has been told.

    Raises OSError with what the kernel refused.
    """
    for kind, body in messages(answer):
        if kind in {NLMSG_ERROR, NLMSG_DONE}:
            (code,) = CODE.unpack_from(body)
            if code:
                raise OSError(-code, os.strerror(-code))
            yield None
        else:
            yield _parse_socket(body)


def _visit(netns_fd: int) -> list[TcpSocket]:
    if _libc.setns(netns_fd, CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise NoPrivilege(
            f"cannot enter a network namespace: {reason}",
            hint="run the agent as root, or as a privileged DaemonSet",
        )
    found: list[TcpSocket] = []
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
    ) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            netlink.send(_request(family))
            try:
                found += _receive(netlink)
            except OSError as exc:
                raise FeatureMissing(
                    f"cannot list TCP sockets: {exc}",
                    hint="modprobe tcp_diag; or a kernel with CONFIG_INET_TCP_DIAG",
                ) from exc
    return found


def _request(family: int) -> bytes:
    states = 1 << TCP_ESTABLISHED | 1 << TCP_LISTEN
    wanted = 1 << INET_DIAG_INFO - 1
    body = REQUEST.pack(family, socket.IPPROTO_TCP, wanted, states)
    return message(SOCK_DIAG_BY_FAMILY, body, NLM_F_DUMP)


def _receive(netlink: socket.socket) -> Iterator[TcpSocket]:
    while True:
        for found in parse(netlink.recv(RECEIVE_BYTES)):
            if found is None:
                return
            yield found


def _parse_socket(body: bytes) -> TcpSocket:
    (family, state, _, _, sport, dport, source, destination, _, low, high, *rest) = (
        MESSAGE.unpack_from(body)
    )
    found = dict(attributes(body[MESSAGE.size :]))
    ulp = dict(attributes(found.get(INET_DIAG_ULP_INFO, b"")))
    return TcpSocket(
        listening=state == TCP_LISTEN,
        inode=rest[-1],
        cookie=high << 32 | low,
        local=_address(family, source),
        local_port=int.from_bytes(sport, "big"),
        peer=_address(family, destination),
        peer_port=int.from_bytes(dport, "big"),
        v6only=any(found.get(INET_DIAG_SKV6ONLY, b"")),
        ulp=ulp.get(INET_ULP_INFO_NAME, b"").rstrip(b"\0").decode("ascii", "replace"),
    )


def _address(family: int, packed: bytes) -> IPv4Address | IPv6Address:
    if family == socket.AF_INET:
        return IPv4Address(packed[:4])
    address = IPv6Address(packed)
    return address.ipv4_mapped or address
