"""Names and tags as Istio's sidecars give them.

Searches and dashboards made for Istio keep working. The rules are those of Envoy's
tracer_impl.cc and http_tracer_impl.cc. Envoy makes no spans of TCP connections: those
have the tags that mean something there.
"""

from __future__ import annotations

from podspan.agent.exchange import (
    LAST_HTTP2_CODE,
    End,
    Exchange,
    Protocol,
    Role,
)
from podspan.agent.pods.pod import Pod
from podspan.agent.tags.own import (
    add_own_tags,
    called_address,
    http_failed,
    tcp_failed,
    tcp_name,
)
from podspan.agent.url import Url

# Envoy keeps these as annotations in Zipkin's v2 format; `cs` and `sr` become the kind.
LAST_BYTE = {Role.CLIENT: "cr", Role.SERVER: "ss"}

# Envoy speaks of downstream (D: who called) and upstream (U: who was called): the
# peer, or this end, by role.
RESPONSE_FLAGS = {
    (Role.CLIENT, End.CLOSED_HERE): "DC",
    (Role.CLIENT, End.CLOSED_THERE): "UC",
    (Role.CLIENT, End.RESET): "UC",
    (Role.CLIENT, End.CONNECT_FAILED): "UF",
    (Role.SERVER, End.CLOSED_HERE): "UC",
    (Role.SERVER, End.CLOSED_THERE): "DC",
    (Role.SERVER, End.RESET): "DC",
}
# Where it was one stream that was reset, not the connection.
STREAM_FLAGS = {
    (Role.CLIENT, End.CLOSED_HERE): "DR",
    (Role.CLIENT, End.RESET): "UR",
    (Role.SERVER, End.CLOSED_HERE): "UR",
    (Role.SERVER, End.RESET): "DR",
}

# UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE,
# DATA_LOSS: http_tracer_impl.cc takes the others for the caller's mistakes.
GRPC_ERRORS = frozenset(("2", "4", "8", "12", "13", "14", "15"))


def pod(pod: Pod) -> dict[str, str]:
    """Return what a sidecar tells of its own pod (ISTIO.md section 3)."""
    namespace = pod.namespace
    address = pod.ips[0] if pod.ips else ""
    return {
        "node_id": f"sidecar~{address}~{pod.name}.{namespace}~"
        f"{namespace}.svc.cluster.local",
        "istio.canonical_service": pod.canonical_service,
        "istio.canonical_revision": pod.canonical_revision,
        "istio.namespace": namespace,
    }


def http(exchange: Exchange, url: Url) -> tuple[str, dict[str, str]]:
    """Return name and tags of a request with its response."""
    role = exchange.role
    status = exchange.status
    authority = url.authority
    called = called_address(exchange)
    tags = {
        "component": "proxy",
        "downstream_cluster": "-",
        "http.status_code": str(status),
        "user_agent": exchange.user_agent or "-",
        "request_size": str(exchange.request_bytes),
        "response_size": str(exchange.response_bytes),
        "response_flags": response_flags(exchange),
        "upstream_address": called,
    }
    # Without a method, the request was not seen.
    if exchange.method:
        tags["http.method"] = exchange.method
        tags["http.protocol"] = f"HTTP/1.{exchange.request_minor}"
        tags["http.url"] = f"{url.scheme}://{authority.text or called}{url.path}"
    if role is Role.CLIENT:
        tags["peer.address"] = exchange.local_addr
        if authority.port:
            _add_cluster(tags, f"outbound|{authority.port}||{authority.host}")
    else:
        tags["peer.address"] = exchange.peer_addr
        _add_cluster(tags, f"inbound|{exchange.local_port}||")
    if exchange.request_id:
        tags["guid:x-request-id"] = exchange.request_id
    if exchange.client_trace_id:
        tags["guid:x-client-trace-id"] = exchange.client_trace_id
    # Unlike OpenTelemetry: 4xx is an answer, not an error.
    if status >= 500 or http_failed(exchange):
        tags["error"] = "true"
    if exchange.protocol is Protocol.HTTP2:
        _add_http2(tags, exchange)
    add_own_tags(tags, exchange)
    return _name(exchange, url), tags


def tcp(exchange: Exchange) -> tuple[str, dict[str, str]]:
    """Return name and tags of a connection, a part of one, or a failed one."""
    client = exchange.role is Role.CLIENT
    tags = {
        "component": "proxy",
        "peer.address": exchange.local_addr if client else exchange.peer_addr,
        "request_size": str(exchange.request_bytes),
        "response_size": str(exchange.response_bytes),
        "response_flags": response_flags(exchange),
        "upstream_address": called_address(exchange),
    }
    if not client:
        _add_cluster(tags, f"inbound|{exchange.local_port}||")
    if tcp_failed(exchange):
        tags["error"] = "true"
    add_own_tags(tags, exchange)
    return tcp_name(exchange), tags


def response_flags(exchange: Exchange) -> str:
    """Return Envoy's word for how it ended; `-` where it has none."""
    if exchange.protocol is Protocol.TCP:
        # Of the flags above, Envoy's TCP proxy knows only this one.
        return "UF" if exchange.end is End.CONNECT_FAILED else "-"
    how = exchange.role, exchange.end
    if exchange.protocol is Protocol.HTTP2 and how in STREAM_FLAGS:
        by_stream = exchange.end is End.RESET or exchange.error
        if by_stream and exchange.error <= LAST_HTTP2_CODE:
            return STREAM_FLAGS[how]
    return RESPONSE_FLAGS.get(how, "-")


def _add_http2(tags: dict[str, str], exchange: Exchange) -> None:
    if exchange.method:
        tags["http.protocol"] = "HTTP/2"
    if not exchange.grpc_status:
        return
    grpc = {
        "grpc.path": exchange.target,
        "grpc.authority": exchange.host,
        "grpc.status_code": exchange.grpc_status,
        "grpc.message": exchange.grpc_message,
    }
    tags |= {name: text for name, text in grpc.items() if text}
    if exchange.grpc_status in GRPC_ERRORS:
        tags["error"] = "true"


def _add_cluster(tags: dict[str, str], cluster: str) -> None:
    tags["upstream_cluster"] = cluster
    tags["upstream_cluster.name"] = cluster


def _name(exchange: Exchange, url: Url) -> str:
    """Return Istio's name for the operation: HOST:PORT/*, else the method.

    The port is the one that the caller named, whatever port the connection has after
    address translation: both halves then have the same name.
    """
    _, host, port, _ = url.authority
    if not host:
        return exchange.method.lower() or "http"
    return f"{host}:{port}/*" if port else f"{host}/*"
