"""How far a long task is, on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

WIDTH = 40
REFRESH_S = 0.1


class ProgressBar:
    """A line that is written over; none where `out` is no terminal."""

    def __init__(
        self,
        out: TextIO,
        total: int,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._total = total
        self._monotonic_s = monotonic_s
        self._shown = out.isatty() and total > 0
        self._next_s = 0.0

    def show(self, done: int) -> None:
        """Tell how much of `total` is done; not more often than people can read."""
        if not self._shown or self._monotonic_s() < self._next_s:
            return
        self._next_s = self._monotonic_s() + REFRESH_S
        share = min(done / self._total, 1)
        bar = "█" * round(share * WIDTH)
        self._out.write(f"\r{bar:░<{WIDTH}} {share:4.0%}")
        self._out.flush()

    def clear(self) -> None:
        """Leave the line to others."""
        if self._shown:
            self._out.write("\r\033[K")
            self._out.flush()
