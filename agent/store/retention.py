"""The oldest traces go, whole, in steps too small for a writer to notice.

Old is what arrived long ago, whatever its spans say: a clock may be wrong, and an
incident of last month, replayed today, is to be looked at today.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from podspan.agent.store.sqlite import Connection

# A clock that was ahead by less makes no difference that anybody notices.
AHEAD_S = 3600

# Names are worth a search for those that are not needed from so many on.
MANY_SERVICES = 10_000

# A step ends with the trace that makes so many spans, some milliseconds.
STEP_SPANS = 2000


@dataclass(frozen=True, slots=True)
class Expired:
    """What a step removed."""

    traces: int = 0
    spans: int = 0

    def __add__(self, other: Expired) -> Expired:
        return Expired(self.traces + other.traces, self.spans + other.spans)


def date_back(db: Connection, now_s: float) -> None:
    """Let the oldest have arrived now where it arrived in the future.

    The clock was ahead then. What came after it would not expire until it does.
    """
    oldest = db.execute("SELECT arrived_s FROM traces ORDER BY no LIMIT 1").fetchone()
    if oldest and oldest[0] > now_s + AHEAD_S:
        db.execute(
            "UPDATE traces SET arrived_s = ?1 WHERE arrived_s > ?1", (int(now_s),)
        )


def expire_older(db: Connection, arrived_before_s: float) -> Expired:
    """Remove some of the traces that arrived before; Expired() when there are none."""
    return _remove(db, STEP_SPANS, arrived_before_s)


def expire_oldest(db: Connection, spans: int = STEP_SPANS) -> Expired:
    """Remove the traces that arrived first, until so many spans are gone."""
    return _remove(db, spans)


def _remove(
    db: Connection, spans: int, arrived_before_s: float = float("inf")
) -> Expired:
    """Remove traces with all they have, and the parts that have none left."""
    removed = Expired()
    while removed.spans < spans:
        oldest = db.execute(
            "SELECT no, spans, arrived_s FROM traces ORDER BY no LIMIT 1"
        ).fetchone()
        if oldest is None or oldest[2] >= arrived_before_s:
            break
        trace, trace_spans, _ = oldest
        db.execute("DELETE FROM traces WHERE no = ?", (trace,))
        db.execute("DELETE FROM chunks WHERE trace = ?", (trace,))
        db.execute("DELETE FROM unsettled WHERE trace = ?", (trace,))
        removed += Expired(1, trace_spans)
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
        _forget_services(db)


def _forget_services(db: Connection) -> None:
    """Forget the services without edges, where there are many."""
    (count,) = db.execute("SELECT count(*) FROM services").fetchone()
    if count > MANY_SERVICES:
        db.execute(
            "DELETE FROM services WHERE no NOT IN"
            " (SELECT parent FROM edges UNION SELECT child FROM edges)"
        )
