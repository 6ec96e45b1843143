"""What the user can choose of what the kernel's programs do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from podspan.agent.config import Config
from podspan.agent.engine import AUTO, KERNEL

SECOND_NS = 1_000_000_000

# What is done in a network namespace: POLICY_ of bpf/connection.h.
POLICY_NONE, POLICY_TRACE, POLICY_ENROL, POLICY_REDIRECT = 0, 1, 2, 4


@dataclass(frozen=True, slots=True)
class Options:
    """The fields of Config that the kernel's programs need."""

    sampling: float = 100.0  # per cent
    span_ids: str = "shared"
    unsampled: str = "0"
    propagate: frozenset[str] = frozenset({"b3multi"})
    tcp: bool = True
    tcp_interval: int = 0  # seconds; 0: never
    guard_grace: float = 2.0  # seconds
    enrol: bool = True  # where no plan says otherwise

    @classmethod
    def of(cls, config: Config) -> Self:
        """Pick them out of what the user has set."""
        return cls(
            config.sampling,
            config.span_ids,
            config.unsampled,
            config.propagate,
            not config.no_tcp,
            config.tcp_interval,
            config.guard_grace,
            config.engine in {AUTO, KERNEL},
        )

    @property
    def guard_grace_ns(self) -> int:
        """How long the redirect guard takes a heartbeat for fresh."""
        return round(self.guard_grace * SECOND_NS)

    def defines(self) -> dict[str, int]:
        """Return names and values for the compiler of bpf/tracer.c."""
        return {
            "SPAN_IDS_CHILD": int(self.span_ids == "child"),
            "UNSAMPLED_DEFER": int(self.unsampled == "defer"),
            "PROPAGATE_B3MULTI": int("b3multi" in self.propagate),
            "PROPAGATE_B3": int("b3" in self.propagate),
            "PROPAGATE_TRACECONTEXT": int("tracecontext" in self.propagate),
            "TCP_SPANS": int(self.tcp),
            "TCP_INTERVAL_NS": self.tcp_interval * SECOND_NS,
        }
