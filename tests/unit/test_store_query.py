"""What a search asks for, by Zipkin's rules; and the words that stand for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.store.logscale import MAX_VALUE, SUBS, bucket_of, middle_of
from podspan.agent.store.query import Query, matches, parse_annotation_query, start_us
from podspan.agent.store.terms import alternatives, text_of, words_of

AT_MS = 1_700_000_000_000
AT_US = AT_MS * 1000


def span(service="a", **more):
    return {
        "traceId": "1" * 16,
        "id": "2" * 16,
        "timestamp": AT_US,
        "localEndpoint": {"serviceName": service},
        **more,
    }


def query(end_ts_ms=AT_MS, lookback_ms=1000, **more):
    return Query(end_ts_ms, lookback_ms, **more)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("error", {"error": ""}),
        ("http.method=GET", {"http.method": "GET"}),
        (" a = 1 and b ", {"a": "1", "b": ""}),
        ("a=1 and a=2", {"a": "2"}),
        ("a=1 and a", {"a": "1"}),
        ("q=x=y", {"q": "x=y"}),
        ("a=", {"a": ""}),
        ("land=sea and sand", {"land": "sea", "sand": ""}),
        ("=1 and  and b", {"b": ""}),
    ],
)
def test_an_annotation_query_is_read_as_zipkin_reads_it(text, wanted):
    assert parse_annotation_query(text) == wanted


def test_an_annotation_query_has_a_hundred_parts_at_most():
    assert len(parse_annotation_query(" and ".join(map(str, range(200))))) == 100


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"end_ts_ms": 0}, "endTs <= 0"),
        ({"lookback_ms": 0}, "lookback <= 0"),
        ({"limit": 0}, "limit <= 0"),
        ({"min_duration_us": 0}, "minDuration <= 0"),
        ({"max_duration_us": 5}, "maxDuration is only valid with minDuration"),
        ({"min_duration_us": 6, "max_duration_us": 5}, "maxDuration < minDuration"),
    ],
)
def test_what_zipkin_refuses_is_refused(more, reason):
    with pytest.raises(ValueError, match=reason):
        query(**more)


def test_names_are_asked_for_in_lower_case():
    asked = query(service="A", remote_service="B", span_name="GET")
    assert (asked.service, asked.remote_service, asked.span_name) == ("a", "b", "get")


def test_the_span_name_all_is_any():
    assert query(span_name="all") == query()


@pytest.mark.parametrize(
    ("spans", "started_us"),
    [
        ([], None),
        ([{"parentId": "1"}], None),
        ([{"timestamp": 5, "parentId": "1"}, {"timestamp": 3, "parentId": "1"}], 3),
        ([{"timestamp": 3, "parentId": "1"}, {"timestamp": 5}], 5),
        ([{"timestamp": 6}, {"timestamp": 5}], 6),
        ([{}, {"timestamp": 5, "parentId": "1"}], 5),
    ],
)
def test_a_trace_starts_with_its_root_or_its_earliest_span(spans, started_us):
    assert start_us(spans) == started_us


@pytest.mark.parametrize(
    ("at_us", "found"),
    [
        (AT_US - 1_000_001, False),
        (AT_US - 1_000_000, True),
        (AT_US, True),
        (AT_US + 1, False),
    ],
)
def test_the_window_includes_both_of_its_ends(at_us, found):
    assert matches(query(), [span(timestamp=at_us)]) is found


TAGGED = span("a", tags={"error": "true"}, name="get", duration=100)
CALLER = span(
    "b",
    parentId="3" * 16,
    remoteEndpoint={"serviceName": "c"},
    annotations=[{"timestamp": AT_US, "value": "retry"}],
)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({}, True),
        ({"service": "a"}, True),
        ({"service": "c"}, False),
        ({"remote_service": "c"}, True),
        ({"remote_service": "a"}, False),
        ({"span_name": "get"}, True),
        ({"span_name": "put"}, False),
        ({"annotation_query": {"error": ""}}, True),
        ({"annotation_query": {"error": "true"}}, True),
        ({"annotation_query": {"error": "false"}}, False),
        ({"annotation_query": {"retry": ""}}, True),
        ({"annotation_query": {"retry": "retry"}}, False),
        ({"annotation_query": {"true": ""}}, False),
        ({"min_duration_us": 100}, True),
        ({"min_duration_us": 101}, False),
        ({"min_duration_us": 50, "max_duration_us": 99}, False),
        # All of one service, not all of one span.
        ({"remote_service": "c", "span_name": "get"}, True),
        ({"service": "a", "span_name": "get", "annotation_query": {"error": ""}}, True),
        ({"service": "b", "annotation_query": {"error": ""}}, False),
        ({"service": "a", "annotation_query": {"retry": ""}}, False),
        ({"service": "a", "remote_service": "c"}, False),
        ({"service": "b", "span_name": "get"}, False),
        ({"service": "b", "min_duration_us": 1}, False),
    ],
)
def test_each_condition_is_met_by_some_span_of_the_service(more, found):
    assert matches(query(**more), [TAGGED, CALLER]) is found
    assert matches(query(**more), [CALLER, TAGGED]) is found


texts = st.sampled_from(["a", "b", "GET", "404", "4040", "٣٣٣٣", ""]) | st.text()
durations_us = st.integers(1, 200) | st.integers(1, MAX_VALUE)


@given(
    st.builds(
        span,
        texts,
        remoteEndpoint=st.builds(dict, serviceName=texts),
        name=texts,
        tags=st.dictionaries(texts, texts),
        duration=durations_us,
    ),
    st.data(),
)
def test_what_matches_has_the_words(of_span, data):
    tags = of_span["tags"]
    keys = data.draw(st.sets(st.sampled_from(sorted(tags)))) if tags else ()
    shortest_us = data.draw(st.none() | st.integers(1, of_span["duration"]))
    longest_us = data.draw(st.none() | st.integers(of_span["duration"], 2 * MAX_VALUE))
    of_service = data.draw(st.booleans())
    asked = query(
        service=of_span["localEndpoint"]["serviceName"] if of_service else "",
        annotation_query={
            key: data.draw(st.sampled_from(["", tags[key]])) for key in keys
        },
        min_duration_us=shortest_us,
        max_duration_us=longest_us if shortest_us else None,
    )
    if matches(asked, [of_span]):
        words = words_of([of_span])
        assert all(words & set(several) for several in alternatives(asked))


def test_a_word_is_eight_hex_digits():
    assert len(text_of([0, 1, 2**32 - 1]).split()) == 3
    assert all(len(word) == 8 for word in text_of([0, 1, 2**32 - 1]).split())


def test_no_duration_needs_more_words_than_a_search_can_have():
    asked = query(min_duration_us=33, max_duration_us=MAX_VALUE - 1)
    (words,) = alternatives(asked)
    assert len(words) < 4 * SUBS


@given(durations_us, durations_us)
def test_buckets_keep_the_order(one, other):
    low, high = sorted((one, other))
    assert bucket_of(low) <= bucket_of(high)


@given(durations_us)
def test_the_middle_of_a_bucket_is_near(value):
    middle = middle_of(bucket_of(value))
    assert bucket_of(middle) == bucket_of(value)
    assert abs(middle - value) * 2 * SUBS <= value
