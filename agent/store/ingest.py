"""Chunks into tables; one transaction's work."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from podspan.agent.store.chunk import Chunk
from podspan.agent.store.names import Kind, Row
from podspan.agent.store.sqlite import Connection
from podspan.agent.store.terms import text_of

# A part ends at so many traces: more, smaller ones make a search ask more often, and
# fewer, larger ones make it read more at a time.
PART_TRACES = 16 * 1024

# And at so much of the whole database: what is expired leaves its words until the rest
# of its part is expired.
PART_SHARE = 32

# A column of a table without content holds the words, and nothing can be asked but
# which row has which: detail=none is the smallest form. A row may be inserted again
# with more words, since nothing of it but the words is stored.
WORDS_TABLE = (
    "CREATE VIRTUAL TABLE words_{} USING fts5(words, content='',"
    " columnsize=0, detail=none, tokenize='ascii')"
)
# FTS5 merges so many pieces of an index at a time, the most it can: the fewer times is
# each word written again.
MERGE = "INSERT INTO words_{0} (words_{0}, rank) VALUES ('automerge', 16)"

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
UPDATE parts SET
    first_us = coalesce(min(first_us, ?1), first_us, ?1),
    last_us = coalesce(max(last_us, ?2), last_us, ?2)
WHERE part = ?3
"""
NAME = "INSERT OR REPLACE INTO names (kind, owner, name, hour) VALUES (?, ?, ?, ?)"


def insert(
    db: Connection, chunks: Sequence[Chunk], now_s: float, max_bytes: int
) -> int:
    """Store the chunks in this order; return how many traces are new."""
    parts = _parts(db, max_bytes // PART_SHARE)
    upto = arrived(db)
    new = 0
    rows = []
    words: dict[int, set[int]] = {}
    unsettled = {}
    starts: dict[int, list[int]] = {}
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
        for piece in chunk.pieces:
            upto += piece.spans
            rows.append((upto, trace, piece.spans, piece.durations, piece.payload))
        words.setdefault(trace, set()).update(chunk.words)
        unsettled[trace] = (trace, upto, now_s)
        starts.setdefault(_part_of(parts, trace), []).extend(chunk.starts_us())
    db.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?)", rows)
    db.executemany(
        "INSERT OR REPLACE INTO unsettled VALUES (?, ?, ?)", unsettled.values()
    )
    _index(db, parts, words)
    for part, starts_us in starts.items():
        if starts_us:
            db.execute(WIDEN_PART, (min(starts_us), max(starts_us), part))
    payload_bytes = sum(len(payload) for *_, payload in rows)
    db.execute(
        "UPDATE parts SET bytes = bytes + ? WHERE part = ?", (payload_bytes, parts[-1])
    )
    return new


def _parts(db: Connection, part_bytes: int) -> list[int]:
    """Return the parts, the last of which has room."""
    last_trace = _sequence(db, "traces")
    rows = db.execute("SELECT part, bytes FROM parts ORDER BY part").fetchall()
    parts = [part for part, _ in rows]
    if (
        not rows
        or rows[-1][1] >= part_bytes
        or last_trace - parts[-1] >= PART_TRACES - 1
    ):
        part = last_trace + 1
        db.execute(WORDS_TABLE.format(part))
        db.execute(MERGE.format(part))
        db.execute("INSERT INTO parts (part, bytes) VALUES (?, 0)", (part,))
        parts.append(part)
    return parts


def _part_of(parts: Sequence[int], trace: int) -> int:
    return parts[bisect_right(parts, trace) - 1]


def arrived(db: Connection) -> int:
    """Return how many spans were ever stored, which is also the last chunk's key."""
    return _sequence(db, "chunks")


def _sequence(db: Connection, table: str) -> int:
    """Return the largest key that was ever given."""
    row = db.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)
    ).fetchone()
    return int(row[0]) if row else 0


def insert_names(db: Connection, rows: Iterable[Row]) -> None:
    """Store names; forget the values of a tag that now has too many."""
    for row in rows:
        db.execute(NAME, row)
        if row[0] == Kind.OPEN_TAG:
            db.execute(
                "DELETE FROM names WHERE kind = ? AND owner = ?", (Kind.VALUE, row[2])
            )


def _index(db: Connection, parts: Sequence[int], words: dict[int, set[int]]) -> None:
    """Add to the traces' words, in the order of rows: FTS5 writes that in one piece."""
    for trace in sorted(words):
        db.execute(
            f"INSERT INTO words_{_part_of(parts, trace)} (rowid, words)"  # noqa: S608
            " VALUES (?, ?)",
            (trace, text_of(words[trace])),
        )
