"""Name the service behind a network namespace.

The kernel knows a namespace by its inode. Where that is a pod's, the service is the
pod's. Else `ip netns` and the container runtimes keep a name for each under /run/netns,
as a bind mount of that inode. What has no name there goes by its program's (comm).

No netlink: a directory read and a stat(2) per entry tell all, and spare the agent the
memory of a netlink library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from podspan.agent.pods.pod import Pod

NETNS_DIRECTORY = Path("/run/netns")

# An inode without a name makes us look again, but not more often than this.
REFRESH_S = 1.0

# A node has some hundred pods; beyond this, someone fills the directory on purpose.
MAX_NAMES = 16384


class ServiceNames:
    """Names of network namespaces, read again when an unknown one shows up."""

    def __init__(
        self,
        directory: Path = NETNS_DIRECTORY,
        monotonic_s: Callable[[], float] = time.monotonic,
        pods_by_netns: Callable[[], Mapping[int, Pod]] = dict,
    ) -> None:
        self._pods_by_netns = pods_by_netns
        self._directory = directory
        self._monotonic_s = monotonic_s
        self._names: dict[int, str] = {}
        self._read_at_s = -REFRESH_S + monotonic_s()

    def pod(self, netns: int) -> Pod | None:
        """Return the pod whose namespace this is, where that is known."""
        return self._pods_by_netns().get(netns)

    def pods_by_netns(self) -> Mapping[int, Pod]:
        """Return this node's pods by namespace: another mapping once they change."""
        return self._pods_by_netns()

    def pods(self) -> frozenset[int]:
        """Return the namespaces that are known to be a pod's."""
        return frozenset(self._pods_by_netns())

    def paths(self) -> dict[int, Path]:
        """Return where those namespaces that have a name can be entered."""
        return {netns: self._directory / name for netns, name in self._names.items()}

    def name(self, netns: int, comm: str) -> str:
        """Return the service that lives in a namespace; by default `comm`."""
        pod = self.pod(netns)
        if pod is not None:
            return pod.service
        name = self._names.get(netns)
        if name is None and self._monotonic_s() - self._read_at_s >= REFRESH_S:
            self.refresh()
            name = self._names.get(netns)
        return name or comm

    def select(self, patterns: Iterable[str]) -> frozenset[int]:
        """Return the inodes of all namespaces whose name matches a pattern, now."""
        self.refresh()
        patterns = tuple(patterns)
        return frozenset(
            netns
            for netns, name in self._names.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        )

    def refresh(self) -> None:
        """Read the directory."""
        self._read_at_s = self._monotonic_s()
        self._names = _read(self._directory)


def _read(directory: Path) -> dict[int, str]:
    """Return the namespaces' names by inode; of two names the first in order."""
    try:
        # A name whose namespace is gone is a plain file on another file system.
        nsfs = Path("/proc/self/ns/net").stat().st_dev
        entries = sorted(directory.iterdir())
    except FileNotFoundError:  # made by the first `ip netns add`
        return {}
    names: dict[int, str] = {}
    for entry in entries[:MAX_NAMES]:
        try:
            stat = entry.stat()
        except OSError:  # deleted since
            continue
        if stat.st_dev == nsfs:
            names.setdefault(stat.st_ino, entry.name)
    return names
