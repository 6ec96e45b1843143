"""The agent's side of the redirect engine: listeners in pods, workers that serve them.

A pod is served by one worker. Its listeners are opened here, once: a connection that
waits in the queue of a worker that has died is accepted by its successor, which comes
at once, and after that with growing pauses. In between nobody holds the gate, and new
connections go direct.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from podspan.agent.errors import FeatureMissing, KernelError, RedirectError
from podspan.agent.exchange import Exchange
from podspan.agent.pods import processes
from podspan.agent.redirect import control, sockets
from podspan.agent.redirect.gate import Gate
from podspan.init.plan import GATE_QUEUE

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "podspan.agent.redirect.worker")

# Between the ends of a worker and its successor: none, then these, doubling.
RESTART_MIN_S: Final = 0.1
RESTART_MAX_S: Final = 10.0
# After so long it is not the start that fails.
STEADY_S: Final = 10.0

# From the end of a drain, which resets what is left, to the kill.
EXIT_S: Final = 2.0
LISTEN_S: Final = 0.02


# Of a worker: two for each of 32,000 connections.
DESCRIPTORS: Final = 65536


@dataclass(frozen=True, slots=True)
class PodPlan:
    """A pod that is to be served."""

    netns: int  # inode
    where: int | Path  # a process in it, or the namespace's path
    sampling: float = 100.0  # per cent
    inbound_source: str = "auto"  # whose address the pod sees: auto | loopback


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What all workers are told, and where they listen in pods."""

    span_ids: str = "shared"
    unsampled: str = "0"
    propagate: frozenset[str] = frozenset({"b3multi"})
    # How long first bytes are held back that may still become HTTP, as "GE".
    sniff_wait_s: float = 1.0
    grace_s: float = 2.0  # the guard's: how long it redirects for an agent that died
    outbound_port: int = 15001
    inbound_port: int = 15006


@dataclass(slots=True, eq=False)
class _Pod:
    """Listeners, held here also for workers to come."""

    plan: PodPlan
    netns_fd: int
    outbound: list[socket.socket]
    inbound: list[socket.socket]
    transparent: frozenset[int]
    slot: _Slot  # whose worker serves it: a gate's queue has one reader
    told: bool = False

    def change(self, plan: PodPlan) -> bool:
        """Take the options of this moment; return whether they are others.

        Connections that are open keep theirs. The rules that make clients' addresses
        possible may come, and go, at any time.
        """
        before = (self.plan, self.transparent)
        self.plan = plan
        self.transparent = frozenset()
        if plan.inbound_source == "auto":
            self.transparent = sockets.transparent_families(self.netns_fd)
        return before != (self.plan, self.transparent)

    def message(self, *, gate: bool) -> control.Open:
        return control.Open(
            self.plan.netns,
            gate,
            self.plan.sampling,
            len(self.outbound),
            tuple(sorted(self.transparent)),
        )

    def fds(self, gate: Gate | None) -> list[int]:
        listeners = [*self.outbound, *self.inbound]
        first = [] if gate is None else [gate.fileno()]
        return [self.netns_fd, *first, *(each.fileno() for each in listeners)]

    def close(self) -> None:
        for listener in [*self.outbound, *self.inbound]:
            listener.close()
        os.close(self.netns_fd)


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: control.Channel
    started_s: float
    confirmed: set[int] = field(default_factory=set)  # pods
    open: int = 0  # connections, as last told
    overloaded: bool = False


@dataclass(slots=True, eq=False)
class _Slot:
    """A place for a worker, and when the next one may start."""

    worker: _Worker | None = None
    pause_s: float = 0.0
    due_s: float = 0.0


