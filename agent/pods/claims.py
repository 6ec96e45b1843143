"""Which network namespace is which pod's, by the processes that run in both.

A process names its pod in /proc/PID/cgroup and its namespace in /proc/PID/ns/net. So
the agent has to see the node's processes (hostPID) and be root.

A look reads only processes that have not settled yet: while a container starts, its
first process moves from the runtime's cgroup and the node's namespace into the pod's,
with one pid. What a pid that was used again would hide comes right with the next full
look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from podspan.agent.pods.cgroup import pod_uids
from podspan.agent.pods.pod import Pod

PROC = Path("/proc")

SETTLE_S = 10.0
FULL_LOOK_S = 60.0

# Of a /proc/PID/cgroup: some twenty times what one with 13 hierarchies takes.
MAX_CGROUP_CHARS = 65536

# starttime in /proc/PID/stat, counted from behind the name (proc_pid_stat(5)).
_START_FIELD = 22 - 3


@dataclass(frozen=True, slots=True)
class Claim:
    """A process of a pod is in a namespace."""

    netns: int
    uids: tuple[str, ...]  # of the pods in its cgroup's path, the outermost first
    start_ticks: int


class PodProcesses:
    """The processes of this node that are some pod's."""

    def __init__(
        self, proc: Path = PROC, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc = proc
        self._monotonic_s = monotonic_s
        self._first_seen_s: dict[int, float] = {}
        self._claims: dict[int, Claim] = {}
        self._full_look_s = monotonic_s()

    def look(self) -> list[Claim]:
        """Return what the processes of this moment claim, the oldest process first."""
        now_s = self._monotonic_s()
        full = now_s >= self._full_look_s
        if full:
            self._full_look_s = now_s + FULL_LOOK_S
        # The node's own namespace is no pod's, although processes of pods may be in
        # it: CRI-O's conmon in the pod's cgroup, or a shell of nsenter(1).
        node_netns = _netns(self._proc / "1")

        before, claims = self._first_seen_s, self._claims
        self._first_seen_s, self._claims = {}, {}
        for pid in _pids(self._proc):
            first_s = before.get(pid, now_s)
            self._first_seen_s[pid] = first_s
            claim = claims.get(pid)
            if full or now_s - first_s < SETTLE_S:
                claim = _claim(self._proc / str(pid))
            if claim is not None and claim.netns != node_netns:
                self._claims[pid] = claim
        return sorted(self._claims.values(), key=lambda claim: claim.start_ticks)


def match(claims: Iterable[Claim], pods: Mapping[str, Pod]) -> dict[int, Pod]:
    """Return the pods by their namespaces' inodes; `pods` are by uid of the cgroup.

    Where processes of two pods are in one namespace, it is the oldest one's: a sandbox
    is there before anyone enters it. Pods on the node's network have none of their own.
    """
    found: dict[int, Pod] = {}
    for claim in claims:
        known = [pods[uid] for uid in claim.uids if uid in pods]
        if known and not known[-1].host_network:
            found.setdefault(claim.netns, known[-1])
    return found


def _pids(proc: Path) -> list[int]:
    return [int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()]


def _claim(process: Path) -> Claim | None:
    """Read one process; None for one of the node, gone, or not ours to read."""
    try:
        with (process / "cgroup").open(errors="replace") as file:
            uids = pod_uids(file.read(MAX_CGROUP_CHARS))
        if not uids:
            return None
        stat = (process / "stat").read_text(errors="replace")
        start_ticks = int(stat.rpartition(")")[2].split()[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return None
    netns = _netns(process)
    return Claim(netns, uids, start_ticks) if netns else None


def _netns(process: Path) -> int:
    """Return the inode of its network namespace; 0 if it cannot be read."""
    try:
        return (process / "ns" / "net").stat().st_ino
    except OSError:
        return 0
