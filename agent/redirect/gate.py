"""The gate: a connection's SYN waits in the kernel until its destination has answered.

Once a connection is accepted here, the application's connect(2) has succeeded, whatever
the destination then says. So the SYN is held in an nfnetlink queue (linux/netfilter/
nfnetlink_queue.h) while the worker connects. If that succeeds the SYN is sent into
the REDIRECT rule; if not, it goes the way it would have gone, and the application sees
the very error that it would have seen. The rules, of init/plan.py:

    -m mark --mark 0x53a -j REDIRECT
    -j NFQUEUE --queue-num 15001 --queue-bypass

Where nobody holds the queue, or it is full, the kernel lets the SYN pass: no worker, no
redirection, at once.

By hand, because no kept library speaks nfnetlink_queue (pyroute2 0.9 does not).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Self

from podspan.agent.errors import (
    FeatureMissing,
    NoPrivilege,
    PodspanError,
    RedirectError,
)
from podspan.agent.netlink import (
    CODE,
    HEADER,
    NLM_F_ACK,
    RECEIVE_BYTES,
    attribute,
    attributes,
    message,
    messages,
)
from podspan.init.plan import AGENT_MARK, GATE_MARK

NETLINK_NETFILTER: Final = 12  # linux/netlink.h
NFNL_SUBSYS_QUEUE: Final = 3  # linux/netfilter/nfnetlink.h

# linux/netfilter/nfnetlink_queue.h
NFQNL_MSG_PACKET: Final = 0
NFQNL_MSG_VERDICT: Final = 1
NFQNL_MSG_CONFIG: Final = 2
NFQA_PACKET_HDR: Final = 1
NFQA_VERDICT_HDR: Final = 2
NFQA_MARK: Final = 3
NFQA_PAYLOAD: Final = 10
NFQA_CFG_CMD: Final = 1
NFQA_CFG_PARAMS: Final = 2
NFQA_CFG_QUEUE_MAXLEN: Final = 3
NFQA_CFG_MASK: Final = 4
NFQA_CFG_FLAGS: Final = 5
NFQNL_CFG_CMD_BIND: Final = 1
NFQNL_COPY_PACKET: Final = 2
NFQA_CFG_F_FAIL_OPEN: Final = 1  # since 3.6: what finds no room passes

# linux/netfilter.h: the rules are walked again, with the mark.
NF_REPEAT: Final = 4
NF_INET_PRE_ROUTING: Final = 0

GENERIC: Final = struct.Struct("!BBH")  # struct nfgenmsg: family, version, queue
PORTS: Final = struct.Struct("!HH")
PACKET: Final = struct.Struct("!IHB")  # struct nfqnl_msg_packet_hdr

# A SYN's headers, options included: IPv6's 40 bytes, few extensions, TCP's 60.
COPY_BYTES: Final = 128
# Connections that wait at the same time; the kernel holds their packets.
QUEUE_PACKETS: Final = 4096
# Of packets that wait to be read, some 1 KB each in the kernel's count.
BUFFER_BYTES: Final = 4 << 20
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h


@dataclass(frozen=True, slots=True)
class Flow:
    """Whom a SYN is from, and for whom it is meant."""

    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class Held:
    """A packet that waits; `flow` is None where it is not TCP's, or not told."""

    number: int
    inbound: bool  # it came to this namespace; else it is leaving
    flow: Flow | None


class QueueTaken(RedirectError):
    """Another process holds this queue of the namespace."""


