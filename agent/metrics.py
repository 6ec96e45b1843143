"""What the agent says of itself, and its forms: Prometheus' text, JSON.

The text format is version 0.0.4 (prometheus.io, "Exposition formats"). It is written by
hand, because importing prometheus-client 0.26 takes 3.5 MB of the agent's 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

REDIRECT_PREFIX: Final = "redirect_"

# Counters of workers and exporters that go down, too.
REDIRECT_GAUGES: Final = ("connections_open", "pods_served")
EXPORT_GAUGES: Final = ("queued",)

Labels = Mapping[str, str]
Sample = tuple[Labels, int | float]
NO_LABELS: Final[Labels] = {}


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


def to_prometheus(snapshot: Snapshot) -> str:
    """Return the snapshot in Prometheus' text format."""
    return "".join(_lines(snapshot))


def _lines(now: Snapshot) -> Iterable[str]:
    redirect = {
        name.removeprefix(REDIRECT_PREFIX): count
        for name, count in now.redirect.items()
    }
    yield from _gauge(
        "podspan_build_info",
        "The agent's version and the kernel it runs on.",
        [({"version": now.version, "kernel": now.kernel}, 1)],
    )
    yield from _gauge(
        "podspan_start_time_seconds",
        "When the agent was started, in seconds since 1970.",
        [(NO_LABELS, now.started_s)],
    )
    yield from _gauge(
        "podspan_engine_info",
        "What writes headers on this node, and why.",
        [({"engine": now.engine, "reason": now.engine_reason}, 1)],
    )
    yield from _gauge(
        "podspan_pod_engine",
        "What writes headers in a pod, and why.",
        [
            (
                {
                    "namespace": pod.namespace,
                    "pod": pod.name,
                    "netns": str(pod.netns),
                    "engine": pod.engine,
                    "reason": pod.reason,
                },
                1,
            )
            for pod in now.pods
        ],
    )
    yield from _counter(
        "podspan_losses_total",
        "What was not traced, not written or not delivered, by reason.",
        _by("reason", now.losses),
    )
    yield from _counter(
        "podspan_exchanges_total",
        "Exchanges that ended, each seen from one end.",
        [(NO_LABELS, now.exchanges)],
    )
    yield from _counter(
        "podspan_spans_total",
        "Spans handed to the exporters.",
        [(NO_LABELS, now.spans)],
    )
    yield from _counter(
        "podspan_export_total",
        "What became of spans, by exporter.",
        [
            ({"exporter": exporter, "what": what}, count)
            for exporter, counts in now.exporters.items()
            for what, count in counts.items()
            if what not in EXPORT_GAUGES
        ],
    )
    yield from _gauge(
        "podspan_export_waiting",
        "Spans that wait to be sent, by exporter.",
        [
            ({"exporter": exporter}, counts[what])
            for exporter, counts in now.exporters.items()
            for what in EXPORT_GAUGES
            if what in counts
        ],
    )
    yield from _counter(
        "podspan_redirect_total",
        "What the redirect engine's workers did.",
        _by("what", {k: n for k, n in redirect.items() if k not in REDIRECT_GAUGES}),
    )
    yield from _gauge(
        "podspan_redirect",
        "What the redirect engine's workers have at this moment.",
        _by("what", {k: n for k, n in redirect.items() if k in REDIRECT_GAUGES}),
    )


def _by(label: str, counts: Mapping[str, int]) -> list[Sample]:
    return [({label: name}, count) for name, count in sorted(counts.items())]


def _gauge(name: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    return _family(name, "gauge", text, samples)


def _counter(name: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    return _family(name, "counter", text, samples)


def _family(
    name: str, kind: str, text: str, samples: Iterable[Sample]
) -> Iterable[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels.items())
        yield f"{name}{{{inner}}} {value}\n" if inner else f"{name} {value}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
