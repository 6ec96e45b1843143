"""The sockets of the redirect engine, and all their options.

Everything here belongs to a pod's network namespace: a socket stays in the one that
its thread was in when it was made, wherever the thread goes afterwards. Entering takes
CAP_SYS_ADMIN, and as long as it takes to make the socket.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, TypeVar

from podspan.agent.errors import RedirectError
from podspan.agent.redirect.route_back import has_route_back
from podspan.init.plan import AGENT_MARK

BACKLOG: Final = 4096  # the kernel takes net.core.somaxconn where that is less

_SO_MARK: Final = 36  # asm-generic/socket.h
_SO_ORIGINAL_DST: Final = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same
_IP_TRANSPARENT: Final = 19  # linux/in.h
_IPV6_TRANSPARENT: Final = 75  # linux/in6.h
_SIOCOUTQ: Final = 0x5411  # linux/sockios.h
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_RESET: Final = struct.pack("ii", 1, 0)  # struct linger: on, no time
_LINGER_OFF: Final = struct.pack("ii", 0, 0)

# Where inbound connections come from in Istio: addresses that no rule redirects. Its
# init adds the second one to the pod's loopback.
LOOPBACK_SOURCES: Final = {
    socket.AF_INET: "127.0.0.6",
    socket.AF_INET6: "::6",
}

# As socket.connect takes it: (host, port), of IPv6 (host, port, flow, scope).
Address = tuple[str, int] | tuple[str, int, int, int]
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


class Source(Enum):
    """Whose address an inbound connection shows to the application."""

    CLIENT = "client"
    LOOPBACK = "loopback"


def open_netns(where: int | Path, inode: int) -> int:
    """Return a descriptor of the namespace of a process, or at a path.

    Raises RedirectError where it is gone, or by now another than `inode`.
    """
    path = where if isinstance(where, Path) else Path(f"/proc/{where}/ns/net")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise RedirectError(f"network namespace {path}: {exc.strerror}") from exc
    found = os.fstat(fd).st_ino
    if found != inode:
        os.close(fd)
        raise RedirectError(f"network namespace {path}: is {found}, expected {inode}")
    return fd


@contextmanager
def inside(netns_fd: int, home_fd: int) -> Iterator[None]:
    """Let this thread make sockets in the namespace; it comes from `home_fd`."""
    _setns(netns_fd)
    try:
        yield
    finally:
        _setns(home_fd)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def call_inside(netns_fd: int, call: Callable[[], T]) -> T:
    """Run `call` in a thread that lives in the namespace, and ends with it."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _setns(netns_fd)
            results.append(call())
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def open_listeners(netns_fd: int, port: int) -> list[socket.socket]:
    """Listen on a port of the namespace, for each family that it has.

    Accepted sockets inherit the mark. Raises RedirectError.
    """

    def listen() -> list[socket.socket]:
        with ExitStack() as stack:
            made = []
            for family in (socket.AF_INET, socket.AF_INET6):
                listener = _listener(family, port)
                if listener is not None:
                    made.append(stack.enter_context(listener))
            stack.pop_all()
            return made

    try:
        return call_inside(netns_fd, listen)
    except OSError as exc:
        raise RedirectError(
            f"port {port} in the pod: {exc.strerror}",
            "another program of the pod listens there, or an agent of another user",
        ) from exc


def _listener(family: socket.AddressFamily, port: int) -> socket.socket | None:
    """Return the listener, None in a namespace without IPv6."""
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.EAFNOSUPPORT:
            return None
        raise
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The next agent opens its own while the last one's workers still serve.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, _SO_MARK, AGENT_MARK)
        listener.bind(("", port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        if family == socket.AF_INET6 and exc.errno == errno.EADDRNOTAVAIL:
            return None  # disable_ipv6 is set
        raise
    return listener


def prepare_accepted(sock: socket.socket) -> None:
    """Make an accepted socket what the relay needs; so does `open_upstream`.

    What the relay sends is sent at once: the peer's own socket has decided when. And
    close(2) sends RST, also that of the kernel for a worker that was killed: with a FIN
    an answer that was cut would look whole. `end_on_close` undoes that.

    A peer that has vanished is found by keepalives at the kernel's pace, because those
    of the application's own socket reach no further than to us.
    """
    sock.setblocking(False)
    _prepare(sock)


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def original_destination(accepted: socket.socket) -> Address | None:
    """Return whom the connection was meant for; None: it was not redirected."""
    try:
        if accepted.family == socket.AF_INET:
            raw = accepted.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
            _, port, packed = struct.unpack_from("!HH4s", raw)
            found: Address = (str(IPv4Address(packed)), port)
        else:
            raw = accepted.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            _, port, _, packed = struct.unpack_from("!HHI16s", raw)
            address = IPv6Address(packed)
            # The kernel tells the interface only of sockets that are bound to one.
            scope = accepted.getpeername()[3] if address.is_link_local else 0
            found = (str(address), port, 0, scope)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOPROTOOPT):  # conntrack knows nothing
            return None
        raise
    return None if found[:2] == accepted.getsockname()[:2] else found


def open_upstream(family: int) -> socket.socket:
    """Make a socket, where this thread is, whose connections are not redirected."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, AGENT_MARK)
    _prepare(sock)
    return sock


def bind_source(sock: socket.socket, source: Source, client: str) -> None:
    """Give an inbound connection its source address, with a port of the kernel's.

    Without ::6 in the pod an IPv6 connection comes from the pod's own address.
    """
    if source is Source.CLIENT:
        _make_transparent(sock)
        sock.bind((client, 0))
        return
    try:
        sock.bind((LOOPBACK_SOURCES[sock.family], 0))
    except OSError as exc:
        if exc.errno != errno.EADDRNOTAVAIL:
            raise


def _make_transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)


def transparent_families(netns_fd: int) -> frozenset[int]:
    """Say in which families the pod may see its clients' own addresses.

    There `podspan init` has made the route that answers take back.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    return call_inside(netns_fd, lambda: frozenset(filter(has_route_back, families)))


def end_on_close(sock: socket.socket) -> None:
    """Let close(2) deliver what was sent, as it does by default."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes that were sent the peer's kernel does not have yet."""
    answer = bytearray(4)
    fcntl.ioctl(sock, _SIOCOUTQ, answer)
    return int(struct.unpack("i", answer)[0])


def error_name(number: int | None) -> str:
    """Return econnrefused or the like, for a counter's name."""
    return errno.errorcode.get(number or 0, str(number)).lower()


def pending_error(sock: socket.socket) -> int:
    """Take the error that waits on the socket; 0: none."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
