"""The database against brute force over what was put into it."""

import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from podspan.agent.errors import StoreError
from podspan.agent.store.database import Database
from podspan.agent.store.query import Query, matches, start_us

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
    traces = {}
    for span in arrived:
        traces.setdefault(span["traceId"], []).append(span)
    matching = [spans for spans in traces.values() if matches(query, spans)]
    # The latest first; of equals the one that came last.
    matching.reverse()
    return sorted(matching, key=start_us, reverse=True)[: query.limit]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(spans_of_many, min_size=1, max_size=4), st.lists(queries(), max_size=8))
def test_a_search_finds_what_brute_force_finds(tmp_path_factory, batches, asked):
    path = tmp_path_factory.mktemp("store") / "traces.db"
    with opened(path) as database:
        for batch in batches:
            database.add(batch)
        arrived = [span for batch in batches for span in batch]
        for query in asked:
            expected = brute_force(arrived, query)
            assert database.traces(query) == expected
            ids = [summary.trace_id for summary in database.summaries(query)]
            assert ids == [spans[0]["traceId"] for spans in expected]


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


def test_old_traces_expire_by_arrival(tmp_path):
    with opened(tmp_path / "traces.db", max_age_s=0) as database:
        database.add([span()])
        wait_for(lambda: not database.trace(span()["traceId"]))


def wait_for(condition, patience_s=20):
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "traces.db"
    path.write_text("something else\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Database(path, max_age_s=1, max_bytes=GIB)
