"""The database against brute force over what was put into it."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from podspan.agent.errors import StoreError
from podspan.agent.store import ingest, terms
from podspan.agent.store.database import Database
from podspan.agent.store.query import Query, matches, start_us
from podspan.agent.store.summary import ServiceSummary, Summary

DAY_MS = 24 * 3600 * 1000
NOW_US = 1_700_000_000_000_000
GIB = 1 << 30


@contextmanager
def opened(path, *, max_age_s=7 * 86400, max_bytes=GIB):
    database = Database(path, max_age_s=max_age_s, max_bytes=max_bytes)
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def database(tmp_path):
    with opened(tmp_path / "traces.db") as database:
        yield database


def span(trace=1, number=1, service="a", **more):
    return {
        "traceId": f"{trace:016x}",
        "id": f"{number:016x}",
        "timestamp": NOW_US,
        "localEndpoint": {"serviceName": service},
        **more,
    }


def everything(**more):
    return Query(end_ts_ms=NOW_US // 1000 + DAY_MS, lookback_ms=2 * DAY_MS, **more)


def test_a_trace_comes_back_as_it_arrived(database):
    first, late, other = span(1, 1), span(1, 2), span(2, 1)
    database.add([first, other])
    database.add([late])
    assert database.trace(first["traceId"]) == [first, late]
    assert database.many([other["traceId"], "ff" * 8, first["traceId"]]) == [
        [other],
        [first, late],
    ]


@pytest.mark.parametrize("trace_id", ["", "1", "0" * 16, "x" * 16, "0" * 31 + "1"])
def test_an_unknown_trace_is_empty(database, trace_id):
    database.add([span()])
    assert database.trace(trace_id) == []


small = st.integers(1, 3)
names = st.sampled_from(["a", "b", "c"])
tags = st.dictionaries(
    st.sampled_from(["error", "k", "http.path", "ä"]),
    st.sampled_from(["", "true", "/", "12345", "12346", "𝄞"]),
)
times_us = st.integers(0, 5).map(lambda step: NOW_US + step * 500_000)
durations_us = st.sampled_from([1, 31, 32, 63, 64, 65, 1000, 1010, 1020, 2**40])
spans_of_many = st.lists(
    st.fixed_dictionaries(
        {
            "traceId": st.integers(1, 6).map("{:016x}".format),
            "id": st.integers(1, 4).map("{:016x}".format),
        },
        optional={
            "parentId": st.just("00000000000000aa"),
            "name": names,
            "timestamp": times_us,
            "duration": durations_us,
            "localEndpoint": names.map(lambda name: {"serviceName": name}),
            "remoteEndpoint": names.map(lambda name: {"serviceName": name}),
            "annotations": st.lists(
                st.fixed_dictionaries(
                    {"timestamp": times_us, "value": st.sampled_from(["k", "error"])}
                ),
                max_size=2,
            ),
            "tags": tags,
        },
    ),
    min_size=1,
    max_size=12,
)


@st.composite
def queries(draw):
    shortest_us = draw(st.none() | durations_us)
    longest_us = None
    if shortest_us is not None:
        longest_us = draw(st.none() | durations_us.map(lambda us: max(us, shortest_us)))
    anything = st.just("")
    return Query(
        end_ts_ms=NOW_US // 1000 + draw(st.integers(0, 5)) * 500,
        lookback_ms=draw(st.integers(1, 5)) * 500,
        limit=draw(small),
        service=draw(anything | names),
        remote_service=draw(anything | names),
        span_name=draw(anything | names),
        annotation_query=draw(anything.map(lambda _: {}) | tags),
        min_duration_us=shortest_us,
        max_duration_us=longest_us,
    )


def brute_force(arrived, query):
    traces: dict[str, Any] = {}
    for span in arrived:
        traces.setdefault(span["traceId"], []).append(span)
    matching = [spans for spans in traces.values() if matches(query, spans)]
    # The latest first; of equals the one that came last.
    matching.reverse()
    matching.sort(key=lambda spans: start_us(spans) or 0, reverse=True)
    return matching[: query.limit]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(spans_of_many, min_size=1, max_size=4), st.lists(queries(), max_size=8))
def test_a_search_finds_what_brute_force_finds(tmp_path_factory, batches, asked):
    path = tmp_path_factory.mktemp("store") / "traces.db"
    with pytest.MonkeyPatch.context() as patch, opened(path) as database:
        patch.setattr(ingest, "PART_TRACES", 2)
        for batch in batches:
            database.add(batch)
        arrived = [span for batch in batches for span in batch]
        for query in asked:
            expected = brute_force(arrived, query)
            assert database.traces(query) == expected
            ids = [summary.trace_id for summary in database.summaries(query)]
            assert ids == [spans[0]["traceId"] for spans in expected]


def test_the_root_that_arrived_first_says_when_a_trace_started(database):
    for number, later_us in enumerate((5_000_000, 9_000_000, 1_000_000), start=1):
        database.add([span(1, number, timestamp=NOW_US + later_us)])
    assert [len(trace) for trace in database.traces(around(5_000_000))] == [3]
    assert database.traces(around(9_000_000)) == []
    assert database.traces(around(1_000_000)) == []


def around(later_us):
    return Query(end_ts_ms=(NOW_US + later_us) // 1000, lookback_ms=1)


def test_parts_of_the_index_give_one_order(database, monkeypatch):
    monkeypatch.setattr(ingest, "PART_TRACES", 3)
    starts = random.Random(1).sample(range(1000), 20)
    for number, later_us in enumerate(starts, start=1):
        database.add([span(number, 1, timestamp=NOW_US + later_us)])
    found = database.traces(everything(service="a", limit=15))
    expected = sorted(starts, reverse=True)[:15]
    assert [trace[0]["timestamp"] - NOW_US for trace in found] == expected


def test_a_duration_is_found_in_a_trace_of_many_spans(database):
    database.add(
        [
            span(1, number, "ab"[number % 2], duration=1_000_000 + number * 10)
            for number in range(1000, 0, -1)
        ]
    )

    def found(shortest_us, longest_us, service=""):
        return bool(
            database.traces(
                everything(
                    service=service,
                    min_duration_us=shortest_us,
                    max_duration_us=longest_us,
                )
            )
        )

    assert found(1_000_030, 1_000_030)
    assert found(1_000_030, 1_000_030, "b")
    assert not found(1_000_030, 1_000_030, "a")
    assert not found(1_000_031, 1_000_039)
    assert found(1_009_991, None)
    assert found(1_009_991, None, "a")
    assert not found(1_009_991, None, "b")
    assert not found(1_010_001, None)


def test_names_are_offered_sorted(database):
    database.add(
        [
            span(1, 1, "b", name="get", remoteEndpoint={"serviceName": "z"}),
            span(1, 2, "b", name="delete", tags={"error": "true", "k": "2"}),
            span(1, 3, "a", name="put", tags={"k": "1"}),
        ]
    )
    assert database.services() == ["a", "b"]
    assert database.span_names("B") == ["delete", "get"]
    assert database.remote_services("b") == ["z"]
    assert database.remote_services("a") == []
    assert database.tag_keys() == ["error", "k"]
    assert database.tag_values("k") == ["1", "2"]


def test_a_tag_with_too_many_values_is_not_offered(database):
    for first in range(0, 1200, 300):
        database.add(
            [
                span(1, number + 1, tags={"http.url": f"/{number}", "k": "v"})
                for number in range(first, first + 300)
            ]
        )
    assert database.tag_keys() == ["k"]
    assert database.tag_values("http.url") == []


def test_services_beyond_those_offered_are_not_kept_in_memory(database, monkeypatch):
    monkeypatch.setattr("podspan.agent.store.names._has_room.__defaults__", (3,))
    for number in range(1, 10):
        database.add([span(1, number, f"s{number}", name="get")])
    assert database.services() == ["s1", "s2", "s3"]
    assert [database.span_names(f"s{number}") for number in (3, 4)] == [["get"], []]
    assert len(database._names._others) == 1 + 3  # the services, and what they have


def test_tags_beyond_those_offered_are_not_kept_over_and_over(database, monkeypatch):
    monkeypatch.setattr("podspan.agent.store.names.MAX_NAMES", 2)
    monkeypatch.setattr("podspan.agent.store.names._has_room.__defaults__", (2,))
    for number in range(1, 30):
        tags = {key: str(number) for key in ("k", "l", "m")}
        database.add([span(1, number, tags=tags)])
    assert database.tag_keys() == ["m"]  # that k and l have too many is remembered
    assert database.tag_values("m") == ["1", "2"]


def test_long_texts_are_found_and_not_kept_in_memory(database):
    caches = [terms._names, terms._tags, terms._keys, terms._durations]
    before = [cache.cache_info().currsize for cache in caches]
    long = "x" * 2000
    database.add(
        [
            span(
                1,
                number,
                f"{long}{number}",
                name=f"{long}{number}",
                duration=5,
                tags={f"{long}{number}": "v"},
                annotations=[{"timestamp": 1, "value": f"{long}-{number}"}],
            )
            for number in range(1, 100)
        ]
    )
    assert [cache.cache_info().currsize for cache in caches] == before
    wanted = {f"{long}7": "v", f"{long}-7": ""}
    asked = everything(service=f"{long}7", annotation_query=wanted, min_duration_us=5)
    assert len(database.traces(asked)) == 1


def test_a_tail_gives_each_span_once(database):
    database.add([span(1, 1)])
    cursor, spans, skipped = database.tail(None, 10)
    assert (spans, skipped) == ([], 0)
    database.add([span(1, 2), span(2, 3)])
    database.add([span(1, 4)])
    cursor, spans, skipped = database.tail(cursor, 10)
    assert [item["id"] for item in spans] == [f"{n:016x}" for n in (2, 3, 4)]
    assert skipped == 0
    assert database.tail(cursor, 10) == (cursor, [], 0)


def test_a_tail_that_is_behind_skips_and_says_so(database):
    cursor, _, _ = database.tail(None, 10)
    database.add([span(1, number) for number in range(1, 11)])
    cursor, spans, skipped = database.tail(cursor, 3)
    assert [item["id"] for item in spans] == [f"{n:016x}" for n in (8, 9, 10)]
    assert skipped == 7
    assert database.tail(cursor, 3) == (cursor, [], 0)


def call(trace, *, duration_us=100, **more):
    return [
        span(trace, 1, "a", kind="CLIENT"),
        span(trace, 1, "b", kind="SERVER", shared=True, duration=duration_us, **more),
    ]


def edges(database):
    return [
        (edge.parent, edge.child, edge.calls, edge.errors)
        for edge in database.links(NOW_US // 1000 + 1, DAY_MS)
    ]


@pytest.mark.parametrize("exact", [True, False])
def test_a_late_span_does_not_count_a_call_twice(database, monkeypatch, exact):
    if not exact:
        monkeypatch.setattr("podspan.agent.store.settle.EXACT_TRACES", 0)
    client, server = call(1)
    database.add([client])
    database.settle(quiet_s=0)
    database.add([server])
    database.settle(quiet_s=0)
    database.add([{**server, "tags": {"error": ""}}])
    database.settle(quiet_s=0)
    assert edges(database) == [("a", "b", 1, 1)]


def test_links_carry_durations(database):
    for number in range(1, 101):
        database.add(call(number, duration_us=number))
    (edge,) = database.links(NOW_US // 1000 + 1, DAY_MS)
    assert (edge.p50_us, edge.p95_us, edge.p99_us) == (50, 95, 99)


def test_a_window_counts_its_traces_only(database, monkeypatch):
    for number, offset_s in enumerate((0, 30, 3600, 7200), start=1):
        at_us = NOW_US + offset_s * 1_000_000
        database.add([{**half, "timestamp": at_us} for half in call(number)])

    def calls(end_s, lookback_s):
        window = (NOW_US // 1_000_000 + end_s) * 1000, lookback_s * 1000
        return sum(edge.calls for edge in database.links(*window))

    windows = [(0, 1), (29, 60), (30, 60), (30, 1), (7200, 7200), (9000, 9000)]
    assert [calls(*window) for window in windows] == [1, 1, 2, 1, 4, 4]
    # In sums, to the minute.
    database.settle(quiet_s=0)
    monkeypatch.setattr("podspan.agent.store.settle.EXACT_TRACES", 0)
    assert [calls(*window) for window in windows] == [2, 2, 2, 2, 4, 4]
    assert calls(3600, 60) == 1


def test_a_window_of_few_large_traces_is_answered_from_sums(database, monkeypatch):
    monkeypatch.setattr("podspan.agent.store.settle.EXACT_SPANS", 3)
    for number in (1, 2):
        database.add(call(number))
    assert edges(database) == [("a", "b", 1, 0)]  # as many as is read of the unsettled
    database.settle(quiet_s=0)
    assert edges(database) == [("a", "b", 2, 0)]


def test_what_is_read_for_an_answer_is_bounded(database, monkeypatch):
    monkeypatch.setattr("podspan.agent.store.search.MOST_SPANS", 10)
    monkeypatch.setattr("podspan.agent.store.settle.MOST_SPANS", 10)
    for number in range(1, 13):
        database.add([span(1, number)])
    database.add([span(2, number) for number in range(1, 7)])
    database.add([span(3, number, timestamp=NOW_US + 1) for number in range(1, 7)])
    assert len(database.trace(f"{1:016x}")) == 10
    assert [len(trace) for trace in database.traces(everything())] == [6, 6]
    ids = [f"{number:016x}" for number in (3, 1, 2)]
    assert [len(trace) for trace in database.many(ids)] == [6, 10]
    database.settle(quiet_s=0)
    database.add(call(1))  # behind what is read
    database.settle(quiet_s=0)
    assert edges(database) == []
    assert database.counts()["spans"] == 26


def test_a_summary_tells_what_a_list_shows(database):
    client, server = call(1, duration_us=90, tags={"error": "500"})
    client |= {"duration": 100, "name": "get", "tags": {"http.method": "GET", "x": "y"}}
    database.add([server])
    database.add([client])
    assert database.summaries(everything()) == [
        Summary(
            trace_id=client["traceId"],
            start_us=NOW_US,
            duration_us=100,
            spans=2,
            errors=1,
            root_service="a",
            root_name="get",
            root_kind="CLIENT",
            services=(ServiceSummary("a", 1, 0), ServiceSummary("b", 1, 1)),
            tags={"http.method": "GET"},
        )
    ]


def test_the_kept_summary_of_a_large_trace_is_the_one_made(database):
    spans = [span(1, 1)] + [
        span(1, number, "b", parentId=f"{1:016x}", timestamp=NOW_US + number)
        for number in range(2, 1000)
    ]
    database.add(spans)
    made = database.summaries(everything())
    database.settle(quiet_s=0)
    assert database.summaries(everything()) == made
    database.add([span(1, 1000, "c", parentId=f"{1:016x}")])
    assert database.summaries(everything())[0].spans == 1000


def test_callers_of_add_at_the_same_time_all_get_their_spans_stored(database):
    def add(caller):
        for number in range(1, 21):
            database.add([span(caller, number), span(999, caller * 100 + number)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(1, 9)))
    assert [len(database.trace(f"{caller:016x}")) for caller in range(1, 9)] == [20] * 8
    assert len(database.trace(f"{999:016x}")) == 160
    assert database.counts()["spans"] == 320
    assert database.counts()["traces"] == 9


def test_who_reads_while_others_write_sees_whole_traces(tmp_path):
    written = threading.Event()

    def write(database):
        for first in range(1, 1501, 50):
            database.add(
                [
                    span(first + number // 4, number + 1, tags={"k": f"{first:0200}"})
                    for number in range(200)
                ]
            )
        written.set()

    def read(database):
        while True:
            last_round = written.is_set()
            for trace in database.traces(everything(service="a")):
                assert len(trace) == 4
            database.links(NOW_US // 1000 + 1, DAY_MS)
            if last_round:
                return

    path = tmp_path / "traces.db"
    with opened(path, max_bytes=1_500_000) as database, ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(each, database) for each in (write, read, read)]:
            done.result()


def test_a_database_opened_again_is_as_it_was(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add(call(1, tags={"k": "v"}))
        cursor, _, _ = database.tail(None, 10)
        before = database.counts()
    with opened(path) as database:
        assert database.trace(f"{1:016x}") == call(1, tags={"k": "v"})
        assert database.services() == ["a", "b"]
        assert database.tag_values("k") == ["v"]
        assert edges(database) == [("a", "b", 1, 0)]
        for what in ("spans", "traces"):
            assert database.counts()[what] == before[what]
        database.add([span(2, 1)])
        assert database.tail(cursor, 10)[1] == [span(2, 1)]


def test_a_closed_database_refuses(tmp_path):
    with opened(tmp_path / "traces.db") as database:
        pass
    with pytest.raises(StoreError, match="closed"):
        database.add([span()])
    with pytest.raises(StoreError, match="closed"):
        database.services()


def make_older(path, trace_id, seconds):
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "UPDATE traces SET arrived_s = arrived_s - ? WHERE id = ?",
            (seconds, bytes.fromhex(trace_id)),
        )


def test_a_name_goes_with_the_last_trace_that_may_have_it(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add([span(1, 1, "gone", tags={"gone": "1", "k": "old"})])
        database.add([span(2, 1, "here", tags={"k": "new"})])
    make_older(path, f"{1:016x}", 7200)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "UPDATE names SET hour = hour - 2"
            " WHERE 'gone' IN (name, owner) OR name = 'old'"
        )
    with opened(path, max_age_s=3600) as database:
        database.expire()
        assert database.services() == ["here"]
        assert database.tag_keys() == ["k"]
        assert database.tag_values("k") == ["new"]
        database.add([span(3, 1, "gone")])
        assert database.services() == ["gone", "here"]


def test_what_arrived_long_ago_expires(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path, max_age_s=3600) as database:
        database.add([span(1, 1, "gone")])
        database.add([span(2, 1, "here")])
        make_older(path, f"{1:016x}", 3601)
        database.expire()
        assert database.trace(f"{1:016x}") == []
        assert database.trace(f"{2:016x}") == [span(2, 1, "here")]
        assert database.traces(everything()) == [[span(2, 1, "here")]]
        counts = database.counts()
        assert (counts["traces"], counts["expired_traces"]) == (1, 1)
        assert (counts["spans"], counts["expired_spans"]) == (1, 1)


def test_a_clock_that_was_ahead_does_not_keep_traces_for_ever(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path, max_age_s=3600) as database:
        database.add([span(1, 1, "a")])
        database.add([span(2, 1, "b")])
        make_older(path, f"{1:016x}", -365 * 86400)
        make_older(path, f"{2:016x}", 3601)
        database.expire()
        assert database.services() == ["a", "b"]
        make_older(path, f"{1:016x}", 3601)  # an hour after the clock was set
        database.expire()
        assert database.counts()["traces"] == 0


def test_a_clock_that_was_ahead_does_not_keep_links_back(tmp_path, monkeypatch):
    path = tmp_path / "traces.db"
    monkeypatch.setattr("podspan.agent.store.settle.EXACT_TRACES", 0)
    with opened(path) as database:
        database.add(call(1))
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE unsettled SET seen_s = seen_s + 1e6")
        database.settle(quiet_s=5)
        assert edges(database) == [("a", "b", 1, 0)]


def test_services_that_nothing_is_left_of_take_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "PART_TRACES", 2)
    monkeypatch.setattr("podspan.agent.store.retention.MANY_SERVICES", 3)
    path = tmp_path / "traces.db"
    with opened(path, max_age_s=3600) as database:
        for number in range(1, 7):
            client, server = call(number)
            server["localEndpoint"] = {"serviceName": f"s{number}"}
            database.add([client, server])
        database.settle(quiet_s=0)
        for number in range(1, 5):
            make_older(path, f"{number:016x}", 3601)
        database.expire()
        with closing(sqlite3.connect(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM services")}
        assert names == {"a", "s5", "s6"}
        assert edges(database) == [("a", "s5", 1, 0), ("a", "s6", 1, 0)]


def test_a_span_that_comes_after_its_trace_expired_begins_a_new_one(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path, max_age_s=3600) as database:
        database.add([span(1, 1)])
        make_older(path, f"{1:016x}", 3601)
        database.expire()
        database.add([span(1, 2)])
        assert database.traces(everything(service="a")) == [[span(1, 2)]]


def test_the_oldest_traces_leave_room_for_new_ones_whole(tmp_path):
    chance = random.Random(1)
    path = tmp_path / "traces.db"
    with opened(path, max_bytes=3_000_000) as database:
        for first in range(1, 5001, 50):
            database.add(
                [
                    span(first + number // 4, number + 1, tags={"k": noise})
                    for number in range(200)
                    for noise in [chance.randbytes(100).hex()]
                ]
            )
            assert database.counts()["bytes"] <= 3_000_000
        counts = database.counts()
        assert counts["expired_traces"] + counts["traces"] == 5000
        assert counts["traces"] > 1000
        oldest = counts["expired_traces"] + 1
        for number in range(1, 5001):
            kept = len(database.trace(f"{number:016x}"))
            assert kept == (4 if number >= oldest else 0)
        asked = everything(limit=5000, service="a")
        assert len(database.traces(asked)) == counts["traces"]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_housekeeping_outlives_what_it_cannot_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("podspan.agent.store.settle.QUIET_S", 0)
    monkeypatch.setattr("podspan.agent.store.database.REST_S", 0.01)
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add([span(1, 1)])
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE chunks SET payload = 'torn'")
            db.execute("INSERT OR REPLACE INTO unsettled VALUES (1, 1, 0)")
        wait_until(lambda: caplog.records)
        make_older(path, f"{1:016x}", 8 * 86400)
        wait_until(lambda: database.counts()["traces"] == 0)


def wait_until(condition):
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_closing_does_not_wait_until_all_is_expired(tmp_path, monkeypatch):
    monkeypatch.setattr("podspan.agent.store.retention.STEP_SPANS", 1)
    monkeypatch.setattr("podspan.agent.store.database.REST_S", 0.01)
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add([span(number, 1) for number in range(1, 20_001)])
    with opened(path, max_age_s=-1) as database:
        wait_until(lambda: database.counts()["expired_traces"])
    assert database.counts()["traces"] > 0


def test_it_is_for_its_owner_only(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add([span()])
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_counting_does_without_a_file_that_was_removed(tmp_path):
    path = tmp_path / "traces.db"
    with opened(path) as database:
        database.add([span()])
        for file in tmp_path.iterdir():
            file.unlink()
        assert database.counts() == {
            "spans": 1,
            "traces": 1,
            "expired_spans": 0,
            "expired_traces": 0,
            "bytes": 0,
        }


@contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_disk_does_not_take_is_refused_whole_and_later_taken(database):
    noise = random.Random(1)
    spans = [
        span(number, 1, f"s{number}", tags={"k": noise.randbytes(1000).hex()})
        for number in range(1, 1001)
    ]
    database.add([span(9999, 1)])
    with no_file_larger_than(500_000), pytest.raises(StoreError, match="cannot store"):
        database.add(spans)
    assert database.traces(everything()) == [[span(9999, 1)]]
    assert database.services() == ["a"]
    assert database.counts()["spans"] == 1
    database.add(spans)
    assert len(database.services()) == 1000  # as many as are offered
    assert database.counts()["spans"] == 1001


ADDER = """
import sys
import threading
from pathlib import Path
from podspan.agent.store import ingest, terms
from podspan.agent.store.database import Database

