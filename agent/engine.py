"""Which engine writes the headers of a pod's requests, and why.

    kernel    the sockets of the pod's clients are enrolled: bpf/request.c writes
    redirect  connections go through a worker (agent/redirect/): it writes
    off       calls are traced as they are seen, and nothing is written

`auto` is kernel where its self-test passed, but for what only a proxy can do: the edge
(requests that arrive without a context get headers before the application reads them)
and HTTP/2. Where the self-test failed it is redirect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from podspan.agent.exchange import Role

AUTO: Final = "auto"
KERNEL: Final = "kernel"
REDIRECT: Final = "redirect"
OFF: Final = "off"
ENGINES: Final = (AUTO, KERNEL, REDIRECT, OFF)

OPTION: Final = "--engine"
ANNOTATION: Final = "podspan.io/engine"
EDGE: Final = "podspan.io/edge"

Ports = frozenset[int] | None  # None: all
NO_PORTS: Final[frozenset[int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a pod's annotations ask for."""

    engine: str = ""  # one of ENGINES; "": the node's
    edge: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done in a pod's network namespace."""

    engine: str  # kernel, redirect, kernel+redirect, off
    reason: str  # a sentence for people
    enrol: bool  # write into the requests of its clients, in the kernel
    inbound: Ports = NO_PORTS  # destination ports that are redirected
    outbound: Ports = NO_PORTS

    @property
    def redirects(self) -> bool:
        """Whether a worker has to serve the pod."""
        return self.inbound != NO_PORTS or self.outbound != NO_PORTS


def plan_of(
    option: str,
    fault: str | None,
    wish: Wish = Wish(),
    http2: Iterable[tuple[int, Role]] = (),
) -> Plan:
    """Return the plan of one pod.

    `option` is the node's (one of ENGINES), `fault` what the kernel engine's self-test
    found, `http2` the called ports where HTTP/2 was seen, by our role.
    """
    wanted = wish.engine or option
    asked = f"{ANNOTATION}: {wanted}" if wish.engine else f"{OPTION} {wanted}"
    if wanted == OFF:
        return Plan(OFF, asked, enrol=False)
    if wanted == KERNEL and fault is not None:
        return Plan(OFF, f"{asked}, but its self-test failed: {fault}", enrol=False)
    if wanted == KERNEL:
        return Plan(KERNEL, asked, enrol=True)
    if wanted == REDIRECT:
        return Plan(REDIRECT, asked, enrol=False, inbound=None, outbound=None)
    if fault is not None:
        reason = f"the kernel engine's self-test failed: {fault}"
        return Plan(REDIRECT, reason, enrol=False, inbound=None, outbound=None)
    return _mixed(wish.edge, frozenset(http2))


def _mixed(edge: bool, http2: frozenset[tuple[int, Role]]) -> Plan:
    inbound: Ports = frozenset(port for port, role in http2 if role is Role.SERVER)
    outbound = frozenset(port for port, role in http2 if role is Role.CLIENT)
    reasons = ["self-test passed"]
    if http2:
        ports = sorted({port for port, _ in http2})
        reasons.append(f"HTTP/2 redirected: {', '.join(map(str, ports))}")
    if edge:
        inbound = None
        reasons.append(f"inbound redirected: {EDGE}")
    mixed = edge or bool(http2)
    engine = f"{KERNEL}+{REDIRECT}" if mixed else KERNEL
    return Plan(engine, "; ".join(reasons), True, inbound, outbound)
