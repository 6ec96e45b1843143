"""The agent's loop: records in, spans out, until a signal ends it.

One thread polls the kernel's ring, makes spans and hands them to the exporters, none
of which waits for a network. Between polls it does what is due: the heartbeat that the
redirect guard looks for, the choice of namespaces, the clock, the report of losses.

Everything the user asked for is checked and opened before the kernel is touched; what
was opened is closed in reverse, whatever happened.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from podspan.agent import version
from podspan.agent.clock import Clock
from podspan.agent.config import Config
from podspan.agent.engine import KERNEL, Plan, plan_of
from podspan.agent.errors import FeatureMissing, NoPrivilege
from podspan.agent.exchange import Exchange, Role
from podspan.agent.istio_metrics import RequestMetrics
from podspan.agent.kernel.enrol import Enrolment
from podspan.agent.kernel.guard import Want
from podspan.agent.kernel.options import Options
from podspan.agent.kernel.state import Inherited
from podspan.agent.lifecycle import Stop, ready, ready_path, stop_signals
from podspan.agent.metrics import PodStatus, Snapshot
from podspan.agent.outputs import Outputs
from podspan.agent.pods.kubernetes import cluster_of
from podspan.agent.pods.names import ServiceNames
from podspan.agent.pods.node import NodePods
from podspan.agent.pods.pod import Pod
from podspan.agent.pods.runtimes import GoProcesses
from podspan.agent.span import Span, SpanOptions, span_of
from podspan.agent.status import open_status
from podspan.agent.steering import Steering

log = logging.getLogger(__name__)

POLL_MS = 100

EXPORT_TICK_S = 0.5
SELECT_S = 1.0
GO_S = 1.0
WORKERS_S = 0.1
CLOCK_S = 1.0
STATUS_S = 1.0
LOSSES_S = 10.0

# Spans handed over at once; more than this do not pile up within one poll.
HAND_OVER_SPANS = 256


class Tracer(Protocol):
    """What the loop needs of podspan.agent.kernel.tracer."""

    fault: str | None  # what the kernel engine's self-test found
    inherited: Inherited
    enrolment: Enrolment

    def poll(self, timeout_ms: int) -> None:
        """Hand over the exchanges that the kernel has finished."""

    def heartbeat(self) -> None:
        """Tell the kernel's programs that the agent is alive."""

    def select(self, netns: frozenset[int]) -> None:
        """Trace these network namespaces, and no others."""

    def set_sampling(self, by_netns: Mapping[int, float]) -> None:
        """Sample these namespaces' traces at rates of their own, in per cent."""

    def set_roaming(self, come: Iterable[int], gone: Iterable[int]) -> None:
        """Claim no parent by thread in these processes: their work roams."""

    def set_plans(self, plans: Mapping[int, int]) -> None:
        """Set what is written where: POLICY_ bits by namespace."""

    def redirect(self, netns: int, wants: Collection[Want]) -> None:
        """Redirect these connections of a namespace, and no others."""

    def handoff_fds(self) -> tuple[int, int, int]:
        """Return the descriptors that redirect workers inherit."""

    def http2_ports(self, netns: frozenset[int]) -> frozenset[tuple[int, int, Role]]:
        """Return where HTTP/2 was seen: namespace, called port, our role."""

    def losses(self) -> dict[str, int]:
        """Return what was lost since the start, by reason."""


class OpenTracer(Protocol):
    """Loads and attaches; leaving the context undoes it."""

    def __call__(
        self,
        *,
        max_connections: int,
        options: Options,
        netns: frozenset[int] | None,
        roaming: Collection[int],
        on_exchange: Callable[[Exchange], None],
        on_warning: Callable[[str], None],
    ) -> AbstractContextManager[Tracer]:
        """Return the tracer, not yet attached."""


