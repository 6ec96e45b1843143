"""OTLP in its binary encoding.

The library writes all parts of a message; this module puts them together, for a
message's parts may be written one by one: parsers merge what comes one after the
other (https://protobuf.dev/programming-guides/encoding/#last-one-wins). So the
attributes that spans have in common are written once, and no tree of objects is
built: half the time, and a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import (
    InstrumentationScope,
)
from opentelemetry.proto.trace.v1 import trace_pb2
from podspan.agent import version
from podspan.agent.export.otlp import (
    CACHED_ATTRIBUTES,
    ERROR_TAG,
    INTEGERS,
    KINDS,
    SCOPE,
    STATUS_ERROR,
    VARYING,
    Resource,
    attributes_of,
    ids_of,
    integer,
)
from podspan.agent.span import Span

_LENGTH_DELIMITED = 2  # the wire type of a message in a message


class ProtobufWriter:
    """OTLP/HTTP's binary bodies."""

    def __init__(self, *, shared_ids: bool) -> None:
        self._shared_ids = shared_ids
        scope = InstrumentationScope(name=SCOPE, version=version())
        self._scope = trace_pb2.ScopeSpans(scope=scope).SerializeToString()

    def request(self, groups: Mapping[Resource, Sequence[Span]]) -> bytes:
        """Return an ExportTraceServiceRequest."""
        resource_spans = ExportTraceServiceRequest.RESOURCE_SPANS_FIELD_NUMBER
        scope_spans = trace_pb2.ResourceSpans.SCOPE_SPANS_FIELD_NUMBER
        return b"".join(
            [
                _field(
                    resource_spans,
                    _resource(resource) + _field(scope_spans, self._spans(spans)),
                )
                for resource, spans in groups.items()
            ]
        )

    def partial_success(self, body: bytes) -> tuple[int, str]:
        """Return what the answer's partial_success says."""
        try:
            partial = ExportTraceServiceResponse.FromString(body).partial_success
        except DecodeError as exc:
            raise ValueError(str(exc)) from exc
        return partial.rejected_spans, partial.error_message

    def _spans(self, spans: Iterable[Span]) -> bytes:
        number = trace_pb2.ScopeSpans.SPANS_FIELD_NUMBER
        fields = [_field(number, self._span(span)) for span in spans]
        return self._scope + b"".join(fields)

    def _span(self, span: Span) -> bytes:
        span_id, parent_id = ids_of(span, shared_ids=self._shared_ids)
        start_ns = span.timestamp_us * 1000
        common, varying = [], []
        for key, value in attributes_of(span).items():
            if key in VARYING:
                varying.append(_key_value(key, value))
            else:
                common.append(_common(key, value))
        fields: dict[str, Any] = {
            "trace_id": bytes.fromhex(span.trace_id).rjust(16, b"\0"),
            "span_id": bytes.fromhex(span_id),
            "parent_span_id": bytes.fromhex(parent_id),
            "name": span.name,
            "kind": KINDS[span.kind],
            "start_time_unix_nano": start_ns,
            "end_time_unix_nano": start_ns + span.duration_us * 1000,
            "attributes": varying,
            "events": [
                {"time_unix_nano": at_us * 1000, "name": what}
                for at_us, what in span.annotations
            ],
        }
        if ERROR_TAG in span.tags:
            fields["status"] = {"code": STATUS_ERROR}
        return b"".join([trace_pb2.Span(**fields).SerializeToString(), *common])


@lru_cache(maxsize=CACHED_ATTRIBUTES)
def _common(key: str, value: str) -> bytes:
    """Return a span with this attribute alone: after another's bytes, it adds it."""
    fields: dict[str, Any] = {"attributes": [_key_value(key, value)]}
    return trace_pb2.Span(**fields).SerializeToString()


def _resource(resource: Resource) -> bytes:
    """Return a ResourceSpans without spans."""
    attributes = [_key_value(key, value) for key, value in resource]
    fields: dict[str, Any] = {"resource": {"attributes": attributes}}
    return trace_pb2.ResourceSpans(**fields).SerializeToString()


def _key_value(key: str, value: str) -> dict[str, Any]:
    """Return what a message's constructor makes a KeyValue of, faster than we."""
    number = integer(key, value) if key in INTEGERS else None
    if number is None:
        return {"key": key, "value": {"string_value": value}}
    return {"key": key, "value": {"int_value": number}}


def _field(number: int, message: bytes) -> bytes:
    """Return a message as the field `number` (below 16) of another one."""
    head = bytearray([number << 3 | _LENGTH_DELIMITED])
    length = len(message)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + message
