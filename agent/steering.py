"""Bring the kernel's programs, the guard and the workers in line with each pod's plan.

A pod's connections are redirected only once a worker has confirmed that it serves the
pod, and no longer than it does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from podspan.agent.config import Config
from podspan.agent.engine import Plan, Wish, plan_of
from podspan.agent.errors import KernelError
from podspan.agent.exchange import Exchange, Role
from podspan.agent.kernel.guard import Want
from podspan.agent.kernel.options import POLICY_ENROL, POLICY_REDIRECT
from podspan.agent.pods import processes
from podspan.agent.pods.names import ServiceNames
from podspan.agent.redirect.engine import PodPlan, RedirectEngine, WorkerOptions

log = logging.getLogger(__name__)

# How long connections that are redirected may go on after the agent's end.
DRAIN_S: Final = 5.0

# Counters of workers that count what is done, not what is lost.
ACTIVITY: Final = (
    "connect_failed_",
    "connections_inbound",
    "connections_open",
    "connections_outbound",
    "pods_served",
    "protocol_",
    "requests_",
    "reset_by_",
    "server_first",
)


class Kernel(Protocol):
    """What is needed of podspan.agent.kernel.tracer.Tracer."""

    @property
    def fault(self) -> str | None:
        """What the kernel engine's self-test found."""

    def set_plans(self, plans: Mapping[int, int]) -> None:
        """Set POLICY_ bits by network namespace."""

    def redirect(self, netns: int, wants: frozenset[Want]) -> None:
        """Redirect these connections of a namespace, and no others."""

    def http2_ports(self, netns: frozenset[int]) -> frozenset[tuple[int, int, Role]]:
        """Return where in these namespaces HTTP/2 was seen; forget all others."""

    def handoff_fds(self) -> tuple[int, int, int]:
        """Return the descriptors that workers inherit."""


