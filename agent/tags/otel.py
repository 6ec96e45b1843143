"""Names and tags of OpenTelemetry's semantic conventions for HTTP spans, stable.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/. Tags are text in Zipkin's
format, so numbers are, too. There are no conventions for spans of TCP connections:
those have the general attributes (semconv: general attributes), and our own. Calls of
gRPC have the attributes for them, too (semconv: gRPC spans, stable since 1.45).
"""

from __future__ import annotations

from collections.abc import Mapping

from podspan.agent.exchange import Exchange, Protocol, Role
from podspan.agent.pods.pod import Pod
from podspan.agent.tags.own import (
    add_own_tags,
    called_address,
    grpc_status_name,
    how_it_failed,
    http_failed,
    tcp_failed,
    tcp_name,
)
from podspan.agent.url import Url

LAST_BYTE: Mapping[Role, str] = {}

# RFC 9110, PATCH of RFC 5789, and QUERY.
METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY",
     "TRACE")
)  # fmt: skip

# Semconv, gRPC spans: what a server is to blame for. A client wants nothing but OK.
GRPC_SERVER_ERRORS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
     "DATA_LOSS")
)  # fmt: skip

OTHER = "_OTHER"
NAME_OF_OTHER = "HTTP"


def pod(pod: Pod) -> dict[str, str]:
    """Return where the span was made (semconv, resource, Kubernetes)."""
    return {
        "k8s.pod.name": pod.name,
        "k8s.pod.uid": pod.uid,
        "k8s.namespace.name": pod.namespace,
    }


def http(exchange: Exchange, url: Url) -> tuple[str, dict[str, str]]:
    """Return name and tags of a request with its response."""
    client = exchange.role is Role.CLIENT
    status = exchange.status
    method = exchange.method
    known = method in METHODS
    tags = {
        "http.request.method": method if known else OTHER,
        "http.request.body.size": str(exchange.request_bytes),
        "http.response.body.size": str(exchange.response_bytes),
        "network.peer.address": exchange.peer_addr,
        "network.peer.port": str(exchange.peer_port),
    }
    if not client:
        tags["client.address"] = exchange.peer_addr
    _add_server(tags, exchange, url.authority.host, url.authority.port)
    # Without a method, the request was not seen.
    if method:
        if not known:
            tags["http.request.method_original"] = method
        tags["network.protocol.name"] = "http"
        tags["network.protocol.version"] = f"1.{exchange.request_minor}"
        _add_url(tags, exchange, url)
    if status:
        tags["http.response.status_code"] = str(status)
    if exchange.user_agent:
        tags["user_agent.original"] = exchange.user_agent
    # 4xx may be the server's right answer; the caller did not get what it asked for.
    if status >= (400 if client else 500):
        _add_error(tags, str(status))
    elif http_failed(exchange):
        _add_error(tags, how_it_failed(exchange))
    add_own_tags(tags, exchange)
    if exchange.protocol is Protocol.HTTP2:
        if method:
            tags["network.protocol.version"] = "2"
        if exchange.grpc_status:
            return _grpc(tags, exchange), tags
    return method if known else NAME_OF_OTHER, tags


def _grpc(tags: dict[str, str], exchange: Exchange) -> str:
    """Add the call's tags and return its name."""
    status = grpc_status_name(exchange.grpc_status)
    method = exchange.target.removeprefix("/")
    tags["rpc.system.name"] = "grpc"
    tags["rpc.method"] = method
    tags["rpc.response.status_code"] = status
    client = exchange.role is Role.CLIENT
    if status != "OK" if client else status in GRPC_SERVER_ERRORS:
        _add_error(tags, status)
    return method


def tcp(exchange: Exchange) -> tuple[str, dict[str, str]]:
    """Return name and tags of a connection, a part of one, or a failed one."""
    tags = {
        "network.transport": "tcp",
        "network.peer.address": exchange.peer_addr,
        "network.peer.port": str(exchange.peer_port),
        "podspan.request_bytes": str(exchange.request_bytes),
        "podspan.response_bytes": str(exchange.response_bytes),
    }
    if exchange.role is not Role.CLIENT:
        tags["client.address"] = exchange.peer_addr
    _add_server(tags, exchange, "", 0)
    if tcp_failed(exchange):
        _add_error(tags, how_it_failed(exchange))
    add_own_tags(tags, exchange)
    return tcp_name(exchange), tags


def _add_server(tags: dict[str, str], exchange: Exchange, host: str, port: int) -> None:
    """Say who was called: by the name that the caller used, else by address."""
    client = exchange.role is Role.CLIENT
    if host and port:
        tags["server.address"] = host.strip("[]")
        tags["server.port"] = str(port)
        return
    tags["server.address"] = exchange.peer_addr if client else exchange.local_addr
    tags["server.port"] = str(exchange.peer_port if client else exchange.local_port)


def _add_url(tags: dict[str, str], exchange: Exchange, url: Url) -> None:
    authority = url.authority.text
    if exchange.role is Role.CLIENT:
        authority = authority or called_address(exchange)
        tags["url.full"] = f"{url.scheme}://{authority}{url.path}"
        return
    tags["url.scheme"] = url.scheme
    path, _, query = url.path.partition("?")
    if exchange.method != "CONNECT":
        # An empty path means `/` (RFC 9110 section 4.2.3), except where `*` says so.
        tags["url.path"] = path or ("*" if exchange.target == "*" else "/")
    if query:
        tags["url.query"] = query


def _add_error(tags: dict[str, str], kind: str) -> None:
    tags["error.type"] = kind
    # What Zipkin, Jaeger and the Collector take for the span's status.
    tags["error"] = "true"
