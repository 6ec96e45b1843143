"""Enrol connections that were there before the agent.

lifecycle.c enrols a connection when it is established; into those that already are,
the agent puts itself by a map update. The socket is named by a descriptor, which is
borrowed from the process that holds it.

Blind: a send(2) that waits for memory meanwhile ends as it began: the rest of its bytes
does not pass request.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from podspan.agent.kernel import pidfd, syscall
from podspan.agent.kernel.syscall import BPF_NOEXIST, BpfError
from podspan.agent.pods.sockets import Connection, Holder

SO_COOKIE: Final = 57  # include/uapi/asm-generic/socket.h

GONE: Final = "gone"  # closed, or its process has ended

# What the kernel's refusals mean (net/core/sock_map.c, net/core/skmsg.c).
REFUSALS: Final = {
    # Enrolled by lifecycle.c since it was found, or in another program's sockhash.
    errno.EBUSY: "in_a_sockhash",
    errno.EEXIST: "in_a_sockhash",
    errno.EINVAL: "upper_layer_protocol",  # set since it was found
    errno.EOPNOTSUPP: GONE,  # not established any more
    errno.E2BIG: "sockhash_full",
    errno.ENOMEM: "memory",
}


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What became of the connections: seen = enrolled + all that were skipped."""

    seen: int
    enrolled: int
    skipped: Mapping[str, int]  # by reason

    def __str__(self) -> str:
        reasons = (f"{reason}={count}" for reason, count in self.skipped.items())
        return " ".join((f"seen={self.seen}", f"enrolled={self.enrolled}", *reasons))


def enrol_existing(map_fd: int, connections: Iterable[Connection]) -> Enrolment:
    """Put the client ends among `connections` into a sockhash whose keys are u64.

    A key is the socket's cookie: a count from 1, so never a kernel address, which is
    what lifecycle.c takes. The sk_msg program must be attached to the map before: a
    socket takes the program that is there when it enters.
    """
    value = struct.Struct({4: "=I", 8: "=Q"}[syscall.map_info(map_fd).value_size])
    fates = Counter(_enrol(map_fd, value, connection) for connection in connections)
    enrolled = fates.pop(None, 0)
    skipped = {str(reason): count for reason, count in sorted(fates.items(), key=str)}
    return Enrolment(enrolled + sum(skipped.values()), enrolled, skipped)


def _enrol(map_fd: int, value: struct.Struct, connection: Connection) -> str | None:
    """Return why a connection was not enrolled, or None if it was."""
    if connection.unfit:
        return connection.unfit
    fate: str | None = GONE
    for holder in connection.holders:
        fate = _enrol_by(holder, map_fd, value, connection.end.cookie)
        if fate != GONE:  # else another process may hold it still
            break
    return fate


def _enrol_by(
    holder: Holder, map_fd: int, value: struct.Struct, cookie: int
) -> str | None:
    try:
        with pidfd.borrowed(holder.pid, holder.fd) as fd:
            if _cookie(fd) != cookie:  # the number is another file's now
                return GONE
            key = struct.pack("=Q", cookie)
            syscall.map_update(map_fd, key, value.pack(fd), BPF_NOEXIST)
    except BpfError as exc:
        return REFUSALS.get(exc.errno or 0) or _name(exc)
    except OSError as exc:
        return GONE if exc.errno in {errno.ESRCH, errno.EBADF} else _name(exc)
    return None


def _cookie(fd: int) -> int | None:
    """Return the cookie of a socket, None of any other file."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        (cookie,) = struct.unpack(
            "=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        )
    finally:
        sock.detach()  # its owner closes it
    return int(cookie)


def _name(exc: OSError) -> str:
    """Return an unexpected errno as a reason: `eperm`."""
    return errno.errorcode.get(exc.errno or 0, "unknown").lower()