def run(config: Config, open_tracer: OpenTracer | None = None) -> int:
    """Trace until SIGTERM or SIGINT; return the exit code."""
    if open_tracer is None:
        open_tracer = _kernel_tracer()
    ready_file = ready_path(config.ready_file)
    log.info(
        "podspan agent: version=%s kernel=%s pid=%d",
        version(),
        platform.release(),
        os.getpid(),
    )
    log.info("config: %s", config.facts())
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        outputs = Outputs(stack, config)
        pods_by_netns = _pods_by_netns(stack)
        names = ServiceNames(pods_by_netns=pods_by_netns)
        clock = Clock()
        options = SpanOptions(config.tags, config.max_path, not config.no_query)
        sink = Sink(names, clock, outputs, options)
        selection = Selection(names, config.netns)
        state = _State()
        status = open_status(
            config.status_address, state.read, state.is_ready, sink.requests.families
        )
        if status is not None:
            stack.callback(status.close)
        go = GoProcesses()
        tracer = stack.enter_context(
            open_tracer(
                max_connections=config.max_connections,
                options=Options.of(config),
                netns=selection.netns,
                roaming=go.look(selection.netns).started,
                on_exchange=sink.take,
                on_warning=log.warning,
            )
        )
        node = plan_of(config.engine, tracer.fault)
        _require(config.engine, tracer.fault)
        log.info("attached: engine=%s reason=%r", node.engine, node.reason)
        if tracer.inherited:
            log.info("taken over from an earlier agent: %s", tracer.inherited)
        log.info("connections older than the agent: %s", tracer.enrolment)

        def look_for_go(netns: frozenset[int] | None) -> None:
            """Their goroutines roam between threads: no thread is a parent."""
            change = go.look(netns)
            tracer.set_roaming(change.started, change.ended)

        def select(netns: frozenset[int]) -> None:
            look_for_go(netns)
            tracer.select(netns)

        steering = Steering(config, tracer, names, lambda: selection.netns, sink.take)
        stack.callback(sink.hand_over)  # of what workers report at their end
        stack.callback(steering.close)
        losses = Losses(
            lambda: {
                **tracer.losses(),
                **outputs.losses(),
                **steering.losses(),
                **sink.requests.losses(),
            }
        )
        stack.callback(losses.sum_up)

        def publish() -> None:
            state.publish(
                engine=node.engine,
                engine_reason=node.reason,
                selftest=tracer.fault or "",
                exchanges=sink.exchanges,
                spans=sink.spans,
                pods=_pods(steering.plans, names),
                losses=losses.read(),
                exporters=outputs.counters(),
                redirect=steering.counters(),
            )

        tasks = [
            Periodic(config.heartbeat_interval, tracer.heartbeat),
            Periodic(EXPORT_TICK_S, outputs.tick),
            Periodic(SELECT_S, lambda: selection.follow(select)),
            Periodic(SELECT_S, lambda: tracer.set_sampling(_rates(pods_by_netns()))),
            Periodic(SELECT_S, steering.follow),
            Periodic(WORKERS_S, steering.poll),
            Periodic(GO_S, lambda: look_for_go(selection.netns)),
            Periodic(CLOCK_S, clock.refresh),
            Periodic(STATUS_S, publish),
            Periodic(LOSSES_S, losses.report),
        ]
        tracer.heartbeat()
        steering.follow()
        publish()
        stack.callback(state.end)
        stack.enter_context(ready(ready_file))
        log.info("ready")
        _loop(stop, tracer, sink, tasks)
    log.info("ended: exchanges=%d spans=%d %s", sink.exchanges, sink.spans, outputs)
    return 0


def _loop(stop: Stop, tracer: Tracer, sink: Sink, tasks: Sequence[Periodic]) -> None:
    """Poll, and do what is due, until it is time to end."""
    while not stop:
        tracer.poll(POLL_MS)
        sink.hand_over()
        now_s = time.monotonic()
        for task in tasks:
            task.run_if_due(now_s)
    log.info("ending: signal=%s", stop.signal)
    # What finished before the signal is in the ring still.
    tracer.poll(0)
    sink.hand_over()


def _pods_by_netns(stack: ExitStack) -> Callable[[], Mapping[int, Pod]]:
    """Return what tells this node's pods, until `stack` is closed; outside of one none.

    The answer is of this moment; asking takes no time.
    """
    cluster = cluster_of(os.environ)
    if cluster is None:
        return dict
    pods = NodePods(cluster)
    stack.callback(pods.close)
    return pods.by_netns


def _rates(pods: Mapping[int, Pod]) -> dict[int, float]:
    """Return the sampling rates that pods have of their own, by namespace."""
    return {
        netns: pod.sampling for netns, pod in pods.items() if pod.sampling is not None
    }


class Sink:
    """Takes exchanges from the kernel, makes spans, hands them over in lots."""

    def __init__(
        self,
        names: ServiceNames,
        clock: Clock,
        outputs: Outputs,
        options: SpanOptions,
    ) -> None:
        self.exchanges = 0
        self.spans = 0
        self.requests = RequestMetrics(names)
        self._names = names
        self._clock = clock
        self._outputs = outputs
        self._options = options
        self._lot: list[Span] = []
        self._failure: Exception | None = None

    def take(self, exchange: Exchange) -> None:
        """Called from within bcc's C code, which swallows exceptions: keep them."""
        self.exchanges += 1
        try:
            self.requests.observe(exchange)
            netns = exchange.netns
            span = span_of(
                exchange,
                self._names.name(netns, exchange.comm),
                self._clock.offset_ns,
                self._options,
                self._names.pod(netns),
            )
            if span is None:
                return
            self._lot.append(span)
            if len(self._lot) >= HAND_OVER_SPANS:
                self._export()
        except Exception as exc:
            self._failure = self._failure or exc

    def hand_over(self) -> None:
        """Pass on what was taken; raise what went wrong while taking."""
        if self._failure is not None:
            raise self._failure
        if self._lot:
            self._export()

    def _export(self) -> None:
        lot, self._lot = self._lot, []
        self.spans += len(lot)
        self._outputs.export(lot)


