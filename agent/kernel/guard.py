"""The redirect guard: pins bpf/redirect_guard.c and keeps its heartbeat.

The iptables rules in pods name the pinned program and hold it for as long as they
exist. What is pinned is therefore reused by the next agent where it is the same: old
rules follow the new agent's heartbeat. Where it is another, it is replaced, and old
rules stop redirecting by themselves until `podspan init apply` runs again.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from podspan.agent.errors import FeatureMissing, KernelError, ProgramRejected
from podspan.agent.kernel import program, syscall
from podspan.agent.kernel.syscall import BpfError

if TYPE_CHECKING:
    from bcc import BPF

# podspan.init.plan.GUARD_PATH is the program in it.
PIN_DIR: Final = Path("/sys/fs/bpf/podspan")
PROGRAM: Final = "redirect_guard"
STATES: Final = "redirect_states"

# Replacements are pinned under this suffix, then renamed. bpffs allows no dot in names.
NEW_SUFFIX: Final = "_new"

# Long enough for an agent that a busy node delays, short enough for a caller's retry.
GRACE_NS: Final = 2_000_000_000

ONLY: Final = bytes(4)  # the key of an array with one element


def require_bpffs(path: Path) -> None:
    """Raise FeatureMissing where nothing can be pinned."""
    if not syscall.is_bpffs(path):
        raise FeatureMissing(
            f"{path} is not a bpf file system", hint=f"mount -t bpf bpf {path}"
        )


class Guard:
    """A pinned guard; nothing is redirected before `want(True)` and a first `beat`."""

    def __init__(self, pin_dir: Path, map_fd: int, state: Any) -> None:
        """Use `open`."""
        self._pin_dir = pin_dir
        self._map_fd = map_fd
        self._state = state  # the ctypes twin of struct redirect_state

    @classmethod
    def open(cls, pin_dir: Path = PIN_DIR, grace_ns: int = GRACE_NS) -> Self:
        """Compile, load and pin the guard, or take over what is pinned."""
        require_bpffs(pin_dir.parent)
        try:
            pin_dir.mkdir(exist_ok=True)
            with ExitStack() as stack:
                compiled = program.load("redirect_guard.c")
                stack.callback(compiled.cleanup)
                states = compiled[STATES.encode()]
                map_fd = _pin(pin_dir, _load(compiled), states.map_fd)
                state = states.Leaf(grace_ns=grace_ns)
        except OSError as exc:
            raise KernelError(f"cannot pin the redirect guard: {exc}") from exc
        guard = cls(pin_dir, map_fd, state)
        guard._write()  # a state left by another agent ends here
        return guard

    @property
    def path(self) -> Path:
        """Where the program is pinned: what the rules name."""
        return self._pin_dir / PROGRAM

    def beat(self, now_ns: int) -> None:
        """Say that the agent is alive at `now_ns`, of CLOCK_MONOTONIC."""
        self._state.heartbeat_ns = now_ns
        self._write()

    def want(self, redirect: bool) -> None:
        """Say whether connections are to be redirected while the heartbeat is fresh."""
        self._state.outbound = self._state.inbound = int(redirect)
        self._write()

    def unpin(self) -> None:
        """Remove the pins, for uninstalling; rules that hold the program go on.

        A legacy table is looked at anew at every write, pinned paths included: in a pod
        whose legacy rules name the guard only `podspan init clean` can then write.
        """
        for name in (PROGRAM, STATES):
            (self._pin_dir / name).unlink(missing_ok=True)
        with suppress(OSError):  # another podspan object is pinned there
            self._pin_dir.rmdir()

    def close(self) -> None:
        """End the redirection at once, not after the grace; the pins stay."""
        if self._map_fd < 0:
            return
        try:
            self._state.heartbeat_ns = self._state.outbound = self._state.inbound = 0
            self._write()
        finally:
            os.close(self._map_fd)
            self._map_fd = -1

    def _write(self) -> None:
        try:
            syscall.map_update(self._map_fd, ONLY, bytes(self._state))
        except BpfError as exc:
            raise KernelError(
                f"cannot write the redirect guard's state: {exc}"
            ) from exc


def _load(compiled: BPF) -> int:
    """Return the program's descriptor, which `compiled` owns."""
    try:
        fd: int = compiled.load_func(PROGRAM.encode(), compiled.SOCKET_FILTER).fd
    except Exception as exc:  # bcc has no exception type of its own
        raise ProgramRejected(f"the kernel rejects {PROGRAM}: {exc}") from exc
    return fd


def _pin(pin_dir: Path, prog_fd: int, map_fd: int) -> int:
    """Return the map that the pinned program reads, pinning ours if need be."""
    pinned = _pinned_map(pin_dir, prog_fd, map_fd)
    if pinned is not None:
        return pinned
    # The map first: a program whose map is not the pinned one is replaced again.
    for name, fd in ((STATES, map_fd), (PROGRAM, prog_fd)):
        new = pin_dir / (name + NEW_SUFFIX)
        new.unlink(missing_ok=True)
        syscall.obj_pin(fd, new)
        new.rename(pin_dir / name)
    return os.dup(map_fd)


def _pinned_map(pin_dir: Path, prog_fd: int, map_fd: int) -> int | None:
    """Return the pinned map if program and map could be ours, else None."""
    with ExitStack() as stack:
        try:
            old_prog_fd = syscall.obj_get(pin_dir / PROGRAM)
            stack.callback(os.close, old_prog_fd)
            old_map_fd = syscall.obj_get(pin_dir / STATES)
        except BpfError as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise
        stack.callback(os.close, old_map_fd)
        old_prog, old_map = syscall.prog_info(old_prog_fd), syscall.map_info(old_map_fd)
        if (
            old_prog.tag == syscall.prog_info(prog_fd).tag
            and old_prog.map_ids == (old_map.id,)
            and old_map.shape == syscall.map_info(map_fd).shape
        ):
            return os.dup(old_map_fd)
    return None
