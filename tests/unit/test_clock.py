"""The world's time, from the kernel's clock."""

import time

from podspan.agent.clock import SAMPLES, TOLERANCE_NS, Clock

EPOCH_NS = 1_700_000_000_000_000_000


class TwoClocks:
    """A monotonic clock where each reading takes a while, and a world's clock."""

    def __init__(self, offset_ns=EPOCH_NS, reading_ns=(100,)):
        self.now_ns = 0
        self.offset_ns = offset_ns
        self.reading_ns = reading_ns
        self.readings = 0

    def monotonic_ns(self):
        self.now_ns += self.reading_ns[self.readings % len(self.reading_ns)]
        self.readings += 1
        return self.now_ns

    def realtime_ns(self):
        return self.now_ns + self.offset_ns

    def clock(self):
        return Clock(self.monotonic_ns, self.realtime_ns)


def test_the_narrowest_sample_counts():
    # Of SAMPLES pairs of readings, one is not disturbed by a scheduler.
    slow = [50_000] * (2 * SAMPLES)
    slow[9] = 10
    clocks = TwoClocks(reading_ns=slow)
    clock = clocks.clock()
    assert abs(clock.offset_ns - EPOCH_NS) <= 10
    assert clock.epoch_ns(5) == clock.offset_ns + 5


def test_a_step_is_followed():
    clocks = TwoClocks()
    clock = clocks.clock()
    clocks.offset_ns += 3_600_000_000_000
    clock.refresh()
    assert abs(clock.offset_ns - EPOCH_NS - 3_600_000_000_000) <= 100


def test_noise_is_not_followed():
    clocks = TwoClocks()
    clock = clocks.clock()
    before = clock.offset_ns
    clocks.offset_ns += TOLERANCE_NS // 2
    clock.refresh()
    assert clock.offset_ns == before


def test_drift_is_followed_in_the_end():
    clocks = TwoClocks()
    clock = clocks.clock()
    for _ in range(100):
        clocks.offset_ns += TOLERANCE_NS // 2
        clock.refresh()
    assert abs(clock.offset_ns - clocks.offset_ns) <= TOLERANCE_NS + 200


def test_the_machines_own_clocks():
    clock = Clock()
    before = time.time_ns()
    assert abs(clock.epoch_ns(time.monotonic_ns()) - before) < 1_000_000_000
