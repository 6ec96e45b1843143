"""Keep batches of spans on disk while their backend does not take them.

The spool is a queue in a folder. Each file is a segment, named by its number:

    segment    "PODSPOOL" version, then records
    record     marker length spans crc(payload) crc(these four) state, then payload
    payload    msgpack: one array per span, its fields by position (`_row`)

Numbers are little-endian, checksums CRC-32. `state` alone changes, by a write of one
byte when the batch was delivered: no moment has half a change, and it needs no room on
a full disk. A segment goes when all of it was delivered, or, the oldest first, when
the spool would outgrow its bound.

What a crash leaves:

- A killed process leaves the bytes it had written, so every batch whose `append`
  returned True; the one in between may be torn, which is counted. A machine that dies
  loses what `sync` had not brought to the disk.
- A batch that was delivered, but not acknowledged, comes again: at least once. Its
  spans have the same ids, by which a backend may tell.
- A damaged record costs itself alone; damage to a segment's name and version sets it
  aside. Damage in a header hides the length, so the next header is looked for; no text
  can forge one, as UTF-8 has no byte of MARKER.

A segment is never continued by a later process, and one of another version is moved to
the folder `set-aside`. Files with names that are not ours are left alone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import struct
import threading
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from podspan.agent.errors import ExportError
from podspan.agent.span import Endpoint, Span

log = logging.getLogger(__name__)

# When fsync(2) is called.
# never: when the kernel likes; enough for the death of the process.
# segment: when a segment is full or done, and at close; a machine that dies loses at
#     most the newest segment, and what was delivered of the oldest comes again.
# batch: before `append` and `ack` return.
SYNCS = ("never", "segment", "batch")

# Dropping the oldest segment loses at most a sixteenth of what may be kept.
MAX_SEGMENT_BYTES = 8 * 1024 * 1024
SEGMENTS = 16

VERSION = 1
SEGMENT_HEAD = struct.pack("<8sH", b"PODSPOOL", VERSION)
SEGMENT_NAME = re.compile(r"([0-9]{20})\.spool")
SET_ASIDE = "set-aside"
PROBE = ".podspan-probe"

MARKER = b"\xff\xfe\xfd\xff"
SUMMED = struct.Struct("<4sIII")
HEADER = struct.Struct("<4sIIIIB")
STATE_AT = HEADER.size - 1
# Many bits apart: no single flipped bit makes a waiting batch a delivered one.
WAITING, DELIVERED = 0x00, 0xA5

SEARCH_BYTES = 64 * 1024


class Spool:
    """A bounded queue of batches of spans on disk; survives SIGKILL and a full disk.

    Any thread may call; `counters` and `len` never wait for the disk.
    """

    def __init__(self, folder: Path, *, max_bytes: int, sync: str = "batch") -> None:
        """Open the spool, or create it; `sync` is one of SYNCS.

        Raises ExportError where the folder is not writable, or another process uses it.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = min(MAX_SEGMENT_BYTES, max_bytes // SEGMENTS)
        self._sync = sync

        # Replaced, never changed: a reader without the lock sees one moment.
        self._counts = {
            "spooled": 0,  # spans
            "spool_dropped": 0,  # spans: the oldest, beyond the bound
            "spool_torn": 0,  # records
            "spool_lost": 0,  # spans of torn records, where known
            "spool_failed": 0,  # spans that the disk did not take
            "spool_set_aside": 0,  # files
            "spool_spans": 0,  # now
            "spool_bytes": 0,  # now
        }

        # Guarded by `_lock`: what follows, and the files.
        self._lock = threading.Lock()
        self._segments: deque[_Segment] = deque()  # the oldest first
        self._active: _Segment | None = None  # the newest, if it may grow
        self._next_number = 0
        self._peeked: _Batch | None = None
        self._warned: set[str] = set()  # each trouble is told once while it lasts
        self._closed = False

        try:
            self._folder_fd = _open_folder(folder)
        except BlockingIOError as exc:
            raise ExportError(
                f"the spool {folder} is in use by another process",
                "every podspan needs a spool folder of its own",
            ) from exc
        except OSError as exc:
            raise self._unusable(exc) from exc
        try:
            self._recover()
        except OSError as exc:
            os.close(self._folder_fd)
            raise self._unusable(exc) from exc

    def append(self, spans: Sequence[Span]) -> bool:
        """Add a batch at the end; False, and counted, where the disk does not take it.

        What exceeds the bound goes, the oldest segment first. Nothing half-done stays.
        """
        if not spans:
            return True
        record = _encode(spans)
        with self._lock:
            try:
                written = self._write(record, len(spans))
            except OSError as exc:
                self._count(spool_failed=len(spans))
                self._warn("takes no spans", exc)
                return False
            self._count(spooled=len(spans), spool_spans=len(spans), spool_bytes=written)
            if self._warned:
                self._warned.clear()
                log.info("the spool takes spans again: folder=%s", self._folder)
            return True

    def peek(self) -> list[Span]:
        """Return the oldest batch that waits; [] where there is none.

        It stays the same until `ack`, also when its segment is dropped meanwhile.
        """
        with self._lock:
            if self._closed:
                return []
            if self._peeked is None:
                self._peeked = self._next_batch()
            return self._peeked.spans if self._peeked is not None else []

    def ack(self) -> None:
        """Never return again the batch that `peek` returned: it is delivered."""
        with self._lock:
            batch, self._peeked = self._peeked, None
            if batch is None:
                return
            self._count(spool_spans=-len(batch.spans))
            if not self._holds(batch.segment):
                return
            segment, record = batch.segment, batch.record
            segment.pass_over(record)
            if not segment.waiting:
                self._remove_oldest()
                return
            try:
                segment.mark_delivered(record)
                if self._sync == "batch":
                    segment.sync()
            except OSError as exc:
                self._warn("may deliver a batch twice after a restart", exc)

    def __len__(self) -> int:
        """Return the number of spans that wait."""
        return self._counts["spool_spans"]

    def counters(self) -> dict[str, int]:
        """Return what happened since the start, and what is there now.

        spooled = delivered + spool_dropped + spool_lost + what spool_spans has grown.
        """
        return dict(self._counts)

    def close(self) -> None:
        """Let go of the folder; what waits stays there for the next process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._peeked is not None and not self._holds(self._peeked.segment):
                # Only this process still had it.
                dropped = len(self._peeked.spans)
                self._count(spool_dropped=dropped, spool_spans=-dropped)
            self._peeked = None
            if self._sync != "never" and self._segments:
                # The reader's and the writer's; the others were when they were full.
                for segment in {self._segments[0], self._segments[-1]}:
                    self._bring_to_disk(segment)
            for segment in self._segments:
                segment.close()
            os.close(self._folder_fd)

    # What follows is called with the lock held.

    def _recover(self) -> None:
        """Find what an earlier process left."""
        for path in sorted(self._folder.iterdir()):
            name = SEGMENT_NAME.fullmatch(path.name)
            if name is None:
                continue
            self._next_number = int(name[1]) + 1
            segment = _Segment(path)
            try:
                torn = segment.survey()
            except (OSError, _NotOurs) as exc:
                self._set_aside(path, exc)
                continue
            finally:
                segment.close()
            self._count(spool_torn=torn)
            if segment.waiting:
                self._count(spool_spans=segment.waiting, spool_bytes=segment.size)
                self._segments.append(segment)
            else:
                self._remove(segment)
        self._make_room(0)
        found = self._counts
        if found["spool_spans"] or found["spool_torn"]:
            log.info(
                "the spool has what an earlier run left: folder=%s spans=%d torn=%d",
                self._folder,
                found["spool_spans"],
                found["spool_torn"],
            )

    def _set_aside(self, path: Path, reason: Exception) -> None:
        """Move away what cannot be read, but may be worth something to someone."""
        self._count(spool_set_aside=1)
        kept = self._folder / SET_ASIDE / path.name
        try:
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            copies = 0
            while os.path.lexists(kept):
                copies += 1
                kept = kept.with_name(f"{path.name}.{copies}")
            path.rename(kept)
        except OSError as exc:
            self._warn(f"leaves {path.name} where it is ({reason})", exc)
        else:
            log.warning("set aside, not a segment: file=%s error=%s", kept, reason)

    def _write(self, record: bytes, spans: int) -> int:
        """Write a record, whole or not at all; return what the files grew by."""
        if self._closed:
            raise OSError(errno.EBADF, "the spool is closed")
        if len(SEGMENT_HEAD) + len(record) > self._max_bytes:
            raise OSError(errno.EFBIG, "the batch is larger than the spool may be")
        self._make_room(len(SEGMENT_HEAD) + len(record))
        segment = self._active
        if segment is not None and segment.size + len(record) > self._segment_bytes:
            self._seal(segment)
            segment = None
        if segment is None:
            return self._begin_segment(SEGMENT_HEAD + record, spans)
        try:
            segment.write(record)
            if self._sync == "batch":
                segment.sync()
        except OSError:
            try:
                segment.cut_back()
            except OSError:
                self._active = None  # a torn end must stay the end
            raise
        segment.grow(len(record), spans)
        return len(record)

    def _begin_segment(self, data: bytes, spans: int) -> int:
        segment = _Segment(self._folder / f"{self._next_number:020d}.spool")
        segment.create()
        self._next_number += 1
        try:
            segment.write(data)
            if self._sync == "batch":
                segment.sync()
                os.fsync(self._folder_fd)
        except OSError:
            with suppress(OSError):
                segment.unlink()
            raise
        segment.grow(len(data), spans)
        self._segments.append(segment)
        self._active = segment
        return len(data)

    def _seal(self, segment: _Segment) -> None:
        """The newest segment is full."""
        self._active = None
        if self._sync == "segment":
            self._bring_to_disk(segment)
        if segment is not self._segments[0]:
            segment.close()

    def _make_room(self, size: int) -> None:
        while self._segments and self._counts["spool_bytes"] + size > self._max_bytes:
            segment = self._segments[0]
            dropped = segment.waiting
            if self._peeked is not None and self._peeked.segment is segment:
                dropped -= len(self._peeked.spans)  # in the reader's hands
            self._count(spool_dropped=dropped, spool_spans=-dropped)
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        segment = self._segments.popleft()
        if segment is self._active:
            self._active = None
        self._count(spool_bytes=-segment.size)
        self._remove(segment)

    def _remove(self, segment: _Segment) -> None:
        try:
            segment.unlink()
            if self._sync != "never":
                os.fsync(self._folder_fd)
        except OSError as exc:
            self._warn(f"cannot remove {segment.path.name}", exc)

    def _next_batch(self) -> _Batch | None:
        """Read the oldest batch that waits and is sound."""
        while self._segments:
            segment = self._segments[0]
            try:
                record = segment.next_waiting()
                payload = segment.payload(record) if record is not None else b""
            except OSError as exc:
                self._warn(f"cannot read {segment.path.name}", exc)
                record = None
            if record is None:
                # It was sound when it was written or surveyed.
                self._lose(segment.waiting)
                self._remove_oldest()
                continue
            if spans := _decode(record, payload):
                return _Batch(segment, record, spans)
            self._lose(record.spans)
            segment.pass_over(record)
        return None

    def _lose(self, spans: int) -> None:
        if spans:
            self._count(spool_torn=1, spool_lost=spans, spool_spans=-spans)

    def _holds(self, segment: _Segment) -> bool:
        """Whether the segment that a batch was peeked from has not been dropped."""
        return bool(self._segments) and self._segments[0] is segment

    def _bring_to_disk(self, segment: _Segment) -> None:
        try:
            segment.sync()
            os.fsync(self._folder_fd)
        except OSError as exc:
            self._warn("may lose spans if the machine dies", exc)

    def _count(self, **changes: int) -> None:
        self._counts = {
            what: count + changes.get(what, 0) for what, count in self._counts.items()
        }

    def _warn(self, what: str, exc: OSError) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(
                "the spool %s: folder=%s error=%r", what, self._folder, exc.strerror
            )

    def _unusable(self, exc: OSError) -> ExportError:
        return ExportError(
            f"cannot keep spans in {self._folder}: {exc.strerror}",
            "the spool needs a folder that this process may write to",
        )


@dataclass(frozen=True, slots=True)
class _Record:
    """A sound header, and where it stands."""

    at: int
    length: int  # bytes of payload
    spans: int
    checksum: int
    delivered: bool

    @property
    def end(self) -> int:
        return self.at + HEADER.size + self.length


@dataclass(frozen=True, slots=True)
class _Batch:
    """What `peek` returned, and where it came from."""

    segment: _Segment
    record: _Record
    spans: list[Span]


class _NotOurs(Exception):
    """A file with a segment's name is none, or of another version."""


class _Segment:
    """A file of records. Its methods raise OSError as the file system does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes that count; a failed write may have left more
        self.waiting = 0  # spans
        self._offset = len(SEGMENT_HEAD)  # before the next record to read
        self._fd: int | None = None

    def create(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def survey(self) -> int:
        """Count what is in the file; return how many records are torn."""
        self.size = os.fstat(self._file()).st_size
        head = os.pread(self._file(), len(SEGMENT_HEAD), 0)
        if not SEGMENT_HEAD.startswith(head):
            raise _NotOurs("not a segment of this version")
        at = self._offset
        if self.size <= at:
            return 1  # a segment begins with a record: it was torn off
        torn = 0
        while at < self.size:
            record = self._record_from(at)
            if record is None:
                return torn + 1
            torn += record.at > at
            if not record.delivered:
                self.waiting += record.spans
            at = record.end
        return torn

    def write(self, data: bytes) -> None:
        """Write after what counts; only `grow` makes it count."""
        at, rest = self.size, memoryview(data)
        while rest:
            written = os.pwrite(self._file(), rest, at)
            at, rest = at + written, rest[written:]

    def grow(self, size: int, spans: int) -> None:
        self.size += size
        self.waiting += spans

    def cut_back(self) -> None:
        """Undo a write that failed."""
        os.ftruncate(self._file(), self.size)

    def next_waiting(self) -> _Record | None:
        """Go to the next record that was not delivered."""
        while record := self._record_from(self._offset):
            if not record.delivered:
                return record
            self._offset = record.end
        return None

    def payload(self, record: _Record) -> bytes:
        return os.pread(self._file(), record.length, record.at + HEADER.size)

    def pass_over(self, record: _Record) -> None:
        self._offset = record.end
        self.waiting -= record.spans

    def mark_delivered(self, record: _Record) -> None:
        os.pwrite(self._file(), bytes([DELIVERED]), record.at + STATE_AT)

    def sync(self) -> None:
        os.fdatasync(self._file())

    def unlink(self) -> None:
        self.close()
        self.path.unlink()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _file(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        return self._fd

    def _record_from(self, at: int) -> _Record | None:
        """Return the next record: at `at`, unless damage has to be passed over."""
        record = self._record_at(at)
        while record is None:
            at += 1
            if self.size - at < HEADER.size:
                return None
            found = self._bytes_at(at, SEARCH_BYTES).find(MARKER)
            if found < 0:
                at += min(self.size - at, SEARCH_BYTES) - len(MARKER)
                continue
            at += found
            record = self._record_at(at)
        return record

    def _record_at(self, at: int) -> _Record | None:
        header = self._bytes_at(at, HEADER.size)
        if len(header) < HEADER.size:
            return None
        marker, length, spans, checksum, own_checksum, state = HEADER.unpack(header)
        if marker != MARKER or own_checksum != zlib.crc32(header[: SUMMED.size]):
            return None
        record = _Record(at, length, spans, checksum, state == DELIVERED)
        return record if record.end <= self.size else None

    def _bytes_at(self, at: int, count: int) -> bytes:
        return os.pread(self._file(), min(count, max(0, self.size - at)), at)


def _open_folder(folder: Path) -> int:
    """Return the folder, locked for this process, which may write there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _try_to_write(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _try_to_write(folder_fd: int) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        os.close(os.open(PROBE, flags, 0o600, dir_fd=folder_fd))
        os.unlink(PROBE, dir_fd=folder_fd)
    except OSError as exc:
        # Room may come, and what is there can be delivered without.
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _encode(spans: Sequence[Span]) -> bytes:
    # surrogatepass: any text that Python can hold can be kept.
    payload = msgpack.packb([_row(s) for s in spans], unicode_errors="surrogatepass")
    summed = SUMMED.pack(MARKER, len(payload), len(spans), zlib.crc32(payload))
    tail = struct.pack("<IB", zlib.crc32(summed), WAITING)
    return b"".join((summed, tail, payload))


def _decode(record: _Record, payload: bytes) -> list[Span] | None:
    """Return the spans of a record; None where it is not as it was written."""
    if len(payload) != record.length or zlib.crc32(payload) != record.checksum:
        return None
    try:
        rows = msgpack.unpackb(payload, use_list=False, unicode_errors="surrogatepass")
        spans = [_span(row) for row in rows]
    except (ValueError, TypeError, LookupError, msgpack.UnpackException):
        return None
    return spans if len(spans) == record.spans else None


def _row(span: Span) -> tuple[Any, ...]:
    """Return the fields of a span as VERSION has them."""
    local, remote = span.local, span.remote
    return (
        span.trace_id,
        span.span_id,
        span.parent_id,
        span.kind,
        span.name,
        span.timestamp_us,
        span.duration_us,
        (local.service, local.address, local.port),
        (remote.service, remote.address, remote.port),
        span.shared,
        span.tags,
        span.annotations,
    )


def _span(row: tuple[Any, ...]) -> Span:
    ids, local, remote, rest = row[:7], row[7], row[8], row[9:]
    fields = (*ids, Endpoint(*local), Endpoint(*remote), *rest)
    return Span(*fields)
