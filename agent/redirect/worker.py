"""A process that serves redirected connections: `python -m` this, stdin the agent.

It outlives the agent: when the control socket ends, it goes on accepting until the
guard's grace is over (no connection is redirected after that), then closes its
listeners, serves what is open to its end and exits.

Out of descriptors it accepts nothing until connections have ended, and says so: the
guard then lets new connections go direct. Nothing that was accepted is dropped.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import resource
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from select import EPOLLEXCLUSIVE, EPOLLIN
from typing import Final, Protocol, TypeVar

from podspan.agent.exchange import Role
from podspan.agent.http_head import Headers
from podspan.agent.kernel.handoff import Handoff, Tuple
from podspan.agent.redirect import control, sockets
from podspan.agent.redirect.gate import Flow, Gate, Held
from podspan.agent.redirect.http1 import Http1
from podspan.agent.redirect.http2 import Http2, ReceivedIds
from podspan.agent.redirect.inject import Direction, Given, Propagation, new_root
from podspan.agent.redirect.layer import Layer, StreamRecord
from podspan.agent.redirect.loop import Loop
from podspan.agent.redirect.relay import Relay, Shared
from podspan.agent.redirect.sniff import Protocol as Spoken
from podspan.agent.redirect.waiting import Waiting
from podspan.init.plan import GATE_QUEUE

log = logging.getLogger(__name__)

T = TypeVar("T")

CONTROL_FD: Final = 0

# How often counters and exchanges go to the agent.
TELL_S: Final = 0.2

# A record with all its texts; a head has no more than 16 KB of them.
EXCHANGE_MAX: Final = 32 << 10

# Accepted in one turn, so that open connections have theirs.
ACCEPTS: Final = 16

# Descriptors that connections leave free: listeners of new pods, logs, imports.
SPARE_FDS: Final = 64
FDS_PER_CONNECTION: Final = 2

# Where the system, not this process, has no more: nothing tells when it has again.
RETRY_S: Final = 0.1
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Maps(Protocol):
    """What a worker needs of podspan.agent.kernel.handoff.Handoff."""

    def take(self, tuple_: Tuple, offset: int) -> Given | None:
        """Return the context that the kernel decided for a request."""

    def claim(self, tuple_: Tuple) -> None:
        """Say that the exchanges of this connection are reported from here."""

    def root(self, netns: int, span_id: int) -> None:
        """Say that the request with this span id is a root."""


class NoMaps:
    """Without the kernel's programs: their requests have no context from them."""

    def take(self, tuple_: Tuple, offset: int) -> Given | None:  # noqa: ARG002
        """Return None."""
        return None

    def claim(self, tuple_: Tuple) -> None:
        """Do nothing."""

    def root(self, netns: int, span_id: int) -> None:
        """Do nothing."""


@dataclass(slots=True, eq=False)
class _Pod:
    netns: int
    netns_fd: int
    options: Propagation
    transparent: frozenset[int]
    waiting: Waiting | None = None
    received_ids: ReceivedIds = field(default_factory=ReceivedIds)
    listeners: list[_Listener] = field(default_factory=list)
    relays: set[Relay] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Listener:
    pod: _Pod
    sock: socket.socket
    direction: Direction


@dataclass(slots=True, eq=False)
class _Connection:
    """A relay's context: whose connection it is."""

    pod: _Pod
    direction: Direction
    destination: sockets.Address
    application: Tuple  # its socket, as it sees it


