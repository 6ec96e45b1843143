"""What a protocol's layer says to the relay: bytes in, actions out; no sockets.

A redirected connection has two sides. DOWN is who opened it, UP is whom it was meant
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Side(Enum):
    """An end of the connection, seen from the relay in its middle."""

    DOWN = "down"
    UP = "up"

    @property
    def other(self) -> Side:
        """The side that this one talks to."""
        return Side.UP if self is Side.DOWN else Side.DOWN


@dataclass(frozen=True, slots=True)
class Send:
    """These bytes to that side."""

    side: Side
    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """FIN to that side, after what was sent."""

    side: Side


@dataclass(frozen=True, slots=True)
class Abort:
    """RST to both sides."""

    reason: str  # a counter's name


@dataclass(frozen=True, slots=True)
class Skip:
    """The next bytes that come from `side` go to the other as they are.

    `count` of them; None: all, for ever, and the relay forwards that side's FIN too.
    """

    side: Side
    count: int | None


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """One HTTP/2 request with its response, in the terms of agent/exchange.py."""

    trace_id: int
    span_id: int
    parent_id: int
    flags: int
    link: int
    request_first_ns: int  # CLOCK_MONOTONIC, as all; 0: not seen
    request_last_ns: int
    response_first_ns: int
    response_last_ns: int
    request_bytes: int
    response_bytes: int
    status: int
    end: int
    error: int
    method: str
    target: str
    host: str
    user_agent: str
    request_id: str
    client_trace_id: str
    grpc_status: str  # "" where it is no gRPC
    grpc_message: str


@dataclass(frozen=True, slots=True)
class Report:
    """A finished exchange (HTTP/2): for the agent."""

    record: StreamRecord


@dataclass(frozen=True, slots=True)
class Count:
    """Something was skipped or lost."""

    reason: str  # a counter's name


Action = Send | End | Abort | Skip | Report | Count


class Layer(Protocol):
    """A protocol's part of one connection.

    Actions are carried out in order. Of `data` every byte is the layer's to send, a
    Skip speaks of those that are still to come; one that follows takes its place.
    `received` is not called for bytes under a Skip, so never again for a side under
    Skip(None); `ended` and `lost` are.
    """

    def received(self, side: Side, data: bytes) -> list[Action]:
        """Bytes have come from that side."""

    def ended(self, side: Side) -> list[Action]:
        """That side has sent FIN."""

    def lost(self, side: Side) -> list[Action]:
        """That side has sent RST or failed: the last call but for the other's."""

    def drained(self, side: Side) -> list[Action]:
        """What was sent to that side has left our buffer below the low-water mark."""
