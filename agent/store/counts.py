"""What the server counts of itself, as Prometheus' text."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final


class Counts:
    """What happened since the start, by name of the metric."""

    HELP: Final = {
        "requests_total": "Requests answered, by status.",
        "messages_total": "Messages of spans received.",
        "message_bytes_total": "Their bytes, unpacked.",
        "spans_received_total": "Spans stored, also those that were known already.",
    }

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = {
            name: 0 for name in self.HELP if "req" not in name
        }

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._values[name] = self._values.get(name, 0) + count

    def to_prometheus(self, stored: Mapping[str, int]) -> str:
        """Return them, and what the database counts, as Prometheus' text."""
        with self._lock:
            values = sorted(self._values.items())
        lines = []
        for name, help_text in self.HELP.items():
            lines += [
                f"# HELP podspan_store_{name} {help_text}",
                f"# TYPE podspan_store_{name} counter",
                *(
                    f"podspan_store_{key} {value}"
                    for key, value in values
                    if key.partition("{")[0] == name
                ),
            ]
        for what, value in sorted(stored.items()):
            since_start = what.startswith("expired_")
            name, kind = (
                (f"{what}_total", "counter") if since_start else (what, "gauge")
            )
            lines += [
                f"# HELP podspan_store_{name} Of the database.",
                f"# TYPE podspan_store_{name} {kind}",
                f"podspan_store_{name} {value}",
            ]
        return "\n".join([*lines, ""])
