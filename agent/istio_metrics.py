"""Istio's standard metrics, from the exchanges that the agent sees anyway.

Names, labels and buckets are those of Istio's proxies (istio.io, "Istio Standard
Metrics"; istio/proxy, istio_stats.cc; Envoy's default buckets), so that dashboards made
for them keep working: a client's end is `reporter="source"`, a server's "destination".
Every exchange counts, sampled or not; a sampled one may become an exemplar.

Where it differs: durations are not cut to whole milliseconds; a request without a
response has code 0, since no proxy makes one up; sizes are those of bodies, as Istio's
page says and its proxies do not do.

The agent's loop counts, and any thread reads.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from podspan.agent.b3 import trace_id_text
from podspan.agent.exchange import FLAG_SAMPLED, End, Exchange, Protocol, Role
from podspan.agent.metrics import (
    COUNTER,
    HISTOGRAM,
    Distribution,
    Exemplar,
    Family,
    Sample,
    label_text,
)
from podspan.agent.pods.names import ServiceNames
from podspan.agent.tags.istio import response_flags
from podspan.agent.tags.own import GRPC_STATUS
from podspan.agent.workloads import (
    UNKNOWN,
    Service,
    Services,
    Workload,
    Workloads,
    without_host,
)

# Of 110 pods with some ten neighbours and some codes each.
MAX_SERIES: Final = 5000
MAX_EXEMPLARS: Final = 5000

# When there is no room, what was not seen for so long may go; looked for not more often
# than this.
IDLE_S: Final = 3600.0
SWEEP_S: Final = 60.0

# TCP connections of which a part was reported: their opening counts once.
MAX_PARTED: Final = 10_000

# Envoy's HistogramStatisticsImpl::supportedBuckets, for milliseconds and bytes alike.
BOUNDS: Final = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000,
    300_000, 600_000, 1_800_000, 3_600_000,
)  # fmt: skip
BUCKETS: Final = len(BOUNDS) + 1

# Places in an HTTP series' counts: plain numbers take 30 bytes each, these 8.
REQUESTS: Final = 0
DURATION_US: Final = 1  # sums
REQUEST_BYTES: Final = 2
RESPONSE_BYTES: Final = 3
DURATIONS: Final = 4  # the first of BUCKETS
REQUEST_SIZES: Final = DURATIONS + BUCKETS
RESPONSE_SIZES: Final = REQUEST_SIZES + BUCKETS
HTTP_COUNTS: Final = bytes(8 * (RESPONSE_SIZES + BUCKETS))

# And in a TCP series'.
OPENED: Final = 0
CLOSED: Final = 1
SENT: Final = 2
RECEIVED: Final = 3
TCP_COUNTS: Final = bytes(8 * 4)

GRPC_STATUSES: Final = frozenset(map(str, range(len(GRPC_STATUS))))

U64: Final = 2**64 - 1


class Edge(NamedTuple):
    """What is told apart: both ends, and how the exchange went."""

    client: bool  # this end is
    own: Workload
    peer: Workload
    service: Service
    protocol: str
    code: int  # of TCP none: -1
    grpc_status: str
    flags: str


class _Series:
    """The numbers of one Edge."""

    __slots__ = ("counts", "exemplar", "exemplars", "seen_s")

    def __init__(self, zeroes: bytes) -> None:
        self.counts = array("Q", zeroes)
        self.exemplar: Exemplar | None = None  # of the requests
        self.exemplars: dict[int, Exemplar] = {}  # of the durations, by bucket
        self.seen_s = 0.0


class RequestMetrics:
    """Counts exchanges by edge; bounded, whatever names strangers make up."""

    def __init__(
        self,
        names: ServiceNames,
        max_series: int = MAX_SERIES,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._workloads = Workloads(names)
        self._services = Services(now_s)
        self._max_series = max_series
        self._now_s = now_s
        self._http: dict[Edge, _Series] = {}
        self._tcp: dict[Edge, _Series] = {}
        self._parted: set[tuple[int, int]] = set()  # namespace, socket
        self._exemplars = 0
        self._swept_s = 0.0
        self._refused = 0

    def observe(self, exchange: Exchange) -> None:
        """Count one; an end of unknown role is neither source nor destination."""
        if exchange.role is Role.UNKNOWN:
            return
        if exchange.protocol is Protocol.TCP:
            self._observe_tcp(exchange)
        else:
            self._observe_http(exchange)

    def losses(self) -> dict[str, int]:
        """Return how many exchanges were not counted, or without their service."""
        return {
            "metrics_series": self._refused,
            "metrics_services": self._services.refused,
        }

    def _observe_http(self, exchange: Exchange) -> None:
        client = exchange.role is Role.CLIENT
        own, peer = self._workloads.ends(exchange)
        grpc_status = _grpc_status(exchange.grpc_status)
        edge = Edge(
            client,
            own,
            peer,
            self._services.called(exchange, peer if client else own),
            "grpc" if grpc_status else "http",
            exchange.status,
            grpc_status,
            response_flags(exchange),
        )
        now_s = self._now_s()
        series = self._http.get(edge) or self._added(self._http, edge, now_s)
        if series is None:
            return
        series.seen_s = now_s
        counts = series.counts
        counts[REQUESTS] += 1
        size = exchange.request_bytes
        counts[REQUEST_SIZES + bisect_left(BOUNDS, size)] += 1
        counts[REQUEST_BYTES] = counts[REQUEST_BYTES] + size & U64
        size = exchange.response_bytes
        counts[RESPONSE_SIZES + bisect_left(BOUNDS, size)] += 1
        counts[RESPONSE_BYTES] = counts[RESPONSE_BYTES] + size & U64
        first_ns = exchange.request_first_ns
        duration_ns = exchange.response_last_ns - first_ns
        if not first_ns or duration_ns < 0:  # one of them was not seen
            return
        duration_ms = duration_ns / 1e6
        bucket = bisect_left(BOUNDS, duration_ms)
        counts[DURATIONS + bucket] += 1
        counts[DURATION_US] = counts[DURATION_US] + duration_ns // 1000 & U64
        if exchange.flags & FLAG_SAMPLED:
            trace_id = trace_id_text(exchange.trace_id)
            self._illustrate(series, bucket, Exemplar(trace_id, duration_ms, now_s))

    def _illustrate(self, series: _Series, bucket: int, exemplar: Exemplar) -> None:
        """Keep the newest one of each bucket; of a new bucket while there is room."""
        if bucket not in series.exemplars:
            if self._exemplars >= MAX_EXEMPLARS:
                return
            self._exemplars += 1
        series.exemplars[bucket] = exemplar
        series.exemplar = exemplar

    def _observe_tcp(self, exchange: Exchange) -> None:
        client = exchange.role is Role.CLIENT
        own, peer = self._workloads.ends(exchange)
        service = without_host(client, peer if client else own)
        flags = response_flags(exchange)
        edge = Edge(client, own, peer, service, "tcp", -1, "", flags)
        now_s = self._now_s()
        series = self._tcp.get(edge) or self._added(self._tcp, edge, now_s)
        if series is None:
            return
        series.seen_s = now_s
        counts = series.counts
        opened, closed = self._turns(exchange)
        counts[OPENED] += opened
        counts[CLOSED] += closed
        counts[SENT] = counts[SENT] + exchange.response_bytes & U64
        counts[RECEIVED] = counts[RECEIVED] + exchange.request_bytes & U64

    def _turns(self, exchange: Exchange) -> tuple[bool, bool]:
        """Tell whether a connection's record is its first one, and its last one."""
        connection = exchange.netns, exchange.sock
        if exchange.end is End.INTERVAL:
            if connection in self._parted or len(self._parted) >= MAX_PARTED:
                return False, False
            self._parted.add(connection)
            return True, False
        parted = connection in self._parted
        self._parted.discard(connection)
        return not parted, True

    def _added(
        self, group: dict[Edge, _Series], edge: Edge, now_s: float
    ) -> _Series | None:
        """Return a new series; None, and counted, where there is no room for it."""
        if len(self._http) + len(self._tcp) >= self._max_series:
            self._sweep(now_s)
            if len(self._http) + len(self._tcp) >= self._max_series:
                self._refused += 1
                return None
        zeroes = HTTP_COUNTS if group is self._http else TCP_COUNTS
        series = group[edge] = _Series(zeroes)
        return series

    def _sweep(self, now_s: float) -> None:
        """Forget what has been idle; one that comes back begins at zero."""
        if now_s - self._swept_s < SWEEP_S:
            return
        self._swept_s = now_s
        for group in (self._http, self._tcp):
            for edge, series in list(group.items()):
                if now_s - series.seen_s > IDLE_S:
                    self._exemplars -= len(series.exemplars)
                    del group[edge]

    def families(self) -> Iterator[Family]:
        """Yield all that was counted; from any thread."""
        # A copy of a dictionary's items is made in one step, while nobody else runs.
        http, tcp = list(self._http.items()), list(self._tcp.items())
        yield Family(
            "istio_requests",
            COUNTER,
            "Requests that ended, by who reports them.",
            (
                Sample(
                    _labels(edge),
                    series.counts[REQUESTS],
                    series.exemplar and series.exemplar._replace(value=1),
                )
                for edge, series in http
            ),
        )
        yield Family(
            "istio_request_duration_milliseconds",
            HISTOGRAM,
            "From a request's first byte to its response's last, in milliseconds.",
            _distributions(http, DURATIONS, DURATION_US),
            BOUNDS,
        )
        yield Family(
            "istio_request_bytes",
            HISTOGRAM,
            "Sizes of requests' bodies, in bytes.",
            _distributions(http, REQUEST_SIZES, REQUEST_BYTES),
            BOUNDS,
        )
        yield Family(
            "istio_response_bytes",
            HISTOGRAM,
            "Sizes of responses' bodies, in bytes.",
            _distributions(http, RESPONSE_SIZES, RESPONSE_BYTES),
            BOUNDS,
        )
        for name, place, text in (
            ("sent_bytes", SENT, "Bytes to who opened a TCP connection."),
            ("received_bytes", RECEIVED, "Bytes from who opened a TCP connection."),
            ("connections_opened", OPENED, "TCP connections that were opened."),
            ("connections_closed", CLOSED, "TCP connections that have ended."),
        ):
            samples = [Sample(_labels(edge), one.counts[place]) for edge, one in tcp]
            yield Family(f"istio_tcp_{name}", COUNTER, text, samples)
        yield Family(
            "podspan_metrics_dropped",
            COUNTER,
            "Exchanges that are not counted, or without their service.",
            [
                Sample(label_text({"reason": reason}), count)
                for reason, count in self.losses().items()
            ],
        )


