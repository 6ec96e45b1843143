"""What is worked out once for a trace, when it has been quiet for a while: its links.

The calls of many traces are kept as sums, by when the traces started. A span that
comes later makes its trace unsettled again: what was summed of it is then taken out,
worked out again from the chunks it had, and put in anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from podspan.agent.store.chunk import unpack
from podspan.agent.store.edges import Tallies, Tally, add_links
from podspan.agent.store.ingest import part_of
from podspan.agent.store.linker import link_trace
from podspan.agent.store.logscale import bucket_of, middle_of
from podspan.agent.store.query import start_us
from podspan.agent.store.search import spans_of
from podspan.agent.store.sqlite import Connection
from podspan.agent.store.summary import ServiceSummary, Summary, summarise
from podspan.agent.store.zipkin_v2 import ZipkinSpan, merge

# A trace is settled when nothing came for so long.
QUIET_S = 5.0

# The sums are kept by the minute.
SLOT_US = 60 * 1_000_000

# What is counted of an edge, besides the buckets of durations.
CALLS, ERRORS = -1, -2

# Summaries of larger traces are kept.
SUMMARY_SPANS = 200

# So many traces in a window are counted one by one, to the microsecond.
EXACT_TRACES = 1000

UNSETTLED_SQL = """
SELECT unsettled.trace, unsettled.upto, traces.linked_upto
FROM unsettled JOIN traces ON traces.no = unsettled.trace
WHERE unsettled.seen_s <= ? ORDER BY unsettled.trace LIMIT ?
"""
ADD_COUNT = """
INSERT INTO edges (part, slot, parent, child, what, count) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET count = count + excluded.count
"""
SUMS = """
SELECT parents.name, children.name, sums.what, sums.count FROM (
    SELECT parent, child, what, sum(count) AS count FROM edges
    WHERE part IN (SELECT part FROM parts) AND slot BETWEEN ? AND ?
    GROUP BY parent, child, what HAVING sum(count) > 0
) AS sums
JOIN services AS parents ON parents.no = parent
JOIN services AS children ON children.no = child
"""

Key = tuple[int, int, str, str, int]  # part, slot, parent, child, what


@dataclass(frozen=True, slots=True)
class Settled:
    """What one trace adds to the sums, as of its last chunk."""

    trace: int
    upto: int
    counts: Counter[Key]
    summary: bytes | None


def work_out(db: Connection, seen_before_s: float, at_most: int) -> list[Settled]:
    """Read quiet traces that are not settled, and work out what they add."""
    rows = db.execute(UNSETTLED_SQL, (seen_before_s, at_most)).fetchall()
    return [_work_out(db, *row) for row in rows]


def record(db: Connection, settled: Sequence[Settled]) -> None:
    """Store what was worked out, except of traces that changed meanwhile."""
    counts: Counter[Key] = Counter()
    for trace in settled:
        still = db.execute(
            "DELETE FROM unsettled WHERE trace = ? AND upto = ?",
            (trace.trace, trace.upto),
        )
        if still.rowcount:
            # Not update(), which adds, too, but += would drop what is taken out.
            counts.update(trace.counts)
            db.execute(
                "UPDATE traces SET linked_upto = ?, summary = ? WHERE no = ?",
                (trace.upto, trace.summary, trace.trace),
            )
    services: dict[str, int] = {}
    for (part, slot, parent, child, what), count in counts.items():
        if count:
            numbers = [_service_no(db, services, name) for name in (parent, child)]
            db.execute(ADD_COUNT, (part, slot, *numbers, what, count))


def tallies(db: Connection, first_us: int, last_us: int) -> Tallies:
    """Return the calls of all traces that started in the window.

    Where these are many, to the minute, and without the latest few seconds' beyond
    EXACT_TRACES traces.
    """
    window = first_us, last_us
    result: Tallies = {}
    few = db.execute(
        "SELECT no FROM traces WHERE start_us BETWEEN ? AND ? LIMIT ?",
        (*window, EXACT_TRACES + 1),
    ).fetchall()
    if len(few) > EXACT_TRACES:
        _add_sums(db, result, window)
        few = db.execute(
            "SELECT no FROM unsettled JOIN traces ON no = trace"
            " WHERE linked_upto = 0 AND start_us BETWEEN ? AND ? LIMIT ?",
            (*window, EXACT_TRACES),
        ).fetchall()
    for (trace,) in few:
        add_links(result, link_trace(merge(spans_of(db, trace))))
    return result


def summary_of(db: Connection, trace: int) -> Summary:
    """Return the trace's summary: as kept, or made now."""
    (kept,) = db.execute("SELECT summary FROM traces WHERE no = ?", (trace,)).fetchone()
    return _summary(kept) if kept else summarise(merge(spans_of(db, trace)))


def _work_out(db: Connection, trace: int, upto: int, linked_upto: int) -> Settled:
    before: list[ZipkinSpan] = []
    now: list[ZipkinSpan] = []
    for chunk_upto, payload in db.execute(
        "SELECT upto, payload FROM chunks WHERE trace = ? ORDER BY upto", (trace,)
    ):
        spans = unpack(payload)
        now += spans
        if chunk_upto <= linked_upto:
            before += spans
    merged = merge(now)
    counts = _counts(trace, now, merged)
    if before:
        counts.subtract(_counts(trace, before, merge(before)))
    large = len(now) > SUMMARY_SPANS
    summary = orjson.dumps(asdict(summarise(merged))) if large else None
    return Settled(trace, upto, counts, summary)


def _counts(
    trace: int, arrived: Sequence[ZipkinSpan], merged: Sequence[ZipkinSpan]
) -> Counter[Key]:
    """Return what to add to the sums; nothing for a trace without a time."""
    counts: Counter[Key] = Counter()
    started_us = start_us(arrived)
    if started_us is None:
        return counts
    place = part_of(trace), started_us // SLOT_US
    for link in link_trace(merged):
        edge = *place, link.parent, link.child
        counts[*edge, CALLS] += link.calls
        counts[*edge, ERRORS] += link.errors
        for duration_us in link.durations_us:
            counts[*edge, bucket_of(duration_us)] += 1
    return counts


def _service_no(db: Connection, known: dict[str, int], name: str) -> int:
    if name not in known:
        db.execute("INSERT OR IGNORE INTO services (name) VALUES (?)", (name,))
        row = db.execute("SELECT no FROM services WHERE name = ?", (name,)).fetchone()
        known[name] = row[0]
    return known[name]


def _add_sums(db: Connection, result: Tallies, window: tuple[int, int]) -> None:
    slots = [at_us // SLOT_US for at_us in window]
    for parent, child, what, count in db.execute(SUMS, slots):
        tally = result.setdefault((parent, child), Tally())
        if what == CALLS:
            tally.calls += count
        elif what == ERRORS:
            tally.errors += count
        else:
            tally.durations[middle_of(what)] += count


def _summary(kept: bytes) -> Summary:
    fields: dict[str, Any] = orjson.loads(kept)
    services = tuple(ServiceSummary(**service) for service in fields.pop("services"))
    return Summary(**fields, services=services)
