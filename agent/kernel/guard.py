"""The redirect guard: pins bpf/redirect_guard.c, feeds its policies and its heartbeat.

The iptables rules in pods name the pinned program and hold it for as long as they
exist. What is pinned is therefore reused by the next agent where it is the same: old
rules follow the new agent's heartbeat and policies. Where it is another, it is
replaced, and old rules stop redirecting by themselves until `podspan init apply` runs
again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from podspan.agent.errors import FeatureMissing, KernelError, ProgramRejected
from podspan.agent.kernel import program, syscall
from podspan.agent.kernel.syscall import BpfError

if TYPE_CHECKING:
    from bcc import BPF

# podspan.init.plan.GUARD_PATH is the program in it.
PIN_DIR: Final = Path("/sys/fs/bpf/podspan")
PROGRAM: Final = "redirect_guard"
STATES: Final = "redirect_states"
POLICIES: Final = "redirect_policies"

# Replacements are pinned under this suffix, then renamed. bpffs allows no dot in names.
NEW_SUFFIX: Final = "_new"

# Long enough for an agent that a busy node delays, short enough for a caller's retry.
GRACE_NS: Final = 2_000_000_000

# Sixteen for each of 512 pods, twice what the largest nodes run; 1 MB of the kernel's.
MAX_POLICIES: Final = 8192

ONLY: Final = bytes(4)  # the key of an array with one element
YES: Final = b"\1"

PROTOCOLS: Final = {"tcp": 6}  # numbers of IANA's, as in the IP header


@dataclass(frozen=True, slots=True)
class Want:
    """Connections of a pod that are to be redirected."""

    inbound: bool  # those that reach the pod; else those that it opens
    port: int | None  # their destination; None: every port
    protocol: Literal["tcp"] = "tcp"

    def __post_init__(self) -> None:
        """Refuse port 0, which means every port to the kernel's program."""
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"no port: {self.port}")


def require_bpffs(path: Path) -> None:
    """Raise FeatureMissing where nothing can be pinned."""
    if not syscall.is_bpffs(path):
        raise FeatureMissing(
            f"{path} is not a bpf file system", hint=f"mount -t bpf bpf {path}"
        )


class Guard:
    """A pinned guard; redirects what is wanted while the last `beat` is fresh."""

    def __init__(
        self, pin_dir: Path, maps: Mapping[str, int], state: Any, policy: Any
    ) -> None:
        """Use `open`."""
        self._pin_dir = pin_dir
        self._maps = dict(maps)  # descriptors
        self._state = state  # the ctypes twin of struct redirect_state
        self._policy = policy  # the class that is the twin of struct redirect_policy
        self._wanted: dict[int, frozenset[Want]] = {}

    @classmethod
    def open(cls, pin_dir: Path = PIN_DIR, grace_ns: int = GRACE_NS) -> Self:
        """Compile, load and pin the guard, or take over what is pinned.

        Nothing is redirected before a first `beat`, nor what an earlier agent wanted.
        """
        require_bpffs(pin_dir.parent)
        try:
            pin_dir.mkdir(exist_ok=True)
            with ExitStack() as stack:
                compiled = program.load(
                    "redirect_guard.c", {"MAX_POLICIES": MAX_POLICIES}
                )
                stack.callback(compiled.cleanup)
                states = compiled[STATES.encode()]
                policies = compiled[POLICIES.encode()]
                fds = {STATES: states.map_fd, POLICIES: policies.map_fd}
                maps = _pin(pin_dir, _load(compiled), fds)
                guard = cls(pin_dir, maps, states.Leaf(grace_ns=grace_ns), policies.Key)
            guard._forget_earlier_agents()
        except OSError as exc:
            raise KernelError(f"cannot pin the redirect guard: {exc}") from exc
        return guard

    @property
    def path(self) -> Path:
        """Where the program is pinned: what the rules name."""
        return self._pin_dir / PROGRAM

    def beat(self, now_ns: int) -> None:
        """Say that the agent is alive at `now_ns`, of CLOCK_MONOTONIC."""
        self._state.heartbeat_ns = now_ns
        self._write_state()

    def want(self, netns: int, wants: Collection[Want]) -> None:
        """Redirect these connections of a namespace, by its inode, and no others.

        Connections that exist stay as they are; to repeat it costs nothing. Raises
        KernelError where the table has no room: then nothing of the namespace is
        redirected.
        """
        old = self._wanted.get(netns, frozenset())
        new = frozenset(wants)
        self._wanted[netns] = old | new
        try:
            # In this order nothing is redirected that neither of the two wants.
            for want in old - new:
                syscall.map_delete(self._maps[POLICIES], self._key(netns, want))
            for want in new - old:
                syscall.map_update(self._maps[POLICIES], self._key(netns, want), YES)
        except BpfError as exc:
            self.forget(netns)
            raise _not_wanted(netns, exc) from exc
        self._wanted[netns] = new

    def forget(self, netns: int) -> None:
        """Redirect nothing of a namespace.

        A namespace that is gone gives its inode to the next one, which may be another
        pod's: call this while a listener of ours still holds it.
        """
        for want in self._wanted.pop(netns, frozenset()):
            syscall.map_delete(self._maps[POLICIES], self._key(netns, want))

    def unpin(self) -> None:
        """Remove the pins, for uninstalling; rules that hold the program go on.

        A legacy table is looked at anew at every write, pinned paths included: in a pod
        whose legacy rules name the guard only `podspan init clean` can then write.
        """
        for name in (PROGRAM, STATES, POLICIES):
            (self._pin_dir / name).unlink(missing_ok=True)
        with suppress(OSError):  # another podspan object is pinned there
            self._pin_dir.rmdir()

    def close(self) -> None:
        """End the redirection at once, not after the grace; the pins stay."""
        if not self._maps:
            return
        try:
            self.beat(0)
        finally:
            for fd in self._maps.values():
                os.close(fd)
            self._maps.clear()

    def _forget_earlier_agents(self) -> None:
        # First its heartbeat, which may be fresh, then what our own would revive.
        self._write_state()
        for key, _ in syscall.map_items(self._maps[POLICIES]):
            syscall.map_delete(self._maps[POLICIES], key)

    def _key(self, netns: int, want: Want) -> bytes:
        return bytes(
            self._policy(
                netns=netns,
                port=want.port or 0,
                inbound=want.inbound,
                protocol=PROTOCOLS[want.protocol],
            )
        )

    def _write_state(self) -> None:
        try:
            syscall.map_update(self._maps[STATES], ONLY, bytes(self._state))
        except BpfError as exc:
            raise KernelError(
                f"cannot write the redirect guard's state: {exc}"
            ) from exc


