"""What is worked out once for a trace, when it has been quiet for a while: its links.

The calls of many traces are kept as sums, by when the traces started. A span that
comes later makes its trace unsettled again: what was summed of it is then taken out,
worked out again from the chunks it had, and put in anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from podspan.agent.store.chunk import unpack
from podspan.agent.store.edges import Edge, Tallies, Tally, add_links
from podspan.agent.store.linker import Link, link_trace
from podspan.agent.store.logscale import bucket_of, middle_of
from podspan.agent.store.query import start_us
from podspan.agent.store.search import MOST_SPANS, spans_of
from podspan.agent.store.sqlite import Connection
from podspan.agent.store.summary import ServiceSummary, Summary, summarise
from podspan.agent.store.zipkin_v2 import ZipkinSpan, merge

# A trace is settled when nothing came for so long.
QUIET_S = 5.0

# A step ends with the trace that makes so many spans: closing waits for it.
STEP_SPANS = 10_000

# The sums are kept by the minute, and by the hour for windows of days.
MINUTE_US = 60 * 1_000_000
HOUR_US = 60 * MINUTE_US
WIDTHS_US = (MINUTE_US, HOUR_US)

# Summaries of larger traces are kept.
SUMMARY_SPANS = 200

# So much in a window is counted trace by trace, to the microsecond.
EXACT_TRACES = 1000
EXACT_SPANS = 20_000

UNSETTLED = """
SELECT unsettled.trace, unsettled.upto, traces.linked_upto, traces.spans
FROM unsettled JOIN traces ON traces.no = unsettled.trace
WHERE unsettled.seen_s NOT BETWEEN ? AND ? ORDER BY unsettled.trace LIMIT ?
"""
NEVER_SETTLED = """
SELECT traces.no, traces.spans FROM unsettled JOIN traces ON traces.no = unsettled.trace
WHERE traces.linked_upto = 0 AND traces.start_us BETWEEN ? AND ? LIMIT ?
"""
SUMS = """
SELECT parents.name, children.name, calls, errors, durations FROM edges
JOIN services AS parents ON parents.no = parent
JOIN services AS children ON children.no = child
WHERE part IN (SELECT part FROM parts) AND width_us = ? AND slot BETWEEN ? AND ?
"""
PART_OF = "SELECT max(part) FROM parts WHERE part <= ?"
PLACE = "part = ? AND width_us = ? AND slot = ? AND parent = ? AND child = ?"
GET_SUM = f"SELECT calls, errors, durations FROM edges WHERE {PLACE}"  # noqa: S608
SET_SUM = "INSERT OR REPLACE INTO edges VALUES (?, ?, ?, ?, ?, ?, ?, ?)"

Slot = tuple[int, int, int]  # part, width_us, slot


@dataclass(frozen=True, slots=True)
class Settled:
    """What one trace adds to the sums, as of its last chunk."""

    trace: int
    upto: int
    links: list[Link]
    start_us: int | None
    counted_links: list[Link]  # what it added when it was settled before
    counted_start_us: int | None
    summary: bytes | None


def work_out(
    db: Connection, now_s: float, quiet_s: float, at_most: int
) -> list[Settled]:
    """Read traces quiet for so long that are not settled; work out what they add.

    What was seen in the future is quiet, too: the clock was ahead then.
    """
    rows = db.execute(UNSETTLED, (now_s - quiet_s, now_s + quiet_s, at_most)).fetchall()
    settled = []
    left = STEP_SPANS
    for trace, upto, linked_upto, spans in rows:
        settled.append(_work_out(db, trace, upto, linked_upto))
        left -= spans
        if left <= 0:
            break
    return settled


def record(db: Connection, settled: Iterable[Settled]) -> None:
    """Store what was worked out, except of traces that changed meanwhile."""
    changes: dict[Slot, Tallies] = {}
    for trace in settled:
        unchanged = db.execute(
            "DELETE FROM unsettled WHERE trace = ? AND upto = ?",
            (trace.trace, trace.upto),
        ).rowcount
        if not unchanged:
            continue
        db.execute(
            "UPDATE traces SET linked_upto = ?, summary = ? WHERE no = ?",
            (trace.upto, trace.summary, trace.trace),
        )
        (part,) = db.execute(PART_OF, (trace.trace,)).fetchone()
        for slot in _slots_of(part, trace.counted_start_us):
            add_links(changes.setdefault(slot, {}), trace.counted_links, -1)
        for slot in _slots_of(part, trace.start_us):
            add_links(changes.setdefault(slot, {}), trace.links)
    _change_sums(db, changes)


def tallies(db: Connection, first_us: int, last_us: int) -> Tallies:
    """Return the calls of all traces that started in the window.

    Where these are many, to the minute, and of those not settled some only.
    """
    result: Tallies = {}
    few = db.execute(
        "SELECT no, spans FROM traces WHERE start_us BETWEEN ? AND ? LIMIT ?",
        (first_us, last_us, EXACT_TRACES + 1),
    ).fetchall()
    if len(few) > EXACT_TRACES or sum(spans for _, spans in few) > EXACT_SPANS:
        for width_us, first, last in _cover(first_us, last_us):
            _add_sums(db, result, width_us, first, last)
        few = db.execute(NEVER_SETTLED, (first_us, last_us, EXACT_TRACES)).fetchall()
    left = EXACT_SPANS
    for trace, spans in few:
        left -= spans
        if left < 0:
            break
        add_links(result, link_trace(merge(spans_of(db, trace))))
    return result


def summary_of(db: Connection, trace: int) -> Summary:
    """Return the trace's summary: as kept, or made now."""
    row = db.execute(
        "SELECT summary FROM traces WHERE no = ? AND NOT EXISTS"
        " (SELECT * FROM unsettled WHERE trace = no)",
        (trace,),
    ).fetchone()
    if row and row[0]:
        return _read_summary(row[0])
    return summarise(merge(spans_of(db, trace)))


