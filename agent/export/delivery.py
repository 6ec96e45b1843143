"""Deliver spans to one backend, in the background, whatever the backend does.

`export` queues and returns. A batch is sent when it is full or old enough; what then
happens to it is the encoder's verdict (encoder.py) on the answer:

- sent, refused, or partly refused: counted, and done with;
- too large: sent again in halves;
- no answer, or one that asks for another try: tried again, later and later, by chance
  within that (full jitter, so that a thousand nodes do not return at once), never
  before a Retry-After is over; where somebody has to repair something, rarely.

Without a spool a batch is given up after RETRY_S, the queue is bounded, and the oldest
spans go first. With one, a second thread moves to disk what failed, and the queue when
it runs full behind a slow backend; from then on everything goes through the spool, in
order, until it is empty, and nothing is given up. The sender keeps a batch from the
spool until it is answered for, so one that was sent but not yet acknowledged when the
agent died comes twice.

The backend's trouble is told once, then every WARN_S, never per batch.
"""

from __future__ import annotations

import gzip
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from podspan.agent.export.client import Client, NoAnswer
from podspan.agent.export.destination import Destination, shown
from podspan.agent.export.encoder import (
    Encoder,
    Outcome,
    Verdict,
    one_line,
    retry_after_s,
)
from podspan.agent.export.spool import Spool
from podspan.agent.span import Span

log = logging.getLogger(__name__)

BATCH_SPANS = 1000
BATCH_DELAY_S = 1.0

# About 10 MB of spans. Bounds the memory of a node whose backend is away.
QUEUE_SPANS = 4096

REQUEST_TIMEOUT_S = 10.0
RETRY_S = 30.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
SETUP_RETRY_S = 30.0
WARN_S = 30.0

# A backend may ask for more patience; it may also be wrong by a year.
MAX_RETRY_AFTER_S = 300.0

# After the spool's disk has not taken a batch.
SPOOL_AGAIN_S = 1.0

# Beyond close()'s time: what an idle disk needs for a full queue, many times over.
SPOOL_CLOSE_S = 2.0

# Compressing spans of one batch saves nine tenths; below this it is not worth the time.
GZIP_OVER_BYTES = 4096
GZIP_LEVEL = 1

# What happens to a span. Dropped: the queue was full. Failed: given up after retries,
# or at exit. Refused: the backend does not want it.
OUTCOMES = ("sent", "dropped", "failed", "refused")

# What the log says of a verdict, and what to do about it.
_REFUSAL = "refuses spans", "they are not sent again; does it take this format?"
_TROUBLES = {
    Outcome.RETRY: (
        "does not take spans",
        "is it up, and the URL right? calls are not affected",
    ),
    Outcome.SETUP: (
        "does not take spans",
        "it answers: are URL, path and credentials right?",
    ),
    Outcome.SENT: ("takes spans, and warns", "all spans were taken"),
}


class _Batch:
    """Spans that are being sent, in parts: one, unless that was too large."""

    def __init__(self, spans: list[Span], source: Spool | None = None) -> None:
        self.parts = deque([spans])
        self.source = source  # whose peek returns it; None: no spool's
        self.started_s = time.monotonic()
        self.failed = False  # at least once
        self.body: bytes | None = None  # of the first part, encoded
        self.compressed = False
        # With a source: what becomes of its spans once it is acknowledged.
        self.counts = dict.fromkeys(OUTCOMES, 0)
        # Where it went to the spool meanwhile: the spans as they are there.
        self.moved: list[Span] | None = None

    @property
    def in_memory_only(self) -> bool:
        return self.source is None and self.moved is None

    def rest(self) -> list[Span]:
        """Return the spans that nobody has answered for."""
        return [span for part in self.parts for span in part]

    def halve(self) -> None:
        part = self.parts.popleft()
        middle = (len(part) + 1) // 2
        self.parts.extendleft([part[middle:], part[:middle]])
        self.body = None

    def next_part(self) -> int:
        """Go to the next part; return the number of spans of the one that is done."""
        self.body = None
        return len(self.parts.popleft())


@dataclass(slots=True)
class _Trouble:
    """What was last said about the backend."""

    error: str = ""
    said_at_s: float = field(default=-WARN_S)


