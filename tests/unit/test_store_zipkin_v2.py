"""Zipkin's formats: what is normalised, what is refused, and how pieces are merged.

Statuses and values were compared with those of Zipkin 3.6.1's server.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from podspan.agent.store import zipkin_proto
from podspan.agent.store.zipkin_v2 import (
    MalformedSpans,
    merge,
    parse_json,
    parse_proto3,
    trace_id_of,
)

EXAMPLES = sorted((Path(__file__).parent / "data/zipkin").glob("*.json"))
FUZZ = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

IDS = {"traceId": "000000000000000a", "id": "000000000000000b"}


def parsed(**more):
    """Return what is left of a span's fields beside its ids."""
    span: Any
    [span] = parse_json(json.dumps([{"traceId": "a", "id": "b", **more}]).encode())
    assert {name: span.pop(name) for name in IDS} == IDS
    return span


def refusal(body):
    with pytest.raises(MalformedSpans) as caught:
        parse_json(body if isinstance(body, bytes) else json.dumps(body).encode())
    return str(caught.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_zipkins_examples_come_out_as_they_went_in(example):
    body = example.read_bytes()
    assert parse_json(body) == json.loads(body)


NORMALISED = {
    "names are lower case": ({"name": "GET /Ä"}, {"name": "get /ä"}),
    "an empty name is none": ({"name": ""}, {}),
    "null is nothing": (dict.fromkeys(("name", "kind", "tags", "debug")), {}),
    "unknown fields are left out": ({"color": [{"x": 1}]}, {}),
    "a short parent is padded": ({"parentId": "1f"}, {"parentId": "0" * 14 + "1f"}),
    "a zero parent is none": ({"parentId": "0000"}, {}),
    "its own parent is none": ({"parentId": "b"}, {}),
    "times may be texts": ({"timestamp": "12"}, {"timestamp": 12}),
    "whole floats are integers": ({"duration": 1.5e3}, {"duration": 1500}),
    "times before 1970 are none": ({"timestamp": -1, "duration": 0}, {}),
    "false is nothing": ({"debug": False, "shared": False}, {}),
    "a client is not shared": (
        {"kind": "CLIENT", "shared": True},
        {"kind": "CLIENT"},
    ),
    "an empty endpoint is none": (
        {"localEndpoint": {}, "remoteEndpoint": {"serviceName": "", "ipv4": "here"}},
        {},
    ),
    "services are lower case": (
        {"localEndpoint": {"serviceName": "Shop", "port": "80"}},
        {"localEndpoint": {"serviceName": "shop", "port": 80}},
    ),
    "an address's family is what it looks like": (
        {"localEndpoint": {"ipv4": "2001:DB8::C001"}},
        {"localEndpoint": {"ipv6": "2001:db8::c001"}},
    ),
    "a mapped address is IPv4": (
        {"localEndpoint": {"ipv6": "::ffff:1.2.3.4"}},
        {"localEndpoint": {"ipv4": "1.2.3.4"}},
    ),
    "a scope is no address": ({"localEndpoint": {"ipv6": "fe80::1%eth0"}}, {}),
    "a port of nobody is none": ({"localEndpoint": {"port": -1}}, {}),
    "numbers become texts": (
        {"tags": {"a": 5, "b": 1.5}},
        {"tags": {"a": "5", "b": "1.5"}},
    ),
    "no tags are none": ({"tags": {}, "annotations": []}, {}),
    "annotations are sorted, each once": (
        {
            "annotations": [
                {"timestamp": 2, "value": "b"},
                {"timestamp": 1, "value": "z", "endpoint": {}},
                {"timestamp": 2, "value": "b"},
            ]
        },
        {
            "annotations": [
                {"timestamp": 1, "value": "z"},
                {"timestamp": 2, "value": "b"},
            ]
        },
    ),
}


@pytest.mark.parametrize(("sent", "kept"), NORMALISED.values(), ids=NORMALISED)
def test_what_is_normalised(sent, kept):
    assert parsed(**sent) == kept


def test_tags_are_sorted_by_key():
    assert list(parsed(tags={"b": "2", "a": "1"})["tags"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a", "000000000000000a"),
        ("463ac35c9f6413ad48485a3953bb6124", "463ac35c9f6413ad48485a3953bb6124"),
        ("000000000000000048485a3953bb6124", "48485a3953bb6124"),
        ("63ac35c9f6413ad48485a3953bb6124", "063ac35c9f6413ad48485a3953bb6124"),
    ],
)
def test_trace_ids_have_16_or_32_digits(sent, kept):
    assert trace_id_of(sent) == kept


BAD_VALUES: dict[str, list[Any]] = {
    "traceId": ["", "A", "0", "a" * 33, "0x1", True, [], "٣"],
    "id": ["", "0" * 16, "a" * 17, "g"],
    "parentId": ["", "a" * 17, "-1", 1.5, {}],
    "kind": ["client", "", 1, []],
    "name": [True, [], {}],
    "timestamp": [1.5, True, "x", 2**63, 1e300, "1" * 20, [], "\uff11"],
    "duration": [0.5, {}],
    "localEndpoint": [[], "x", {"port": 65536}, {"port": 1.5}, {"ipv4": []}],
    "annotations": [{}, [1], [{}], [{"timestamp": 1}], [{"value": "x"}]],
    "tags": [[], "x", {"a": None}, {"a": True}, {"a": {}}, {"a": []}],
    "debug": ["true", 1],
    "shared": ["true", 0],
}
REFUSED: dict[str, Any] = {
    "an object": {},
    "null": None,
    "a list of numbers": [1],
    "a list of null": [None],
    "no ids": [{}],
    "no trace id": [{"id": "1"}],
    "no id": [{"traceId": "1"}],
    **{
        f"{field} {value!r}": [{"traceId": "a", "id": "b", field: value}]
        for field, values in BAD_VALUES.items()
        for value in values
    },
}


@pytest.mark.parametrize("message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(message):
    assert refusal(message)


def test_a_refusal_says_which_span():
    assert "span 2 of the list" in refusal([IDS, IDS, {"id": "1"}])


def test_version_1_is_named():
    assert "JSON_V1" in refusal([{**IDS, "binaryAnnotations": []}])


NOT_JSON = {
    "nothing": b"",
    "cut short": b'[{"traceId":"1","id":"1"}',
    "bytes after it": b"[] x",
    "two lists": b"[][]",
    "NaN": b'[{"traceId":"1","id":"1","timestamp":NaN}]',
    "infinity": b'[{"traceId":"1","id":"1","timestamp":-Infinity}]',
    "a comment": b"[/**/]",
    "single quotes": b"[{'traceId':'1','id':'1'}]",
    "a comma too many": b'[{"traceId":"1","id":"1"},]',
    "a byte order mark": b"\xef\xbb\xbf[]",
    "a lone surrogate": b'[{"traceId":"1","id":"1","name":"\\ud800"}]',
    "a surrogate in UTF-8": b'[{"traceId":"1","id":"1","name":"\xed\xa0\x80"}]',
    "invalid UTF-8": b'[{"traceId":"1","id":"1","name":"\xff"}]',
    "a NUL": b'[{"traceId":"1","id":"1","name":"\0"}]',
    "a line break in a text": b'[{"traceId":"1","id":"1","name":"\n"}]',
    "nested without end": b"[" * 1_000_000,
    "nested deeply": b'[{"traceId":"1","id":"1","x":'
    + b"[" * 5000
    + b"]" * 5000
    + b"}]",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_refused(body):
    assert "Malformed JSON" in refusal(body)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
endpoints = st.fixed_dictionaries(
    {},
    optional={
        "serviceName": st.text() | json_values,
        "ipv4": st.ip_addresses().map(str) | st.text() | json_values,
        "ipv6": st.ip_addresses().map(str)
        | st.text("0123456789abcdef:.%")
        | json_values,
        "port": st.integers(-1, 70000) | json_values,
    },
)
hex_ids = st.text("0123456789abcdef", min_size=1, max_size=33) | json_values
loose_spans = st.fixed_dictionaries(
    {"traceId": hex_ids, "id": hex_ids},
    optional={
        "parentId": hex_ids,
        "kind": st.sampled_from(["CLIENT", "SERVER"]) | json_values,
        "name": st.text() | json_values,
        "timestamp": st.integers() | json_values,
        "duration": st.floats(allow_nan=False) | json_values,
        "localEndpoint": endpoints | json_values,
        "remoteEndpoint": endpoints | json_values,
        "annotations": st.lists(
            st.fixed_dictionaries({"timestamp": json_values, "value": st.text()})
        )
        | json_values,
        "tags": st.dictionaries(st.text(), st.text() | json_values) | json_values,
        "debug": st.booleans() | json_values,
        "shared": st.booleans() | json_values,
    },
)


@FUZZ
@given(st.lists(loose_spans | json_values, max_size=3) | json_values)
def test_whatever_json_is_refused_or_normalised_once_and_for_all(value):
    try:
        spans = parse_json(json.dumps(value).encode())
    except MalformedSpans:
        return
    assert parse_json(json.dumps(spans).encode()) == spans


@FUZZ
@given(st.binary())
def test_whatever_bytes_are_refused_or_read(body):
    for parse in (parse_json, parse_proto3):
        with suppress(MalformedSpans):
            parse(body)


def proto_message(*spans):
    message: Any = zipkin_proto._LIST_OF_SPANS()
    for fields in spans:
        message.spans.add(**fields)
    return message.SerializeToString()


def test_protobuf_is_read_as_json_is():
    body = proto_message(
        {
            "trace_id": bytes.fromhex("0102030405060708090a0b0c0d0e0f10"),
            "parent_id": bytes.fromhex("00000000000000a0"),
            "id": bytes.fromhex("00000000000000a1"),
            "kind": 1,
            "name": "GET",
            "timestamp": 1556604172355737,
            "duration": 1431,
            "local_endpoint": {
                "service_name": "Frontend",
                "ipv4": bytes([192, 168, 99, 1]),
                "port": 3306,
            },
            "remote_endpoint": {"ipv6": bytes.fromhex("20010db8" + "0" * 20 + "c001")},
            "annotations": [{"timestamp": 1, "value": "ws"}, {"timestamp": 0}],
            "tags": [{"key": "a", "value": "1"}, {"key": "empty"}, {"value": "no key"}],
            "debug": True,
        }
    )
    assert parse_proto3(body) == [
        {
            "traceId": "0102030405060708090a0b0c0d0e0f10",
            "parentId": "00000000000000a0",
            "id": "00000000000000a1",
            "kind": "CLIENT",
            "name": "get",
            "timestamp": 1556604172355737,
            "duration": 1431,
            "localEndpoint": {
                "serviceName": "frontend",
                "ipv4": "192.168.99.1",
                "port": 3306,
            },
            "remoteEndpoint": {"ipv6": "2001:db8::c001"},
            "annotations": [{"timestamp": 1, "value": "ws"}],
            "tags": {"a": "1", "empty": ""},
            "debug": True,
        }
    ]


def test_the_bytes_on_the_wire_are_those_of_zipkin_proto():
    span = b"\x0a\x08" + bytes(7) + b"\x0a" + b"\x1a\x08" + bytes(7) + b"\x0b"
    span += b"\x20\x02\x31\x7b" + bytes(7) + b"\x38\x04\x68\x01"
    assert parse_proto3(b"\x0a" + bytes([len(span)]) + span) == [
        {**IDS, "kind": "SERVER", "timestamp": 123, "duration": 4, "shared": True}
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"\n\x05\xff\xff",
        b"[]",
        proto_message({}),
        proto_message({"trace_id": b"\1", "id": bytes(8)}),
        proto_message({"trace_id": b"\1" * 17, "id": b"\1"}),
        proto_message({"trace_id": b"\1", "id": b"\1", "timestamp": 2**64 - 1}),
    ],
)
def test_what_protobuf_is_refused(body):
    with pytest.raises(MalformedSpans):
        parse_proto3(body)


def test_no_protobuf_is_no_spans():
    assert parse_proto3(b"") == []


def at(service, **more):
    return {"serviceName": service, **more}


def piece(number, **more) -> Any:
    return {"traceId": "0" * 15 + "a", "id": f"{number:016x}", **more}


def test_pieces_of_a_span_become_one():
    merged = merge(
        [
            piece(1, duration=5, tags={"b": "2"}, localEndpoint=at("web", port=80)),
            piece(2),
            piece(
                1,
                name="get",
                tags={"a": "1"},
                annotations=[{"timestamp": 1, "value": "x"}],
            ),
        ]
    )
    assert merged == [
        piece(
            1,
            name="get",
            duration=5,
            localEndpoint=at("web", port=80),
            annotations=[{"timestamp": 1, "value": "x"}],
            tags={"a": "1", "b": "2"},
        ),
        piece(2),
    ]


def test_the_same_id_at_other_endpoints_is_another_span():
    spans = [
        piece(1, localEndpoint=at("a")),
        piece(1, localEndpoint=at("b")),
        piece(1, localEndpoint=at("b", port=1)),
        piece(1, localEndpoint=at("b", port=2)),
    ]
    assert merge(spans) == [
        spans[0],
        piece(1, localEndpoint=at("b", port=1)),
        spans[3],
    ]


def test_a_server_shares_its_clients_id_and_parent():
    client = piece(2, parentId=f"{1:016x}", kind="CLIENT", localEndpoint=at("a"))
    server = piece(2, kind="SERVER", localEndpoint=at("b"))
    expected = {**server, "parentId": f"{1:016x}", "shared": True}
    assert merge([server, client]) == [client, expected]
    assert merge([server | {"shared": True}, client]) == [client, expected]


def test_the_longest_trace_id_is_everyones():
    long = "b" * 16 + piece(1)["traceId"]
    merged = merge([piece(1), piece(2) | {"traceId": long}])
    assert [span["traceId"] for span in merged] == [long, long]


def test_merging_changes_none_of_its_spans():
    spans = [
        piece(1, kind="CLIENT", tags={"a": "1"}, localEndpoint=at("a")),
        piece(1, kind="SERVER", localEndpoint=at("b")),
        piece(1, kind="CLIENT", tags={"b": "1"}),
    ]
    before = json.dumps(spans)
    merge(spans)
    assert json.dumps(spans) == before


@FUZZ
@given(st.lists(loose_spans, max_size=4).map(json.dumps))
def test_merging_loses_no_tag_and_no_annotation(text):
    spans: Any
    try:
        spans = [{**span, **IDS} for span in parse_json(text.encode())]
    except MalformedSpans:
        return
    merged = merge(spans)
    assert len(merged) <= len(spans)
    assert contents(merged) == contents(spans)


def contents(spans):
    tags = {key for span in spans for key in span.get("tags", ())}
    notes = [note for span in spans for note in span.get("annotations", ())]
    return tags, {(note["timestamp"], note["value"]) for note in notes}


def test_a_span_in_very_many_pieces_is_merged_in_one_go():
    """In pairs it would take a minute."""
    started_s = time.monotonic()
    [merged] = merge([piece(1, tags={str(n): ""}) for n in range(20_000)])
    assert len(merged["tags"]) == 20_000
    print(f"{time.monotonic() - started_s:.3f} s")