class _State:
    """What the status port tells; written by the loop, whole, read by any thread."""

    def __init__(self) -> None:
        self._ready = False
        self._now = Snapshot(
            version=version(),
            kernel=platform.release(),
            pid=os.getpid(),
            started_s=time.time(),
            updated_s=time.monotonic(),
            engine="",
            engine_reason="starting",
            selftest="",
        )

    def read(self) -> Snapshot:
        return self._now

    def is_ready(self) -> bool:
        return self._ready

    def publish(self, **changes: Any) -> None:
        """Everything is attached, and this has changed."""
        self._now = replace(self._now, updated_s=time.monotonic(), **changes)
        self._ready = True

    def end(self) -> None:
        """Nothing is attached any more."""
        self._ready = False


def _pods(plans: Mapping[int, Plan], names: ServiceNames) -> tuple[PodStatus, ...]:
    """Return the plans with the pods' names, in the order of these."""
    paths = names.paths()
    found = []
    for netns, plan in plans.items():
        pod = names.pod(netns)
        namespace = pod.namespace if pod else ""
        name = pod.name if pod else paths[netns].name if netns in paths else ""
        found.append(PodStatus(netns, namespace, name, plan.engine, plan.reason))
    return tuple(sorted(found, key=lambda one: (one.namespace, one.name, one.netns)))


class Selection:
    """The network namespaces that --netns names; None without it: all."""

    def __init__(self, names: ServiceNames, patterns: tuple[str, ...]) -> None:
        self._names = names
        self._patterns = patterns
        self.netns = names.select(patterns) if patterns else None
        if self.netns is not None and not self.netns:
            log.warning("no namespace yet: netns=%s", ",".join(patterns))

    def follow(self, select: Callable[[frozenset[int]], None]) -> None:
        """Look again; `select` what is there now if it is not what was."""
        if self.netns is None:
            return
        netns = self._names.select(self._patterns)
        if netns != self.netns:
            self.netns = netns
            select(netns)
            log.info("selected: namespaces=%d", len(netns))


class Periodic:
    """Something to do every so often."""

    def __init__(self, every_s: float, action: Callable[[], None]) -> None:
        self._every_s = every_s
        self._action = action
        self._next_s = time.monotonic() + every_s

    def run_if_due(self, now_s: float) -> None:
        """Do it if it is time; a late run does not make the next one early."""
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._action()


class Losses:
    """Warns when a counter of losses has grown."""

    def __init__(self, read: Callable[[], dict[str, int]]) -> None:
        self.read = read
        self._told: dict[str, int] = {}

    def report(self) -> None:
        """Log what was lost since the last report, and altogether."""
        now = self.read()
        grown = {
            reason: count - self._told.get(reason, 0)
            for reason, count in now.items()
            if count > self._told.get(reason, 0)
        }
        self._told = now
        if grown:
            log.warning("lost: %s; since the start: %s", _facts(grown), _facts(now))

    def sum_up(self) -> None:
        """Log all that was lost, if anything was."""
        now = self.read()
        if any(now.values()):
            log.warning("lost altogether: %s", _facts(now))


def _facts(counts: dict[str, int]) -> str:
    return " ".join(f"{reason}={count}" for reason, count in counts.items() if count)


def _require(engine: str, fault: str | None) -> None:
    """Raise where the engine that was asked for does not work here."""
    if engine == KERNEL and fault is not None:
        raise FeatureMissing(
            f"--engine kernel: its self-test failed: {fault}",
            "use --engine auto, which then redirects, or another kernel",
        )


def _kernel_tracer() -> OpenTracer:
    """Return the real tracer; what it needs is tried in the order of its repair."""
    if os.geteuid() != 0:
        raise NoPrivilege(
            "the agent loads programs into the kernel, which only root may",
            "run it with sudo, or as a privileged DaemonSet",
        )
    if importlib.util.find_spec("bcc") is None:
        raise FeatureMissing(
            f"no module bcc for {sys.executable}",
            "apt-get install python3-bpfcc; a virtual environment needs "
            "--system-site-packages to see it",
        )
    tracer: OpenTracer = import_module("podspan.agent.kernel.tracer").Tracer
    return tracer
