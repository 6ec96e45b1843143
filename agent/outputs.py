"""All the places that the user chose for spans, as one."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from podspan.agent.config import DATA_DIR, Config
from podspan.agent.embedded import EmbeddedStore
from podspan.agent.errors import ExportError
from podspan.agent.export import Exporter
from podspan.agent.export.delivery import BackendExporter
from podspan.agent.export.destination import (
    Destination,
    checked_url,
    headers_from_list,
)
from podspan.agent.export.encoder import Encoder
from podspan.agent.export.jsonl import JsonLinesExporter
from podspan.agent.export.spool import Spool
from podspan.agent.export.tree import TreeExporter
from podspan.agent.export.zipkin import ZipkinEncoder
from podspan.agent.span import Span
from podspan.agent.values import Secret

log = logging.getLogger(__name__)

# How long the exporters together may go on after the signal.
DRAIN_S = 5.0

# Counters of an exporter that are losses. What the spool's disk does not take is none:
# it stays in the queue, and is counted as dropped or failed if it comes to that.
LOSSES = (
    "dropped",
    "failed",
    "refused",
    "spool_dropped",
    "spool_torn",
    "spool_lost",
)

SPOOLS = "spool"
STORE = "store"


class Outputs:
    """Exporters by name; all is closed when `stack` is."""

    def __init__(self, stack: ExitStack, config: Config) -> None:
        """Open what the user asked for; raise ExportError or UsageError."""
        self._by_name: dict[str, Exporter] = {}
        self._missed: Counter[str] = Counter()  # spans that an exporter refused
        self._store: EmbeddedStore | None = None
        self._drain_until_s: float | None = None
        self._config = config
        if config.zipkin is not None:
            headers = config.zipkin_headers_file, config.zipkin_headers
            self._add_backend(stack, config.zipkin, ZipkinEncoder(), *headers)
        if config.otlp is not None:
            # Here, not above: its libraries take memory.
            from podspan.agent.export.otlp import OtlpEncoder  # noqa: PLC0415

            encoder = OtlpEncoder(
                config.otlp_encoding, shared_ids=config.span_ids == "shared"
            )
            headers = config.otlp_headers_file, config.otlp_headers
            self._add_backend(stack, config.otlp, encoder, *headers)
        if config.json is not None:
            self._add(stack, "json", JsonLinesExporter(config.json))
        if config.tree:
            self._add(stack, "tree", TreeExporter.on_terminal())
        if config.wants_store:
            self._add_store(stack)

    def _add_backend(
        self,
        stack: ExitStack,
        url: str,
        encoder: Encoder,
        headers_file: str | None,
        headers: Secret | None,
    ) -> None:
        config = self._config
        name = encoder.name
        url = checked_url(url, f"--{name}", encoder.default_path)
        tls = url.startswith("https:")
        listed = {}
        if headers is not None:
            listed = headers_from_list(headers.text, f"PODSPAN_{name.upper()}_HEADERS")
        destination = Destination(
            url,
            headers_file=_path(headers_file),
            headers=listed,
            ca_file=_path(config.tls_ca) if tls else None,
            cert_file=_path(config.tls_cert) if tls else None,
            key_file=_path(config.tls_key) if tls else None,
        )
        exporter = BackendExporter(name, encoder, destination, self._spool(name))
        self._add(stack, name, exporter)

    def _add_store(self, stack: ExitStack) -> None:
        config = self._config
        self._store = EmbeddedStore(
            config.store_address,
            Path(config.data_dir or DATA_DIR),
            max_age_s=config.store_max_age,
            max_bytes=config.store_max_size,
            log_level=config.log_level,
        )
        stack.callback(self._store.close)
        encoder = ZipkinEncoder()
        url = checked_url(self._store.url, "--store", encoder.default_path)
        exporter = BackendExporter(STORE, encoder, Destination(url), self._spool(STORE))
        self._add(stack, STORE, exporter)

    def _spool(self, name: str) -> Spool | None:
        """Return a backend's spool; None where none is wanted, or by default possible.

        The folder that the user named works or fails.
        """
        config = self._config
        if not config.spool_size:
            return None
        folder = Path(config.data_dir or DATA_DIR) / SPOOLS / name
        try:
            return Spool(folder, max_bytes=config.spool_size, sync=config.spool_sync)
        except ExportError as exc:
            if config.data_dir is not None:
                raise
            log.warning("no spool for %s: %s hint=%r", name, exc, exc.hint)
            return None

    def _add(self, stack: ExitStack, name: str, exporter: Exporter) -> None:
        self._by_name[name] = exporter
        stack.callback(self._close, exporter)

    def export(self, spans: list[Span]) -> None:
        """Hand the spans to every exporter; a file that is full costs only its own.

        Raises ExportError where it is the only place.
        """
        for name, exporter in self._by_name.items():
            try:
                exporter.export(spans)
            except ExportError as exc:
                if len(self._by_name) == 1:
                    raise
                if not self._missed[name]:
                    log.warning("spans are missing there: %s hint=%r", exc, exc.hint)
                self._missed[name] += len(spans)

    def tick(self) -> None:
        """Do what is due."""
        if self._store is not None:
            self._store.tick()
        for exporter in self._by_name.values():
            exporter.tick()

    def counters(self) -> Mapping[str, Mapping[str, int]]:
        """Return what became of spans, by exporter."""
        return {
            name: {**counters, "failed": counters.get("failed", 0) + self._missed[name]}
            for name, exporter in self._by_name.items()
            for counters in [exporter.counters()]
        }

    def losses(self) -> dict[str, int]:
        """Return what was lost, by exporter and reason."""
        return {
            f"{name}_{reason}": counters[reason]
            for name, counters in self.counters().items()
            for reason in LOSSES
            if reason in counters
        }

    def _close(self, exporter: Exporter) -> None:
        now_s = time.monotonic()
        if self._drain_until_s is None:
            self._drain_until_s = now_s + DRAIN_S
        exporter.close(max(0.0, self._drain_until_s - now_s))

    def __str__(self) -> str:
        return " ".join(
            f"{name}_{key}={value}"
            for name, counters in self.counters().items()
            for key, value in counters.items()
        )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