def _not_wanted(netns: int, exc: BpfError) -> KernelError:
    what = f"cannot redirect connections of the namespace {netns}"
    if exc.errno == errno.E2BIG:
        return KernelError(
            f"{what}: all {MAX_POLICIES} policies of the redirect guard are in use",
            hint="redirect fewer pods on this node, or all ports of a pod as one",
        )
    return KernelError(f"{what}: {exc}")


def _load(compiled: BPF) -> int:
    """Return the program's descriptor, which `compiled` owns."""
    try:
        fd: int = compiled.load_func(PROGRAM.encode(), compiled.SOCKET_FILTER).fd
    except Exception as exc:  # bcc has no exception type of its own
        raise ProgramRejected(
            f"the kernel rejects {PROGRAM}: {exc}",
            hint="the agent needs CAP_BPF and CAP_PERFMON, and a kernel that is not "
            "locked down for confidentiality (/sys/kernel/security/lockdown)",
        ) from exc
    return fd


def _pin(pin_dir: Path, prog_fd: int, maps: Mapping[str, int]) -> dict[str, int]:
    """Return the maps that the pinned program reads, pinning ours if need be."""
    pinned = _pinned_maps(pin_dir, prog_fd, maps)
    if pinned is not None:
        return pinned
    # The maps first: a program whose maps are not the pinned ones is replaced again.
    for name, fd in (*maps.items(), (PROGRAM, prog_fd)):
        new = pin_dir / (name + NEW_SUFFIX)
        new.unlink(missing_ok=True)
        syscall.obj_pin(fd, new)
        new.rename(pin_dir / name)
    return {name: os.dup(fd) for name, fd in maps.items()}


def _pinned_maps(
    pin_dir: Path, prog_fd: int, maps: Mapping[str, int]
) -> dict[str, int] | None:
    """Return the pinned maps if program and maps could be ours, else None."""
    with ExitStack() as stack:

        def get(name: str) -> int:
            fd = syscall.obj_get(pin_dir / name)
            stack.callback(os.close, fd)
            return fd

        try:
            old_prog = syscall.prog_info(get(PROGRAM))
            old_maps = {name: get(name) for name in maps}
        except BpfError as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise
        infos = {name: syscall.map_info(fd) for name, fd in old_maps.items()}
        if (
            old_prog.tag == syscall.prog_info(prog_fd).tag
            and set(old_prog.map_ids) == {info.id for info in infos.values()}
            and all(
                infos[name].shape == syscall.map_info(fd).shape
                for name, fd in maps.items()
            )
        ):
            return {name: os.dup(fd) for name, fd in old_maps.items()}
    return None
