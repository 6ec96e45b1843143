"""podspan.agent.export: where spans go.

delivery.py     to one backend, in the background: batches, retries, a spool
spool.py        what waits on disk
client.py       HTTP and TLS, credentials that rotate
destination.py  where a backend is, and how to prove who we are
encoder.py      what a protocol is to delivery.py
zipkin.py       Zipkin v2 JSON
otlp.py         OTLP: the mapping, its JSON; otlp_protobuf.py the binary encoding
jsonl.py        one span per line, into a file
tree.py         trees, onto the terminal
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from podspan.agent.span import Span


class Exporter(Protocol):
    """Takes spans somewhere.

    Raises ExportError, or BrokenPipeError when whoever reads our standard output has
    enough, which is no failure.
    """

    def export(self, spans: Sequence[Span]) -> None:
        """Take the spans; never wait for a network."""

    def tick(self) -> None:
        """Do what is due by now; called about twice a second."""

    def counters(self) -> dict[str, int]:
        """Return what was sent and lost since the start, by reason."""

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most this long, and let go of everything."""
