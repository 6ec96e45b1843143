"""From packets to spans: the parts of this folder in one line.

Memory holds what is open: connections (at most connections.MAX_OPEN), calls without
their bodies, and what waits in streams for bytes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from podspan.agent.exchange import Exchange, Role
from podspan.agent.replay.capture import Packet
from podspan.agent.replay.connections import MAX_OPEN, Connections
from podspan.agent.replay.names import ServiceNames, named_host
from podspan.agent.replay.packets import segment_of
from podspan.agent.replay.traces import Traces
from podspan.agent.span import DEFAULT_OPTIONS, Span, SpanOptions, span_of

# Spans are exported by so many: a transaction of a database, a write to a file.
BATCH_SPANS = 1000


@dataclass(frozen=True, slots=True)
class Summary:
    """What was in a capture, and what was skipped or lost, by reason."""

    packets: int
    connections: int
    exchanges: int
    spans: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        """Return it as a line."""
        counted = (
            f"{self.packets} packets, {self.connections} connections, "
            f"{self.exchanges} exchanges, {self.spans} spans"
        )
        reasons = sorted(self.skipped.items())
        skipped = ", ".join(f"{reason} {count}" for reason, count in reasons)
        return f"{counted}; skipped: {skipped or 'nothing'}"


class Replay:
    """Takes packets in the order of time, gives spans."""

    def __init__(
        self,
        export: Callable[[Sequence[Span]], None],
        names: ServiceNames,
        *,
        child_ids: bool = False,
        options: SpanOptions = DEFAULT_OPTIONS,
        max_open: int = MAX_OPEN,
    ) -> None:
        self._export = export
        self._names = names
        self._options = options
        self._count: Counter[str] = Counter()
        self._traces = Traces(self._report, names, self._count, child_ids=child_ids)
        self._connections = Connections(self._traces, self._count, max_open)
        self._batch: list[Span] = []
        self._packets = 0
        self._exchanges = 0
        self._spans = 0
        self.first_ns = 0  # the earliest time of a packet, and the latest
        self.last_ns = 0

    def packet(self, packet: Packet) -> None:
        """Take the next packet."""
        at_ns = packet.at_ns
        self._packets += 1
        self.first_ns = min(self.first_ns or at_ns, at_ns)
        self.last_ns = max(self.last_ns, at_ns)
        segment = segment_of(packet.link_type, packet.data, packet.wire_length)
        if isinstance(segment, str):
            self._count[segment] += 1
        else:
            self._connections.segment(at_ns, segment)

    def close(self) -> None:
        """The capture is over: what is open ends unseen."""
        self._connections.close()
        self._flush()

    def summary(self) -> Summary:
        """Return what there was until now."""
        skipped = {reason: count for reason, count in self._count.items() if count}
        return Summary(
            self._packets,
            self._connections.seen,
            self._exchanges,
            self._spans,
            skipped,
        )

    def _report(self, exchange: Exchange) -> None:
        client = exchange.role is Role.CLIENT
        host = ""
        if not client:
            host = named_host(exchange.method, exchange.target, exchange.host)
        service = self._names.name(exchange.local_addr, host)
        span = span_of(exchange, service, 0, self._options)
        self._exchanges += client
        if span is None:
            return
        self._spans += 1
        self._batch.append(span)
        if len(self._batch) >= BATCH_SPANS:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            batch, self._batch = self._batch, []
            self._export(batch)
