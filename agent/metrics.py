"""What the agent says of itself, and its forms: Prometheus' two texts, JSON.

The formats are Prometheus' text 0.0.4 (prometheus.io, "Exposition formats") and
OpenMetrics 1.0, which alone has exemplars. They are written by hand, because importing
prometheus-client 0.26 takes 3.5 MB of the agent's 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Final, NamedTuple

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

REDIRECT_PREFIX: Final = "redirect_"

# Counters of workers and exporters that go down, too.
REDIRECT_GAUGES: Final = ("connections_open", "pods_served")
EXPORT_GAUGES: Final = {
    "queued": ("podspan_export_waiting", "Spans that wait to be sent, by exporter."),
    "spool_spans": (
        "podspan_export_spool_spans",
        "Spans that wait on disk for their backend, by exporter.",
    ),
    "spool_bytes": (
        "podspan_export_spool_bytes",
        "What the spool takes on disk, by exporter.",
    ),
}

NO_LABELS: Final = ""


class Format(Enum):
    """A text format, by its content type."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Exemplar(NamedTuple):
    """One observation, and the trace that it is part of."""

    trace_id: str
    value: float
    at_s: float  # since 1970


class Sample(NamedTuple):
    """A counter or a gauge."""

    labels: str  # as `label_text` makes it
    value: int | float
    exemplar: Exemplar | None = None


class Distribution(NamedTuple):
    """A histogram; counts are each bucket's own, the last one without a bound."""

    labels: str
    counts: Sequence[int]
    sum: int | float
    exemplars: Mapping[int, Exemplar]  # by bucket


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name, which for a counter is without `_total`."""

    name: str
    kind: str
    text: str
    samples: Iterable[Sample | Distribution]
    bounds: tuple[float, ...] = ()  # of a histogram's buckets


@dataclass(frozen=True, slots=True)
class PodStatus:
    """What is done in one network namespace, and why."""

    netns: int  # inode
    namespace: str  # "": no pod, a namespace with a name
    name: str
    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The agent at one moment; counters are since its start."""

    version: str
    kernel: str
    pid: int
    started_s: float  # seconds since 1970
    updated_s: float  # of time.monotonic()
    engine: str  # the node's, one of agent/engine.py
    engine_reason: str
    selftest: str  # what the kernel engine's self-test found; "": passed
    exchanges: int = 0
    spans: int = 0
    pods: tuple[PodStatus, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    exporters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    redirect: Mapping[str, int] = field(default_factory=dict)


def to_json(snapshot: Snapshot) -> str:
    """Return the snapshot as a JSON object, for `podspan doctor`."""
    return json.dumps(asdict(snapshot))


def negotiated(accept: str) -> Format:
    """Return the format for an Accept header (RFC 9110 section 12.5.1)."""
    wishes = {Format.TEXT: 0.0, Format.OPENMETRICS: 0.0}
    for wish in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in wish.split(";"))
        values = dict(part.partition("=")[::2] for part in parameters)
        weight = weight_of(values.get("q", "1"))
        if kind == "application/openmetrics-text":
            if values.get("version", "1.0.0") == "1.0.0":
                wishes[Format.OPENMETRICS] = max(wishes[Format.OPENMETRICS], weight)
        elif kind in ("text/plain", "text/*", "*/*"):
            wishes[Format.TEXT] = max(wishes[Format.TEXT], weight)
    open_metrics = wishes[Format.OPENMETRICS]
    if open_metrics and open_metrics >= wishes[Format.TEXT]:
        return Format.OPENMETRICS
    return Format.TEXT


def weight_of(text: str) -> float:
    """Return how much a client wants it, 0 to 1 (RFC 9110 section 12.4.2)."""
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def exposition(families: Iterable[Family], form: Format) -> Iterator[str]:
    """Yield the text, some lines at a time: as a whole it may have many megabytes."""
    for family in families:
        named = f"{family.name}_total" if family.kind == COUNTER else family.name
        title = family.name if form is Format.OPENMETRICS else named
        yield f"# HELP {title} {family.text}\n# TYPE {title} {family.kind}\n"
        les = [_le(bound, form) for bound in (*family.bounds, float("inf"))]
        for sample in family.samples:
            if isinstance(sample, Distribution):
                yield _distribution(family.name, sample, les, form)
            else:
                labels = f"{{{sample.labels}}}" if sample.labels else ""
                exemplar = _exemplar(sample.exemplar, form)
                yield f"{named}{labels} {sample.value}{exemplar}\n"
    if form is Format.OPENMETRICS:
        yield "# EOF\n"


