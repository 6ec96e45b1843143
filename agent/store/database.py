"""Traces in a database file: what the server writes to and asks.

sqlite      the file, its schema, its connections; the only importer of sqlite3
query       what is asked      summary   a trace in short      edges   calls counted
chunk       spans packed       terms     their words for the index
ingest      chunks in          search    traces out
settle      links, worked out when a trace is quiet
retention   the oldest out     names     what a person may choose from

A part that only computes has no use of a database: query, terms, logscale, chunk,
names, summary and edges.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from podspan.agent.errors import StoreError
from podspan.agent.store import ingest, retention, search, settle
from podspan.agent.store.chunk import Chunk, chunks_of, packed_id, unpack
from podspan.agent.store.edges import EdgeStats, stats_of
from podspan.agent.store.names import Kind, Names, hour_of
from podspan.agent.store.query import Query
from podspan.agent.store.sqlite import Connection, File, bytes_of
from podspan.agent.store.summary import Summary
from podspan.agent.store.zipkin_v2 import ZipkinSpan

log = logging.getLogger(__name__)

T = TypeVar("T")

# How often the database's own thread looks for something to do.
REST_S = 1.0

# Traces that are settled in one transaction.
SETTLE_TRACES = 256

# While there is something to settle, it rests so many times as long as it works, so
# that who adds spans is not held up.
IDLE = 3

# Expiry by size starts before the size is reached, so that it never is.
FULL_SHARE = 0.9


@dataclass(slots=True)
class _Batch:
    """What one caller of `add` waits for."""

    spans: Sequence[ZipkinSpan]
    chunks: list[Chunk]
    done: bool = False
    error: StoreError | None = None


class _Counts:
    """How much there is, and since the start how much expired."""

    def __init__(self, spans: int, traces: int) -> None:
        self._lock = threading.Lock()
        self._spans = spans
        self._traces = traces
        self._expired = retention.Expired()

    def store(self, new_traces: int, spans: int) -> None:
        with self._lock:
            self._traces += new_traces
            self._spans += spans

    def expire(self, removed: retention.Expired) -> None:
        with self._lock:
            self._traces -= removed.traces
            self._spans -= removed.spans
            self._expired += removed

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return {
                "spans": self._spans,
                "traces": self._traces,
                "expired_spans": self._expired.spans,
                "expired_traces": self._expired.traces,
            }


class Database:
    """Traces in a file, until `close`; for any thread.

    Readers see what was committed when they began, and wait for nobody.
    """

    def __init__(self, path: Path, *, max_age_s: float, max_bytes: int) -> None:
        """Open the file, or make it; raise StoreError."""
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._file = File(path, max_bytes=max_bytes)
        self._room_bytes = int(max_bytes * FULL_SHARE) - self._file.log_most_bytes
        self._pending: list[_Batch] = []
        self._pending_lock = threading.Lock()
        self._turn = threading.Lock()  # to commit what is pending
        try:
            with self._file.reading() as db:
                self._names = _names(db)
                self._names_since = 0  # the hour
                self._counts = _Counts(
                    *db.execute(
                        "SELECT coalesce(sum(spans), 0), count(*) FROM traces"
                    ).fetchone()
                )
        except StoreError:
            self._file.close()
            raise
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_house, name="podspan-store", daemon=True
        )
        self._thread.start()

    def add(self, spans: Sequence[ZipkinSpan]) -> None:
        """Store the spans; return when they are committed.

        Callers that come while another's spans are written share the next transaction.
        Raises StoreError; then none of the spans is kept.
        """
        if not spans:
            return
        batch = _Batch(spans, chunks_of(spans))
        with self._pending_lock:
            self._pending.append(batch)
        # Whoever gets to write writes for all who wait; `done` tells the others.
        with self._turn:
            if not batch.done:
                with self._pending_lock:
                    batches, self._pending = self._pending, []
                self._commit(batches)
        if batch.error:
            raise batch.error

    def _commit(self, batches: Sequence[_Batch]) -> None:
        now_s = time.time()
        chunks = [chunk for batch in batches for chunk in batch.chunks]
        spans = sum(len(batch.spans) for batch in batches)
        expired = retention.Expired()
        error: StoreError | None = StoreError("cannot store spans: see the log")
        try:
            with self._file.writing("store spans in") as db:
                new = ingest.insert(db, chunks, now_s, self._max_bytes)
                for batch in batches:
                    rows = self._names.learn(batch.spans, hour_of(now_s))
                    ingest.insert_names(db, rows)
                if bytes_of(db)[1] > self._room_bytes:
                    # Who adds faster than the thread expires makes room himself.
                    expired = retention.expire_oldest(db, 2 * spans)
            error = None
        except StoreError as exc:
            error = exc
        finally:
            if error:
                self._learn_again()
            for batch in batches:
                batch.error = error
                batch.done = True
        if not error:
            self._counts.store(new, spans)
            self._counts.expire(expired)

    def _learn_again(self) -> None:
        """Forget the names that were not stored."""
        with suppress(StoreError), self._file.reading() as db:
            self._names = _names(db)

    def trace(self, trace_id: str) -> list[ZipkinSpan]:
        """Return the trace's spans as they arrived; [] where it is not known."""
        return next(iter(self.many([trace_id])), [])

    def many(self, trace_ids: Sequence[str]) -> list[list[ZipkinSpan]]:
        """Return those of the traces that are known."""
        with self._file.reading() as db:
            found = (_trace_no(db, trace_id) for trace_id in dict.fromkeys(trace_ids))
            return [search.spans_of(db, no) for no in found if no is not None]

    def traces(self, query: Query) -> list[list[ZipkinSpan]]:
        """Return the traces that match, the latest start first."""
        return self._search(query, search.spans_of)

    def summaries(self, query: Query) -> list[Summary]:
        """Return what `traces` does, in short."""
        return self._search(query, settle.summary_of)

    def _search(self, query: Query, read: Callable[[Connection, int], T]) -> list[T]:
        with self._file.reading() as db:
            found = islice(search.found(db, query), min(query.limit, sys.maxsize))
            return [read(db, trace) for trace in found]

    def services(self) -> list[str]:
        """Return the names of the services that have spans, sorted."""
        return self._names_of(Kind.SERVICE, "")

    def remote_services(self, service: str) -> list[str]:
        """Return the names of the services that the service spoke with, sorted."""
        return self._names_of(Kind.REMOTE, service.lower())

    def span_names(self, service: str) -> list[str]:
        """Return the names of the service's spans, sorted."""
        return self._names_of(Kind.SPAN, service.lower())

    def tag_keys(self) -> list[str]:
        """Return the tags that have few enough values to choose from, sorted."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT DISTINCT owner FROM names WHERE kind = ? ORDER BY owner",
                (Kind.VALUE,),
            )
            return [key for (key,) in rows]

    def tag_values(self, key: str) -> list[str]:
        """Return the values of such a tag, sorted."""
        return self._names_of(Kind.VALUE, key)

    def _names_of(self, kind: Kind, owner: str) -> list[str]:
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT name FROM names WHERE kind = ? AND owner = ? ORDER BY name",
                (kind, owner),
            )
            return [name for (name,) in rows]

    def links(self, end_ts_ms: int, lookback_ms: int) -> list[EdgeStats]:
        """Return who called whom in the traces that started in the window, by name."""
        window = Query(end_ts_ms, lookback_ms)
        with self._file.reading() as db:
            return stats_of(settle.tallies(db, window.first_us, window.last_us))

    def tail(self, after: int | None, limit: int) -> tuple[int, list[ZipkinSpan], int]:
        """Return (cursor, spans, skipped): what arrived after a cursor, in its order.

        Of more than `limit` spans, the latest are returned and the others skipped.
        """
        with self._file.reading() as db:
            now = ingest.arrived(db)
            if after is None or after >= now:
                return now, [], 0
            spans: list[ZipkinSpan] = []
            for (payload,) in db.execute(
                "SELECT payload FROM chunks WHERE upto > ? ORDER BY upto DESC", (after,)
            ):
                spans = unpack(payload) + spans
                if len(spans) >= limit:
                    break
            fresh = min(now - after, limit, len(spans))
            return now, spans[len(spans) - fresh :], now - after - fresh

    def counts(self) -> dict[str, int]:
        """Return how much there is, and since the start how much expired."""
        return {**self._counts.as_dict(), "bytes": self._file.bytes_on_disk()}

    def expire(self) -> None:
        """Remove the oldest traces until age and size are as they should be."""
        cutoff_s = time.time() - self._max_age_s
        while self._expire_step(lambda db: retention.expire_older(db, cutoff_s)):
            pass
        while self._bytes()[1] > self._room_bytes:
            if not self._expire_step(retention.expire_oldest):
                break
        self._forget_names()
        total, used = self._bytes()
        while total > max(self._room_bytes, used):
            self._file.shrink()
            total, used = self._bytes()
        self._file.truncate_log()

    def _expire_step(self, remove: Callable[[Connection], retention.Expired]) -> bool:
        """Remove a few traces; tell whether there were any."""
        with self._file.writing("expire traces in") as db:
            expired = remove(db)
        self._counts.expire(expired)
        return expired.traces > 0

    def _bytes(self) -> tuple[int, int]:
        with self._file.reading() as db:
            return bytes_of(db)

    def _forget_names(self) -> None:
        """Forget the names that are older than every trace; once an hour, perhaps."""
        with self._file.reading() as db:
            oldest = db.execute("SELECT arrived_s FROM traces ORDER BY no LIMIT 1")
            (arrived_s,) = oldest.fetchone() or (time.time(),)
        hour = hour_of(arrived_s)
        if hour == self._names_since:
            return
        with self._turn, self._file.writing("expire names in") as db:
            db.execute("DELETE FROM names WHERE hour < ?", (hour,))
            self._names.forget(hour)
        self._names_since = hour

    def settle(self, quiet_s: float = settle.QUIET_S) -> None:
        """Work out the links of all traces to which nothing came for that long."""
        while self._settle_step(quiet_s):
            pass

    def _settle_step(self, quiet_s: float) -> bool:
        """Settle a few traces; tell whether there were any."""
        with self._file.reading() as db:
            settled = settle.work_out(db, time.time() - quiet_s, SETTLE_TRACES)
        if settled:
            with self._file.writing("store links in") as db:
                settle.record(db, settled)
        return bool(settled)

    def _keep_house(self) -> None:
        """Settle and expire, until `close`; trouble is told once, then tried again."""
        trouble = ""
        rest_s = REST_S
        while not self._closing.wait(rest_s):
            begun_s = time.monotonic()
            rest_s = REST_S
            try:
                self.expire()
                if self._settle_step(settle.QUIET_S):
                    rest_s = IDLE * (time.monotonic() - begun_s)
                trouble = ""
            except StoreError as exc:
                if str(exc) != trouble:
                    trouble = str(exc)
                    log.warning("%s", trouble)

    def close(self) -> None:
        """End the thread, and close the file; once more does nothing."""
        self._closing.set()
        self._thread.join()
        self._file.close()


def _names(db: Connection) -> Names:
    rows = db.execute("SELECT kind, owner, name, hour FROM names")
    return Names((Kind(kind), *row) for kind, *row in rows)


def _trace_no(db: Connection, trace_id: str) -> int | None:
    row = db.execute(
        "SELECT no FROM traces WHERE id = ?", (packed_id(trace_id),)
    ).fetchone()
    return row[0] if row else None
