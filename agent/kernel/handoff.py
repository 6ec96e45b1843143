"""What a redirect worker reads from the kernel's programs, and tells them.

The only reader and writer of bpf/handoff.h's tables in user space. The tables come as
descriptors, which a worker inherits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from podspan.agent.exchange import Link, Role
from podspan.agent.kernel import syscall
from podspan.agent.redirect.inject import Given

TUPLE: Final = struct.Struct("=16s16sIHH")
HANDED_KEY: Final = struct.Struct("=40sQ")
HANDED: Final = struct.Struct("=QQQQBB2x36s")
ROOT_KEY: Final = struct.Struct("=QI4x")
HTTP2_KEY: Final = struct.Struct("=IHBx")
YES: Final = b"\1"


@dataclass(frozen=True, slots=True)
class Tuple:
    """An application's connected socket, as the application sees it."""

    netns: int  # inode
    local_addr: str
    local_port: int
    peer_addr: str
    peer_port: int

    def pack(self) -> bytes:
        """Return a `struct tuple`."""
        return TUPLE.pack(
            _packed(self.local_addr),
            _packed(self.peer_addr),
            self.netns,
            self.local_port,
            self.peer_port,
        )


class Handoff:
    """The tables as a worker uses them; raises BpfError where the kernel refuses.

    All are of the kind that forgets its oldest entries, so none is ever full.
    """

    def __init__(self, handed_fd: int, claims_fd: int, roots_fd: int) -> None:
        """Take the descriptors that `Tracer.handoff_fds` returns; they stay open."""
        self._handed = handed_fd
        self._claims = claims_fd
        self._roots = roots_fd

    def take(self, tuple_: Tuple, offset: int) -> Given | None:
        """Return the context of the head that ends `offset` bytes into what was sent.

        None where the kernel decided none. Once taken it is gone.
        """
        key = HANDED_KEY.pack(tuple_.pack(), offset)
        value = syscall.map_lookup(self._handed, key, HANDED.size)
        if value is None:
            return None
        syscall.map_delete(self._handed, key)
        high, low, span_id, parent_id, link, flags, request_id = HANDED.unpack(value)
        return Given(
            trace_id=high << 64 | low,
            span_id=span_id,
            parent_id=parent_id,
            flags=flags,
            link=Link(link),
            request_id=request_id.rstrip(b"\0"),
        )

    def claim(self, tuple_: Tuple) -> None:
        """Let the kernel make no TCP record of it: its exchanges are reported here."""
        syscall.map_update(self._claims, tuple_.pack(), YES)

    def root(self, netns: int, span_id: int) -> None:
        """Make a root of the request with this span id, before it reaches the pod."""
        syscall.map_update(self._roots, ROOT_KEY.pack(span_id, netns), YES)


def http2_port(key: bytes) -> tuple[int, int, Role]:
    """Read a `struct http2_key`: netns, port, role."""
    netns, port, role = HTTP2_KEY.unpack(key)
    return netns, port, Role(role)


def _packed(address: str) -> bytes:
    parsed: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(parsed, IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + parsed.packed
    return parsed.packed
