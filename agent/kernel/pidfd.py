"""Borrow another process's file descriptor (pidfd_getfd(2), since Linux 5.6).

It takes PTRACE_MODE_ATTACH_REALCREDS: CAP_SYS_PTRACE, and no security module that
forbids it, as Yama's ptrace_scope 3 does.

Blind: on a node with the net_cls or net_prio controller (cgroup v1), the socket takes
the agent's class, as it would when passed by SCM_RIGHTS.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# include/uapi/asm-generic/unistd.h, and the same on x86.
SYS_PIDFD_GETFD: Final = 438

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def borrowed(pid: int, fd: int) -> Iterator[int]:
    """Yield a duplicate of a process's descriptor, closed when the context ends.

    Keep that short: while the duplicate is there, the process's own close(2) ends no
    connection. Raises OSError: ESRCH and EBADF where process or descriptor are gone,
    EPERM where it is forbidden.
    """
    pidfd = os.pidfd_open(pid)
    try:
        duplicate = _getfd(pidfd, fd)
    finally:
        os.close(pidfd)
    try:
        yield duplicate
    finally:
        os.close(duplicate)


def _getfd(pidfd: int, fd: int) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(SYS_PIDFD_GETFD),
        ctypes.c_int(pidfd),
        ctypes.c_int(fd),
        ctypes.c_uint(0),
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return result
