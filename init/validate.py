"""Try a redirected connection: do the rules work in this network namespace?

The plan redirects one connection whatever the guard says, and no other can be meant: on
loopback, from the probe port to the probe port. We are its client, and listen where it
is redirected to. That rule is written in one transaction with all the others.

Without the rule the socket is connected with itself (RFC 9293's simultaneous open), and
reads what it wrote. Where the inbound port is taken, as by the agent's listener, that
difference alone has to do. No privilege is needed.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from errno import EADDRINUSE
from typing import Final

from podspan.agent.errors import NotRedirected
from podspan.init.plan import LOOPBACK, Family, Redirection

FAMILIES: Final = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
# linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same. The answer is a sockaddr,
# with the port after two bytes.
SO_ORIGINAL_DST: Final = 80
LEVELS: Final = {Family.IPV4: socket.SOL_IP, Family.IPV6: socket.IPPROTO_IPV6}
SOCKADDR_SIZE: Final = 28

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
        client.settimeout(max(0.0, deadline - time.monotonic()) or None)
        client.connect((address, wanted.probe_port))
        client.sendall(b"\n")
        sources = [client] if listener is None else [client, listener]
        ready, _, _ = select.select(
            sources, [], [], max(0.0, deadline - time.monotonic())
        )
        if listener is not None and listener in ready:
            accepted = stack.enter_context(listener.accept()[0])
            port = original_port(accepted, family)
            return "" if port == wanted.probe_port else f"port {port} was dialled"
        if client in ready and _reads_itself(client):
            return "no rule took the probe's connection"
        if listener is None and client in ready:
            return ""
        return "nothing arrived in time"


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


def _reads_itself(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b"\n"
    except ConnectionResetError:
        return False
