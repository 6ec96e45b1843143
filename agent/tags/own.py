"""Tags that neither Envoy nor OpenTelemetry has; and what both conventions ask."""

from __future__ import annotations

from errno import errorcode
from functools import lru_cache

from podspan.agent.exchange import (
    LAST_HTTP2_CODE,
    End,
    Exchange,
    Link,
    Protocol,
    Role,
)

BROKEN = frozenset({End.CLOSED_HERE, End.CLOSED_THERE, End.RESET, End.CONNECT_FAILED})

# A TCP connection may be closed at any time, by any end.
TCP_BROKEN = frozenset({End.RESET, End.CONNECT_FAILED})

# RFC 9113 section 7.
_HTTP2_CODES = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL",
    "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)  # fmt: skip

# https://grpc.io/docs/guides/status-codes/, by number.
GRPC_STATUS = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
    "UNAUTHENTICATED",
)  # fmt: skip
_GRPC_TEXT = {str(number): name for number, name in enumerate(GRPC_STATUS)}

# Text made once, not per span.
_LINK_TEXT = {link: link.name.lower() for link in Link}
_END_TEXT = {end: end.name.lower().replace("_", "-") for end in End}


def add_own_tags(tags: dict[str, str], exchange: Exchange) -> None:
    """Add link, end, error, retransmits, and how long each step took, where known."""
    tags["podspan.link"] = _LINK_TEXT[exchange.link]
    end = exchange.end
    if end is not End.COMPLETE:
        tags["podspan.end"] = _END_TEXT[end]
    if exchange.error:
        tags["podspan.error"] = error_name(exchange)
    if exchange.retransmits:
        tags["podspan.retransmits"] = str(exchange.retransmits)

    asked_ns = exchange.request_first_ns
    asked_all_ns = exchange.request_last_ns
    answered_ns = exchange.response_first_ns
    answered_all_ns = exchange.response_last_ns
    connected_ns = exchange.connect_end_ns
    if connected_ns and exchange.connect_start_ns:
        tags["podspan.connect_us"] = _us(exchange.connect_start_ns, connected_ns)
    if asked_all_ns and asked_ns:
        tags["podspan.request_us"] = _us(asked_ns, asked_all_ns)
    if answered_ns:
        if exchange.protocol is Protocol.TCP:
            # Where the serving end speaks first, there is no request before it.
            since_ns = asked_ns if 0 < asked_ns <= answered_ns else connected_ns
            if since_ns:
                tags["podspan.first_response_us"] = _us(since_ns, answered_ns)
        elif asked_all_ns:
            tags["podspan.wait_us"] = _us(asked_all_ns, answered_ns)
        if answered_all_ns:
            tags["podspan.response_us"] = _us(answered_ns, answered_all_ns)


def how_it_failed(exchange: Exchange) -> str:
    """Return the error's name, or how it ended."""
    return error_name(exchange) if exchange.error else _END_TEXT[exchange.end]


def tcp_failed(exchange: Exchange) -> bool:
    """Tell whether an error ended the connection."""
    return exchange.error != 0 or exchange.end in TCP_BROKEN


def http_failed(exchange: Exchange) -> bool:
    """Tell whether the exchange ended without a whole response.

    What was not seen may have gone well.
    """
    end = exchange.end
    return end in BROKEN or (exchange.status == 0 and end is not End.UNSEEN)


def error_name(exchange: Exchange) -> str:
    """Return ECONNREFUSED or the like, of a stream CANCEL; a number without a name."""
    number = exchange.error
    if exchange.protocol is Protocol.HTTP2 and number <= LAST_HTTP2_CODE:
        return _HTTP2_CODES[number]
    return errorcode.get(number, str(number))


def grpc_status_name(status: str) -> str:
    """Return NOT_FOUND or the like; what is not known as it was sent."""
    return _GRPC_TEXT.get(status, status)


def tcp_name(exchange: Exchange) -> str:
    """Return tcp:PORT, the port being that of the end that was called."""
    client = exchange.role is Role.CLIENT
    return f"tcp:{exchange.peer_port if client else exchange.local_port}"


# The called end's address comes again and again.
@lru_cache(maxsize=4096)
def address_and_port(address: str, port: int) -> str:
    """Return both as a URL has them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def called_address(exchange: Exchange) -> str:
    """Return address and port of the end that was called."""
    if exchange.role is Role.CLIENT:
        return address_and_port(exchange.peer_addr, exchange.peer_port)
    return address_and_port(exchange.local_addr, exchange.local_port)


def _us(start_ns: int, end_ns: int) -> str:
    """Return the time between; never negative: a response may come early."""
    return str((end_ns - start_ns) // 1000) if end_ns > start_ns else "0"