class Steering:
    """One plan per network namespace, followed by all who have a part in it."""

    def __init__(
        self,
        config: Config,
        kernel: Kernel,
        names: ServiceNames,
        selected: Callable[[], frozenset[int] | None],
        on_exchange: Callable[[Exchange], None],
    ) -> None:
        """`selected`: the namespaces that are traced, None for all."""
        self._config = config
        self._kernel = kernel
        self._names = names
        self._selected = selected
        self._on_exchange = on_exchange
        self._workers: RedirectEngine | None = None
        self._plans: Mapping[int, Plan] = {}
        self._redirected: dict[int, frozenset[Want]] = {}
        self._told: set[str] = set()

    @property
    def plans(self) -> Mapping[int, Plan]:
        """The plans by network namespace."""
        return MappingProxyType(dict(self._plans))

    def follow(self) -> None:
        """Look at pods, annotations and ports again; change what differs."""
        http2: dict[int, set[tuple[int, Role]]] = {}
        namespaces = self._namespaces()
        for netns, port, role in self._kernel.http2_ports(namespaces):
            http2.setdefault(netns, set()).add((port, role))
        plans = {
            netns: plan_of(
                self._config.engine,
                self._kernel.fault,
                self._wish(netns),
                http2.get(netns, ()),
            )
            for netns in namespaces
        }
        if plans != self._plans:
            self._tell(plans)
            self._plans = plans
            self._kernel.set_plans({n: _bits(plan) for n, plan in plans.items()})
            # Before their listeners close.
            self._redirect_what_is_served()
        self._serve()
        self.poll()

    def poll(self) -> None:
        """Take what workers have to tell; redirect what they serve by now."""
        if self._workers is None:
            return
        self._workers.poll()
        self._redirect_what_is_served()

    def _redirect_what_is_served(self) -> None:
        serving = self._workers.serving() if self._workers is not None else frozenset()
        wanted = {
            netns: _wants(plan)
            for netns, plan in self._plans.items()
            if plan.redirects and netns in serving
        }
        for netns in self._redirected.keys() | wanted.keys():
            wants = wanted.get(netns, frozenset())
            if self._redirected.get(netns, frozenset()) == wants:
                continue
            try:
                self._kernel.redirect(netns, wants)
            except (KernelError, OSError) as exc:
                self._warn(f"not redirected: netns={netns} {exc}")
                wanted.pop(netns, None)  # nothing is; it is tried again
            else:
                log.info("redirecting: netns=%d %s", netns, _shown(wants))
        self._redirected = wanted

    def counters(self) -> dict[str, int]:
        """Return what workers counted."""
        return self._workers.counters() if self._workers is not None else {}

    def losses(self) -> dict[str, int]:
        """Return those of the counters that are losses."""
        return {
            name: count
            for name, count in self.counters().items()
            if not name.removeprefix("redirect_").startswith(ACTIVITY)
        }

    def close(self) -> None:
        """Redirect nothing any more; connections that are redirected may end."""
        if self._workers is None:
            return
        for netns in self._redirected:
            self._kernel.redirect(netns, frozenset())
        self._redirected = {}
        self._workers.close(DRAIN_S)
        self._workers.poll()

    def _namespaces(self) -> frozenset[int]:
        """Return those that have a plan: of pods, or with a name."""
        selected = self._selected()
        found = selected
        if found is None:
            found = self._names.pods() | self._names.select(("*",))
        return found - {processes.own_netns(), processes.netns_of(1) or 0}

    def _wish(self, netns: int) -> Wish:
        pod = self._names.pod(netns)
        return Wish() if pod is None else Wish(pod.engine, pod.edge)

    def _serve(self) -> None:
        pods = [netns for netns, plan in self._plans.items() if plan.redirects]
        if self._workers is None:
            if not pods:
                return
            self._workers = self._start_workers()
        places = self._places(pods)
        self._workers.serve(
            {
                netns: PodPlan(
                    netns,
                    places[netns],
                    self._sampling(netns),
                    self._config.inbound_source,
                )
                for netns in pods
                if netns in places
            }
        )

    def _places(self, pods: list[int]) -> dict[int, int | Path]:
        """Return a way into each namespace: its name, or a process in it."""
        places: dict[int, int | Path] = {}
        named = self._names.paths()
        by_netns = processes.by_netns() if set(pods) - named.keys() else {}
        for netns in pods:
            if netns in named:
                places[netns] = named[netns]
            elif netns in by_netns:
                places[netns] = by_netns[netns][0]
        return places

    def _sampling(self, netns: int) -> float:
        pod = self._names.pod(netns)
        if pod is None or pod.sampling is None:
            return self._config.sampling
        return pod.sampling

    def _start_workers(self) -> RedirectEngine:
        config = self._config
        return RedirectEngine(
            workers=config.redirect_workers,
            handoff_fds=self._kernel.handoff_fds(),
            options=WorkerOptions(
                span_ids=config.span_ids,
                unsampled=config.unsampled,
                propagate=config.propagate,
                grace_s=config.guard_grace,
            ),
            on_record=self._on_exchange,
            on_warning=log.warning,
        )

    def _warn(self, text: str) -> None:
        """Log a warning once."""
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", text)

    def _tell(self, plans: Mapping[int, Plan]) -> None:
        """Log each plan that is new, once for all pods that have it."""
        for plan in sorted(set(plans.values()), key=lambda plan: plan.reason):
            text = f"{plan.engine}: {plan.reason}"
            if text not in self._told:
                self._told.add(text)
                log.info("engine: engine=%s reason=%r", plan.engine, plan.reason)


def _bits(plan: Plan) -> int:
    enrol = POLICY_ENROL if plan.enrol else 0
    return enrol | (POLICY_REDIRECT if plan.redirects else 0)


def _wants(plan: Plan) -> frozenset[Want]:
    return frozenset(
        Want(inbound, port)
        for inbound, ports in ((True, plan.inbound), (False, plan.outbound))
        for port in (_ALL if ports is None else ports)
    )


_ALL: Final = (None,)


def _shown(wants: frozenset[Want]) -> str:
    def ports(inbound: bool) -> str:
        some = [want.port for want in wants if want.inbound is inbound]
        if None in some:
            return "all"
        return ",".join(str(port) for port in sorted(filter(None, some))) or "none"

    return f"inbound={ports(True)} outbound={ports(False)}"
