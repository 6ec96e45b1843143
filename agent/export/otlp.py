"""Spans as OTLP over HTTP takes them (Collector, Jaeger, Tempo).

Pure: delivery.py sends. Of the two encodings this module writes JSON, and
otlp_protobuf.py the binary one. What an answer means is OTLP's specification,
https://opentelemetry.io/docs/specs/otlp/#otlphttp-response: 429, 502, 503 and 504 are
trouble that passes, nothing else is; spans rejected by a partial success are not sent
again. What Zipkin's model has goes where OpenTelemetry's has a place for it, as in
"OpenTelemetry to Zipkin" (https://opentelemetry.io/docs/specs/otel/trace/
sdk_exporters/zipkin/) and its inverse, the Collector's receiver.

Shared span ids
---------------
Both ends of a call may have one span id (`--span-ids shared`). OTLP has no such thing:
two spans of one id are one span twice, or an error. So the server's half gets the id
that the kernel would give it with `--span-ids child`, derived from the client's, whose
child it becomes. What hangs below the server's half has the shared id for its parent,
and only one span is seen at a time:

- A call linked by thread was made while we served: its parent is the server's half,
  and moves with it. But not where that may be the trace's root: a root's span id is
  the low half of its trace id, and a root that is a server's has no client whose id it
  could share. Its id stays, and so do its children's parents.
- A call linked by a header has the parent that the application wrote. Either it
  forwarded what it received, or it has a tracer of its own, whose span that is. This
  cannot be told apart here, so the parent stays: where it was forwarded the call is
  seen beside the server's half, below the client's.

So every parent is a true ancestor, and exists; it may be one level too high. With
`--span-ids child` the kernel tells these cases apart, and nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import orjson
from podspan.agent import version
from podspan.agent.export.encoder import Outcome, Verdict, failure
from podspan.agent.ids import derive_id
from podspan.agent.span import Span

PROTOBUF, JSON = ENCODINGS = ("protobuf", "json")

RETRIED_STATUSES = frozenset({429, 502, 503, 504})

SCOPE = "podspan"

# opentelemetry/proto/trace/v1/trace.proto: SpanKind, Status.StatusCode.
KINDS = {"SERVER": 2, "CLIENT": 3}
STATUS_ERROR = 2

# OpenTelemetry's resource specification: for want of a name.
UNKNOWN_SERVICE = "unknown_service"

# Of whom a span tells, not of what.
RESOURCE_TAGS = ("k8s.pod.name", "k8s.pod.uid", "k8s.namespace.name")

# It is the span's status.
ERROR_TAG = "error"

# Attributes that are numbers: by the semantic conventions' registry, and our own.
INTEGERS = frozenset(
    ("http.request.body.size", "http.response.body.size", "http.response.status_code",
     "http.status_code", "network.local.port", "network.peer.port", "server.port",
     "podspan.connect_us", "podspan.first_response_us", "podspan.request_bytes",
     "podspan.request_us", "podspan.response_bytes", "podspan.response_us",
     "podspan.retransmits", "podspan.wait_us")
)  # fmt: skip

# Attributes that hardly any two spans have the same value of.
VARYING = frozenset(
    ("guid:x-request-id", "http.request.body.size", "http.response.body.size",
     "http.url", "network.local.port", "network.peer.port", "podspan.connect_us",
     "podspan.first_response_us", "podspan.request_bytes", "podspan.request_us",
     "podspan.response_bytes", "podspan.response_us", "podspan.wait_us",
     "request_size", "response_size", "url.full", "url.path", "url.query")
)  # fmt: skip

# Attributes of a node's busiest edges: about 1 MB.
CACHED_ATTRIBUTES = 2048

# An int64 has room for all numbers of so many digits.
_DIGITS = 18

# The attributes of a resource.
Resource = tuple[tuple[str, str], ...]

_SENT = Verdict(Outcome.SENT)


class Writer(Protocol):
    """One encoding."""

    def request(self, groups: Mapping[Resource, Sequence[Span]]) -> bytes:
        """Return an ExportTraceServiceRequest."""

    def partial_success(self, body: bytes) -> tuple[int, str]:
        """Return the rejected spans and the message of an ExportTraceServiceResponse.

        Raises ValueError.
        """


class OtlpEncoder:
    """OTLP, in one of ENCODINGS."""

    name = "otlp"
    default_path = "/v1/traces"

    def __init__(self, encoding: str = PROTOBUF, *, shared_ids: bool = False) -> None:
        """`shared_ids`: spans are made with `--span-ids shared`."""
        self.content_type = "application/json"
        self._writer: Writer = JsonWriter(shared_ids=shared_ids)
        if encoding == PROTOBUF:
            # Here, not above: it takes 2 MB of memory.
            from podspan.agent.export.otlp_protobuf import (  # noqa: PLC0415
                ProtobufWriter,
            )

            self.content_type = "application/x-protobuf"
            self._writer = ProtobufWriter(shared_ids=shared_ids)

    def encode(self, spans: Sequence[Span]) -> bytes:
        """Return an ExportTraceServiceRequest."""
        groups: dict[Resource, list[Span]] = {}
        for span in spans:
            groups.setdefault(resource_of(span), []).append(span)
        return self._writer.request(groups)

    def verdict(self, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
        """Return what an answer means."""
        if not 200 <= status <= 299:
            # A google.rpc.Status, whose text is readable in both encodings.
            message = body.decode("utf-8", "replace")
            retried = status in RETRIED_STATUSES
            return failure(status, headers, message, retried=retried)
        try:
            rejected, message = self._writer.partial_success(body)
        except ValueError:
            # A proxy's answer, or nothing: 2xx says enough.
            return _SENT
        if rejected <= 0 and not message:
            return _SENT
        message = message or "no reason given"
        if rejected <= 0:
            return Verdict(Outcome.SENT, f"warns: {message}")
        return Verdict(
            Outcome.PARTIAL, f"rejected {rejected} spans: {message}", rejected
        )


def resource_of(span: Span) -> Resource:
    """Return who made the span."""
    tags = span.tags
    pod = [(key, tags[key]) for key in RESOURCE_TAGS if key in tags]
    return ("service.name", span.local.service or UNKNOWN_SERVICE), *pod


def attributes_of(span: Span) -> dict[str, str]:
    """Return the span's attributes; of INTEGERS some are numbers, see `integer`."""
    local, remote = span.local, span.remote
    attributes = {
        "network.local.address": local.address,
        "network.local.port": str(local.port),
        "network.peer.address": remote.address,
        "network.peer.port": str(remote.port),
    }
    if remote.service:
        # What service graphs call a peer that sends no spans.
        attributes["peer.service"] = remote.service
    attributes |= span.tags
    attributes.pop(ERROR_TAG, None)
    for key in RESOURCE_TAGS:
        attributes.pop(key, None)
    return attributes


