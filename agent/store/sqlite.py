"""The database file: opened, checked, written by one at a time and read by any.

The only importer of sqlite3, whose errors leave here as StoreError.

WAL mode, and no fsync(2) for each commit (`synchronous=NORMAL`): what was committed
survives the end of this process, however it ends, but the last of it may not survive
the end of the machine. Then it is as if it had not been sent; nothing is half there.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from podspan.agent.errors import StoreError

Connection = sqlite3.Connection

# Says that the file is ours: "pods" (PRAGMA application_id).
APPLICATION_ID = 0x706F6473

# What the schema is called (PRAGMA user_version).
SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE traces (
    no INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of their first spans' arrival
    id BLOB NOT NULL UNIQUE,
    arrived_s INTEGER NOT NULL,            -- its first span, since 1970
    root_us INTEGER,                       -- timestamp of the first root that arrived
    first_us INTEGER,                      -- earliest timestamp
    start_us INTEGER AS (coalesce(root_us, first_us)),  -- as query.start_us
    longest_us INTEGER NOT NULL,           -- longest duration of a span
    spans INTEGER NOT NULL,
    linked_upto INTEGER NOT NULL DEFAULT 0,  -- its chunks up to here are in edges
    summary BLOB                           -- only where it takes long to make
);
CREATE INDEX traces_by_start ON traces (start_us);

-- Spans of one trace that arrived at one time.
CREATE TABLE chunks (
    upto INTEGER PRIMARY KEY AUTOINCREMENT,  -- spans ever stored, these included
    trace INTEGER NOT NULL,
    spans INTEGER NOT NULL,
    durations BLOB,                          -- JSON: by service, sorted; only of many
    payload BLOB NOT NULL                    -- JSON list, deflated
);
CREATE INDEX chunks_by_trace ON chunks (trace);

-- Traces in a row that share an index of words, words_PART, which is dropped as a
-- whole. A part goes from the trace that it is named after to where the next begins.
CREATE TABLE parts (
    part INTEGER PRIMARY KEY,
    bytes INTEGER NOT NULL,  -- of payload that came while it was the last part
    first_us INTEGER,        -- bounds of when its traces started
    last_us INTEGER
);

-- Traces that got spans which are not in edges yet.
CREATE TABLE unsettled (
    trace INTEGER PRIMARY KEY,
    upto INTEGER NOT NULL,  -- its last chunk
    seen_s REAL NOT NULL
);

-- Calls from service to service, by when their traces started.
CREATE TABLE edges (
    part INTEGER NOT NULL,
    width_us INTEGER NOT NULL,
    slot INTEGER NOT NULL,    -- start of the trace, in units of width_us
    parent INTEGER NOT NULL,  -- services.no
    child INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    durations BLOB NOT NULL,  -- JSON list: a logscale bucket, its calls, the next ...
    PRIMARY KEY (part, width_us, slot, parent, child)
) WITHOUT ROWID;
CREATE TABLE services (no INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

-- Names to choose from, with the hour since 1970 in which they were seen last.
CREATE TABLE names (
    kind INTEGER NOT NULL,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    hour INTEGER NOT NULL,
    PRIMARY KEY (kind, owner, name)
) WITHOUT ROWID;
"""

# How long to wait for another process that writes to the same file.
BUSY_S = 5.0

# The log is written back into the file every that many pages; more needs more disk,
# less writes the same pages more often.
MIN_LOG_PAGES = 64
MAX_LOG_PAGES = 4096
# The part of the whole that the log may take. Readers can keep it from being reused.
LOG_SHARE = 16
LOG_OVERDUE = 2

# Pages given back to the file system at a time.
SHRINK_PAGES = 256

# Of each connection.
CACHE_KIB = 8 * 1024


