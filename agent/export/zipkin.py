"""POST spans to a Zipkin v2 collector (Zipkin, Jaeger, an OpenTelemetry Collector).

`export` encodes and queues; a thread of its own batches, compresses and sends, so that
the reading of the kernel's records never waits for a network. What happens to a batch:

- 2xx: sent.
- No answer, 408, 429 or 5xx: tried again, later and later, until RETRY_S are over;
  then dropped and counted as failed.
- Any other answer: tried again it would fare no better; counted as refused.

Meanwhile spans wait in a queue of bounded size; one that finds it full is dropped and
counted. The collector's trouble is told once, then every WARN_S, never per batch.
"""

from __future__ import annotations

import gzip
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import urllib3
from podspan.agent.errors import UsageError
from podspan.agent.span import Span, zipkin_json

log = logging.getLogger(__name__)

ZIPKIN_PATH = "/api/v2/spans"

BATCH_SPANS = 1000
BATCH_DELAY_S = 1.0

# JSON of about 20,000 spans. Bounds the memory of a node whose collector is away.
QUEUE_BYTES = 16 * 1024 * 1024

REQUEST_TIMEOUT_S = 5.0
RETRY_S = 30.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
WARN_S = 30.0

# Compressing spans of one batch saves nine tenths; below this it is not worth the time.
GZIP_OVER_BYTES = 4096
GZIP_LEVEL = 1

# What happens to a span. Dropped: the queue was full. Failed: given up after retries,
# or at exit. Refused: the collector does not want it.
OUTCOMES = ("sent", "dropped", "failed", "refused")

RETRIED_STATUSES = frozenset({408, 429})

# Tell a mesh, and our own kernel programs, not to trace the upload of traces.
UNTRACED = {"b3": "0", "x-b3-sampled": "0"}


def zipkin_endpoint(url: str) -> str:
    """Return where to POST: `url`, completed if it has no path of its own."""
    hint = "an example: --zipkin http://zipkin.istio-system:9411"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UsageError(f"not a URL: {url!r}: {exc}", hint) from exc
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"not an http or https URL: {url!r}", hint)
    if not parts.hostname or port == 0 or not url.isprintable() or " " in url:
        raise UsageError(f"not a URL: {url!r}", hint)
    if parts.username is not None:
        raise UsageError("a URL with a user name in it would end up in logs", hint)
    if parts.path in ("", "/"):
        parts = parts._replace(path=ZIPKIN_PATH)
    return parts._replace(fragment="").geturl()


@dataclass(slots=True)
class _Trouble:
    """What was last said about the collector."""

    error: str = ""
    said_at_s: float = field(default=-WARN_S)


