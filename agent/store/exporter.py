"""Spans of this process straight into a database: those of a replay, of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from podspan.agent.span import Span, zipkin_json
from podspan.agent.store.database import Database
from podspan.agent.store.server import StoreServer
from podspan.agent.store.zipkin_v2 import parse_json
from podspan.agent.values import Address

# An incident is kept until the user removes the file, however long ago it was.
MAX_AGE_S = 100 * 365 * 86400
MAX_BYTES = 1 << 40


class StoreExporter:
    """Puts spans into a database, which it opens; StoreError where that fails."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path, max_age_s=MAX_AGE_S, max_bytes=MAX_BYTES)
        self._sent = 0

    def export(self, spans: Sequence[Span]) -> None:
        """Store the spans, as if they had been posted."""
        body = f"[{','.join(map(zipkin_json, spans))}]"
        self.database.add(parse_json(body.encode()))
        self._sent += len(spans)

    def serve(self, stack: ExitStack, address: Address) -> str:
        """Show the spans there until `stack` is closed; return the viewer's URL."""
        server = StoreServer(self.database, (address.host, address.port))
        stack.callback(server.close)
        server.start()
        return f"http://{Address(address.host, server.port).reachable}/"

    def settle(self) -> None:
        """Work out now what the dependency graph shows; by itself it takes a while."""
        self.database.settle(quiet_s=0)

    def tick(self) -> None:
        """Nothing waits here."""

    def counters(self) -> dict[str, int]:
        """Return the number of spans stored."""
        return {"sent": self._sent}

    def close(self, timeout_s: float) -> None:  # noqa: ARG002
        """Close the file."""
        self.database.close()
