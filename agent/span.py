"""Make a span of an exchange, as Zipkin's v2 model has it.

The ids are those of the kernel's record. Where they are the caller's (`--span-ids
shared`: Zipkin's own way, and Istio 0.4's), the server's half is marked shared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson
from podspan.agent.b3 import trace_id_text
from podspan.agent.exchange import FLAG_SAMPLED, Exchange, Protocol, Role
from podspan.agent.pods.pod import Pod
from podspan.agent.tags import CONVENTIONS
from podspan.agent.url import TARGET_CUT, request_url


@dataclass(frozen=True, slots=True)
class SpanOptions:
    """How spans look; made once."""

    tags: str = "istio"  # one of CONVENTIONS
    max_path: int = TARGET_CUT  # characters of path and query in a tag
    query: bool = True


DEFAULT_OPTIONS = SpanOptions()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of the exchange; an empty `service` is an unknown one."""

    service: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Span:
    """One end's view of one exchange, in the units and texts of Zipkin v2."""

    trace_id: str
    span_id: str
    parent_id: str  # "": root
    kind: str  # CLIENT, SERVER
    name: str
    timestamp_us: int  # since 1970
    duration_us: int
    local: Endpoint
    remote: Endpoint
    shared: bool
    tags: dict[str, str]
    annotations: tuple[tuple[int, str], ...] = ()  # microseconds since 1970, what


def span_of(
    exchange: Exchange,
    service: str,
    offset_ns: int,
    options: SpanOptions = DEFAULT_OPTIONS,
    pod: Pod | None = None,
) -> Span | None:
    """Return the span of an exchange; None if it is not to be recorded.

    `service` is the name of this end, `offset_ns` what CLOCK_MONOTONIC lacks to the
    time since 1970, `pod` that of this end, where it is known.
    """
    role = exchange.role
    if not exchange.flags & FLAG_SAMPLED or role is Role.UNKNOWN:
        return None

    tcp = exchange.protocol is Protocol.TCP
    start_ns, end_ns = _tcp_bounds(exchange) if tcp else _bounds(exchange)
    # Both cut to microseconds, then subtracted: a child cannot outlast its parent
    # by rounding.
    start_us = (start_ns + offset_ns) // 1000
    end_us = (end_ns + offset_ns) // 1000

    convention = CONVENTIONS[options.tags]
    client = role is Role.CLIENT
    called = ""
    annotations: tuple[tuple[int, str], ...] = ()
    if tcp:
        name, tags = convention.tcp(exchange)
    else:
        url = request_url(
            exchange.method,
            exchange.target,
            exchange.host,
            max_path=options.max_path,
            query=options.query,
        )
        name, tags = convention.http(exchange, url)
        # CONNECT goes to a proxy: the peer is not who is named.
        if client and exchange.method != "CONNECT":
            called = url.authority.service
        if 0 < exchange.response_last_ns == end_ns and role in convention.LAST_BYTE:
            annotations = ((end_us, convention.LAST_BYTE[role]),)

    if pod is not None:
        tags |= convention.pod(pod)

    # The name of a network namespace is a file's, so it may be no text.
    if not service.isascii():
        service = service.encode("utf-8", "replace").decode()
    return Span(
        trace_id_text(exchange.trace_id),
        f"{exchange.span_id:016x}",
        f"{exchange.parent_id:016x}" if exchange.parent_id else "",
        "CLIENT" if client else "SERVER",
        name,
        start_us,
        (end_us - start_us) or 1,
        Endpoint(service, exchange.local_addr, exchange.local_port),
        Endpoint(called, exchange.peer_addr, exchange.peer_port),
        not client and exchange.shared,
        tags,
        annotations,
    )


def zipkin_json(span: Span) -> str:
    """Return the span as one JSON object of Zipkin's v2 API, in printable ASCII.

    So no name or value from the network speaks to a terminal, or breaks a line.
    """
    fields = zipkin_fields(span)
    text = orjson.dumps(fields).decode()
    # orjson leaves as they are what few spans have: all beyond ASCII, and DEL.
    return text if text.isascii() and text.isprintable() else json.dumps(fields)


def zipkin_fields(span: Span) -> dict[str, Any]:
    """Return the span as an object of Zipkin's v2 API, ready for a JSON encoder."""
    fields = {
        "traceId": span.trace_id,
        "id": span.span_id,
        "kind": span.kind,
        "name": span.name,
        "timestamp": span.timestamp_us,
        "duration": span.duration_us,
        "localEndpoint": _endpoint_fields(span.local),
        "remoteEndpoint": _endpoint_fields(span.remote),
        "tags": span.tags,
    }
    if span.parent_id:
        fields["parentId"] = span.parent_id
    if span.shared:
        fields["shared"] = True
    if span.annotations:
        fields["annotations"] = [
            {"timestamp": at_us, "value": what} for at_us, what in span.annotations
        ]
    return fields


def _endpoint_fields(endpoint: Endpoint) -> dict[str, Any]:
    service, address = endpoint.service, endpoint.address
    family = "ipv6" if ":" in address else "ipv4"
    if not service:
        return {family: address, "port": endpoint.port}
    return {"serviceName": service.lower(), family: address, "port": endpoint.port}


def _bounds(exchange: Exchange) -> tuple[int, int]:
    """Return the first and the last moment seen; any of them may be missing (0).

    Connecting comes before: the request did not take that long.
    """
    start_ns = exchange.request_first_ns
    end_ns = exchange.response_last_ns
    if start_ns and end_ns >= start_ns:
        return start_ns, end_ns
    seen = [
        at_ns
        for at_ns in (
            start_ns,
            exchange.request_last_ns,
            exchange.response_first_ns,
            end_ns,
        )
        if at_ns
    ]
    return (start_ns or min(seen), max(seen)) if seen else (0, 0)


def _tcp_bounds(exchange: Exchange) -> tuple[int, int]:
    """Return the first and the last moment seen, connecting included."""
    seen = [
        at_ns
        for at_ns in (
            exchange.connect_start_ns,
            exchange.connect_end_ns,
            exchange.request_first_ns,
            exchange.request_last_ns,
            exchange.response_first_ns,
            exchange.response_last_ns,
        )
        if at_ns
    ]
    return (min(seen), max(seen)) if seen else (0, 0)
