"""Is this the trace that one page of Bookinfo must give? Spans in, complaints out.

A call has two halves, the caller's and the called one's, so the client's call of
productpage gives eight spans. What must hold is what a person would look for in the
tree: names, kinds, parents and durations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from podspan.agent.demo.bookinfo import (
    CLIENT,
    PORT,
    SERVICES,
    Service,
    subtree_work_ms,
)
from podspan.agent.span import Span

# Each span is dated by the offset of the clocks as measured last, so two moments of
# two spans compare no better than that. Every service works longer than this.
CLOCKS_US = 1000


class Half(NamedTuple):
    """One end of one call."""

    kind: str
    caller: str
    called: str

    def __str__(self) -> str:
        """Name it for people."""
        return f"the {self.kind} half of {self.caller} -> {self.called}"


def _calls(service: Service) -> Iterator[tuple[str, str]]:
    for called in service.calls:
        yield service.name, called
        yield from _calls(SERVICES[called])


# Callers before those they call.
CALLS = tuple(_calls(CLIENT))
CALLER = {called: caller for caller, called in CALLS}
HALVES = tuple(Half(kind, *call) for call in CALLS for kind in ("CLIENT", "SERVER"))


def half_of(span: Span) -> Half | None:
    """Return which half a span is; None if none of ours."""
    called = span.name.removesuffix(f":{PORT}/*")
    caller = CALLER.get(called, "")
    half = Half(span.kind, caller, called)
    at = caller if span.kind == "CLIENT" else called
    return half if half in HALVES and span.local.service == at else None


def missing(spans: Iterable[Span]) -> list[Half]:
    """Return the halves that are not among the spans."""
    seen = {half_of(span) for span in spans}
    return [half for half in HALVES if half not in seen]


def complaints(spans: Sequence[Span], page: Any) -> list[str]:
    """Return what is wrong with the trace; `page` tells what the services received."""
    return list(_count(spans)) or list(_content(spans, page))


def _count(spans: Sequence[Span]) -> Iterator[str]:
    """Every half once, and nothing else."""
    for half in missing(spans):
        yield f"{half} is missing"
    for seen, times in Counter(map(half_of, spans)).items():
        if seen and times > 1:
            yield f"{seen} is there {times} times"
    for span in spans:
        if not half_of(span):
            service = span.local.service
            yield f"a {span.kind} span {span.name!r} of {service} is too much"


def _content(spans: Sequence[Span], page: Any) -> Iterator[str]:
    halves = {half_of(span): span for span in spans}
    traces = sorted({span.trace_id for span in spans})
    if len(traces) > 1:
        yield f"{len(traces)} trace ids instead of one: {', '.join(traces)}"

    received = dict(_received(page))
    servers: dict[str, Span] = {}
    for caller, called in CALLS:
        client = halves[Half("CLIENT", caller, called)]
        server = halves[Half("SERVER", caller, called)]
        servers[called] = server
        yield from _parents(client, server, servers.get(caller))
        yield from _times(client, server, servers.get(caller))
        yield from _headers(client, received.get(called, []), called)
        for span in (client, server):
            status = span.tags.get("http.status_code")
            if status != "200" or "error" in span.tags:
                yield f"{half_of(span)} has status {status} instead of 200"


def _parents(client: Span, server: Span, parent: Span | None) -> Iterator[str]:
    """The halves belong together, and to what the caller served at that time."""
    parent_id = parent.span_id if parent else ""
    if client.parent_id != parent_id:
        yield (
            f"{half_of(client)} has parent {client.parent_id or 'none'} "
            f"instead of {parent_id or 'none'}"
        )
    if server.shared:
        joined = server.span_id == client.span_id
        joined = joined and server.parent_id == client.parent_id
    else:
        joined = server.parent_id == client.span_id != server.span_id
    if not joined:
        yield (
            f"{half_of(server)} (id {server.span_id}, parent "
            f"{server.parent_id or 'none'}) does not belong to the CLIENT half "
            f"(id {client.span_id}, parent {client.parent_id or 'none'})"
        )


def _times(client: Span, server: Span, parent: Span | None) -> Iterator[str]:
    """No call is shorter than the work below it, none outlasts who waits for it."""
    half = half_of(server)
    least_us = subtree_work_ms(half.called) * 1000 if half else 0
    for span in (client, server):
        if span.duration_us < least_us:
            yield f"{half_of(span)} took {span.duration_us} us: less than {least_us} us"
    if server.timestamp_us < client.timestamp_us - CLOCKS_US:
        yield f"{half_of(server)} starts before the CLIENT half"
    if parent and not (
        parent.timestamp_us - CLOCKS_US
        <= client.timestamp_us
        <= _end_us(client)
        <= _end_us(parent) + CLOCKS_US
    ):
        yield f"{half_of(client)} is not within {half_of(parent)}"


def _headers(client: Span, headers: list[list[str]], called: str) -> Iterator[str]:
    """What went over the wire is what the spans say."""
    wanted = {
        "x-b3-traceid": client.trace_id,
        "x-b3-spanid": client.span_id,
        "x-b3-parentspanid": client.parent_id,
        "x-b3-sampled": "1",
    }
    for header, value in wanted.items():
        values = [text for name, text in headers if name.lower() == header]
        if values != ([value] if value else []):
            got = ", ".join(values) or "none"
            yield f"{called} received {header} {got} instead of {value or 'none'}"


def _received(page: Any) -> Iterator[tuple[str, list[list[str]]]]:
    yield page["service"], page["received"]
    for answer in page["answers"].values():
        yield from _received(answer)


def _end_us(span: Span) -> int:
    return span.timestamp_us + span.duration_us
