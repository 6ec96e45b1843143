"""Print every trace as a tree, once it has been quiet for a while.

Nothing says that a trace is complete; a trace that goes on after it was printed is
printed again with its later spans only.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Self, TextIO

from podspan.agent.errors import ExportError
from podspan.agent.span import Span
from podspan.agent.tree import WIDTH, render

QUIET_S = 1.0

# Beyond this, the oldest traces are printed early: memory is bounded, nothing is lost.
MAX_SPANS = 20_000


class TreeExporter:
    """Collects spans by trace and prints them to `out`."""

    def __init__(
        self,
        out: TextIO,
        width: int = WIDTH,
        quiet_s: float = QUIET_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._width = width
        self._quiet_s = quiet_s
        self._monotonic_s = monotonic_s
        # By trace id, the one that has been quiet for longest first.
        self._traces: dict[str, list[Span]] = {}
        self._last_s: dict[str, float] = {}
        self._waiting = 0
        self._sent = 0

    @classmethod
    def on_terminal(
        cls,
        quiet_s: float = QUIET_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Print to the standard output, as wide as its terminal is."""
        # One that knows no blocks shows question marks, and no traceback.
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        width = shutil.get_terminal_size((WIDTH, 0)).columns
        return cls(sys.stdout, width, quiet_s, monotonic_s)

    def export(self, spans: Sequence[Span]) -> None:
        """Keep the spans until their traces are quiet."""
        now_s = self._monotonic_s()
        for span in spans:
            trace_id = span.trace_id
            trace = self._traces.pop(trace_id, [])
            trace.append(span)
            self._traces[trace_id] = trace
            self._last_s[trace_id] = now_s
        self._waiting += len(spans)
        while self._waiting > MAX_SPANS:
            self._print(next(iter(self._traces)))

    def tick(self) -> None:
        """Print what has been quiet for long enough."""
        until_s = self._monotonic_s() - self._quiet_s
        while self._traces:
            oldest = next(iter(self._traces))
            if self._last_s[oldest] > until_s:
                break
            self._print(oldest)

    def counters(self) -> dict[str, int]:
        """Return the number of spans printed and waiting."""
        return {"sent": self._sent, "queued": self._waiting}

    def close(self, timeout_s: float) -> None:  # noqa: ARG002
        """Print what is left."""
        while self._traces:
            self._print(next(iter(self._traces)))

    def _print(self, trace_id: str) -> None:
        spans = self._traces.pop(trace_id)
        del self._last_s[trace_id]
        self._waiting -= len(spans)
        try:
            self._out.write(render(spans, self._width) + "\n")
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise ExportError(f"cannot print trees: {exc.strerror}") from exc
        self._sent += len(spans)
