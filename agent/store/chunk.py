"""What arrives of one trace at one time, as the database keeps it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from podspan.agent.store.terms import words_of
from podspan.agent.store.zipkin_v2 import ZipkinSpan

# The fastest; four fifths are saved at any level.
DEFLATE_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Spans of one trace, packed, with what the tables say of them."""

    trace_id: bytes
    spans: int
    root_us: int | None  # timestamp of the first span without a parent
    first_us: int | None  # earliest timestamp
    longest_us: int
    words: set[str]
    payload: bytes


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
    """Return a chunk's spans."""
    spans: list[ZipkinSpan] = orjson.loads(zlib.decompress(payload))
    return spans


def _chunk(trace_id: str, spans: list[ZipkinSpan]) -> Chunk:
    timed = [span for span in spans if "timestamp" in span]
    return Chunk(
        trace_id=packed_id(trace_id),
        spans=len(spans),
        root_us=next((s["timestamp"] for s in timed if "parentId" not in s), None),
        first_us=min((span["timestamp"] for span in timed), default=None),
        longest_us=max(span.get("duration", 0) for span in spans),
        words=words_of(spans),
        payload=zlib.compress(orjson.dumps(spans), DEFLATE_LEVEL),
    )