def _distribution(
    name: str, sample: Distribution, les: Sequence[str], form: Format
) -> str:
    labels = sample.labels
    start = f"{name}_bucket{{{labels}{',' if labels else ''}le="
    exemplars = sample.exemplars
    below = list(accumulate(sample.counts))
    lines = [
        f'{start}"{le}"}} {count}{_exemplar(exemplars.get(bucket), form)}\n'
        for bucket, (le, count) in enumerate(zip(les, below, strict=True))
    ]
    lines.append(f"{name}_sum{{{labels}}} {sample.sum}\n")
    lines.append(f"{name}_count{{{labels}}} {below[-1]}\n")
    return "".join(lines)


def _exemplar(exemplar: Exemplar | None, form: Format) -> str:
    if exemplar is None or form is not Format.OPENMETRICS:
        return ""
    trace_id, value, at_s = exemplar
    return f' # {{trace_id="{trace_id}"}} {value} {at_s:.3f}'


def _le(bound: float, form: Format) -> str:
    """Return the bound as the format's other writers do: it names a series.

    OpenMetrics 1.0 has canonical numbers: 1.0 and, from a million on, 1.8e+06.
    """
    if bound == float("inf"):
        return "+Inf"
    if form is Format.TEXT:
        return f"{bound:.15g}"
    return f"{bound:.3g}" if bound >= 1e6 else str(float(bound))


def label_text(labels: Mapping[str, str]) -> str:
    """Return labels as they stand between the braces."""
    return ",".join([f'{key}="{_escaped(word)}"' for key, word in labels.items()])


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def agent_families(now: Snapshot) -> Iterator[Family]:
    """Yield what the snapshot says."""
    yield from _facts(now)
    yield from _counts(now)
    yield from _exports(now.exporters)
    yield from _redirect(now.redirect)


def _facts(now: Snapshot) -> Iterator[Family]:
    yield Family(
        "podspan_build_info",
        GAUGE,
        "The agent's version and the kernel it runs on.",
        [_fact({"version": now.version, "kernel": now.kernel})],
    )
    yield Family(
        "podspan_start_time_seconds",
        GAUGE,
        "When the agent was started, in seconds since 1970.",
        [Sample(NO_LABELS, now.started_s)],
    )
    yield Family(
        "podspan_engine_info",
        GAUGE,
        "What writes headers on this node, and why.",
        [_fact({"engine": now.engine, "reason": now.engine_reason})],
    )
    yield Family(
        "podspan_pod_engine",
        GAUGE,
        "What writes headers in a pod, and why.",
        [
            _fact(
                {
                    "namespace": pod.namespace,
                    "pod": pod.name,
                    "netns": str(pod.netns),
                    "engine": pod.engine,
                    "reason": pod.reason,
                }
            )
            for pod in now.pods
        ],
    )


def _counts(now: Snapshot) -> Iterator[Family]:
    yield Family(
        "podspan_losses",
        COUNTER,
        "What was not traced, not written or not delivered, by reason.",
        _by("reason", now.losses),
    )
    yield Family(
        "podspan_exchanges",
        COUNTER,
        "Exchanges that ended, sampled or not, each seen from one end.",
        [Sample(NO_LABELS, now.exchanges)],
    )
    yield Family(
        "podspan_spans",
        COUNTER,
        "Spans handed to the exporters: the sampled exchanges.",
        [Sample(NO_LABELS, now.spans)],
    )


def _exports(exporters: Mapping[str, Mapping[str, int]]) -> Iterator[Family]:
    yield Family(
        "podspan_export",
        COUNTER,
        "What became of spans, by exporter.",
        [
            Sample(label_text({"exporter": exporter, "what": what}), count)
            for exporter, counts in exporters.items()
            for what, count in counts.items()
            if what not in EXPORT_GAUGES
        ],
    )
    for what, (name, text) in EXPORT_GAUGES.items():
        yield Family(
            name,
            GAUGE,
            text,
            [
                Sample(label_text({"exporter": exporter}), counts[what])
                for exporter, counts in exporters.items()
                if what in counts
            ],
        )


def _redirect(counters: Mapping[str, int]) -> Iterator[Family]:
    by_what = {
        name.removeprefix(REDIRECT_PREFIX): count for name, count in counters.items()
    }
    now: dict[str, int] = {
        what: by_what.pop(what) for what in REDIRECT_GAUGES if what in by_what
    }
    yield Family(
        "podspan_redirect",
        COUNTER,
        "What the redirect engine's workers did.",
        _by("what", by_what),
    )
    # Not named as the counter is: in OpenMetrics that would be one family.
    yield Family(
        "podspan_redirect_now",
        GAUGE,
        "What the redirect engine's workers have at this moment.",
        _by("what", now),
    )


def _fact(labels: Mapping[str, str]) -> Sample:
    return Sample(label_text(labels), 1)


def _by(label: str, counts: Mapping[str, int]) -> list[Sample]:
    return [
        Sample(label_text({label: name}), count)
        for name, count in sorted(counts.items())
    ]
