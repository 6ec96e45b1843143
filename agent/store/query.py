"""What a search for traces asks, and whether a trace is an answer.

The rules are those of Zipkin's QueryRequest. `matches` is the reference: the database
finds candidates by an index, and verifies each with the conditions that are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from podspan.agent.store.zipkin_v2 import MAX_INTEGER, ZipkinSpan

# Zipkin's viewer offers this as a span's name, and means any.
ANY_SPAN = "all"

# As many parts of an annotationQuery as Zipkin reads; the last one takes the rest.
MAX_PARTS = 100

# A condition holds for a trace if it holds for any of its spans.
Condition = Callable[[ZipkinSpan], bool]


@dataclass(frozen=True)
class Query:
    """What is asked; names are lower-cased, and an empty one asks nothing.

    Raises ValueError for what Zipkin refuses.
    """

    end_ts_ms: int  # since 1970
    lookback_ms: int
    limit: int = 10  # traces
    service: str = ""  # of the span's own end; all that follows is asked of its spans
    remote_service: str = ""
    span_name: str = ""
    # "" asks for the tag, or for an annotation of that value; else for the tag's value.
    annotation_query: Mapping[str, str] = field(default_factory=dict)
    min_duration_us: int | None = None
    max_duration_us: int | None = None

    def __post_init__(self) -> None:
        for name in ("service", "remote_service", "span_name"):
            object.__setattr__(self, name, getattr(self, name).lower())
        if self.span_name == ANY_SPAN:
            object.__setattr__(self, "span_name", "")
        positive = {
            "endTs": self.end_ts_ms,
            "lookback": self.lookback_ms,
            "limit": self.limit,
            "minDuration": self.min_duration_us,
        }
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} <= 0")
        if self.max_duration_us is not None:
            if self.min_duration_us is None:
                raise ValueError("maxDuration is only valid with minDuration")
            if self.max_duration_us < self.min_duration_us:
                raise ValueError("maxDuration < minDuration")

    @property
    def first_us(self) -> int:
        """The earliest start of a trace that is asked for."""
        return max((self.end_ts_ms - self.lookback_ms) * 1000, 0)

    @property
    def last_us(self) -> int:
        """The latest start of a trace that is asked for."""
        return min(self.end_ts_ms * 1000, MAX_INTEGER)


def parse_annotation_query(text: str) -> dict[str, str]:
    """Read "error and http.method=GET"; a key's last value wins."""
    wanted: dict[str, str] = {}
    for part in text.split(" and ", MAX_PARTS - 1):
        key, equals, value = part.partition("=")
        key = key.strip()
        if equals:
            wanted[key] = value.strip()
        else:
            wanted.setdefault(key, "")
    wanted.pop("", None)
    return wanted


def matches(query: Query, spans: Sequence[ZipkinSpan]) -> bool:
    """Tell whether the trace of these spans, as they arrived, is asked for."""
    started_us = start_us(spans)
    if started_us is None or not query.first_us <= started_us <= query.last_us:
        return False
    return not unmet(conditions(query), spans)


def start_us(spans: Sequence[ZipkinSpan]) -> int | None:
    """Return when a trace started: the first root seen, else the earliest span."""
    earliest_us = None
    for span in spans:
        if at_us := span.get("timestamp"):
            if "parentId" not in span:
                return at_us
            if earliest_us is None or at_us < earliest_us:
                earliest_us = at_us
    return earliest_us


def unmet(wanted: Sequence[Condition], spans: Sequence[ZipkinSpan]) -> list[Condition]:
    """Return the conditions that hold for none of the spans."""
    return [condition for condition in wanted if not any(map(condition, spans))]


def conditions(query: Query) -> list[Condition]:
    """Return what has to hold for some span each, not all for the same one."""
    wanted: list[Condition] = []
    if query.remote_service:
        wanted.append(lambda span: service_at(span, "remote") == query.remote_service)
    if query.span_name:
        wanted.append(lambda span: span.get("name") == query.span_name)
    wanted += [_annotated(key, text) for key, text in query.annotation_query.items()]
    if query.min_duration_us is not None:
        wanted.append(_lasting(query.min_duration_us, query.max_duration_us))
    if not query.service:
        return wanted

    def ours(span: ZipkinSpan) -> bool:
        return service_at(span, "local") == query.service

    return [ours, *(_both(ours, condition) for condition in wanted)]


def service_at(span: ZipkinSpan, end: str) -> str:
    """Return the service at the span's "local" or "remote" end; "" if unknown."""
    endpoint = (
        span.get("localEndpoint") if end == "local" else span.get("remoteEndpoint")
    )
    return endpoint.get("serviceName", "") if endpoint else ""


def _both(first: Condition, second: Condition) -> Condition:
    return lambda span: first(span) and second(span)


def _annotated(key: str, text: str) -> Condition:
    if text:
        return lambda span: span.get("tags", {}).get(key) == text
    return lambda span: (
        key in span.get("tags", {})
        or any(note["value"] == key for note in span.get("annotations", ()))
    )


def _lasting(min_us: int, max_us: int | None) -> Condition:
    def lasting(span: ZipkinSpan) -> bool:
        duration_us = span.get("duration", 0)
        return min_us <= duration_us and (max_us is None or duration_us <= max_us)

    return lasting
