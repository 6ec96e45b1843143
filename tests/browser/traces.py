"""Traces to look at, as Zipkin's v2 JSON: Bookinfo in its moods, and hostile names."""

from random import Random
from typing import Any

Span = dict[str, Any]

SERVICES = ("istio-ingressgateway", "productpage", "details", "reviews", "ratings")
# Markup that would run, were it not text; right-to-left override, emoji, a long name.
INJECTION = "<img src=x onerror=\"document.title='owned'\">"
ODD = "数据-ñandú-🛰️-\u202egnp.exe"


class Trace:
    """Spans under one trace id; ids count up from the trace's seed."""

    def __init__(self, seed: int, *, shared: bool = False) -> None:
        self.trace_id = f"{0x5EED000000000000 + seed:016x}{seed + 1:016x}"
        self.shared = shared
        self.spans: list[Span] = []
        self._next_id = (seed + 1) << 16

    def call(
        self,
        caller: str,
        called: str,
        name: str,
        at_us: int,
        duration_us: int,
        *,
        parent: str = "",
        status: int = 200,
        tags: dict[str, str] | None = None,
    ) -> str:
        """Add both ends of a call; returns the id that the callee's calls descend from.

        A tenth of the time is the network's. `shared`: the server's span has the id
        of the client's, else one of its own below it.
        """
        network_us = duration_us // 10
        client_id = self._id()
        server_id = client_id if self.shared else self._id()
        common = {
            "http.method": "GET",
            "http.url": f"http://{called}:9080/{called}/0",
            "http.path": f"/{called}/0",
            "http.status_code": str(status),
            **({"error": "true"} if status >= 500 else {}),
            **(tags or {}),
        }
        client: Span = {
            "traceId": self.trace_id,
            "id": client_id,
            "kind": "CLIENT",
            "name": name,
            "timestamp": at_us,
            "duration": duration_us,
            "localEndpoint": endpoint(caller, 40000),
            "remoteEndpoint": endpoint(called, 9080),
            "tags": {
                **common,
                "podspan.connect_us": str(network_us // 4),
                "podspan.request_us": str(duration_us // 50),
                "podspan.wait_us": str(duration_us * 3 // 4),
                "podspan.response_us": str(duration_us // 20),
                "podspan.link": "thread",
            },
        }
        server: Span = {
            "traceId": self.trace_id,
            "id": server_id,
            "kind": "SERVER",
            "name": name,
            "timestamp": at_us + network_us // 2,
            "duration": duration_us - network_us,
            "localEndpoint": endpoint(called, 9080),
            "remoteEndpoint": endpoint(caller, 40000),
            "annotations": [
                {"timestamp": at_us + duration_us - network_us // 2, "value": "ss"}
            ],
            "tags": common,
        }
        if parent:
            client["parentId"] = parent
        if self.shared:
            server["shared"] = True
            if parent:
                server["parentId"] = parent
        else:
            server["parentId"] = client_id
        self.spans += [client, server]
        return server_id

    def _id(self) -> str:
        self._next_id += 1
        return f"{self._next_id:016x}"


def endpoint(service: str, port: int) -> dict[str, object]:
    return {"serviceName": service, "ipv4": "10.1.2.3", "port": port}


def bookinfo(
    seed: int,
    at_us: int,
    *,
    duration_us: int = 40_000,
    shared: bool = False,
    ratings_status: int = 200,
) -> list[Span]:
    """Return the eight spans of a product page; a 5xx of ratings reaches the root."""
    trace = Trace(seed, shared=shared)
    gateway, page, details, reviews, ratings = SERVICES
    part = duration_us // 10
    status = 200 if ratings_status < 500 else 500

    def call(
        caller: str, called: str, parent: str, start: int, parts: int, status: int
    ) -> str:
        name = f"{called}.default.svc.cluster.local:9080/*"
        begin_us = at_us + start * part
        return trace.call(
            caller, called, name, begin_us, parts * part, parent=parent, status=status
        )

    root = call(gateway, page, "", 0, 10, status)
    call(page, details, root, 1, 1, 200)
    below = call(page, reviews, root, 3, 6, status)
    call(reviews, ratings, below, 5, 3, ratings_status)
    return trace.spans


def hostile(seed: int, at_us: int) -> list[Span]:
    """Return spans whose names and tags try to become markup, or to look odd."""
    trace = Trace(seed)
    tags = {INJECTION: INJECTION, "note": '"><script>document.title="owned"</script>'}
    root = trace.call(INJECTION, ODD, INJECTION, at_us, 9_000, tags=tags)
    trace.call(ODD, "x" * 200, ODD, at_us + 1_000, 5_000, parent=root, status=404)
    return trace.spans


def an_hour(now_us: int) -> list[Span]:
    """Return 60 product pages and a hostile trace of the last 50 minutes."""
    random = Random(5)
    spans = hostile(1000, now_us - 90_000_000)
    for seed in range(60):
        spans += bookinfo(
            seed,
            now_us - random.randrange(10, 3000) * 1_000_000,
            duration_us=int(random.lognormvariate(10.4, 0.9)),
            shared=seed % 2 == 0,
            ratings_status=503 if seed % 7 == 3 else 200,
        )
    return spans