def _grpc_status(text: str) -> str:
    """Return the status if it is one: the text is a stranger's."""
    return text if not text or text in GRPC_STATUSES else UNKNOWN


def _distributions(
    group: list[tuple[Edge, _Series]], first: int, total: int
) -> Iterator[Distribution]:
    for edge, series in group:
        counts = series.counts
        illustrated = first == DURATIONS
        yield Distribution(
            _labels(edge),
            counts[first : first + BUCKETS],  # a copy in one step, as above
            counts[total] / 1000 if illustrated else counts[total],
            dict(series.exemplars) if illustrated else {},
        )


def _labels(edge: Edge) -> str:
    """Return the labels in Istio's order. What it takes from mutual TLS is unknown."""
    client, own, peer, service, protocol, code, grpc_status, flags = edge
    source, destination = (own, peer) if client else (peer, own)
    # Istio's client does not tell. What TCP carries may be TLS.
    policy = UNKNOWN if client or protocol == "tcp" else "none"
    last = {"response_flags": flags, "connection_security_policy": policy}
    if code >= 0:
        last["response_code"] = str(code)
        last["grpc_response_status"] = grpc_status
    return ",".join(
        (
            'reporter="source"' if client else 'reporter="destination"',
            _end_labels("source", source),
            _end_labels("destination", destination),
            _service_labels(service),
            f'request_protocol="{protocol}"',
            label_text(last),
        )
    )


@lru_cache(maxsize=1024)
def _end_labels(end: str, workload: Workload) -> str:
    return label_text(
        {
            f"{end}_workload": workload.name,
            f"{end}_canonical_service": workload.canonical_service,
            f"{end}_canonical_revision": workload.canonical_revision,
            f"{end}_workload_namespace": workload.namespace,
            f"{end}_principal": UNKNOWN,
            f"{end}_app": workload.app,
            f"{end}_version": workload.version,
            f"{end}_cluster": UNKNOWN,
        }
    )


@lru_cache(maxsize=1024)
def _service_labels(service: Service) -> str:
    return label_text(
        {
            "destination_service": service.host,
            "destination_service_name": service.name,
            "destination_service_namespace": service.namespace,
        }
    )
