"""Which headers a request's context becomes, as bpf/request.c would write them.

Headers in, edits out. Where the kernel hides a line by writing over its name, the line
is removed here; every value is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from podspan.agent.b3 import Header


class Direction(Enum):
    """Which way a redirected connection crosses the pod's border."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


@dataclass(frozen=True, slots=True)
class Given:
    """A context that is decided: by the kernel (`struct handed`), or here."""

    trace_id: int  # 128 bit
    span_id: int
    parent_id: int  # 0: root
    flags: int  # FLAG_ of agent/exchange.py
    link: int
    request_id: bytes = b""  # 36 characters, or none


@dataclass(frozen=True, slots=True)
class Propagation:
    """What the user can choose of the headers: see agent/config.py."""

    span_ids: str = "shared"
    unsampled: str = "0"
    propagate: frozenset[str] = frozenset({"b3multi"})
    sampling: float = 100.0  # per cent, the pod's


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to a head; names are in lower case.

    Of each name in `values` the first line gets the value and further ones go; where
    there is none, one is appended, in this order. All lines of a name in `remove` go.
    """

    values: tuple[Header, ...]
    remove: frozenset[bytes]


def edit_for(headers: Iterable[Header], given: Given, options: Propagation) -> Edit:
    """Return what bpf/request.c would have written for this context."""
    raise NotImplementedError


def apply_to_headers(headers: Iterable[Header], edit: Edit) -> list[Header]:
    """Return the headers after the edit."""
    raise NotImplementedError


def new_root(
    headers: Iterable[Header], options: Propagation, random64: Callable[[], int]
) -> Given:
    """Return a context for a head that has none: Envoy's rules for the decision."""
    raise NotImplementedError


def context_of_stream(
    headers: Iterable[Header],
    direction: Direction,
    options: Propagation,
    random64: Callable[[], int],
) -> Given:
    """Return the context of an HTTP/2 request, as bpf/context.h decides it."""
    raise NotImplementedError
