"""Traces as a cluster of 50 services makes them, with the tags of Istio's sidecars."""

import random
from typing import Any

SERVICES = [f"service-{number}" for number in range(50)]
METHODS = ["GET", "GET", "GET", "POST", "PUT"]
AGENTS = ["curl/7.88.1", "python-requests/2.31.0", "Go-http-client/1.1"]

# A call every so often.
TRACE_GAP_US = 20_000
FIRST_US = 1_700_000_000_000_000


def traces(count, *, calls=4, seed=1):
    """Yield traces of `calls` calls, each with a client's and a server's span."""
    chance = random.Random(seed)
    for number in range(count):
        yield trace(chance, number, calls)


def trace(chance, number, calls):
    """Return a trace in which each call is made by a service called before."""
    trace_id = f"{chance.getrandbits(128):032x}"
    request_id = f"{chance.getrandbits(128):032x}"
    start_us = FIRST_US + number * TRACE_GAP_US + chance.randrange(TRACE_GAP_US)
    spans = []
    callers: list[Any] = [("ingress", None, start_us, 2_000_000)]
    for _ in range(calls):
        caller, parent_id, since_us, room_us = callers[chance.randrange(len(callers))]
        # Each calls a few others, as services do.
        service = SERVICES[hash(caller) % 7 * 7 + chance.randrange(7)]
        span_id = f"{chance.getrandbits(64):016x}"
        begin_us = since_us + chance.randrange(200)
        took_us = min(int(chance.lognormvariate(8.5, 1.2)) + 50, room_us)
        tags = call_tags(chance, number, service, request_id, took_us)
        spans += both_ends(
            trace_id, span_id, parent_id, caller, service, begin_us, took_us, tags
        )
        callers.append((service, span_id, begin_us, took_us))
    return spans


def call_tags(chance, number, service, request_id, took_us):
    failed = chance.random() < 0.02
    wait_us = took_us * 8 // 10
    return {
        "component": "proxy",
        "downstream_cluster": "-",
        "http.status_code": "503" if failed else chance.choice(["200", "200", "404"]),
        "user_agent": chance.choice(AGENTS),
        "request_size": str(chance.randrange(2000)),
        "response_size": str(chance.randrange(50_000)),
        "response_flags": "UC" if failed else "-",
        "upstream_address": f"10.244.{len(service)}.{int(service[8:])}:8080",
        "http.method": chance.choice(METHODS),
        "http.protocol": "HTTP/1.1",
        "http.url": f"http://{service}:8080/items/{number}/{chance.randrange(1000)}",
        "guid:x-request-id": request_id,
        "podspan.link": "thread",
        "podspan.request_us": str(chance.randrange(100)),
        "podspan.wait_us": str(wait_us),
        "podspan.response_us": str(took_us - wait_us),
        **({"error": "true"} if failed else {}),
    }


def both_ends(trace_id, span_id, parent_id, caller, service, begin_us, took_us, tags):
    common = {
        "traceId": trace_id,
        **({"parentId": parent_id} if parent_id else {}),
        "id": span_id,
        "name": f"{service}:8080/*",
    }
    address = f"10.244.1.{len(caller)}"
    yield {
        **common,
        "kind": "CLIENT",
        "timestamp": begin_us,
        "duration": took_us,
        "localEndpoint": {"serviceName": caller, "ipv4": address, "port": 40000},
        "remoteEndpoint": {"serviceName": service, "ipv4": "10.96.0.1", "port": 8080},
        "tags": {
            **tags,
            "peer.address": address,
            "upstream_cluster": f"outbound|8080||{service}",
            "upstream_cluster.name": f"outbound|8080||{service}",
        },
    }
    yield {
        **common,
        "kind": "SERVER",
        "timestamp": begin_us + 40,
        "duration": max(took_us - 80, 1),
        "localEndpoint": {"serviceName": service, "ipv4": "10.244.2.2", "port": 8080},
        "remoteEndpoint": {"ipv4": address, "port": 40000},
        "shared": True,
        "tags": {
            **tags,
            "peer.address": address,
            "upstream_cluster": "inbound|8080||",
            "upstream_cluster.name": "inbound|8080||",
            "podspan.wait_us": str(max(int(tags["podspan.wait_us"]) - 40, 0)),
        },
    }