class BackendExporter:
    """Sends spans to one backend, until `close`."""

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        destination: Destination,
        spool: Spool | None,
        *,
        batch_spans: int = BATCH_SPANS,
        batch_delay_s: float = BATCH_DELAY_S,
        queue_spans: int = QUEUE_SPANS,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_s: float = RETRY_S,
        max_backoff_s: float = MAX_BACKOFF_S,
        setup_retry_s: float = SETUP_RETRY_S,
    ) -> None:
        """Read the destination's files; raises UsageError.

        The spool is closed with the exporter. `name` is the backend's, for people.
        """
        self._name = name
        self._encoder = encoder
        self._url = shown(destination.url)
        self._client = Client(destination)
        self._spool = spool
        self._batch_spans = batch_spans
        self._batch_delay_s = batch_delay_s
        self._queue_spans = queue_spans
        self._request_timeout_s = request_timeout_s
        self._retry_s = retry_s
        self._max_backoff_s = max_backoff_s
        self._setup_retry_s = setup_retry_s
        self._trouble = _Trouble()
        self._tries = 0  # since the backend last took something

        # Guarded by `_changed`: what follows.
        self._changed = threading.Condition()
        self._queue: deque[Span] = deque()
        self._oldest_s = 0.0  # when the queue stopped being empty
        self._batch: _Batch | None = None  # in the sender's hands
        self._moving: _Batch | int = 0  # in the mover's: it, or so many of the queue
        self._spool_again_s = 0.0  # before, the spool is not asked again
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._deadline_s: float | None = None  # set by close()
        self._sender_ended = False
        self._abandoned = False

        self._sender = threading.Thread(
            target=self._send, name=f"podspan-{name}-send", daemon=True
        )
        self._sender.start()
        self._mover = None
        if spool is not None:
            self._mover = threading.Thread(
                target=self._move,
                args=(spool,),
                name=f"podspan-{name}-spool",
                daemon=True,
            )
            self._mover.start()

    def export(self, spans: Sequence[Span]) -> None:
        """Queue the spans; drop and count the oldest for which there is no room."""
        with self._changed:
            was_empty = not self._queue
            if was_empty:
                self._oldest_s = time.monotonic()
            self._queue.extend(spans)
            self._drop_excess()
            # Only then do the threads have anything to do but wait on.
            if was_empty or len(self._queue) >= self._batch_spans:
                self._changed.notify_all()

    def tick(self) -> None:
        """The threads keep their own time."""

    def counters(self) -> dict[str, int]:
        """Return what happened to all spans so far.

        Without a spool their sum is what was exported. With one it is that, and what
        the spool had at the start, if of the spool's counters `spool_spans`,
        `spool_dropped` and `spool_lost` are added; but for moments in which spans
        change hands.
        """
        with self._changed:
            counts = {**self._counts, "queued": self._in_memory()}
        return counts if self._spool is None else counts | self._spool.counters()

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for at most `timeout_s`; keep the rest in the spool.

        Without a spool, or where its disk does not take it, it is counted as failed.
        """
        with self._changed:
            failed_before = self._counts["failed"]
            self._deadline_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        # A backend that trickles its answer evades every socket timeout.
        self._sender.join(timeout_s + 0.5)
        if self._mover is not None:
            self._mover.join(SPOOL_CLOSE_S)
        with self._changed:
            self._abandoned = True
            self._counts["failed"] += self._in_memory()
            unsent = self._counts["failed"] - failed_before
            self._queue.clear()
            self._batch = None
            self._moving = 0
            self._changed.notify_all()
        self._client.close()
        if unsent:
            log.warning("%s: ended with spans unsent: spans=%d", self._name, unsent)
        if self._spool is not None and self._mover is not None:
            if kept := len(self._spool):
                log.info("%s: kept for the next run: spans=%d", self._name, kept)
            # A disk that hangs would hold up the exit.
            if not self._mover.is_alive():
                self._spool.close()

    # The sender's thread.

    def _send(self) -> None:
        while batch := self._next_batch():
            verdict = self._attempt(batch)
            message = one_line(self._client.redacted(verdict.message))
            if verdict.outcome in (Outcome.RETRY, Outcome.SETUP):
                self._report_trouble(message, verdict.outcome)
                self._put_off(batch, verdict)
                continue
            self._tries = 0
            if verdict.outcome is Outcome.TOO_LARGE and len(batch.parts[0]) > 1:
                with self._changed:
                    batch.halve()
                continue
            if message:
                self._report_trouble(message, verdict.outcome)
            else:
                self._report_recovery()
            self._settle(batch, verdict)
        with self._changed:
            self._sender_ended = True
            self._changed.notify_all()

    def _next_batch(self) -> _Batch | None:
        """Wait for something to send; None when it is time to end."""
        while True:
            with self._changed:
                while not self._sender_is_done() and not self._sender_has_work():
                    self._wait()
                if self._sender_is_done():
                    return None
                # A spool that makes room is empty for a moment: the mover has more.
                if self._batch is None and not self._spooled() and not self._moving:
                    self._batch = _Batch(self._pop())
                if self._batch is not None:
                    return self._batch
            # Not with the lock held: export() shall not wait for a disk.
            if self._spool is not None and (spans := self._spool.peek()):
                with self._changed:
                    self._batch = _Batch(spans, self._spool)

    def _sender_has_work(self) -> bool:
        if self._batch is not None and self._moving is self._batch:
            return False
        if self._batch is not None and self._batch.moved is not None:
            self._batch = None  # it comes again, from the spool
        if self._batch is not None or self._spooled():
            return True
        # What the mover holds is older than the queue.
        return not self._moving and self._is_due()

    def _sender_is_done(self) -> bool:
        if self._abandoned:
            return True
        if self._deadline_s is None:
            return False
        if time.monotonic() >= self._deadline_s:
            return True
        if self._spool is not None:
            # What failed, and what has to wait behind it, is safe or will be.
            failed = self._batch is not None and self._batch.failed
            if failed or self._spooled() or self._moving:
                return True
        return self._batch is None and not self._queue

    def _attempt(self, batch: _Batch) -> Verdict:
        """Send the first part, once."""
        if batch.body is None:
            try:
                batch.body = self._encoder.encode(batch.parts[0])
            except (TypeError, ValueError) as exc:
                # A text that is none, as half of a surrogate pair. Halving finds it.
                return Verdict(Outcome.TOO_LARGE, f"cannot be encoded: {exc}")
            batch.compressed = len(batch.body) > GZIP_OVER_BYTES
            if batch.compressed:
                batch.body = gzip.compress(batch.body, GZIP_LEVEL)
        headers = {"content-type": self._encoder.content_type}
        if batch.compressed:
            headers["content-encoding"] = "gzip"
        timeout_s = self._request_timeout_s
        if self._deadline_s is not None:
            timeout_s = min(timeout_s, self._deadline_s - time.monotonic())
            if timeout_s <= 0:
                return Verdict(Outcome.RETRY, "no time left")
        try:
            answer = self._client.post(batch.body, headers, timeout_s)
        except NoAnswer as exc:
            return Verdict(Outcome.RETRY, str(exc))
        return self._encoder.verdict(answer.status, answer.headers, answer.body)

    def _put_off(self, batch: _Batch, verdict: Verdict) -> None:
        """Wait before the next try: of this batch, or of the next if it is given up."""
        pause_s = self._pause_s(verdict)
        self._tries += 1
        with self._changed:
            if self._abandoned:
                return
            batch.failed = True
            late_s = time.monotonic() + pause_s - batch.started_s
            if self._spool is None and late_s > self._retry_s:
                self._counts["failed"] += len(batch.rest())
                self._batch = None
            self._changed.notify_all()
            until_s = time.monotonic() + pause_s
            while time.monotonic() < until_s and not self._sender_is_done():
                limit_s = until_s if self._deadline_s is None else self._deadline_s
                self._changed.wait(min(until_s, limit_s) - time.monotonic())

    def _pause_s(self, verdict: Verdict) -> float:
        if verdict.outcome is Outcome.SETUP:
            return self._setup_retry_s * random.uniform(0.5, 1)
        # Beyond 2**30 it is the maximum anyway, and beyond 2**1000 no float.
        most_s = FIRST_BACKOFF_S * 2 ** min(self._tries, 30)
        pause_s = random.uniform(0, min(most_s, self._max_backoff_s))
        asked_s = retry_after_s(verdict.retry_after, time.time())
        return pause_s + min(asked_s or 0.0, MAX_RETRY_AFTER_S)

    def _settle(self, batch: _Batch, verdict: Verdict) -> None:
        """The first part is answered for."""
        with self._changed:
            while self._moving is batch:
                self._changed.wait()
            if self._abandoned:
                return
            if batch.moved is None:
                self._count_part(batch, verdict)
        if batch.moved is not None and self._spool is not None:
            # Still there, unless the spool's bound has taken it.
            there = self._spool.peek() == batch.moved
            with self._changed:
                batch.source, batch.moved = self._spool, None
                if not there:
                    self._batch = None
                    return
                self._count_part(batch, verdict)
        if batch.source is not None and not batch.parts:
            batch.source.ack()
            with self._changed:
                for outcome, number in batch.counts.items():
                    self._counts[outcome] += number

    def _count_part(self, batch: _Batch, verdict: Verdict) -> None:
        counts = self._counts if batch.source is None else batch.counts
        _count(counts, verdict, batch.next_part())
        if not batch.parts:
            self._batch = None

    # The mover's thread.

    def _move(self, spool: Spool) -> None:
        while lot := self._next_lot():
            taken = spool.append(lot)
            with self._changed:
                self._end_move(lot, taken=taken)
                self._changed.notify_all()
                if not taken and self._deadline_s is not None:
                    return

    def _next_lot(self) -> list[Span] | None:
        """Wait for something to move; None when it is time to end."""
        with self._changed:
            while not self._must_move():
                if self._mover_is_done():
                    return None
                self._wait()
            batch = self._batch
            # It is older than what is queued.
            if batch is not None and batch.in_memory_only:
                self._moving = batch
                return batch.rest()
            lot = self._pop()
            self._moving = len(lot)
            return lot

    def _must_move(self) -> bool:
        if self._abandoned or time.monotonic() < self._spool_again_s:
            return False
        batch = self._batch
        in_memory_only = batch is not None and batch.in_memory_only
        if self._deadline_s is not None:
            there_is = in_memory_only or bool(self._queue)
            return there_is and (self._is_late() or self._spooled())
        if in_memory_only and batch is not None and batch.failed:
            return True
        if self._spooled():
            return self._is_due()
        # The backend is slow; better on disk than dropped.
        return batch is not None and len(self._queue) >= self._queue_spans // 2

    def _mover_is_done(self) -> bool:
        if self._abandoned:
            return True
        return self._is_late() and not self._in_memory()

    def _end_move(self, lot: list[Span], *, taken: bool) -> None:
        moved, self._moving = self._moving, 0
        if not taken:
            self._spool_again_s = time.monotonic() + SPOOL_AGAIN_S
        if isinstance(moved, _Batch):
            moved.moved = lot if taken else None
        elif not taken and not self._abandoned:
            self._queue.extendleft(reversed(lot))
            self._drop_excess()

    # What follows is called with `_changed` held.

    def _spooled(self) -> bool:
        return self._spool is not None and len(self._spool) > 0

    def _is_late(self) -> bool:
        """Whether nothing more will be taken from the queue to be sent."""
        return self._sender_ended or (
            self._deadline_s is not None and time.monotonic() >= self._deadline_s
        )

    def _in_memory(self) -> int:
        """Return how many spans a kill would lose."""
        spans = len(self._queue)
        if self._batch is not None and self._batch.in_memory_only:
            spans += len(self._batch.rest())
        return spans + (self._moving if isinstance(self._moving, int) else 0)

    def _is_due(self) -> bool:
        if len(self._queue) >= self._batch_spans:
            return True
        if not self._queue:
            return False
        return (
            self._deadline_s is not None
            or time.monotonic() >= self._oldest_s + self._batch_delay_s
        )

    def _pop(self) -> list[Span]:
        size = min(len(self._queue), self._batch_spans)
        self._oldest_s = time.monotonic()
        return [self._queue.popleft() for _ in range(size)]

    def _drop_excess(self) -> None:
        while len(self._queue) > self._queue_spans:
            self._queue.popleft()
            self._counts["dropped"] += 1

    def _wait(self) -> None:
        """Wait for a change, or for a moment that may be one."""
        now_s = time.monotonic()
        moments = [self._spool_again_s]
        if self._queue:
            moments.append(self._oldest_s + self._batch_delay_s)
        if self._deadline_s is not None:
            moments.append(self._deadline_s)
        ahead = [at_s - now_s for at_s in moments if at_s > now_s]
        self._changed.wait(min(ahead, default=None))

    # What the log says; the sender's thread.

    def _report_trouble(self, error: str, outcome: Outcome) -> None:
        now_s = time.monotonic()
        if now_s - self._trouble.said_at_s < WARN_S:
            return
        self._trouble = _Trouble(error, now_s)
        what, hint = _TROUBLES.get(outcome, _REFUSAL)
        log.warning(
            "%s %s: url=%s error=%r %s hint=%r",
            self._name,
            what,
            self._url,
            error,
            " ".join(f"{key}={value}" for key, value in self.counters().items()),
            hint,
        )

    def _report_recovery(self) -> None:
        if self._trouble.error:
            log.info("%s takes spans again: url=%s", self._name, self._url)
            # One that refuses every other batch is told of no more often, either.
            self._trouble.error = ""


def _count(counts: dict[str, int], verdict: Verdict, spans: int) -> None:
    refused = {Outcome.SENT: 0, Outcome.PARTIAL: min(verdict.rejected, spans)}
    number = refused.get(verdict.outcome, spans)
    counts["refused"] += number
    counts["sent"] += spans - number
