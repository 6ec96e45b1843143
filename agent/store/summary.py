"""What the list of traces shows of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from podspan.agent.store.query import service_at, start_us
from podspan.agent.store.zipkin_v2 import ZipkinSpan

ROOT_TAGS = ("http.method", "http.path", "http.url", "http.status_code")


@dataclass(frozen=True, slots=True)
class ServiceSummary:
    """One service's part of a trace."""

    service: str
    spans: int
    errors: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A trace in short."""

    trace_id: str
    start_us: int | None  # since 1970
    duration_us: int | None  # from the first start to the last end that are known
    spans: int
    errors: int
    root_service: str
    root_name: str
    root_kind: str
    services: tuple[ServiceSummary, ...]  # as first met
    tags: dict[str, str]  # those of ROOT_TAGS that the root has


def summarise(spans: Sequence[ZipkinSpan]) -> Summary:
    """Return the summary of a trace: one span at least, merged."""
    counted: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for span in spans:
        service = service_at(span, "local")
        counted[service] += 1
        failed[service] += "error" in span.get("tags", ())
    root = _root(spans)
    tags = root.get("tags", {})
    return Summary(
        trace_id=root["traceId"],
        start_us=start_us(spans),
        duration_us=_duration_us(spans),
        spans=len(spans),
        errors=failed.total(),
        root_service=service_at(root, "local"),
        root_name=root.get("name", ""),
        root_kind=root.get("kind", ""),
        services=tuple(
            ServiceSummary(service, count, failed[service])
            for service, count in counted.items()
            if service
        ),
        tags={key: tags[key] for key in ROOT_TAGS if key in tags},
    )


def _root(spans: Sequence[ZipkinSpan]) -> ZipkinSpan:
    """Return the span without a parent, else the one whose parent is not here."""
    ids = {span["id"] for span in spans}
    return min(
        spans,
        key=lambda span: (
            "parentId" in span,
            span.get("parentId") in ids,
            span.get("shared", False),
            span.get("timestamp") or float("inf"),
        ),
    )


def _duration_us(spans: Sequence[ZipkinSpan]) -> int | None:
    timed = [
        (span["timestamp"], span["timestamp"] + span.get("duration", 0))
        for span in spans
        if span.get("timestamp")
    ]
    if not timed:
        return None
    duration_us = max(end for _, end in timed) - min(begin for begin, _ in timed)
    return duration_us or None