class RedirectEngine:
    """Serves pods' redirected connections by `workers` processes."""

    def __init__(
        self,
        *,
        workers: int,
        handoff_fds: tuple[int, ...],
        options: WorkerOptions,
        on_record: Callable[[Exchange], None],
        on_warning: Callable[[str], None],
    ) -> None:
        """Start the workers; `handoff_fds` are those of handoff.Handoff, or empty."""
        self._handoff_fds = handoff_fds
        self._options = options
        self._on_record = on_record
        self._on_warning = on_warning
        self._pods: dict[int, _Pod] = {}
        self._warned: dict[int, str] = {}
        self._no_gate = False
        self._counters: Counter[str] = Counter()
        _allow_descriptors()
        self._slots = [_Slot() for _ in range(workers)]
        for slot in self._slots:
            self._start(slot)

    @property
    def pids(self) -> list[int]:
        """The processes of the living workers."""
        return [worker.process.pid for worker in self._workers()]

    def serve(self, pods: Mapping[int, PodPlan]) -> None:
        """Open and close what differs from the last call; what failed is tried again.

        Connections of a pod that is no longer wanted go on to their end, unless the
        pod has no process any more: then nobody will end them.
        """
        unwanted = [netns for netns in self._pods if netns not in pods]
        if unwanted:
            alive = processes.by_netns()
            for netns in unwanted:
                self._forget(netns, gone=netns not in alive)
        for netns in self._warned.keys() - pods.keys():
            del self._warned[netns]
        for plan in pods.values():
            known = self._pods.get(plan.netns)
            if known is None:
                self._open(plan)
            elif not known.told:
                with self._warning_once(plan):
                    self._tell(known)
            else:
                with self._warning_once(plan):
                    self._change(known, plan)

    def poll(self) -> None:
        """Take what workers have told, without waiting; replace those that ended."""
        for slot in self._slots:
            if slot.worker is not None:
                self._listen_to(slot.worker)
                if slot.worker.process.poll() is not None:
                    self._bury(slot, slot.worker)
            if slot.worker is None and time.monotonic() >= slot.due_s:
                self._start(slot)

    def serving(self) -> frozenset[int]:
        """Return the namespaces whose connections a worker accepts now."""
        return frozenset(
            netns
            for netns, pod in self._pods.items()
            if (worker := pod.slot.worker) is not None
            and netns in worker.confirmed
            and not worker.overloaded
            and not worker.channel.ended
        )

    def counters(self) -> dict[str, int]:
        """Return what all workers have counted, those included that have ended."""
        now = {
            "connections_open": sum(worker.open for worker in self._workers()),
            "pods_served": len(self._pods),
        }
        counted = {**self._counters, **now}
        return {f"redirect_{name}": value for name, value in sorted(counted.items())}

    def close(self, drain_s: float) -> None:
        """End: queued connections are accepted, open ones have `drain_s` to end."""
        for worker in self._workers():
            worker.channel.send(control.Drain(drain_s))
        for pod in self._pods.values():
            pod.close()
        self._pods.clear()
        deadline_s = time.monotonic() + drain_s + EXIT_S
        for slot in self._slots:
            if slot.worker is not None:
                self._hear_out(slot.worker, deadline_s)
                self._bury(slot, slot.worker)

    # Pods

    def _open(self, plan: PodPlan) -> None:
        with self._warning_once(plan):
            self._pods[plan.netns] = self._open_pod(plan)
            self._tell(self._pods[plan.netns])

    @contextmanager
    def _warning_once(self, plan: PodPlan) -> Iterator[None]:
        """What fails is tried again by the next `serve`, and told when it changes."""
        try:
            yield
        # RuntimeError: no more threads.
        except (RedirectError, KernelError, OSError, RuntimeError) as exc:
            self._counters["pods_failed"] += 1
            if self._warned.get(plan.netns) != str(exc):
                self._warned[plan.netns] = str(exc)
                self._on_warning(f"cannot redirect in netns={plan.netns}: {exc}")
        else:
            self._warned.pop(plan.netns, None)

    def _change(self, pod: _Pod, plan: PodPlan) -> None:
        if pod.change(plan) and pod.slot.worker is not None:
            pod.slot.worker.channel.send(pod.message(gate=False))

    def _open_pod(self, plan: PodPlan) -> _Pod:
        netns_fd = sockets.open_netns(plan.where, plan.netns)
        served = Counter(id(pod.slot) for pod in self._pods.values())
        slot = min(self._slots, key=lambda slot: served[id(slot)])
        pod = _Pod(plan, netns_fd, [], [], frozenset(), slot)
        try:
            pod.outbound = sockets.open_listeners(netns_fd, self._options.outbound_port)
            pod.inbound = sockets.open_listeners(netns_fd, self._options.inbound_port)
            pod.change(plan)
        except BaseException:
            pod.close()
            raise
        return pod

    def _forget(self, netns: int, *, gone: bool) -> None:
        pod = self._pods.pop(netns)
        worker = pod.slot.worker
        if worker is not None:
            worker.confirmed.discard(netns)
            worker.channel.send(control.Close(netns, gone))
        pod.close()

    def _tell(self, pod: _Pod) -> None:
        """Let its worker serve the pod, with a gate where the kernel has such."""
        pod.told = False
        worker = pod.slot.worker
        if worker is None:
            return  # it will be told when it starts
        gate = self._open_gate(pod)
        worker.channel.send(pod.message(gate=gate is not None), pod.fds(gate))
        pod.told = True
        if gate is not None:
            gate.close()  # the worker's is another descriptor, and ends with it

    def _open_gate(self, pod: _Pod) -> Gate | None:
        if self._no_gate:
            return None
        try:
            return sockets.call_inside(pod.netns_fd, lambda: Gate.open(GATE_QUEUE))
        except FeatureMissing as exc:
            self._no_gate = True
            self._on_warning(
                f"{exc}; hint: {exc.hint}; connect(2) will succeed where nobody answers"
            )
            return None

    # Workers

    def _workers(self) -> list[_Worker]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def _start(self, slot: _Slot) -> None:
        try:
            ours, theirs = control.pair()
            with theirs:
                process = subprocess.Popen(
                    WORKER_COMMAND,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    process_group=0,
                )
        except OSError as exc:
            self._counters["workers_failed"] += 1
            self._wait_longer(slot)
            self._on_warning(f"no redirect worker: {exc}")
            return
        worker = _Worker(process, control.Channel(ours), time.monotonic())
        slot.worker = worker
        options = self._options
        worker.channel.send(
            control.Start(
                options.span_ids,
                options.unsampled,
                tuple(sorted(options.propagate)),
                options.sniff_wait_s,
                options.grace_s,
            ),
            self._handoff_fds,
        )
        for pod in self._pods.values():
            if pod.slot is slot:
                with self._warning_once(pod.plan):
                    self._tell(pod)

    def _listen_to(self, worker: _Worker, *, ending: bool = False) -> None:
        worker.channel.flush()
        try:
            for message, _ in worker.channel.receive():
                self._take(worker, message)
        except control.BadMessage as exc:
            self._on_warning(f"redirect worker pid={worker.process.pid}: {exc}")
            worker.channel.ended = True
        if worker.channel.ended and not ending:
            worker.process.kill()  # it has left us, or it is not one of ours

    def _take(self, worker: _Worker, message: control.Message) -> None:
        match message:
            case control.Opened(netns):
                worker.confirmed.add(netns)
            case control.Counted(counters, open_):
                self._counters.update(counters)
                worker.open = open_
            case control.Finished(exchanges):
                for packed in exchanges:
                    self._on_record(control.unpack_exchange(packed))
            case control.Overloaded(yes):
                worker.overloaded = yes
                if yes:
                    self._on_warning(
                        f"redirect worker pid={worker.process.pid} has no descriptors"
                        f" left for new connections; open={worker.open}"
                    )
            case _:
                raise control.BadMessage(f"{type(message).__name__} is for workers")

    def _bury(self, slot: _Slot, worker: _Worker) -> None:
        """Count what a dead worker took along; its successor is due."""
        with suppress(control.BadMessage):
            for message, _ in worker.channel.receive():
                self._take(worker, message)
        worker.channel.close()
        code = worker.process.wait()
        slot.worker = None
        if code == 0:
            return
        self._counters["workers_died"] += 1
        self._counters["connections_cut"] += worker.open
        lived_s = time.monotonic() - worker.started_s
        if lived_s >= STEADY_S:
            slot.pause_s = 0.0
        self._wait_longer(slot)
        self._on_warning(
            f"redirect worker pid={worker.process.pid} ended with {code}"
            f" after {lived_s:.1f} s; connections_cut={worker.open}"
        )

    @staticmethod
    def _wait_longer(slot: _Slot) -> None:
        slot.due_s = time.monotonic() + slot.pause_s
        slot.pause_s = min(max(RESTART_MIN_S, 2 * slot.pause_s), RESTART_MAX_S)

    def _hear_out(self, worker: _Worker, deadline_s: float) -> None:
        """Take what an ending worker has to tell, until it has ended."""
        while worker.process.poll() is None:
            if time.monotonic() >= deadline_s:
                worker.process.kill()
                return
            if not worker.channel.ended:
                self._listen_to(worker, ending=True)
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(LISTEN_S)


def _allow_descriptors() -> None:
    """Raise our own limit (each pod takes five), and so that of workers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        # Where fs.nr_open is less, or CAP_SYS_RESOURCE missing, it stays.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, DESCRIPTORS))
            hard = DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
