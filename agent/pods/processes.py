"""Which processes run, and in which network namespace.

Ids are those of the pid namespace whose /proc is mounted: the agent runs in the
node's. A process that ends while it is looked at is left out.
"""

from __future__ import annotations

import os
from pathlib import Path


def pids() -> list[int]:
    """Return the ids of all processes; the kernel's tgid, not of each thread."""
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdecimal()]


def netns_of(pid: int) -> int | None:
    """Return the inode of the namespace that a process's first thread is in."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:  # ended, or not ours to look at
        return None


def own_netns() -> int:
    """Return the inode of the namespace that we are in."""
    return Path("/proc/self/ns/net").stat().st_ino


def by_netns() -> dict[int, list[int]]:
    """Return the ids of all processes by their namespace's inode."""
    found: dict[int, list[int]] = {}
    for pid in pids():
        netns = netns_of(pid)
        if netns is not None:
            found.setdefault(netns, []).append(pid)
    return found