database = Database(Path(sys.argv[1]), max_age_s=1e9, max_bytes=1 << 30)
for batch in range(1, 1_000_000):
    database.add(
        [
            {
                "traceId": f"{batch * 10 + number % 10:016x}",
                "id": f"{number:016x}",
                "timestamp": 1_700_000_000_000_000 + batch,
                "tags": {"batch": str(batch)},
            }
            for number in range(1, 101)
        ]
    )
    print(batch, flush=True)
"""


def test_killed_while_it_writes_it_has_what_it_took_and_no_halves(tmp_path):
    path = tmp_path / "traces.db"
    with subprocess.Popen(
        [sys.executable, "-c", ADDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if int(line) >= 30:
                break
        process.send_signal(signal.SIGKILL)
        taken = max([30, *map(int, process.stdout.read().split())])
    with opened(path) as database:
        for batch in range(1, taken + 1):
            for trace in range(10):
                assert len(database.trace(f"{batch * 10 + trace:016x}")) == 10
            asked = everything(annotation_query={"batch": str(batch)}, limit=20)
            assert len(database.traces(asked)) == 10
        # Perhaps one that it had no time to tell of.
        assert database.counts()["spans"] in (taken * 100, taken * 100 + 100)
        database.add([span()])
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def open_only(path):
    Database(path, max_age_s=1, max_bytes=GIB).close()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "traces.db"
    path.write_text("something else\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_only(path)
    assert path.read_text().startswith("something else")


def test_another_programs_database_is_refused(tmp_path):
    path = tmp_path / "traces.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        open_only(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path):
    path = tmp_path / "traces.db"
    open_only(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer podspan"):
        open_only(path)


def test_a_missing_folder_is_told_of(tmp_path):
    with pytest.raises(StoreError, match="cannot open") as raised:
        open_only(tmp_path / "nowhere" / "traces.db")
    assert "folder" in raised.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_told_of(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot open"):
        open_only(tmp_path / "traces.db")


@pytest.mark.parametrize(
    "more",
    [
        {"end_ts_ms": 10**30, "lookback_ms": 10**30},
        {"min_duration_us": 10**30},
        {"min_duration_us": 1, "max_duration_us": 10**30},
        {"limit": 10**30},
        {"annotation_query": {f'" OR {number}': "\0*" for number in range(100)}},
        {"service": "' AND \"", "span_name": "NEAR(a b)", "remote_service": "*"},
    ],
)
def test_odd_questions_are_answered(database, more):
    database.add([span(duration=5)])
    window = {"end_ts_ms": NOW_US // 1000, "lookback_ms": DAY_MS}
    query = Query(**{**window, **more})
    assert database.traces(query) == (
        [[span(duration=5)]] if matches(query, [span(duration=5)]) else []
    )


def test_odd_spans_are_stored(database):
    odd = {
        "traceId": "f" * 32,
        "id": "f" * 16,
        "timestamp": 2**63 - 1,
        "duration": 2**63 - 1,
        "name": "\0",
        "tags": {"": "", "\0": "'\"", "k" * 100_000: "v" * 100_000},
    }
    database.add([odd, odd])
    assert database.trace("f" * 32) == [odd, odd]
    query = Query(2**60, 2**60, span_name="\0", min_duration_us=2**63 - 1)
    assert database.traces(query) == [[odd, odd]]
    database.settle(quiet_s=0)
    assert database.summaries(query)[0].duration_us == 2**63 - 1
