"""Make a span of an exchange, as Zipkin's v2 model has it.

Id mode `shared` (Zipkin's own, Istio 0.4's): the server's half has the ids of the
client's half and is marked shared. Name and tags are those of Istio's sidecars, so
that searches and dashboards made for them keep working; what only podspan knows is
under `podspan.`.
"""

from __future__ import annotations

from dataclasses import dataclass
from json import JSONEncoder

from podspan.agent.b3 import trace_id_text
from podspan.agent.exchange import FLAG_SAMPLED, End, Exchange, Link, Role

# The texts of the kernel's record are cut at these sizes (bpf/exchange.h).
HOST_CUT = 96

# What Envoy would write into response_flags. Envoy speaks of downstream (D: who
# called) and upstream (U: who was called): the peer, or this end, by role.
RESPONSE_FLAGS = {
    (Role.CLIENT, End.CLOSED_HERE): "DC",
    (Role.CLIENT, End.CLOSED_THERE): "UC",
    (Role.CLIENT, End.RESET): "UC",
    (Role.SERVER, End.CLOSED_HERE): "UC",
    (Role.SERVER, End.CLOSED_THERE): "DC",
    (Role.SERVER, End.RESET): "DC",
}

BROKEN = frozenset({End.CLOSED_HERE, End.CLOSED_THERE, End.RESET})

# Text made once, not per span.
_LINK_TEXT = {link: link.name.lower() for link in Link}
_END_TEXT = {end: end.name.lower().replace("_", "-") for end in End}


# No span refers to itself: looking for circles would cost a third of the time.
_encode = JSONEncoder(separators=(",", ":"), check_circular=False).encode


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


def span_of(exchange: Exchange, service: str, offset_ns: int) -> Span | None:
    """Return the span of an exchange; None if it is not to be recorded.

    `service` is the name of this end, `offset_ns` what CLOCK_MONOTONIC lacks to the
    time since 1970.
    """
    role = exchange.role
    if not exchange.flags & FLAG_SAMPLED or role is Role.UNKNOWN:
        return None

    start_ns, end_ns = _bounds(exchange)
    # Both cut to microseconds, then subtracted: a child cannot outlast its parent
    # by rounding.
    start_us = (start_ns + offset_ns) // 1000
    duration_us = (end_ns + offset_ns) // 1000 - start_us

    client = role is Role.CLIENT
    host = exchange.host.lower()
    return Span(
        trace_id_text(exchange.trace_id),
        f"{exchange.span_id:016x}",
        f"{exchange.parent_id:016x}" if exchange.parent_id else "",
        "CLIENT" if client else "SERVER",
        _name(host, exchange.method),
        start_us,
        duration_us or 1,
        Endpoint(service, exchange.local_addr, exchange.local_port),
        Endpoint(
            _called_service(host) if client else "",
            exchange.peer_addr,
            exchange.peer_port,
        ),
        not client and exchange.shared,
        _tags(exchange, host),
    )


def zipkin_json(span: Span) -> str:
    """Return the span as one JSON object of Zipkin's v2 API, without line breaks."""
    fields: dict[str, object] = {
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
    return _encode(fields)


def _endpoint_fields(endpoint: Endpoint) -> dict[str, object]:
    address = endpoint.address
    fields: dict[str, object] = {
        "ipv6" if ":" in address else "ipv4": address,
        "port": endpoint.port,
    }
    if endpoint.service:
        fields["serviceName"] = endpoint.service.lower()
    return fields


def _bounds(exchange: Exchange) -> tuple[int, int]:
    """Return the first and the last moment seen; any of them may be missing (0)."""
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


def _name(host: str, method: str) -> str:
    """Return Istio's name for the operation: HOST:PORT/*, else the method.

    A Host without a port means port 80 (RFC 9110 section 4.2.1), whatever port the
    connection has after address translation: both halves then have the same name.
    """
    if not host:
        return method.lower()
    if len(host) >= HOST_CUT or _has_port(host):
        return f"{host}/*"
    return f"{host}:80/*"


def _has_port(host: str) -> bool:
    return host.rfind(":") > host.rfind("]")


def _called_service(host: str) -> str:
    """Return the name that the caller used, without the port; "" for an address."""
    name = host[: host.rfind(":")] if _has_port(host) else host
    if name.startswith("[") or name.replace(".", "").isdigit():
        return ""
    return name


def _url(exchange: Exchange, host: str) -> str:
    target = exchange.target
    if target.startswith("/") or target == "*":
        if not host:
            client = exchange.role is Role.CLIENT
            address = exchange.peer_addr if client else exchange.local_addr
            port = exchange.peer_port if client else exchange.local_port
            host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        return f"http://{host}{target}" if target != "*" else f"http://{host}"
    return target  # absolute form, or CONNECT's authority


def _tags(exchange: Exchange, host: str) -> dict[str, str]:
    """Return the tags that Envoy gives, in its words, and our own."""
    end = exchange.end
    status = exchange.status
    tags = {
        "component": "proxy",
        "http.method": exchange.method,
        "http.url": _url(exchange, host),
        "http.protocol": f"HTTP/1.{exchange.request_minor}",
        "http.status_code": str(status),
        "user_agent": exchange.user_agent or "-",
        "request_size": str(exchange.request_bytes),
        "response_size": str(exchange.response_bytes),
        "response_flags": RESPONSE_FLAGS.get((exchange.role, end), "-"),
        "peer.address": exchange.peer_addr,
        "podspan.link": _LINK_TEXT[exchange.link],
    }
    if exchange.request_id:
        tags["guid:x-request-id"] = exchange.request_id
    if exchange.role is Role.CLIENT:
        address, port = exchange.peer_addr, exchange.peer_port
        tags["upstream_address"] = (
            f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        )
    if end is not End.COMPLETE:
        tags["podspan.end"] = _END_TEXT[end]
    # As Envoy, unlike OpenTelemetry: 4xx is an answer, not an error.
    # What was not seen may have gone well.
    unanswered = status == 0 and end is not End.UNSEEN
    if unanswered or status >= 500 or end in BROKEN:
        tags["error"] = "true"
    return tags
