"""The event loop of a worker: epoll, timers, and sockets closed at a safe moment.

Not asyncio: a transport that pauses reading leaves epoll and so sees no RST, and one
that closes cannot choose between FIN and RST.
"""

from __future__ import annotations

import heapq
import logging
import select
import socket
import time
from collections.abc import Callable
from itertools import count

log = logging.getLogger(__name__)

# Handlers run at most so many events before timers are looked at again.
MAX_EVENTS = 256

Handler = Callable[[int], None]


class Timer:
    """A call that is due at a time; `cancel` may be called whenever."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget the call."""
        self.call = None


class Loop:
    """Calls handlers with epoll's events, one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = count()
        self._closing: list[socket.socket] = []

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` with the events of this descriptor."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Change which events are reported; errors and RST always are."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Report nothing more of this descriptor, which is still open."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def close(self, sock: socket.socket) -> None:
        """Close a socket, which was removed before, after this round of events.

        Until then its number cannot be another's, for which an event that was
        already fetched would be taken.
        """
        self._closing.append(sock)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, in so many seconds."""
        timer = Timer(call)
        due = time.monotonic() + seconds
        heapq.heappush(self._timers, (due, next(self._serial), timer))
        return timer

    def run(self, until: Callable[[], bool]) -> None:
        """Serve until `until`, asked after each round, says yes."""
        handlers = self._handlers
        while not until():
            for fd, events in self._epoll.poll(self._timeout_s(), MAX_EVENTS):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            self._run_timers()
            for sock in self._closing:
                sock.close()
            self._closing.clear()

    def _timeout_s(self) -> float:
        timers = self._timers
        while timers and timers[0][2].call is None:
            heapq.heappop(timers)
        if not timers:
            return -1
        return max(0.0, timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        timers = self._timers
        now = time.monotonic()
        while timers and timers[0][0] <= now:
            call = heapq.heappop(timers)[2].call
            if call is not None:
                call()
