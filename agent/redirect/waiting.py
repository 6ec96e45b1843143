"""Connections that are not accepted yet: SYNs at a pod's gate, and their upstreams.

A SYN is let into the listener once its upstream is connected, which then waits for it
here. Whatever else happens, the SYN goes direct: see gate.py.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from select import EPOLLIN, EPOLLOUT
from typing import Final

from podspan.agent.redirect import sockets
from podspan.agent.redirect.gate import Flow, Gate, Held
from podspan.agent.redirect.loop import Loop, Timer

# A SYN that may come in is accepted at once, unless who sent it is gone.
ACCEPT_S: Final = 5.0
# Who does not answer for so long has to be waited for by the application itself.
CONNECT_S: Final = 10.0

OpenUpstream = Callable[[Held, Flow], socket.socket]


@dataclass(slots=True, eq=False)
class _Attempt:
    flow: Flow
    sock: socket.socket
    held: list[Held] = field(default_factory=list)
    timer: Timer | None = None


class Waiting:
    """What waits for one pod. `open_upstream` raises OSError where it cannot."""

    def __init__(
        self,
        loop: Loop,
        gate: Gate,
        counters: Counter[str],
        open_upstream: OpenUpstream,
    ) -> None:
        self._loop = loop
        self._gate = gate
        self._counters = counters
        self._open_upstream = open_upstream
        self._attempts: dict[Flow, _Attempt] = {}
        self._ready: dict[Flow, tuple[socket.socket, Timer]] = {}
        loop.add(gate.fileno(), EPOLLIN, self._on_gate)

    def __len__(self) -> int:
        """Return how many upstream sockets there are."""
        return len(self._attempts) + len(self._ready)

    def take(self, accepted: Flow) -> tuple[Flow, socket.socket] | None:
        """Return the upstream of an accepted connection, and its flow as it was sent.

        Two connections from one port, to different destinations, cannot both keep that
        port on their way to the listener.
        """
        flow = accepted
        if flow not in self._ready:
            ends = (flow.source, flow.destination, flow.destination_port)
            found = [
                each
                for each in self._ready
                if (each.source, each.destination, each.destination_port) == ends
            ]
            if len(found) != 1:
                return None
            [flow] = found
        sock, timer = self._ready.pop(flow)
        timer.cancel()
        return flow, sock

    def close(self) -> None:
        """Give the gate up: what comes now goes direct, and what waits at once."""
        for attempt in list(self._attempts.values()):
            self._let_go(attempt, errno.ECANCELED)
        self._loop.remove(self._gate.fileno())
        self._gate.close()

    def drop(self) -> None:
        """Close what nobody has come for."""
        for flow in list(self._ready):
            self._expire(flow)

    def _on_gate(self, _events: int) -> None:
        try:
            waiting = self._gate.receive()
        except OSError as exc:
            self._counters[f"gate_failed_{sockets.error_name(exc.errno)}"] += 1
            return
        self._counters["gate_overruns"] += self._gate.overruns
        self._gate.overruns = 0
        for held in waiting:
            if held.flow is None:
                self._counters["gate_unknown"] += 1
                self._say(self._gate.direct, held)
            else:
                self._hold(held, held.flow)

    def _hold(self, held: Held, flow: Flow) -> None:
        if flow in self._ready:  # the same SYN once more
            self._say(self._gate.redirect, held)
            return
        attempt = self._attempts.get(flow)
        if attempt is not None:  # likewise
            attempt.held.append(held)
            return
        try:
            sock = self._open_upstream(held, flow)
        except OSError as exc:
            self._counters[f"gate_no_socket_{sockets.error_name(exc.errno)}"] += 1
            self._say(self._gate.direct, held)
            return
        attempt = _Attempt(flow, sock, [held])
        self._attempts[flow] = attempt
        try:
            sock.connect((flow.destination, flow.destination_port))
        except BlockingIOError:
            self._loop.add(sock.fileno(), EPOLLOUT, lambda _: self._answered(attempt))
            attempt.timer = self._loop.after(
                CONNECT_S, lambda: self._let_go(attempt, errno.ETIMEDOUT)
            )
        except OSError as exc:
            self._failed(attempt, exc.errno or 0)
        else:
            self._connected(attempt)

    def _answered(self, attempt: _Attempt) -> None:
        self._loop.remove(attempt.sock.fileno())
        if attempt.timer is not None:
            attempt.timer.cancel()
        error = sockets.pending_error(attempt.sock)
        if error:
            self._failed(attempt, error)
        else:
            self._connected(attempt)

    def _connected(self, attempt: _Attempt) -> None:
        flow = attempt.flow
        del self._attempts[flow]
        timer = self._loop.after(ACCEPT_S, lambda: self._expire(flow))
        self._ready[flow] = (attempt.sock, timer)
        for held in attempt.held:
            self._say(self._gate.redirect, held)

    def _failed(self, attempt: _Attempt, error: int) -> None:
        """The application's own connect(2) shall find that out."""
        self._counters[f"connect_failed_{sockets.error_name(error)}"] += 1
        del self._attempts[attempt.flow]
        for held in attempt.held:
            self._say(self._gate.direct, held)
        self._loop.close(attempt.sock)

    def _let_go(self, attempt: _Attempt, error: int) -> None:
        if attempt.timer is not None:
            attempt.timer.cancel()
        self._loop.remove(attempt.sock.fileno())
        self._failed(attempt, error)

    def _say(self, verdict: Callable[[Held], None], held: Held) -> None:
        try:
            verdict(held)
        except OSError as exc:  # it waits on, and is dropped with the gate
            self._counters[f"gate_failed_{sockets.error_name(exc.errno)}"] += 1

    def _expire(self, flow: Flow) -> None:
        found = self._ready.pop(flow, None)
        if found is not None:
            sock, timer = found
            timer.cancel()
            self._loop.close(sock)
