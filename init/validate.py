"""Try a redirected connection: do the rules work in this network namespace?

The plan redirects one connection whatever the guard says, and no other can be meant: on
loopback, from the probe port to the probe port. We are its client, and listen where it
is redirected to. That rule is written in one transaction with all the others.

Without the rule the socket is connected with itself (RFC 9293's simultaneous open), and
reads what it wrote. Where the inbound port is taken, as by the agent's listener, it is
looked up who has the connection. No privilege is needed.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from errno import EADDRINUSE
from pathlib import Path
from typing import Final

from podspan.agent.errors import NotRedirected
from podspan.init.plan import LOOPBACK, Family, Redirection

FAMILIES: Final = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
# linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same. The answer is a sockaddr,
# with the port after two bytes.
SO_ORIGINAL_DST: Final = 80
LEVELS: Final = {Family.IPV4: socket.SOL_IP, Family.IPV6: socket.IPPROTO_IPV6}
SOCKADDR_SIZE: Final = 28

TABLES: Final = {
    Family.IPV4: Path("/proc/thread-self/net/tcp"),
    Family.IPV6: Path("/proc/thread-self/net/tcp6"),
}
MIN_TIMEOUT_S: Final = 0.001  # 0 would be: do not wait
NO_RULE: Final = "no rule took the probe's connection"

RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: nothing in TIME_WAIT


def validate(wanted: Redirection, families: Sequence[Family], timeout_s: float) -> None:
    """Raise unless a connection is redirected, in each family."""
    deadline = time.monotonic() + timeout_s
    for family in families:
        try:
            problem = _try(wanted, family, deadline)
        except OSError as exc:
            problem = exc.strerror or str(exc)
        if problem:
            raise NotRedirected(
                f"IPv{family.value} connections are not redirected: {problem}",
                hint="has podspan init apply run in this pod, with the same ports? "
                "`iptables-save | grep PODSPAN` and `podspan init plan` show what is "
                "there and what should be",
            )


def _try(wanted: Redirection, family: Family, deadline: float) -> str:
    """Return what is wrong, or nothing."""
    address = str(LOOPBACK[family].network_address)
    with ExitStack() as stack:
        listener = _listener(family, address, wanted.inbound_port)
        if listener is not None:
            stack.enter_context(listener)
        client = stack.enter_context(socket.socket(FAMILIES[family]))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        try:
            client.bind((address, wanted.probe_port))
        except OSError as exc:
            return f"the probe port {wanted.probe_port} is in use: {exc.strerror}"
        client.settimeout(max(MIN_TIMEOUT_S, deadline - time.monotonic()))
        try:
            client.connect((address, wanted.probe_port))
            client.sendall(b"\n")
        except ConnectionError:
            if listener is None:
                return ""  # by whoever it came to: a socket does not reset itself
            raise
        if listener is None:
            return _judge_unseen(client, wanted, family)
        return _judge(client, listener, wanted, family)


def _judge(
    client: socket.socket, listener: socket.socket, wanted: Redirection, family: Family
) -> str:
    ready, _, _ = select.select([client, listener], [], [], client.gettimeout())
    if listener in ready:
        with listener.accept()[0] as accepted:
            port = original_port(accepted, family)
            # Before the other end: conntrack then takes a SYN of the same ports as a
            # new connection at once, which meets the rules of its own time.
            client.close()
        return "" if port == wanted.probe_port else f"port {port} was dialled"
    return NO_RULE if client in ready else "nothing arrived in time"


def _judge_unseen(client: socket.socket, wanted: Redirection, family: Family) -> str:
    """Judge a connection that another's listener has, if it is redirected."""
    ports = (wanted.inbound_port, wanted.probe_port)
    if ports in _connections(family):
        return ""
    try:
        return NO_RULE if client.recv(1) == b"\n" else ""
    except ConnectionError:
        return ""  # as above; it was closed before we looked


def _connections(family: Family) -> Iterator[tuple[int, int]]:
    """Yield local and remote port of this namespace's sockets (proc_net_tcp.rst)."""
    for line in TABLES[family].read_text().splitlines()[1:]:
        _, local, remote, *_ = line.split()
        yield int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)


def _listener(family: Family, address: str, port: int) -> socket.socket | None:
    """Listen where the probe goes; None where another listens there already."""
    listener = socket.socket(FAMILIES[family])
    # Beside the agent's listeners on all addresses, and theirs beside this one.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except OSError as exc:
        listener.close()
        if exc.errno != EADDRINUSE:
            raise
        return None
    return listener


def original_port(accepted: socket.socket, family: Family) -> int:
    """Return the port that the peer of a redirected connection dialled."""
    raw = accepted.getsockopt(LEVELS[family], SO_ORIGINAL_DST, SOCKADDR_SIZE)
    port: int = struct.unpack_from("!2xH", raw)[0]
    return port