class File:
    """A database file of ours, open."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.path = path
        self._lock = threading.Lock()  # held by who writes
        self._idle: list[sqlite3.Connection] = []  # connections to read
        self._closed = False
        self._writer: sqlite3.Connection | None = None
        with suppress(OSError):  # SQLite says better what is wrong
            # For its owner only: its log, too, gets this mode.
            path.touch(mode=0o600, exist_ok=False)
        with self._translated("open"):
            self._writer = self._connect()
            self._prepare(self._writer, max_bytes)

    def _connect(self) -> sqlite3.Connection:
        # Each connection has one user at a time, but not always the same thread.
        connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        return connection

    def _prepare(self, writer: sqlite3.Connection, max_bytes: int) -> None:
        """Check that the file is ours; make it so where it is empty."""
        self._check(writer)
        (page_bytes,) = writer.execute("PRAGMA page_size").fetchone()
        log_pages = max_bytes // page_bytes // LOG_SHARE
        log_pages = min(max(log_pages, MIN_LOG_PAGES), MAX_LOG_PAGES)
        log_bytes = log_pages * page_bytes
        self.log_most_bytes = LOG_OVERDUE * log_bytes
        for pragma in (
            "auto_vacuum = INCREMENTAL",  # before anything else is written
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "secure_delete = OFF",
            f"wal_autocheckpoint = {log_pages}",
            f"journal_size_limit = {log_bytes}",
        ):
            writer.execute(f"PRAGMA {pragma}").fetchall()
        with self.writing("open") as db:
            if _is_empty(db):
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check(self, db: Connection) -> None:
        """Raise StoreError for what is not ours to write to."""
        if _is_empty(db):
            return
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        if application_id != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is another program's database",
                "give another file",
            )
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer podspan (schema {version},"
                f" this one knows {SCHEMA_VERSION})",
                "use that version, or give another file",
            )

    @contextmanager
    def writing(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Run a transaction, alone; what raises leaves nothing behind."""
        with self._lock, self._translated(doing):
            writer = self._writer
            if writer is None:
                raise StoreError(f"cannot {doing} {self.path}: it is closed")
            writer.execute("BEGIN IMMEDIATE")
            try:
                yield writer
                writer.execute("COMMIT")
            except BaseException:
                # SQLite has ended it itself after some errors.
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the database, whatever is written meanwhile."""
        with self._translated("read"):
            if self._closed:
                raise StoreError(f"cannot read {self.path}: it is closed")
            try:
                reader = self._idle.pop()
            except IndexError:
                reader = self._connect()
            try:
                reader.execute("BEGIN")
                yield reader
            finally:
                if reader.in_transaction:
                    reader.execute("ROLLBACK")
                self._put_back(reader)

    def _put_back(self, reader: sqlite3.Connection) -> None:
        self._idle.append(reader)
        if self._closed:
            self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def shrink(self) -> None:
        """Give some of the free pages back to the file system."""
        with self._lock, self._translated("shrink"):
            if self._writer is not None:
                # A step of this statement frees one page; execute() makes one step.
                self._writer.executescript(f"PRAGMA incremental_vacuum({SHRINK_PAGES})")

    def truncate_log(self) -> None:
        """Write the log back and empty it, if it grew far beyond its limit."""
        if self._log_bytes() <= self.log_most_bytes:
            return
        with self._lock, self._translated("write the log of"):
            if self._writer is not None:
                # Waits for readers; gives up after BUSY_S.
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def bytes_on_disk(self) -> int:
        """Return the size of the database and its log."""
        return _size_of(self.path) + self._log_bytes()

    def _log_bytes(self) -> int:
        return _size_of(Path(f"{self.path}-wal"))

    def close(self) -> None:
        """Write the log back, and let go of the file; once more does nothing."""
        with self._lock:
            self._closed = True
            self._close_idle()
            if self._writer is not None:
                # Closing writes the log back, where the disk takes it; if not, whoever
                # opens the file next does.
                with suppress(sqlite3.Error):
                    self._writer.close()
                self._writer = None

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(f"cannot {doing} {self.path}: {exc}", _hint(exc)) from exc


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed under us
        return 0


def _is_empty(db: Connection) -> bool:
    (objects,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return not objects


def bytes_of(db: Connection) -> tuple[int, int]:
    """Return the size of all pages, and of those that are in use."""
    (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    return pages * page_bytes, (pages - free) * page_bytes


def _hint(error: sqlite3.Error) -> str:
    """Return what to do about it."""
    return {
        "SQLITE_NOTADB": "give another file",
        "SQLITE_CANTOPEN": "the folder has to exist and be writable",
        "SQLITE_FULL": "free some space",
        "SQLITE_READONLY": "file and folder have to be writable",
        "SQLITE_READONLY_DIRECTORY": "the folder has to be writable",
        "SQLITE_CORRUPT": "move the file away: a new one is made",
        "SQLITE_BUSY": "another process writes to it",
    }.get(getattr(error, "sqlite_errorname", ""), "")
