"""The status port: health, metrics and what `podspan doctor` asks for, by HTTP.

    /healthz   200 while the agent's loop turns
    /readyz    200 once everything is attached, else 503
    /metrics   Prometheus' text format, or OpenMetrics where that is preferred
    /status    JSON

Whoever reaches the port is not trusted: a head is at most HEAD_BYTES, is waited for
TIMEOUT_S in all, and only MAX_CONNECTIONS are served at the same time. A request has no
body, and a connection one request. The agent's loop publishes finished snapshots and
never waits for a thread of this module.

Metrics may be some hundred megabytes of text that says little: they are sent in pieces
as they are made, packed if the client can unpack them, and are never in memory as one.
"""

from __future__ import annotations

import errno
import io
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import chain
from typing import Any, Final

from podspan.agent import metrics
from podspan.agent.errors import StatusError
from podspan.agent.metrics import Family, Snapshot
from podspan.agent.values import Address

log = logging.getLogger(__name__)

HEAD_BYTES: Final = 8192
TIMEOUT_S: Final = 5.0
MAX_CONNECTIONS: Final = 8
# A whole answer; Prometheus gives up after 10 seconds by default.
ANSWER_S: Final = 30.0
PIECE_BYTES: Final = 65536
BACKLOG: Final = 16

# The loop publishes once a second. One that is silent so long will not come back.
STUCK_S: Final = 60.0

# Where no connection can be accepted, as without descriptors: not too often.
PAUSE_S: Final = 0.5

PATHS: Final = ("/healthz", "/readyz", "/metrics", "/status")


class StatusServer:
    """Answers on one address, from threads of its own, until `close`."""

    def __init__(
        self,
        address: Address,
        read: Callable[[], Snapshot],
        ready: Callable[[], bool],
        families: Callable[[], Iterable[Family]] = tuple,
    ) -> None:
        """Raise StatusError where the address cannot be had.

        `families` are metrics besides those of the snapshot.
        """
        self.read = read
        self.ready = ready
        self.families = families
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._closing = threading.Event()
        self._listener = _listen(address)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, name="podspan-status", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Accept no more connections; those that are served end by themselves."""
        self._closing.set()
        # close(2) alone would leave the thread in accept(2).
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                connection, peer = self._listener.accept()
            except OSError as exc:
                if not self._closing.is_set():
                    log.debug("status: cannot accept: %s", exc)
                    self._closing.wait(PAUSE_S)
                continue
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            self._start(connection, peer)

    def _start(self, connection: socket.socket, peer: Any) -> None:
        thread = threading.Thread(
            target=self._serve,
            args=(connection, peer),
            name="podspan-status-client",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as exc:  # no thread to be had
            log.debug("status: %s", exc)
            connection.close()
            self._places.release()

    def _serve(self, connection: socket.socket, peer: Any) -> None:
        with connection:
            try:
                _Handler(connection, peer, self)  # type: ignore[arg-type]
            except OSError as exc:  # it has gone, or is too slow
                log.debug("status: %s", exc)
            except Exception:
                log.exception("status: an answer failed")
            finally:
                self._places.release()


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: StatusServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    server_version = "podspan"
    sys_version = ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def setup(self) -> None:
        """Read the head here: http.server would take 6 MB, and as long as it lasts."""
        self.connection = self.request
        self.rfile = io.BytesIO(_read_head(self.connection))
        self._deadline_s = time.monotonic() + ANSWER_S
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        """Send what was answered."""
        self._send(self.wfile.getvalue())  # type: ignore[attr-defined]

    def _send(self, data: bytes) -> None:
        """Send, as long as the whole answer may take; raise OSError after that."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("an answer was not taken in time")
        self.connection.settimeout(min(left_s, TIMEOUT_S))
        self.connection.sendall(data)

    def do_GET(self) -> None:
        """Answer by the path; a query means nothing."""
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._say(*_health(self.server.read(), self.server.ready()))
        elif path == "/readyz":
            ready = self.server.ready()
            self._say(ready, "ready" if ready else "not ready: the agent is starting")
        elif path == "/metrics":
            self._tell_metrics()
        elif path == "/status":
            text = metrics.to_json(self.server.read())
            self._answer(HTTPStatus.OK, "application/json", text)
        else:
            there = " ".join(PATHS)
            self.send_error(HTTPStatus.NOT_FOUND, f"not here; there is {there}")

    do_HEAD = do_GET  # noqa: N815

    def _say(self, good: bool, text: str) -> None:
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, "text/plain; charset=utf-8", f"{text}\n")

    def _tell_metrics(self) -> None:
        form = metrics.negotiated(self.headers.get("Accept", ""))
        own = metrics.agent_families(self.server.read())
        lines = metrics.exposition(chain(own, self.server.families()), form)
        body = _pieces(lines)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", form.value)
        self.send_header("Vary", "Accept, Accept-Encoding")
        self.send_header("Connection", "close")
        if _takes_gzip(self.headers.get("Accept-Encoding", "")):
            self.send_header("Content-Encoding", "gzip")
            body = _packed(body)
        # RFC 9112 section 7.1. To an older client the connection's end is the end.
        chunked = self.request_version not in ("HTTP/0.9", "HTTP/1.0")
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(self.wfile.getvalue())  # type: ignore[attr-defined]
        self.wfile = io.BytesIO()
        for piece in body:
            self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            self._send(b"0\r\n\r\n")

    def _answer(self, status: HTTPStatus, content_type: str, text: str) -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Probes come every few seconds: nothing to tell."""
        log.debug("status: %s %r", self.client_address[0], format % args)


def _pieces(lines: Iterable[str]) -> Iterator[bytes]:
    """Yield the text in pieces of some size, none of them empty."""
    kept: list[bytes] = []
    size = 0
    for text in lines:
        kept.append(text.encode(errors="replace"))
        size += len(kept[-1])
        if size >= PIECE_BYTES:
            yield b"".join(kept)
            kept, size = [], 0
    if kept:
        yield b"".join(kept)


def _packed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield them as gzip (RFC 1952), fast rather than small; none of them empty."""
    packer = zlib.compressobj(level=1, wbits=16 + zlib.MAX_WBITS)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def _takes_gzip(accept_encoding: str) -> bool:
    """Tell whether gzip is named, and not to refuse it (RFC 9110 section 12.5.3)."""
    for wish in accept_encoding.lower().split(","):
        coding, _, weight = wish.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return metrics.weight_of(weight or "1") > 0
    return False


