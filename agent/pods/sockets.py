"""The TCP connections that exist already, and who holds them.

sock_diag tells the connections, /proc the descriptors. Which end opened a connection
nobody kept: it was accepted if its local port is one that its namespace listens on.

Blind: a connection whose listener is gone, or accepts for foreign addresses (TPROXY),
passes for an own one; descriptors held outside of the connection's namespace, or by a
thread that has a table of its own (CLONE_FILES), are not found.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from podspan.agent.pods import processes, sock_diag
from podspan.agent.pods.names import NETNS_DIRECTORY, ServiceNames
from podspan.agent.pods.sock_diag import TcpSocket


class Holder(NamedTuple):
    """A process's descriptor of a socket."""

    pid: int
    fd: int


@dataclass(frozen=True, slots=True)
class Connection:
    """An established connection, as seen from one end."""

    netns: int
    end: TcpSocket
    accepted: bool
    holders: tuple[Holder, ...]  # of those that could be enrolled, none else

    @property
    def unfit(self) -> str | None:
        """Why requests of this end get no headers; None: they can."""
        return _unfit(self.end, self.accepted) or (
            None if self.holders else "no_holder_found"
        )


class Listeners:
    """What a namespace listens on."""

    def __init__(self, sockets: Iterable[TcpSocket]) -> None:
        self._bound: set[tuple[IPv4Address | IPv6Address, int]] = set()
        self._any: set[tuple[int, int]] = set()  # IP version, port
        for one in sockets:
            if not one.local.is_unspecified:
                self._bound.add((one.local, one.local_port))
                continue
            self._any.add((one.local.version, one.local_port))
            if one.local.version == 6 and not one.v6only:
                self._any.add((4, one.local_port))

    def accepted(self, end: TcpSocket) -> bool:
        """Say whether a connection with this local address came to one of them."""
        return (end.local.version, end.local_port) in self._any or (
            end.local,
            end.local_port,
        ) in self._bound


def find_connections(netns: frozenset[int] | None) -> list[Connection]:
    """Return the established connections of these namespaces; None: of all.

    The agent's own namespace is left out; a connection within a pod has both its ends
    here. Raises KernelError where that cannot be known, see sock_diag.
    """
    pids = processes.by_netns()
    names = ServiceNames()
    found = (names.select(["*"]) | pids.keys()) - {processes.own_netns()}
    return [
        connection
        for inode in (found if netns is None else found & netns)
        for connection in _connections_of(
            inode,
            NETNS_DIRECTORY / names.name(inode, ""),
            pids.get(inode, []),
        )
    ]


def _connections_of(netns: int, name: Path, pids: list[int]) -> list[Connection]:
    fd = _open_netns(netns, [*(Path(f"/proc/{pid}/ns/net") for pid in pids), name])
    if fd is None:
        return []
    try:
        sockets = sock_diag.tcp_sockets(fd)
    finally:
        os.close(fd)
    listeners = Listeners(one for one in sockets if one.listening)
    ends = [(one, listeners.accepted(one)) for one in sockets if not one.listening]
    wanted = {
        end.inode for end, accepted in ends if end.inode and not _unfit(end, accepted)
    }
    holders = find_holders(wanted, pids) if wanted else {}
    return [
        Connection(netns, end, accepted, tuple(holders.get(end.inode, ())))
        for end, accepted in ends
    ]


def _open_netns(netns: int, paths: Iterable[Path]) -> int | None:
    """Return a descriptor of the namespace by a path that still leads to it."""
    for path in paths:
        with suppress(OSError):  # the process has ended
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == netns:
                return fd
            os.close(fd)  # its id is another process's now
    return None


def find_holders(
    inodes: Collection[int], pids: Iterable[int]
) -> dict[int, list[Holder]]:
    """Return who of `pids` holds the sockets of these inodes, by inode."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[Holder]] = {}
    for pid in pids:
        with suppress(OSError):  # the process has ended
            directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)
            try:
                for fd, inode in _wanted_links(directory, wanted):
                    found.setdefault(inode, []).append(Holder(pid, fd))
            finally:
                os.close(directory)
    return found


def _wanted_links(
    directory: int, wanted: Mapping[str, int]
) -> Iterator[tuple[int, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                inode = wanted.get(os.readlink(entry.name, dir_fd=directory))
            except FileNotFoundError:  # closed since
                continue
            if inode is not None:
                yield int(entry.name), inode


def _unfit(end: TcpSocket, accepted: bool) -> str | None:
    if accepted:
        return "accepted"
    if end.ulp == "mptcp":
        return "mptcp"
    return "upper_layer_protocol" if end.ulp else None