class Gate:
    """A queue of packets that wait; it is one process's, but can be handed on."""

    def __init__(self, queue: int, sock: socket.socket) -> None:
        """Take over a socket that `open` has made, here or in another process."""
        self._queue = queue
        self._socket = sock
        self.overruns = 0  # packets that passed, because we did not come to reading

    @classmethod
    def open(cls, queue: int) -> Self:
        """Hold a queue of the network namespace that the calling thread is in.

        Raises NoPrivilege without CAP_NET_ADMIN, FeatureMissing where the kernel has no
        nfnetlink_queue, QueueTaken, RedirectError where it just now cannot.
        """
        try:
            sock = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                NETLINK_NETFILTER,
            )
        except OSError as exc:
            raise _explained(exc, queue) from exc
        self = cls(queue, sock)
        try:
            self._configure(attribute(NFQA_CFG_CMD, _command(NFQNL_CFG_CMD_BIND)))
            params = struct.pack("!IB", COPY_BYTES, NFQNL_COPY_PACKET)
            fail_open = struct.pack("!I", NFQA_CFG_F_FAIL_OPEN)
            self._configure(
                attribute(NFQA_CFG_PARAMS, params)
                + attribute(NFQA_CFG_QUEUE_MAXLEN, struct.pack("!I", QUEUE_PACKETS))
                + attribute(NFQA_CFG_MASK, fail_open)
                + attribute(NFQA_CFG_FLAGS, fail_open)
            )
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        except OSError as exc:
            self._socket.close()
            raise _explained(exc, queue) from exc
        self._socket.setblocking(False)
        return self

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a packet waits."""
        return self._socket.fileno()

    def receive(self) -> list[Held]:
        """Return what has come, without waiting."""
        try:
            return list(parse(self._socket.recv(RECEIVE_BYTES)))
        except BlockingIOError:
            return []
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            return []

    def redirect(self, held: Held) -> None:
        """Let it come to the listener."""
        self._verdict(held, GATE_MARK)

    def direct(self, held: Held) -> None:
        """Let it go to whom it is meant for."""
        self._verdict(held, AGENT_MARK)

    def close(self) -> None:
        """Give the queue up. What waits is dropped, and goes direct when sent again."""
        self._socket.close()

    def _verdict(self, held: Held, mark: int) -> None:
        body = attribute(
            NFQA_VERDICT_HDR, struct.pack("!II", NF_REPEAT, held.number)
        ) + attribute(NFQA_MARK, struct.pack("!I", mark))
        self._socket.send(_message(NFQNL_MSG_VERDICT, self._queue, body))

    def _configure(self, content: bytes) -> None:
        self._socket.send(_message(NFQNL_MSG_CONFIG, self._queue, content, NLM_F_ACK))
        answer = self._socket.recv(RECEIVE_BYTES)
        (code,) = CODE.unpack_from(answer, HEADER.size)
        if code:
            raise OSError(-code, os.strerror(-code))


def parse(datagram: bytes) -> Iterator[Held]:
    """Yield the packets of one netlink datagram; other messages are left out."""
    for kind, body in messages(datagram):
        if kind == NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET:
            found = dict(attributes(body[GENERIC.size :]))
            number, _, hook = PACKET.unpack_from(found[NFQA_PACKET_HDR])
            flow = flow_of(found.get(NFQA_PAYLOAD, b""))
            yield Held(number, hook == NF_INET_PRE_ROUTING, flow)


def flow_of(packet: bytes) -> Flow | None:
    """Return whose SYN this is; None where it is none.

    IPv6 extension headers before TCP's are nothing that a pod sends: such goes direct.
    """
    version = packet[0] >> 4 if packet else 0
    try:
        if version == 4 and packet[9] == socket.IPPROTO_TCP:
            at = (packet[0] & 15) * 4
            source = str(IPv4Address(packet[12:16]))
            destination = str(IPv4Address(packet[16:20]))
        elif version == 6 and packet[6] == socket.IPPROTO_TCP:
            at = 40
            source = str(IPv6Address(packet[8:24]))
            destination = str(IPv6Address(packet[24:40]))
        else:
            return None
        source_port, destination_port = PORTS.unpack_from(packet, at)
    except (IndexError, ValueError, struct.error):
        return None
    return Flow(source, source_port, destination, destination_port)


def _command(command: int) -> bytes:
    return struct.pack("!BBH", command, 0, 0)


def _message(kind: int, queue: int, content: bytes, flags: int = 0) -> bytes:
    body = GENERIC.pack(socket.AF_UNSPEC, 0, queue) + content
    return message(NFNL_SUBSYS_QUEUE << 8 | kind, body, flags)


def _explained(exc: OSError, queue: int) -> PodspanError:
    # The kernel answers EPERM as well where another socket has the queue: the socket
    # can be made by anyone, so tell by who we are.
    if exc.errno == errno.EPERM and os.geteuid() != 0:
        return NoPrivilege(f"cannot hold packets: {exc}", hint="needs CAP_NET_ADMIN")
    if exc.errno in {errno.EPERM, errno.EBUSY}:
        return QueueTaken(
            f"queue {queue} of this network namespace is taken",
            hint="another agent serves this pod: see /proc/net/netfilter/"
            "nfnetlink_queue",
        )
    if exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}:
        return RedirectError(f"cannot hold packets: {exc}")
    return FeatureMissing(
        f"cannot hold packets: {exc}",
        hint="modprobe nfnetlink_queue (CONFIG_NETFILTER_NETLINK_QUEUE)",
    )