class ZipkinExporter:
    """Sends spans to one collector, until `close`."""

    def __init__(
        self,
        url: str,
        *,
        batch_spans: int = BATCH_SPANS,
        batch_delay_s: float = BATCH_DELAY_S,
        queue_bytes: int = QUEUE_BYTES,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._url = zipkin_endpoint(url)
        self._batch_spans = batch_spans
        self._batch_delay_s = batch_delay_s
        self._queue_bytes = queue_bytes
        self._request_timeout_s = request_timeout_s
        self._retry_s = retry_s

        # One request at a time, on one connection kept open.
        self._pool = urllib3.PoolManager(maxsize=1, retries=False)
        self._trouble = _Trouble()

        # Guarded by `_changed`: what follows.
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._oldest_s = 0.0  # when the queue stopped being empty
        self._sending = 0  # spans of the batch in the thread's hands
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._deadline_s: float | None = None  # set by close()
        self._abandoned = False

        self._thread = threading.Thread(
            target=self._run, name="podspan-zipkin", daemon=True
        )
        self._thread.start()

    def export(self, spans: Sequence[Span]) -> None:
        """Queue the spans; drop and count those for which there is no room."""
        encoded = [zipkin_json(span).encode() for span in spans]
        with self._changed:
            if not self._queue:
                self._oldest_s = time.monotonic()
            was_waiting = len(self._queue)
            for text in encoded:
                if self._queued_bytes + len(text) > self._queue_bytes:
                    self._counts["dropped"] += 1
                    continue
                self._queue.append(text)
                self._queued_bytes += len(text)
            # Only then does the thread have anything to do but wait on.
            if not was_waiting or len(self._queue) >= self._batch_spans:
                self._changed.notify()

    def tick(self) -> None:
        """The thread keeps its own time."""

    def counters(self) -> dict[str, int]:
        """Return what happened to all spans so far; their sum is what was exported."""
        with self._changed:
            waiting = len(self._queue) + self._sending
            return {**self._counts, "queued": waiting}

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for at most `timeout_s`; count the rest as failed."""
        with self._changed:
            failed_before = self._counts["failed"]
            self._deadline_s = time.monotonic() + timeout_s
            self._changed.notify()
        # A collector that trickles its answer evades every socket timeout.
        self._thread.join(timeout_s + 0.5)
        with self._changed:
            self._abandoned = True
            self._counts["failed"] += self._sending + len(self._queue)
            unsent = self._counts["failed"] - failed_before
            self._sending = 0
            self._queue.clear()
            self._queued_bytes = 0
        self._pool.clear()
        if unsent:
            log.warning("zipkin: ended with spans unsent: spans=%d", unsent)

    def _run(self) -> None:
        while batch := self._next_batch():
            started_s = time.monotonic()
            outcome = self._deliver(b"[" + b",".join(batch) + b"]", started_s)
            with self._changed:
                if self._abandoned:
                    return
                self._sending = 0
                self._counts[outcome] += len(batch)

    def _next_batch(self) -> list[bytes]:
        """Wait until a batch is full or old enough; empty when it is time to end."""
        with self._changed:
            while True:
                now_s = time.monotonic()
                if self._deadline_s is not None:
                    if not self._queue or now_s >= self._deadline_s:
                        return []
                    break
                if len(self._queue) >= self._batch_spans:
                    break
                wait_s = None
                if self._queue:
                    wait_s = self._oldest_s + self._batch_delay_s - now_s
                    if wait_s <= 0:
                        break
                self._changed.wait(wait_s)
            size = min(len(self._queue), self._batch_spans)
            batch = [self._queue.popleft() for _ in range(size)]
            self._queued_bytes -= sum(map(len, batch))
            self._oldest_s = now_s
            self._sending = size
            return batch

    def _deliver(self, body: bytes, started_s: float) -> str:
        """Send one batch, however often it takes; return its outcome."""
        headers = {"content-type": "application/json", **UNTRACED}
        if len(body) > GZIP_OVER_BYTES:
            body = gzip.compress(body, GZIP_LEVEL)
            headers["content-encoding"] = "gzip"

        backoff_s = FIRST_BACKOFF_S
        while True:
            error, retry = self._post(body, headers)
            if not error:
                self._report_recovery()
                return "sent"
            self._report_trouble(error)
            if not retry:
                return "refused"
            if time.monotonic() + backoff_s - started_s > self._retry_s:
                return "failed"
            if not self._pause(backoff_s):
                return "failed"
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[str, bool]:
        """Try once; return what went wrong ("": nothing) and whether to try again."""
        timeout_s = self._request_timeout_s
        if self._deadline_s is not None:
            timeout_s = min(timeout_s, self._deadline_s - time.monotonic())
            if timeout_s <= 0:
                return "no time left", True
        try:
            response = self._pool.request(
                "POST",
                self._url,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(total=timeout_s),
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as exc:
            return _reason(exc), True
        status = response.status
        if 200 <= status <= 299:
            return "", False
        answer = response.data[:200].decode("utf-8", "replace").strip()
        error = f"HTTP {status} {' '.join(answer.split())}".strip()
        return error, status >= 500 or status in RETRIED_STATUSES

    def _pause(self, seconds: float) -> bool:
        """Wait between two tries; return whether there is time for another one."""
        until_s = time.monotonic() + seconds
        with self._changed:
            while True:
                now_s = time.monotonic()
                if self._deadline_s is not None:
                    until_s = min(until_s, self._deadline_s)
                    if now_s >= self._deadline_s:
                        return False
                if now_s >= until_s:
                    return True
                self._changed.wait(until_s - now_s)

    def _report_trouble(self, error: str) -> None:
        now_s = time.monotonic()
        if now_s - self._trouble.said_at_s < WARN_S:
            return
        self._trouble = _Trouble(error, now_s)
        counters = " ".join(f"{key}={value}" for key, value in self.counters().items())
        log.warning(
            "zipkin does not take spans: url=%s error=%r %s "
            "hint='is the collector up, and the URL right? calls are not affected'",
            self._url,
            error,
            counters,
        )

    def _report_recovery(self) -> None:
        if self._trouble.error:
            log.info("zipkin takes spans again: url=%s", self._url)
            self._trouble = _Trouble()


def _reason(exc: urllib3.exceptions.HTTPError) -> str:
    """Return what urllib3 means, without its objects' addresses."""
    text = str(exc)
    return text.rpartition(": ")[2] if "object at 0x" in text else text
