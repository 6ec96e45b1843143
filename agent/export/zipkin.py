"""Spans as Zipkin's v2 API takes them (Zipkin, Jaeger, an OpenTelemetry Collector).

Pure: delivery.py sends. What an answer means: any 2xx, Zipkin's own being 202, is yes;
no answer, 408, 429 and 5xx are trouble that passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson
from podspan.agent.export.encoder import Outcome, Verdict, failure
from podspan.agent.span import Span, zipkin_fields

RETRIED_STATUSES = frozenset({408, 429})

_SENT = Verdict(Outcome.SENT)


class ZipkinEncoder:
    """Zipkin v2 JSON."""

    name = "zipkin"
    content_type = "application/json"
    default_path = "/api/v2/spans"

    def encode(self, spans: Sequence[Span]) -> bytes:
        """Return a JSON list of spans."""
        return orjson.dumps([zipkin_fields(span) for span in spans])

    def verdict(self, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
        """Return what an answer means; its body is a text where it says no."""
        if 200 <= status <= 299:
            return _SENT
        retried = status >= 500 or status in RETRIED_STATUSES
        return failure(
            status, headers, body.decode("utf-8", "replace"), retried=retried
        )
