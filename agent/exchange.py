"""What the kernel told us: one request and its response, seen from one end.

The only reader of `struct exchange_record` (bpf/exchange.h), and of what workers of the
redirect engine tell of HTTP/2, which the kernel does not parse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any


class Role(IntEnum):
    """Which end of the exchange this is (`enum exchange_role`)."""

    UNKNOWN = 0
    CLIENT = 1
    SERVER = 2


class Link(IntEnum):
    """How the exchange found its parent (`enum exchange_link`)."""

    NONE = 0
    HEADER = 1
    THREAD = 2
    UPGRADE = 3


class Protocol(IntEnum):
    """What the connection speaks (`enum exchange_protocol`, and HTTP2).

    Of TCP, `request_` is what the opening end sent, `response_` what it received.
    """

    HTTP = 1
    TCP = 2
    HTTP2 = 3  # one stream; never of the kernel's


class End(IntEnum):
    """How the exchange ended (`enum exchange_end`)."""

    COMPLETE = 1
    EOF = 2
    CLOSED_HERE = 3
    CLOSED_THERE = 4
    RESET = 5
    NEXT_REQUEST = 6
    UNSEEN = 7
    CONNECT_FAILED = 8
    INTERVAL = 9


# `enum exchange_flags`. Plain ints: an IntFlag costs a microsecond per test.
FLAG_SAMPLED = 1
FLAG_INJECTED = 2
FLAG_SHARED = 4
FLAG_ACCEPTED_DEBUG = 8

LAST_HTTP2_CODE = 13  # RFC 9113 section 7; the socket's errnos are above it

# A dictionary is four times as fast as calling the enum.
_ROLES = {role.value: role for role in Role}
_LINKS = {link.value: link for link in Link}
_ENDS = {end.value: end for end in End}
_PROTOCOLS = {protocol.value: protocol for protocol in Protocol}

_NOT_IN_A_STREAM: dict[str, Any] = {
    "connect_start_ns": 0,
    "connect_end_ns": 0,
    "sock": 0,
    "pid": 0,
    "tid": 0,
    "retransmits": 0,
    "request_minor": 0,
    "protocol": Protocol.HTTP2,
    "comm": "",
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A finished exchange. Times are CLOCK_MONOTONIC, 0 where not seen."""

    trace_id: int  # 128 bit
    span_id: int
    parent_id: int  # 0: root
    connect_start_ns: int
    connect_end_ns: int
    request_first_ns: int
    request_last_ns: int
    response_first_ns: int
    response_last_ns: int
    request_bytes: int
    response_bytes: int
    sock: int
    netns: int
    pid: int
    tid: int
    retransmits: int
    local_addr: str
    local_port: int
    peer_addr: str
    peer_port: int
    status: int  # 0: no response head seen
    # errno of the socket when it ended, 0: none. Of HTTP2 up to LAST_HTTP2_CODE: the
    # code of a RST_STREAM, of the other end (RESET) or this one (CLOSED_HERE).
    error: int
    role: Role
    link: Link
    end: End
    flags: int
    request_minor: int
    protocol: Protocol
    method: str
    target: str
    host: str
    user_agent: str
    request_id: str
    client_trace_id: str
    comm: str
    grpc_status: str = ""  # in decimal; "": no gRPC, or it ended without
    grpc_message: str = ""  # percent-encoded, as it was sent

    @property
    def sampled(self) -> bool:
        """Whether this exchange becomes a span."""
        return bool(self.flags & FLAG_SAMPLED)

    @property
    def shared(self) -> bool:
        """Whether the ids came from the caller's headers."""
        return bool(self.flags & FLAG_SHARED)

    @classmethod
    def from_kernel(cls, raw: Any) -> Exchange:
        """Read a `struct exchange_record` (bpf/exchange.h)."""
        return cls(
            raw.trace_id_high << 64 | raw.trace_id_low,
            raw.span_id,
            raw.parent_id,
            raw.connect_start_ns,
            raw.connect_end_ns,
            raw.request_first_ns,
            raw.request_last_ns,
            raw.response_first_ns,
            raw.response_last_ns,
            raw.request_bytes,
            raw.response_bytes,
            raw.sock,
            raw.netns,
            raw.pid,
            raw.tid,
            raw.retransmits,
            _address(bytes(raw.local_addr)),
            raw.local_port,
            _address(bytes(raw.peer_addr)),
            raw.peer_port,
            raw.status,
            raw.error,
            _ROLES[raw.role],
            _LINKS[raw.link],
            _ENDS[raw.end],
            raw.flags,
            raw.request_minor,
            _PROTOCOLS[raw.protocol],
            _text(raw.method),
            _text(raw.target),
            _text(raw.host),
            _text(raw.user_agent),
            _text(raw.request_id),
            _text(raw.client_trace_id),
            _text(raw.comm),
        )

    @classmethod
    def from_worker(cls, wire: Mapping[str, Any]) -> Exchange:
        """Read a StreamRecord (agent/redirect/layer.py) as a worker sends it.

        With it come `role`, `netns`, `local_addr`, `local_port`, `peer_addr` and
        `peer_port`, of the application's end; `trace_id` is a number, or 16 bytes with
        the highest first. Which process it was is not known, nor what the socket did.
        """
        fields = dict(wire)
        trace_id = fields["trace_id"]
        if isinstance(trace_id, bytes):
            fields["trace_id"] = int.from_bytes(trace_id, "big")
        fields["role"] = _ROLES[fields["role"]]
        fields["link"] = _LINKS[fields["link"]]
        fields["end"] = _ENDS[fields["end"]]
        return cls(**{**_NOT_IN_A_STREAM, **fields})


# A node talks to few addresses, and parsing one costs more than the rest of a record.
@lru_cache(maxsize=4096)
def _address(packed: bytes) -> str:
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _text(raw: bytes) -> str:
    """Read a text that the kernel may have cut, also inside a character.

    Space after a header's value comes along.
    """
    return raw.decode("utf-8", "replace").rstrip(" \t")