def _health(snapshot: Snapshot, ready: bool) -> tuple[bool, str]:
    silent_s = time.monotonic() - snapshot.updated_s
    if ready and silent_s > STUCK_S:
        return False, f"the agent's loop has not turned for {silent_s:.0f} s"
    return True, "ok"


def _read_head(connection: socket.socket) -> bytes:
    """Return a head; raise OSError where none comes, or not in time, or too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    head = b""
    while not _is_whole(head):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("a request's head did not come in time")
        connection.settimeout(left_s)
        part = connection.recv(HEAD_BYTES - len(head))
        if not part:  # the end, or no room
            raise ConnectionError(f"no whole head within {HEAD_BYTES} bytes")
        head += part
    return head


def _is_whole(head: bytes) -> bool:
    return b"\r\n\r\n" in head or b"\n\n" in head


def open_status(
    address: Address | None,
    read: Callable[[], Snapshot],
    ready: Callable[[], bool],
    families: Callable[[], Iterable[Family]] = tuple,
) -> StatusServer | None:
    """Serve there; None where nothing is wanted, or the default port is another's.

    What the user named works or fails: raises StatusError.
    """
    if address is None:
        return None
    try:
        return StatusServer(address, read, ready, families)
    except StatusError as exc:
        if address.named:
            raise
        log.warning("no status port: %s hint=%r", exc, exc.hint)
        return None


def _listen(address: Address) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server(
            (address.host, address.port), family=family, backlog=BACKLOG
        )
    except OSError as exc:
        hint = "choose another: --status-address 127.0.0.1:PORT, or none"
        if exc.errno == errno.EADDRINUSE:
            raise StatusError(
                f"another process has the status port {address}", hint
            ) from exc
        raise StatusError(
            f"cannot open the status port {address}: {exc.strerror or exc}", hint
        ) from exc
