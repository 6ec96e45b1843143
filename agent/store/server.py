"""The store's sockets and threads: waitress, with limits for whoever reaches the port.

A connection costs memory and, for a large body, disk: their number, the size of heads
and bodies, and the time of silence are bounded. What is over a limit gets waitress's
own 413 or 431.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import waitress
from podspan.agent.errors import StoreError
from podspan.agent.store.api import Api
from podspan.agent.store.request import MAX_BODY_BYTES
from waitress import wasyncore

if TYPE_CHECKING:
    from podspan.agent.store.database import Database

# Enough that a slow search does not hold up ingest; each may hold a large message.
THREADS: Final = 8
MAX_CONNECTIONS: Final = 64
MAX_HEAD_BYTES: Final = 16 * 1024
SILENCE_S: Final = 30

# A thousand spans are about a megabyte: kept in memory, what is larger in a file.
RECEIVE_BYTES: Final = 65536
BODY_IN_MEMORY_BYTES: Final = 2 * 1024 * 1024

# Read to the end, or else the client is reset before it sees its 413.
MAX_READ_BYTES: Final = 2 * MAX_BODY_BYTES

BACKLOG: Final = 128

# For answers that are being made when the server is closed.
DRAIN_S: Final = 5.0
POLL_S: Final = 0.02


class StoreServer:
    """Answers on one address until `close`."""

    def __init__(self, database: Database, address: tuple[str, int]) -> None:
        """Bind; port 0 is any. StoreError where the address cannot be had."""
        listener = _listen(address)
        host, self.port = listener.getsockname()[:2]
        # Waitress tells each full queue and each client that goes away.
        logging.getLogger("waitress").setLevel(logging.ERROR)
        self._server = waitress.create_server(
            Api(database, local=ipaddress.ip_address(host).is_loopback),
            sockets=[listener],
            threads=THREADS,
            connection_limit=MAX_CONNECTIONS,
            max_request_header_size=MAX_HEAD_BYTES,
            max_request_body_size=MAX_READ_BYTES,
            recv_bytes=RECEIVE_BYTES,
            inbuf_overflow=BODY_IN_MEMORY_BYTES,
            channel_timeout=SILENCE_S,
            cleanup_interval=SILENCE_S // 3,
            asyncore_use_poll=True,
            backlog=BACKLOG,
            ident=None,
        )
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ended.set()

    def serve_forever(self) -> None:
        """Answer until `close` is called by another thread."""
        self._ended.clear()
        try:
            self._server.run()
        finally:
            self._ended.set()

    def start(self) -> None:
        """Answer in a thread of its own."""
        self._ended.clear()
        self._thread = threading.Thread(
            target=self.serve_forever, name="podspan-store", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Accept nothing more, finish the answers that are being made, and end."""
        if self._ended.is_set():
            self._close_sockets()
        else:
            self._in_loop(self._close_listener)
            deadline_s = time.monotonic() + DRAIN_S
            while self._is_busy() and time.monotonic() < deadline_s:
                self._ended.wait(POLL_S)
        self._server.task_dispatcher.shutdown(timeout=DRAIN_S)
        if not self._ended.is_set():
            self._in_loop(self._close_sockets)
            self._ended.wait(DRAIN_S)
        if self._thread:
            self._thread.join(DRAIN_S)

    def _in_loop(self, action: Callable[[], None]) -> None:
        """Let the loop do it: sockets are its own."""
        # Without anything to listen to it ends by itself, and closes its trigger.
        with suppress(OSError):
            self._server.trigger.pull_trigger(action)

    def _is_busy(self) -> bool:
        return any(
            channel.requests or channel.total_outbufs_len
            for channel in list(self._server.active_channels.values())
        )

    def _close_listener(self) -> None:
        wasyncore.dispatcher.close(self._server)

    def _close_sockets(self) -> None:
        for channel in list(self._server.active_channels.values()):
            channel.handle_close()
        self._server.close()


def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port),
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=host == "::",
        )
    except (OSError, OverflowError) as exc:
        hint = ""
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            hint = "another store or Zipkin is there: choose another --listen ADDR:PORT"
        raise StoreError(f"cannot listen on {host}, port {port}: {exc}", hint) from exc
