"""The agent's metrics, read by Prometheus' own parsers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.metrics import (
    COUNTER,
    HISTOGRAM,
    Distribution,
    Exemplar,
    Family,
    Format,
    PodStatus,
    Sample,
    Snapshot,
    agent_families,
    exposition,
    label_text,
    negotiated,
    to_json,
)
from prometheus_client import openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

PARSERS = {
    Format.TEXT: text_string_to_metric_families,
    Format.OPENMETRICS: openmetrics_parser.text_string_to_metric_families,
}

NASTY = 'a "quoted" back\\slash,\nnew}line \\n é \ud800'


def snapshot(**changes):
    facts = {
        "version": "1.2",
        "kernel": "6.1.0",
        "pid": 7,
        "started_s": 1700000000.5,
        "updated_s": 12.0,
        "engine": "kernel",
        "engine_reason": "self-test passed",
        "selftest": "",
        "exchanges": 23,
        "spans": 19,
        "pods": (
            PodStatus(4026532001, "shop", "cart-0", "kernel", "self-test passed"),
            PodStatus(4026532002, "", "cni-1", "off", "--engine off"),
        ),
        "losses": {"ring_full": 0, "zipkin_dropped": 3},
        "exporters": {
            "zipkin": {
                "sent": 16,
                "dropped": 3,
                "queued": 5,
                "spooled": 4,
                "spool_spans": 2,
                "spool_bytes": 911,
            }
        },
        "redirect": {"redirect_connections_open": 2, "redirect_requests_injected": 9},
    }
    return Snapshot(**{**facts, **changes})


def parsed(text, form=Format.TEXT):
    return list(PARSERS[form](text))


def samples(text, form=Format.TEXT):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parsed(text, form)
        for sample in family.samples
    }


def told(form=Format.TEXT, **changes):
    return "".join(exposition(agent_families(snapshot(**changes)), form))


@pytest.mark.parametrize("form", Format)
def test_everything_that_a_snapshot_says_is_a_sample(form):
    assert samples(told(form), form) == {
        ("podspan_build_info", ("kernel", "6.1.0"), ("version", "1.2")): 1,
        ("podspan_start_time_seconds",): 1700000000.5,
        (
            "podspan_engine_info",
            ("engine", "kernel"),
            ("reason", "self-test passed"),
        ): 1,
        (
            "podspan_pod_engine",
            ("engine", "kernel"),
            ("namespace", "shop"),
            ("netns", "4026532001"),
            ("pod", "cart-0"),
            ("reason", "self-test passed"),
        ): 1,
        (
            "podspan_pod_engine",
            ("engine", "off"),
            ("namespace", ""),
            ("netns", "4026532002"),
            ("pod", "cni-1"),
            ("reason", "--engine off"),
        ): 1,
        ("podspan_losses_total", ("reason", "ring_full")): 0,
        ("podspan_losses_total", ("reason", "zipkin_dropped")): 3,
        ("podspan_exchanges_total",): 23,
        ("podspan_spans_total",): 19,
        ("podspan_export_total", ("exporter", "zipkin"), ("what", "sent")): 16,
        ("podspan_export_total", ("exporter", "zipkin"), ("what", "dropped")): 3,
        ("podspan_export_total", ("exporter", "zipkin"), ("what", "spooled")): 4,
        ("podspan_export_waiting", ("exporter", "zipkin")): 5,
        ("podspan_export_spool_spans", ("exporter", "zipkin")): 2,
        ("podspan_export_spool_bytes", ("exporter", "zipkin")): 911,
        ("podspan_redirect_total", ("what", "requests_injected")): 9,
        ("podspan_redirect_now", ("what", "connections_open")): 2,
    }


@pytest.mark.parametrize("form", Format)
def test_each_family_has_its_kind(form):
    text = told(form)
    kinds = {family.name: family.type for family in parsed(text, form)}
    assert kinds["podspan_losses"] == "counter"
    assert kinds["podspan_pod_engine"] == "gauge"
    assert set(kinds.values()) == {"counter", "gauge"}
    assert text.endswith("# EOF\n" if form is Format.OPENMETRICS else "\n")


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("field", ["version", "kernel", "engine", "engine_reason"])
def test_any_text_can_be_a_label(field, form):
    found = samples(told(form, **{field: NASTY}), form)
    values = {value for _, *labels in found for _, value in labels}
    assert NASTY in values
    assert len(found) == len(samples(told(form), form))


BOUNDS = (0.5, 1, 300_000, 1_800_000)
HELLO = Exemplar("463ac35c9f6413ad48485a3953bb6124", 0.75, 1700000000.125)
TIMES = Family(
    "times_ms",
    HISTOGRAM,
    "Times.",
    [
        Distribution(label_text({"who": "a"}), (1, 2, 0, 0, 3), 99.5, {1: HELLO}),
        Distribution("", (0, 0, 0, 0, 0), 0, {}),
    ],
    BOUNDS,
)
CALLS = Family("calls", COUNTER, "Calls.", [Sample("", 7, HELLO._replace(value=1))])


def les(text, form):
    [family, _] = parsed(text, form)
    return [
        (one.labels["le"], one.value)
        for one in family.samples
        if one.name == "times_ms_bucket" and one.labels.get("who") == "a"
    ]


def test_buckets_are_cumulative_and_named_as_each_format_has_it():
    text = "".join(exposition([TIMES, CALLS], Format.TEXT))
    assert les(text, Format.TEXT) == [
        ("0.5", 1), ("1", 3), ("300000", 3), ("1800000", 3), ("+Inf", 6),
    ]  # fmt: skip
    text = "".join(exposition([TIMES, CALLS], Format.OPENMETRICS))
    assert les(text, Format.OPENMETRICS) == [
        ("0.5", 1), ("1.0", 3), ("300000.0", 3), ("1.8e+06", 3), ("+Inf", 6),
    ]  # fmt: skip


@pytest.mark.parametrize("form", Format)
def test_a_histogram_has_its_sum_and_its_count(form):
    found = samples("".join(exposition([TIMES, CALLS], form)), form)
    assert found[("times_ms_sum", ("who", "a"))] == 99.5
    assert found[("times_ms_count", ("who", "a"))] == 6
    assert found[("times_ms_count",)] == 0


def test_exemplars_are_in_openmetrics_only():
    text = "".join(exposition([TIMES, CALLS], Format.TEXT))
    assert HELLO.trace_id not in text
    text = "".join(exposition([TIMES, CALLS], Format.OPENMETRICS))
    found = {
        (one.name, one.labels.get("le")): one.exemplar
        for family in parsed(text, Format.OPENMETRICS)
        for one in family.samples
        if one.exemplar
    }
    assert set(found) == {("times_ms_bucket", "1.0"), ("calls_total", None)}
    in_bucket = found["times_ms_bucket", "1.0"]
    assert in_bucket.labels == {"trace_id": HELLO.trace_id}
    assert (in_bucket.value, float(in_bucket.timestamp)) == (HELLO.value, HELLO.at_s)


def test_the_content_type_is_that_of_the_formats_own_library():
    assert Format.OPENMETRICS.value == openmetrics.exposition.CONTENT_TYPE_LATEST


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
    "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;"
    "escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        ("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", Format.TEXT),
        (PROMETHEUS_2, Format.OPENMETRICS),
        (PROMETHEUS_3, Format.OPENMETRICS),
        ("Application/OpenMetrics-Text ; Version=1.0.0", Format.OPENMETRICS),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=2.0.0", Format.TEXT),
        ("application/openmetrics-text;version=0.0.1", Format.TEXT),
        ("application/openmetrics-text;q=0", Format.TEXT),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.4", Format.TEXT),
        ("text/plain, application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;q=nonsense", Format.TEXT),
    ],
)
def test_what_is_preferred_is_what_is_told(accept, form):
    assert negotiated(accept) is form


@given(st.text())
def test_no_accept_header_harms(accept):
    assert negotiated(accept) in Format


def test_json_says_all_fields():
    said = json.loads(to_json(snapshot()))
    assert set(said) == set(Snapshot.__dataclass_fields__)
    assert said["pods"][0]["name"] == "cart-0"
    assert said["losses"] == {"ring_full": 0, "zipkin_dropped": 3}
