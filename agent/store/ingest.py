"""Chunks into tables; one transaction's work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podspan.agent.store.chunk import Chunk
from podspan.agent.store.names import Kind, Row
from podspan.agent.store.sqlite import Connection

# Traces of one index of words. Fewer cost each search more, more cost expiry more.
PART_TRACES = 16 * 1024

# A column of a table without content holds the words, and nothing can be asked but
# which row has which: detail=none is the smallest form. A row may be inserted again
# with more words, since nothing of it but the words is stored.
WORDS_TABLE = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS words_{} USING fts5(words, content='',"
    " columnsize=0, detail=none, tokenize='ascii')"
)

# What is known of a trace's start never changes for being told twice.
ADD_TRACE = """
INSERT INTO traces (id, arrived_s, root_us, first_us, longest_us, spans)
VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    root_us = coalesce(root_us, excluded.root_us),
    first_us = coalesce(min(first_us, excluded.first_us), first_us, excluded.first_us),
    longest_us = max(longest_us, excluded.longest_us),
    spans = spans + excluded.spans
RETURNING no, spans
"""
WIDEN_PART = """
INSERT INTO parts (part, first_us, last_us) VALUES (?, ?, ?)
ON CONFLICT (part) DO UPDATE SET
    first_us = coalesce(min(first_us, excluded.first_us), first_us, excluded.first_us),
    last_us = coalesce(max(last_us, excluded.last_us), last_us, excluded.last_us)
"""
NAME = "INSERT OR REPLACE INTO names (kind, owner, name, hour) VALUES (?, ?, ?, ?)"


def part_of(trace_no: int) -> int:
    """Return the part that a trace belongs to."""
    return trace_no // PART_TRACES


def insert(db: Connection, chunks: Sequence[Chunk], now_s: float) -> int:
    """Store the chunks in this order; return how many traces are new."""
    upto = arrived(db)
    new = 0
    rows = []
    words: dict[int, set[str]] = {}
    unsettled = {}
    for chunk in chunks:
        trace, spans = db.execute(
            ADD_TRACE,
            (
                chunk.trace_id,
                int(now_s),
                chunk.root_us,
                chunk.first_us,
                chunk.longest_us,
                chunk.spans,
            ),
        ).fetchone()
        new += spans == chunk.spans
        upto += chunk.spans
        rows.append((upto, trace, chunk.spans, chunk.payload))
        words.setdefault(trace, set()).update(chunk.words)
        unsettled[trace] = (trace, upto, now_s)
        _widen(db, part_of(trace), chunk)
    db.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?)", rows)
    db.executemany(
        "INSERT OR REPLACE INTO unsettled VALUES (?, ?, ?)", unsettled.values()
    )
    _index(db, words)
    return new


def arrived(db: Connection) -> int:
    """Return how many spans were ever stored, which is also the last chunk's key."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'chunks'").fetchone()
    return int(row[0]) if row else 0


def insert_names(db: Connection, rows: Iterable[Row]) -> None:
    """Store names; forget the values of a tag that now has too many."""
    for row in rows:
        db.execute(NAME, row)
        if row[0] == Kind.OPEN_TAG:
            db.execute(
                "DELETE FROM names WHERE kind = ? AND owner = ?", (Kind.VALUE, row[2])
            )


def _widen(db: Connection, part: int, chunk: Chunk) -> None:
    starts = [at_us for at_us in (chunk.root_us, chunk.first_us) if at_us is not None]
    first_us, last_us = min(starts, default=None), max(starts, default=None)
    db.execute(WIDEN_PART, (part, first_us, last_us))


def _index(db: Connection, words: dict[int, set[str]]) -> None:
    """Add to the traces' words, in the order of rows: FTS5 writes that in one piece."""
    part = None
    for trace in sorted(words):
        if part != part_of(trace):
            part = part_of(trace)
            db.execute(WORDS_TABLE.format(part))
        db.execute(
            f"INSERT INTO words_{part} (rowid, words) VALUES (?, ?)",  # noqa: S608
            (trace, " ".join(words[trace])),
        )
