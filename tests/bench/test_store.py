"""What the embedded store takes and gives: `pytest -s tests/bench/test_store.py`.

A million spans (PODSPAN_BENCH_SPANS) in traces of 8, and five traces of 10,000. Times
are CPU's of the thread that waits, because the machine has other things to do; of
adding, the clock's is told as well. Each question is asked several times: the median
and the slowest.
"""

import os
import random
import statistics
import time

from bench.traces import FIRST_US, TRACE_GAP_US, trace, traces
from podspan.agent.store.database import Database
from podspan.agent.store.query import Query

SPANS = int(os.environ.get("PODSPAN_BENCH_SPANS", "1000000"))
TRACES = SPANS // 8
BATCH_SPANS = 1000
LARGE_TRACES = 5
LARGE_CALLS = 5000
ROUNDS = 7
GIB = 1 << 30

END_MS = (FIRST_US + TRACES * TRACE_GAP_US) // 1000
LOOKBACK_MS = END_MS - FIRST_US // 1000 + 1


def ask(**more):
    return Query(end_ts_ms=END_MS, lookback_ms=LOOKBACK_MS, **more)


def error(key="error", text=""):
    return {"annotation_query": {key: text}}


def test_a_million_spans(tmp_path):
    database = Database(tmp_path / "traces.db", max_age_s=1e9, max_bytes=100 * GIB)
    try:
        add_traces(database)
        chance = random.Random(2)
        for number in range(LARGE_TRACES):
            database.add(trace(chance, number * TRACES // LARGE_TRACES, LARGE_CALLS))
        begun_s = time.thread_time()
        database.settle(quiet_s=0)
        settling_us = (time.thread_time() - begun_s) / SPANS * 1e6
        print(f"settling what is left: {settling_us:.1f} us a span\n")
        ask_for_traces(database)
        ask_for_the_rest(database)
    finally:
        database.close()


def add_traces(database):
    clock_s = cpu_s = 0.0
    batch = []
    for number, spans in enumerate(traces(TRACES), start=1):
        batch += spans
        if len(batch) >= BATCH_SPANS or number == TRACES:
            begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
            database.add(batch)
            clock_s += time.perf_counter() - begun_s
            cpu_s += time.process_time() - cpu_begun_s
            batch = []
    size = database.counts()["bytes"] / SPANS
    print(f"\nadding {SPANS} spans: {SPANS / clock_s:.0f} a second by the clock")
    print(
        f"{SPANS / cpu_s:.0f} a second of CPU, settling included; {size:.0f} bytes each"
    )


def ask_for_traces(database):
    middle = database.traces(
        Query(END_MS - LOOKBACK_MS // 2, LOOKBACK_MS, limit=ROUNDS)
    )
    ids = iter([spans[0]["traceId"] for spans in middle])
    tell("a trace by id, each another", lambda: database.trace(next(ids)))
    url = middle[0][0]["tags"]["http.url"]
    service, name = "service-3", "service-3:8080/*"
    searches = {
        "all": {},
        "a rare http.url": error("http.url", url),
        "a value that no span has": error("podspan.error", "ECONNRESET"),
        "error": error(),
        "error, limit 1000": error() | {"limit": 1000},
        "a frequent service": {"service": "ingress"},
        "a service, a tag frequent elsewhere": {
            "service": "ingress",
            **error("upstream_cluster", "inbound|8080||"),
        },
        "service, name, 5 to 6 ms": {
            "service": service,
            "span_name": name,
            "min_duration_us": 5000,
            "max_duration_us": 6000,
        },
        "service, name, over 1 s": {
            "service": service,
            "span_name": name,
            "min_duration_us": 1_000_000,
        },
        "service, tag, 5 to 9 ms": {
            "service": service,
            **error("http.status_code", "503"),
            "min_duration_us": 5000,
            "max_duration_us": 9000,
        },
        "5003 us": {"min_duration_us": 5003, "max_duration_us": 5003},
    }
    for what, asked in searches.items():
        query = ask(**asked)
        tell(f"traces: {what}", lambda query=query: database.traces(query))
    tell("summaries: limit 1000", lambda: database.summaries(ask(limit=1000)))


def ask_for_the_rest(database):
    large = max(
        (
            database.traces(Query(FIRST_US // 1000 + at_ms + 20, 20, limit=1))[0]
            for at_ms in range(0, 20 * TRACES, 20 * TRACES // LARGE_TRACES)
        ),
        key=len,
    )
    tell("a large trace", lambda: database.trace(large[0]["traceId"]))
    tell("links: all", lambda: database.links(END_MS, LOOKBACK_MS))
    tell("links: a minute", lambda: database.links(END_MS, 60_000))
    tell("services", database.services)
    tell("tags to choose from", database.tag_keys)
    cursor, _, _ = database.tail(None, 1)
    tell("tail: 1000 spans", lambda: database.tail(cursor - 1000, 1000)[1])


def tell(what, question):
    took_ms = []
    for _ in range(ROUNDS):
        begun_s = time.thread_time()
        answer = question()
        took_ms.append((time.thread_time() - begun_s) * 1000)
    found = f"{len(answer)} found"
    if answer and isinstance(answer[0], list):
        found += f", of {sum(map(len, answer))} spans"
    median_ms, slowest_ms = statistics.median(took_ms), max(took_ms)
    print(f"{what:45} {median_ms:7.1f} ms, at most {slowest_ms:6.1f}; {found}")
