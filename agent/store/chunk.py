"""What arrives of one trace at one time, as the database keeps it."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from podspan.agent.store.query import service_at
from podspan.agent.store.terms import words_of
from podspan.agent.store.zipkin_v2 import ZipkinSpan

# The fastest; four fifths are saved at any level.
DEFLATE_LEVEL = 1

# A search stops to read a trace where it has seen enough; so large ones are in pieces.
PIECE_SPANS = 250

# Of so many spans reading takes long enough to be avoided.
MANY_SPANS = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the spans, packed."""

    spans: int
    durations: bytes | None
    payload: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Spans of one trace, with what the tables say of them."""

    trace_id: bytes
    spans: int
    root_us: int | None  # timestamp of the first span without a parent
    first_us: int | None  # earliest timestamp
    longest_us: int
    words: set[int]
    pieces: list[Piece]

    def starts_us(self) -> list[int]:
        """Return what may be the trace's start, or become it."""
        return [at_us for at_us in (self.root_us, self.first_us) if at_us is not None]


def chunks_of(spans: Sequence[ZipkinSpan]) -> list[Chunk]:
    """Return the spans by trace, each trace's in their order."""
    by_trace: dict[str, list[ZipkinSpan]] = {}
    for span in spans:
        by_trace.setdefault(span["traceId"], []).append(span)
    return [_chunk(trace_id, group) for trace_id, group in by_trace.items()]


def packed_id(trace_id: str) -> bytes:
    """Return the trace id's 8 or 16 bytes; none for what is no trace id."""
    try:
        return bytes.fromhex(trace_id) if len(trace_id) in (16, 32) else b""
    except ValueError:
        return b""


def unpack(payload: bytes) -> list[ZipkinSpan]:
    """Return a piece's spans."""
    spans: list[ZipkinSpan] = orjson.loads(zlib.decompress(payload))
    return spans


def has_duration(
    durations: bytes, service: str, min_us: int, max_us: int | None
) -> bool:
    """Tell whether a span of the service, or of any for "", took so long."""
    by_service: dict[str, list[int]] = orjson.loads(durations)
    several = [by_service.get(service, [])] if service else by_service.values()
    for sorted_us in several:
        at = bisect_left(sorted_us, min_us)
        if at < len(sorted_us) and (max_us is None or sorted_us[at] <= max_us):
            return True
    return False


def _chunk(trace_id: str, spans: list[ZipkinSpan]) -> Chunk:
    timed = [span for span in spans if "timestamp" in span]
    return Chunk(
        trace_id=packed_id(trace_id),
        spans=len(spans),
        root_us=next((s["timestamp"] for s in timed if "parentId" not in s), None),
        first_us=min((span["timestamp"] for span in timed), default=None),
        longest_us=max(span.get("duration", 0) for span in spans),
        words=words_of(spans),
        pieces=[
            _piece(spans[first : first + PIECE_SPANS])
            for first in range(0, len(spans), PIECE_SPANS)
        ],
    )


def _piece(spans: list[ZipkinSpan]) -> Piece:
    payload = zlib.compress(orjson.dumps(spans), DEFLATE_LEVEL)
    durations = _durations(spans) if len(spans) >= MANY_SPANS else None
    return Piece(len(spans), durations, payload)


def _durations(spans: list[ZipkinSpan]) -> bytes:
    by_service: dict[str, list[int]] = {}
    for span in spans:
        if duration_us := span.get("duration"):
            by_service.setdefault(service_at(span, "local"), []).append(duration_us)
    for several in by_service.values():
        several.sort()
    return orjson.dumps(by_service)
