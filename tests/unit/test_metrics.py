"""The agent's metrics, read by Prometheus' own parser."""

import json

import pytest
from podspan.agent.metrics import PodStatus, Snapshot, to_json, to_prometheus
from prometheus_client.parser import text_string_to_metric_families

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
        "exporters": {"zipkin": {"sent": 16, "dropped": 3, "queued": 5}},
        "redirect": {"redirect_connections_open": 2, "redirect_requests_injected": 9},
    }
    return Snapshot(**{**facts, **changes})


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_that_a_snapshot_says_is_a_sample():
    assert samples(to_prometheus(snapshot())) == {
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
        ("podspan_export_waiting", ("exporter", "zipkin")): 5,
        ("podspan_redirect_total", ("what", "requests_injected")): 9,
        ("podspan_redirect", ("what", "connections_open")): 2,
    }


def test_each_family_has_its_kind():
    text = to_prometheus(snapshot())
    kinds = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert kinds["podspan_losses"] == "counter"
    assert kinds["podspan_pod_engine"] == "gauge"
    assert set(kinds.values()) == {"counter", "gauge"}
    assert text.endswith("\n")


@pytest.mark.parametrize("field", ["version", "kernel", "engine", "engine_reason"])
def test_any_text_can_be_a_label(field):
    found = samples(to_prometheus(snapshot(**{field: NASTY})))
    values = {value for _, *labels in found for _, value in labels}
    assert NASTY in values
    assert len(found) == len(samples(to_prometheus(snapshot())))


def test_json_says_all_fields():
    said = json.loads(to_json(snapshot()))
    assert set(said) == set(Snapshot.__dataclass_fields__)
    assert said["pods"][0]["name"] == "cart-0"
    assert said["losses"] == {"ring_full": 0, "zipkin_dropped": 3}
