"""zipkin.proto, as the protobuf library's own descriptors: no generated code.

Source: openzipkin/zipkin-api, zipkin.proto (package zipkin.proto3).
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from podspan.agent.store.zipkin_v2 import MalformedSpans

PACKAGE: Final = "zipkin.proto3"

# Its numbers on the wire; 0 is no kind.
KINDS: Final = (None, "CLIENT", "SERVER", "PRODUCER", "CONSUMER")

# Message to fields, in the numbers' order from 1. A capital: another message's.
MESSAGES: Final = {
    "Endpoint": "string service_name, bytes ipv4, bytes ipv6, int32 port",
    "Annotation": "fixed64 timestamp, string value",
    # map<string, string> is, on the wire, a list of these.
    "Tag": "string key, string value",
    "Span": "bytes trace_id, bytes parent_id, bytes id, int32 kind, string name, "
    "fixed64 timestamp, uint64 duration, Endpoint local_endpoint, "
    "Endpoint remote_endpoint, Annotation[] annotations, Tag[] tags, bool debug, "
    "bool shared",
    "ListOfSpans": "Span[] spans",
}


def decode(body: bytes) -> Any:
    """Return a message ListOfSpans."""
    spans = _LIST_OF_SPANS()
    try:
        spans.ParseFromString(body)
    except message.DecodeError as exc:
        raise MalformedSpans("Malformed reading List<Span> from proto3") from exc
    return spans


def as_json(span: Any) -> dict[str, Any]:
    """Return a message Span as Zipkin's JSON would have it, not yet normalised."""
    return {
        "traceId": span.trace_id.hex() or None,
        "parentId": span.parent_id.hex() or None,
        "id": span.id.hex() or None,
        # A kind of a later version is none that we know.
        "kind": KINDS[span.kind] if 0 <= span.kind < len(KINDS) else None,
        "name": span.name,
        "timestamp": span.timestamp,
        "duration": span.duration,
        "localEndpoint": _endpoint(span.local_endpoint),
        "remoteEndpoint": _endpoint(span.remote_endpoint),
        "annotations": [
            {"timestamp": each.timestamp, "value": each.value}
            for each in span.annotations
            if each.timestamp and each.value
        ],
        "tags": {tag.key: tag.value for tag in span.tags if tag.key},
        "debug": span.debug,
        "shared": span.shared,
    }


def _endpoint(endpoint: Any) -> dict[str, Any]:
    return {
        "serviceName": endpoint.service_name,
        "ipv4": _address(endpoint.ipv4),
        "ipv6": _address(endpoint.ipv6),
        "port": endpoint.port,
    }


def _address(octets: bytes) -> str | None:
    return str(ip_address(octets)) if len(octets) in (4, 16) else None


def _list_of_spans() -> type[message.Message]:
    file = descriptor_pb2.FileDescriptorProto(
        name="zipkin.proto", package=PACKAGE, syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        described = file.message_type.add(name=name)
        for number, text in enumerate(fields.split(", "), 1):
            described.field.append(_field(number, *text.split()))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{PACKAGE}.ListOfSpans")
    made: type[message.Message] = message_factory.GetMessageClass(descriptor)
    return made


def _field(number: int, kind: str, name: str) -> descriptor_pb2.FieldDescriptorProto:
    proto = descriptor_pb2.FieldDescriptorProto
    field = proto(name=name, number=number, label=proto.LABEL_OPTIONAL)
    if kind.endswith("[]"):
        kind, field.label = kind.removesuffix("[]"), proto.LABEL_REPEATED
    if kind in MESSAGES:
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = proto.Type.Value(f"TYPE_{kind.upper()}")
    return field


_LIST_OF_SPANS: Final = _list_of_spans()
