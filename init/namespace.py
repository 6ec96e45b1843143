"""Which network namespace we are in, and how to get into another."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from podspan.agent.errors import RedirectError, UsageError

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h

# Registered for the first network namespace only (net/core/sysctl_net_core.c,
# net_core_table with init_net): its presence tells where we are also from inside a
# container with hostNetwork, where /proc/1 is the container's own.
INIT_NET_MARK: Final = Path("/proc/sys/net/core/netdev_max_backlog")


def enter(path: str) -> None:
    """Put this thread, and the processes it starts, into a network namespace."""
    try:
        with Path(path).open("rb") as there:
            _setns(there.fileno())
    except OSError as exc:
        raise UsageError(
            f"podspan init: cannot enter {path}: {exc.strerror}",
            hint="give the file of a network namespace, as /run/netns/NAME or "
            "/proc/PID/ns/net; CAP_SYS_ADMIN is needed to enter it",
        ) from exc


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def refuse_host() -> None:
    """Raise in the host's network namespace: rules here would redirect the node.

    Blind: a node that is itself a container (kind) has a namespace like any pod's.
    """
    if INIT_NET_MARK.exists():
        raise RedirectError(
            "this is the host's network namespace, podspan init is for a pod's",
            hint="run it in the pod's init container, or: podspan init ... "
            "--network-namespace FILE; pods with hostNetwork need no init",
        )
