"""Tell the world's time from the kernel's CLOCK_MONOTONIC.

The offset of the two clocks is read by sampling one between two readings of the
other; of several samples the narrowest counts. A new offset replaces the old one only
when they differ by more than the samples can be wrong, so that the spans of one trace
do not jitter, while a step of the clock (settimeofday, a suspended machine) is
followed.
"""

import time
from collections.abc import Callable

SAMPLES = 9

# Below this, two offsets are the same: NTP slews by up to 500 ppm, 0.5 ms a second.
TOLERANCE_NS = 2_000


class Clock:
    """Turns CLOCK_MONOTONIC into nanoseconds since 1970."""

    __slots__ = ("_monotonic_ns", "_realtime_ns", "offset_ns")

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        realtime_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._realtime_ns = realtime_ns
        self.offset_ns = self._measure()[0]

    def refresh(self) -> None:
        """Follow the clock if it was stepped or has drifted; call it now and then."""
        offset_ns, width_ns = self._measure()
        if abs(offset_ns - self.offset_ns) > width_ns + TOLERANCE_NS:
            self.offset_ns = offset_ns

    def epoch_ns(self, monotonic_ns: int) -> int:
        """Return the time since 1970 of a moment on CLOCK_MONOTONIC."""
        return monotonic_ns + self.offset_ns

    def _measure(self) -> tuple[int, int]:
        """Return the offset and how wrong it can be, of the best sample."""
        best_offset_ns, best_width_ns = 0, -1
        for _ in range(SAMPLES):
            before_ns = self._monotonic_ns()
            real_ns = self._realtime_ns()
            width_ns = self._monotonic_ns() - before_ns
            if best_width_ns < 0 or width_ns < best_width_ns:
                best_offset_ns = real_ns - before_ns - width_ns // 2
                best_width_ns = width_ns
        return best_offset_ns, best_width_ns
