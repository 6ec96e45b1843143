"""Which traces a query asks for, newest first, as far as one wants to know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

from podspan.agent.store.chunk import has_duration, unpack
from podspan.agent.store.query import Query, conditions, unmet
from podspan.agent.store.sqlite import Connection
from podspan.agent.store.terms import alternatives, text_of
from podspan.agent.store.zipkin_v2 import ZipkinSpan

# Read of one trace, and for one answer: they take a kilobyte and more each. A tracer
# that is wrong may give all its spans one trace id.
MOST_SPANS = 100_000

BY_START = """
SELECT no FROM traces WHERE start_us BETWEEN ? AND ? ORDER BY start_us DESC, no DESC
"""
PARTS = """
SELECT part, last_us FROM parts WHERE last_us >= ? AND first_us <= ?
ORDER BY last_us DESC
"""
# The words first, then the rows: the planner cannot know that they are few.
BY_WORDS = """
SELECT traces.start_us, traces.no
FROM words_{part} CROSS JOIN traces ON traces.no = words_{part}.rowid
WHERE words_{part} MATCH ? AND traces.start_us BETWEEN ? AND ?
"""


def found(db: Connection, query: Query) -> Iterator[int]:
    """Return the numbers of the traces that match, the latest start first."""
    wanted = conditions(query)
    if not wanted:
        for (trace,) in db.execute(BY_START, (query.first_us, query.last_us)):
            yield trace
        return
    for trace in _candidates(db, query):
        if not _may_last(db, query, trace):
            continue
        left = wanted
        for spans in chunks(db, trace):
            left = unmet(left, spans)
            if not left:
                yield trace
                break


def chunks(db: Connection, trace: int) -> Iterator[list[ZipkinSpan]]:
    """Return a trace's spans in the order they arrived, piece by piece."""
    for (payload,) in db.execute(
        "SELECT payload FROM chunks WHERE trace = ? ORDER BY upto", (trace,)
    ):
        yield unpack(payload)


def spans_of(db: Connection, trace: int) -> list[ZipkinSpan]:
    """Return a trace's spans in the order they arrived; the first MOST_SPANS."""
    spans: list[ZipkinSpan] = []
    for piece in chunks(db, trace):
        spans += piece
        if len(spans) >= MOST_SPANS:
            break
    return spans[:MOST_SPANS]


def answer_of(db: Connection, traces: Iterable[int]) -> list[list[ZipkinSpan]]:
    """Return the traces' spans, up to the trace that makes MOST_SPANS."""
    answer = []
    left = MOST_SPANS
    for trace in traces:
        answer.append(spans_of(db, trace))
        left -= len(answer[-1])
        if left <= 0:
            break
    return answer


def _candidates(db: Connection, query: Query) -> Iterator[int]:
    """Return the traces that have the query's words, the latest start first.

    A part is only asked when what the parts before it gave does not come first.
    """
    wanted = alternatives(query)
    if not all(wanted):
        return
    expression = _match_expression(wanted)
    waiting: list[tuple[int, int]] = []  # a heap, of what sorts last negated
    window = query.first_us, query.last_us
    for part, last_us in db.execute(PARTS, window).fetchall():
        while waiting and -waiting[0][0] > last_us:
            yield -heappop(waiting)[1]
        sql = BY_WORDS.format(part=part)
        for start_us, trace in db.execute(sql, (expression, *window)):
            heappush(waiting, (-start_us, -trace))
    while waiting:
        yield -heappop(waiting)[1]


def _may_last(db: Connection, query: Query, trace: int) -> bool:
    """Tell whether the trace may have a duration that is asked for.

    Durations have a word for many, so that here alone the words are often wrong; and a
    trace of many spans, which has all the words, takes long to read.
    """
    if query.min_duration_us is None:
        return True
    asked = query.service, query.min_duration_us, query.max_duration_us
    return any(
        durations is None or has_duration(durations, *asked)
        for (durations,) in db.execute(
            "SELECT durations FROM chunks WHERE trace = ?", (trace,)
        )
    )


def _match_expression(wanted: list[list[int]]) -> str:
    """Return FTS5's expression for a word of each list."""
    return " AND ".join(
        "(" + text_of(words).replace(" ", " OR ") + ")" for words in wanted
    )