class Worker:
    """The event loop and what it serves."""

    def __init__(self, channel: control.Channel) -> None:
        self._channel = channel
        self._loop = Loop()
        self._home_fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._counters: Counter[str] = Counter()
        self._exchanges: list[bytes] = []
        self._exchanges_size = 0
        self._pods: dict[int, _Pod] = {}  # those that are served
        self._relays: set[Relay] = set()  # also of pods that are no longer served
        self._max_open = _raise_descriptor_limit()
        self._refused: deque[tuple[_Listener, socket.socket]] = deque()
        self._accepting = True
        self._leaving = False  # accepts nothing any more
        self._told_open = 0
        self._propagation = Propagation()
        self._maps: Maps = NoMaps()
        self._grace_s = 0.0
        self._shared = Shared(
            loop=self._loop,
            counters=self._counters,
            closed=self._closed,
            finished=self._finished,
            sniff_wait_s=1.0,
        )

    def run(self) -> None:
        """Serve until all connections have ended after the agent has."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so is its service's stop
        self._loop.add(self._channel.sock.fileno(), EPOLLIN, self._on_control)
        self._loop.after(TELL_S, self._tell_regularly)
        gc.freeze()
        self._loop.run(
            until=lambda: self._leaving and not (self._relays or self._refused)
        )
        self._tell()
        self._channel.close()

    # The agent

    def _on_control(self, _events: int) -> None:
        try:
            for message, fds in self._channel.receive():
                self._obey(message, fds)
        except control.BadMessage:
            log.exception("the agent is taken as gone")
            self._channel.ended = True
        if self._channel.truncated:
            self._counters["messages_truncated"] += self._channel.truncated
            self._channel.truncated = 0
        if self._channel.ended:
            self._loop.remove(self._channel.sock.fileno())
            self._loop.after(self._grace_s, self._leave)

    def _obey(self, message: control.Message, fds: list[int]) -> None:
        match message:
            case control.Start():
                self._propagation = Propagation(
                    message.span_ids, message.unsampled, frozenset(message.propagate)
                )
                self._shared.sniff_wait_s = message.sniff_wait_s
                self._grace_s = message.grace_s
                if fds:
                    self._maps = Handoff(*fds)
            case control.Open():
                self._open_pod(message, fds)
            case control.Close(netns, gone):
                self._close_pod(netns, gone)
            case control.Drain(within_s):
                self._leave()
                self._loop.after(within_s, self._cut)
            case _:
                raise control.BadMessage(f"{type(message).__name__} is for the agent")

    def _open_pod(self, message: control.Open, fds: list[int]) -> None:
        given = self._propagation
        options = Propagation(
            given.span_ids, given.unsampled, given.propagate, message.sampling
        )
        transparent = frozenset(message.transparent)
        if not fds:
            known = self._pods.get(message.netns)
            if known is not None:
                known.options, known.transparent = options, transparent
            return
        self._close_pod(message.netns, gone=False)
        netns_fd, *listeners = fds
        pod = _Pod(message.netns, netns_fd, options, transparent)
        if message.gate:
            pod.waiting = self._open_gate(pod, listeners.pop(0))
        for index, fd in enumerate(listeners):
            outbound = index < message.outbound
            direction = Direction.OUTBOUND if outbound else Direction.INBOUND
            listener = _Listener(pod, socket.socket(fileno=fd), direction)
            listener.sock.setblocking(False)
            pod.listeners.append(listener)
            if self._accepting:
                self._listen(listener)
        self._pods[pod.netns] = pod
        self._channel.send(control.Opened(pod.netns))

    def _close_pod(self, netns: int, gone: bool) -> None:
        pod = self._pods.pop(netns, None)
        if pod is None:
            return
        if pod.waiting is not None:
            pod.waiting.close()
        self._close_listeners(pod)
        if pod.waiting is not None:
            pod.waiting.drop()
        if gone:
            for relay in list(pod.relays):
                relay.abort("pod_gone")
        self._release(pod)

    def _close_listeners(self, pod: _Pod) -> None:
        while self._accepting and any(map(self._accept_some, pod.listeners)):
            pass  # what is queued was redirected while the pod was served
        for listener in pod.listeners:
            if self._accepting:
                self._loop.remove(listener.sock.fileno())
            self._loop.close(listener.sock)
        pod.listeners.clear()

    def _open_gate(self, pod: _Pod, fd: int) -> Waiting:
        def upstream(held: Held, flow: Flow) -> socket.socket:
            if len(self._relays) + len(waiting) >= self._max_open:
                raise OSError(errno.EMFILE, "no descriptors left")
            direction = Direction.INBOUND if held.inbound else Direction.OUTBOUND
            family = socket.AF_INET6 if ":" in flow.source else socket.AF_INET
            return self._open_upstream(pod, direction, family, flow.source)

        gate = Gate(GATE_QUEUE, socket.socket(fileno=fd))
        waiting = Waiting(self._loop, gate, self._counters, upstream)
        return waiting

    def _release(self, pod: _Pod) -> None:
        """Let the namespace go once no connection of the pod needs it."""
        waits = any(listener.pod is pod for listener, _ in self._refused)
        if pod.netns_fd >= 0 and not (pod.listeners or pod.relays or waits):
            os.close(pod.netns_fd)
            pod.netns_fd = -1

    def _leave(self) -> None:
        self._leaving = True
        for netns in list(self._pods):
            self._close_pod(netns, gone=False)

    def _cut(self) -> None:
        for relay in list(self._relays):
            relay.abort("drain_over")

    # Accepting

    def _listen(self, listener: _Listener) -> None:
        # The queue is shared by all workers; one of those that sleep is woken.
        self._loop.add(
            listener.sock.fileno(),
            EPOLLIN | EPOLLEXCLUSIVE,
            lambda _events: self._accept_turn(listener),
        )

    def _accept_turn(self, listener: _Listener) -> None:
        for _ in range(ACCEPTS):
            if not self._accept_some(listener):
                return

    def _accept_some(self, listener: _Listener) -> bool:
        """Accept one connection; return whether there may be another."""
        if not self._accepting:
            return False
        if len(self._relays) >= self._max_open:
            self._stop_accepting()
            return False
        try:
            sock, _ = listener.sock.accept()
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno in _EXHAUSTED:
                self._stop_accepting()
                self._loop.after(RETRY_S, self._accept_again)
                return False
            self._counters["accept_failed"] += 1  # of one connection: it is gone
            return True
        self._serve(listener, sock)
        return True

    def _serve(self, listener: _Listener, sock: socket.socket) -> None:
        try:
            sockets.prepare_accepted(sock)
            destination = sockets.original_destination(sock)
            client = sock.getpeername()
        except OSError:  # reset since
            self._counters["accept_failed"] += 1
            sock.close()
            return
        if destination is None:
            # Whom it is meant for is us: to relay it would be a loop.
            self._counters["not_redirected"] += 1
            sock.close()
            return
        try:
            waiting = listener.pod.waiting
            flow = Flow(client[0], client[1], destination[0], destination[1])
            ready = waiting.take(flow) if waiting is not None else None
            if ready is not None:
                # As the application knows it: on its way the port may have changed.
                flow, up = ready
                client = (flow.source, flow.source_port)
            else:
                up = self._open_upstream(
                    listener.pod, listener.direction, sock.family, client[0]
                )
        except OSError as exc:
            if exc.errno in _EXHAUSTED:
                self._refused.append((listener, sock))
                self._stop_accepting()
                self._loop.after(RETRY_S, self._accept_again)
                return
            log.warning("upstream socket for %s: %s", destination, exc)
            self._counters["upstream_failed"] += 1
            sock.close()
            return
        pod = listener.pod
        application = _tuple(pod, client, destination)
        connection = _Connection(pod, listener.direction, destination, application)
        relay = Relay(self._shared, sock, up, self._choose, connection)
        pod.relays.add(relay)
        self._relays.add(relay)
        self._counters[f"connections_{listener.direction.value}"] += 1
        relay.start(None if ready is not None else destination)
        if listener.direction is Direction.INBOUND:
            # The kernel has chosen the port at the latest when we connected.
            connection.application = _tuple(pod, destination, up.getsockname())

    def _open_upstream(
        self, pod: _Pod, direction: Direction, family: int, client: str
    ) -> socket.socket:
        with sockets.inside(pod.netns_fd, self._home_fd):
            up = sockets.open_upstream(family)
        if direction is Direction.INBOUND:
            shown = family in pod.transparent
            source = sockets.Source.CLIENT if shown else sockets.Source.LOOPBACK
            try:
                sockets.bind_source(up, source, client)
            except OSError:
                up.close()
                raise
        return up

    def _stop_accepting(self) -> None:
        if not self._accepting:
            return
        self._accepting = False
        self._counters["overloaded"] += 1
        for pod in self._pods.values():
            for listener in pod.listeners:
                self._loop.remove(listener.sock.fileno())
        self._channel.send(control.Overloaded(True))

    def _accept_again(self) -> None:
        if self._accepting:
            return
        self._accepting = True
        for pod in self._pods.values():
            for listener in pod.listeners:
                self._listen(listener)
        refused, self._refused = self._refused, deque()
        for listener, sock in refused:
            self._serve(listener, sock)
            self._release(listener.pod)
        if self._accepting:
            self._channel.send(control.Overloaded(False))

    # Connections

    def _choose(self, relay: Relay, spoken: Spoken) -> Layer | None:
        self._counters[f"protocol_{spoken.value}"] += 1
        connection = _connection(relay)
        direction, options = connection.direction, connection.pod.options
        if spoken is Spoken.HTTP1:
            return Http1(direction, self._give(relay), options)
        if spoken is Spoken.HTTP2:
            self._tell_maps(lambda: self._maps.claim(connection.application))
            received = connection.pod.received_ids
            return Http2(direction, options, time.monotonic_ns, _random64, received)
        return None

    def _give(self, relay: Relay) -> Callable[[int, Headers], Given | None]:
        connection = _connection(relay)
        pod = connection.pod

        def from_kernel(offset: int, _headers: Headers) -> Given | None:
            self._counters["requests_outbound"] += 1
            return self._tell_maps(lambda: self._maps.take(application, offset))

        def from_here(_offset: int, headers: Headers) -> Given | None:
            self._counters["requests_inbound"] += 1
            given = new_root(headers, pod.options, _random64)
            self._tell_maps(lambda: self._maps.root(pod.netns, given.span_id))
            return given

        if connection.direction is Direction.INBOUND:
            return from_here
        application = connection.application
        return from_kernel

    def _tell_maps(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except OSError:
            self._counters["handoff_failed"] += 1
            return None

    def _closed(self, relay: Relay) -> None:
        pod = _connection(relay).pod
        pod.relays.discard(relay)
        self._relays.discard(relay)
        self._release(pod)
        if not self._accepting and len(self._relays) < self._max_open:
            # In a turn of its own: the descriptors are closed after this one.
            self._loop.after(0, self._accept_again)

    def _finished(self, relay: Relay, record: StreamRecord) -> None:
        outbound = _connection(relay).direction is Direction.OUTBOUND
        role = Role.CLIENT if outbound else Role.SERVER
        packed = control.pack_exchange(record, role, _connection(relay).application)
        if len(packed) > EXCHANGE_MAX:
            self._counters["records_too_long"] += 1
            return
        self._exchanges.append(packed)
        self._exchanges_size += len(packed)
        if self._exchanges_size > control.EXCHANGES_MAX - EXCHANGE_MAX:
            self._tell_exchanges()

    # Telling the agent

    def _tell_regularly(self) -> None:
        self._tell()
        self._loop.after(TELL_S, self._tell_regularly)

    def _tell(self) -> None:
        self._tell_exchanges()
        self._channel.flush()
        open_ = len(self._relays)
        if not self._counters and open_ == self._told_open:
            return
        if self._channel.send(control.Counted(dict(self._counters), open_)):
            self._counters.clear()
            self._told_open = open_

    def _tell_exchanges(self) -> None:
        if not self._exchanges:
            return
        if not self._channel.send(control.Finished(tuple(self._exchanges))):
            self._counters["records_lost"] += len(self._exchanges)
        self._exchanges.clear()
        self._exchanges_size = 0


def _connection(relay: Relay) -> _Connection:
    assert isinstance(relay.context, _Connection)  # noqa: S101 (made in _serve)
    return relay.context


def _tuple(pod: _Pod, local: sockets.Address, peer: sockets.Address) -> Tuple:
    return Tuple(pod.netns, local[0], local[1], peer[0], peer[1])


def _random64() -> int:
    return random.getrandbits(64) or 1


def _raise_descriptor_limit() -> int:
    """Allow as many descriptors as may be; return how many connections that makes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, (hard - SPARE_FDS) // FDS_PER_CONNECTION)


def main() -> None:
    """Serve the agent at the other end of stdin."""
    logging.basicConfig(
        stream=sys.stderr, format=f"worker {os.getpid()}: %(levelname)s: %(message)s"
    )
    sock = socket.socket(fileno=os.dup(CONTROL_FD))
    with suppress(OSError):  # a child would inherit it
        os.set_inheritable(sock.fileno(), False)
    Worker(control.Channel(sock)).run()


if __name__ == "__main__":
    main()
