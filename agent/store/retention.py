"""The oldest traces go, whole, in steps too small for a writer to notice.

Old is what arrived long ago, whatever its spans say: a clock may be wrong, and an
incident of last month, replayed today, is to be looked at today.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from podspan.agent.store.sqlite import Connection

# Traces or chunks of one step.
STEP_TRACES = 100
STEP_CHUNKS = 500

# Pages given back to the file system in one step.
STEP_PAGES = 256


@dataclass(frozen=True, slots=True)
class Expired:
    """What a step removed."""

    traces: int = 0
    spans: int = 0


def expire_older(db: Connection, arrived_before_s: float) -> Expired:
    """Remove some of the traces that arrived before; Expired() when there are none."""
    old = [trace for trace, arrived_s in _oldest(db) if arrived_s < arrived_before_s]
    return _remove(db, old)


def expire_oldest(db: Connection) -> Expired:
    """Remove some of the traces that arrived first."""
    return _remove(db, [trace for trace, _ in _oldest(db)])


def shrink(db: Connection) -> bool:
    """Give some of the free pages back; False when there are none."""
    db.execute(f"PRAGMA incremental_vacuum({STEP_PAGES})").fetchall()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    return bool(free)


def _oldest(db: Connection) -> list[tuple[int, int]]:
    return db.execute(
        "SELECT no, arrived_s FROM traces ORDER BY no LIMIT ?", (STEP_TRACES,)
    ).fetchall()


def _remove(db: Connection, traces: list[int]) -> Expired:
    """Remove traces with all they have, and the parts that have none left."""
    removed = Expired()
    for trace in traces:
        (spans,) = db.execute(
            "DELETE FROM traces WHERE no = ? RETURNING spans", (trace,)
        ).fetchone()
        gone = db.execute("DELETE FROM chunks WHERE trace = ?", (trace,)).rowcount
        db.execute("DELETE FROM unsettled WHERE trace = ?", (trace,))
        removed = Expired(removed.traces + 1, removed.spans + spans)
        if gone > STEP_CHUNKS:
            break
    if removed.traces:
        _drop_empty_parts(db)
    return removed


def _drop_empty_parts(db: Connection) -> None:
    """Drop the parts whose traces are all gone, except the last, which has yet room."""
    (oldest,) = db.execute("SELECT min(no) FROM traces").fetchone()
    parts = [part for (part,) in db.execute("SELECT part FROM parts ORDER BY part")]
    for part, following in pairwise(parts):
        if oldest is not None and following > oldest:
            break
        db.execute(f"DROP TABLE words_{part}")
        db.execute("DELETE FROM parts WHERE part = ?", (part,))
        db.execute("DELETE FROM edges WHERE part = ?", (part,))
