"""How often, how well and how fast one service calls another, over many traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from podspan.agent.store.linker import Link


@dataclass(frozen=True, slots=True)
class EdgeStats:
    """The calls of one service to another; None where no duration is known."""

    parent: str
    child: str
    calls: int
    errors: int
    p50_us: int | None
    p95_us: int | None
    p99_us: int | None


@dataclass(slots=True)
class Tally:
    """The calls of one service to another, as they are counted."""

    calls: int = 0
    errors: int = 0
    durations: Counter[int] = field(default_factory=Counter)  # microseconds: calls

    def add(self, link: Link, times: int = 1) -> None:
        """Count the calls of one trace; `times` -1 takes them out."""
        self.calls += times * link.calls
        self.errors += times * link.errors
        for duration_us in link.durations_us:
            self.durations[duration_us] += times


Edge = tuple[str, str]  # parent, child
Tallies = dict[Edge, Tally]


def add_links(tallies: Tallies, links: Iterable[Link], times: int = 1) -> None:
    """Count the links of one trace; `times` -1 takes them out."""
    for link in links:
        tallies.setdefault((link.parent, link.child), Tally()).add(link, times)


def stats_of(tallies: Tallies) -> list[EdgeStats]:
    """Return the edges, by name."""
    return [
        EdgeStats(parent, child, tally.calls, tally.errors, *_quantiles(tally))
        for (parent, child), tally in sorted(tallies.items())
        if tally.calls > 0
    ]


def _quantiles(tally: Tally) -> tuple[int | None, int | None, int | None]:
    return (
        quantile(tally.durations, 50),
        quantile(tally.durations, 95),
        quantile(tally.durations, 99),
    )


def quantile(counts: Counter[int], percent: int) -> int | None:
    """Return the smallest value that `percent` of all do not exceed (nearest rank)."""
    rank = -(-counts.total() * percent // 100)
    for value in sorted(counts):
        rank -= counts[value]
        if rank <= 0:
            return value
    return None