def _work_out(db: Connection, trace: int, upto: int, linked_upto: int) -> Settled:
    spans: list[ZipkinSpan] = []
    counted_spans = 0
    for chunk_upto, payload in db.execute(
        "SELECT upto, payload FROM chunks WHERE trace = ? ORDER BY upto", (trace,)
    ):
        spans += unpack(payload)
        if chunk_upto <= linked_upto:
            counted_spans = len(spans)
        if len(spans) >= MOST_SPANS:
            break
    counted = spans[:counted_spans]
    merged = merge(spans)
    large = len(spans) > SUMMARY_SPANS
    return Settled(
        trace=trace,
        upto=upto,
        links=link_trace(merged),
        start_us=start_us(spans),
        counted_links=link_trace(merge(counted)) if counted else [],
        counted_start_us=start_us(counted),
        summary=orjson.dumps(asdict(summarise(merged))) if large else None,
    )


def _slots_of(part: int, started_us: int | None) -> list[Slot]:
    """Return where a trace is counted; one without a time nowhere."""
    if started_us is None:
        return []
    return [(part, width_us, started_us // width_us) for width_us in WIDTHS_US]


def _cover(first_us: int, last_us: int) -> Iterator[tuple[int, int, int]]:
    """Yield (width, first slot, last slot): whole hours, and minutes around them."""
    first_hour, end_hour = -(-first_us // HOUR_US), (last_us + 1) // HOUR_US
    first_minute, last_minute = first_us // MINUTE_US, last_us // MINUTE_US
    if first_hour >= end_hour:
        yield MINUTE_US, first_minute, last_minute
        return
    minutes = HOUR_US // MINUTE_US
    yield MINUTE_US, first_minute, first_hour * minutes - 1
    yield HOUR_US, first_hour, end_hour - 1
    yield MINUTE_US, end_hour * minutes, last_minute


def _change_sums(db: Connection, changes: dict[Slot, Tallies]) -> None:
    numbers: dict[str, int] = {}
    for slot, tallies_ in changes.items():
        for edge, change in tallies_.items():
            place = *slot, *(_service_no(db, numbers, name) for name in edge)
            row = db.execute(GET_SUM, place).fetchone()
            calls, errors, buckets = _read_sum(*row) if row else (0, 0, Counter())
            for duration_us, count in change.durations.items():
                buckets[bucket_of(duration_us)] += count
            durations = [number for item in (+buckets).items() for number in item]
            calls, errors = calls + change.calls, errors + change.errors
            db.execute(SET_SUM, (*place, calls, errors, orjson.dumps(durations)))


def _service_no(db: Connection, known: dict[str, int], name: str) -> int:
    if name not in known:
        db.execute("INSERT OR IGNORE INTO services (name) VALUES (?)", (name,))
        row = db.execute("SELECT no FROM services WHERE name = ?", (name,)).fetchone()
        known[name] = row[0]
    return known[name]


def _add_sums(
    db: Connection, result: Tallies, width_us: int, first: int, last: int
) -> None:
    buckets: dict[Edge, Counter[int]] = {}
    for parent, child, calls, errors, durations in db.execute(
        SUMS, (width_us, first, last)
    ):
        edge = parent, child
        tally = result.setdefault(edge, Tally())
        tally.calls += calls
        tally.errors += errors
        total = buckets.setdefault(edge, Counter())
        numbers = orjson.loads(durations)
        for bucket, count in zip(numbers[::2], numbers[1::2], strict=True):
            total[bucket] += count
    for edge, total in buckets.items():
        durations = result[edge].durations
        for bucket, count in total.items():
            durations[middle_of(bucket)] += count


def _read_sum(
    calls: int, errors: int, durations: bytes
) -> tuple[int, int, Counter[int]]:
    numbers: Sequence[int] = orjson.loads(durations)
    buckets = Counter(dict(zip(numbers[::2], numbers[1::2], strict=True)))
    return calls, errors, buckets


def _read_summary(kept: bytes) -> Summary:
    fields: dict[str, Any] = orjson.loads(kept)
    services = tuple(ServiceSummary(**service) for service in fields.pop("services"))
    return Summary(**fields, services=services)
