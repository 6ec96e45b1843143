"""What the embedded store takes and gives: `pytest -s tests/bench/test_store.py`.

A million spans (PODSPAN_BENCH_SPANS) in traces of 8, and five traces of 10,000. Adding
is timed by this process's CPU as well as by the clock, because the machine has other
things to do. Each question is asked several times; the slowest is told as well.
"""

import os
import time

from bench.traces import FIRST_US, TRACE_GAP_US, traces
from podspan.agent.store.database import Database
from podspan.agent.store.query import Query

SPANS = int(os.environ.get("PODSPAN_BENCH_SPANS", "1000000"))
TRACES = SPANS // 8
BATCH_SPANS = 1000
ROUNDS = 7
GIB = 1 << 30

END_MS = (FIRST_US + TRACES * TRACE_GAP_US) // 1000 + 1000
LOOKBACK_MS = END_MS - FIRST_US // 1000 + 1000


def ask(**more):
    return Query(end_ts_ms=END_MS, lookback_ms=LOOKBACK_MS, **more)


def test_a_million_spans(tmp_path):
    database = Database(tmp_path / "traces.db", max_age_s=1e9, max_bytes=100 * GIB)
    try:
        measure_adding(database)
        big = add_large_traces(database)
        begun_s = time.process_time()
        database.settle(quiet_s=0)
        settling_us = (time.process_time() - begun_s) / SPANS * 1e6
        print(f"settling: {settling_us:.1f} us of CPU a span")
        measure_reading(database, big)
    finally:
        database.close()


def measure_adding(database):
    spent = {"clock": 0.0, "CPU": 0.0}
    batch = []
    for spans in [*traces(TRACES), None]:
        if spans:
            batch += spans
        if len(batch) >= BATCH_SPANS or (batch and not spans):
            begun = time.perf_counter(), time.process_time()
            database.add(batch)
            spent["clock"] += time.perf_counter() - begun[0]
            spent["CPU"] += time.process_time() - begun[1]
            batch = []
    counts = database.counts()
    print(
        f"\nadding {SPANS} spans: {SPANS / spent['clock']:.0f} a second,"
        f" {SPANS / spent['CPU']:.0f} a second of CPU;"
        f" {counts['bytes'] / SPANS:.0f} bytes each"
    )