def integer(key: str, value: str) -> int | None:
    """Return the value of an attribute that is a number."""
    if key in INTEGERS and value.isascii() and value.isdigit():
        return int(value) if len(value) <= _DIGITS else None
    return None


def ids_of(span: Span, *, shared_ids: bool) -> tuple[str, str]:
    """Return the span's id and its parent's ("": root), as the module's text tells."""
    span_id, parent_id = span.span_id, span.parent_id
    if span.shared:
        return _derived(span_id), span_id
    if (
        shared_ids
        and span.kind == "CLIENT"
        and span.tags.get("podspan.link") == "thread"
        and parent_id != span.trace_id[-16:]
    ):
        return span_id, _derived(parent_id)
    return span_id, parent_id


def _derived(span_id: str) -> str:
    return f"{derive_id(int(span_id, 16)):016x}"


class JsonWriter:
    """OTLP/JSON: ids in hexadecimal, enums as numbers, 64 bit numbers as text."""

    def __init__(self, *, shared_ids: bool) -> None:
        self._shared_ids = shared_ids
        self._scope = {"name": SCOPE, "version": version()}

    def request(self, groups: Mapping[Resource, Sequence[Span]]) -> bytes:
        """Return an ExportTraceServiceRequest."""
        resource_spans = [
            {
                "resource": {"attributes": [_attribute(*pair) for pair in resource]},
                "scopeSpans": [
                    {"scope": self._scope, "spans": [self._span(s) for s in spans]}
                ],
            }
            for resource, spans in groups.items()
        ]
        return orjson.dumps({"resourceSpans": resource_spans})

    def partial_success(self, body: bytes) -> tuple[int, str]:
        """Return what the answer's partialSuccess says."""
        answer = orjson.loads(body)
        partial = answer.get("partialSuccess") if isinstance(answer, dict) else None
        if not isinstance(partial, dict):
            return 0, ""
        rejected = str(partial.get("rejectedSpans") or 0)
        return int(rejected), str(partial.get("errorMessage") or "")

    def _span(self, span: Span) -> orjson.Fragment:
        span_id, parent_id = ids_of(span, shared_ids=self._shared_ids)
        end_us = span.timestamp_us + span.duration_us
        fields = {
            "traceId": span.trace_id.rjust(32, "0"),
            "spanId": span_id,
            "name": span.name,
            "kind": KINDS[span.kind],
            "startTimeUnixNano": f"{span.timestamp_us}000",
            "endTimeUnixNano": f"{end_us}000",
            "attributes": [
                _common(key, value) if key not in VARYING else _attribute(key, value)
                for key, value in attributes_of(span).items()
            ],
        }
        if parent_id:
            fields["parentSpanId"] = parent_id
        if ERROR_TAG in span.tags:
            fields["status"] = {"code": STATUS_ERROR}
        if span.annotations:
            fields["events"] = [
                {"timeUnixNano": f"{at_us}000", "name": what}
                for at_us, what in span.annotations
            ]
        return orjson.Fragment(orjson.dumps(fields))


def _attribute(key: str, value: str) -> dict[str, Any]:
    if key in INTEGERS and integer(key, value) is not None:
        return {"key": key, "value": {"intValue": value}}
    return {"key": key, "value": {"stringValue": value}}


@lru_cache(maxsize=CACHED_ATTRIBUTES)
def _common(key: str, value: str) -> orjson.Fragment:
    return orjson.Fragment(orjson.dumps(_attribute(key, value)))
