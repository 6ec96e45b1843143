"""Write spans as JSON lines: one Zipkin v2 span per line, appended to a file."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from podspan.agent.errors import ExportError
from podspan.agent.span import Span, zipkin_json

STDOUT = "-"


class JsonLinesExporter:
    """Appends to `path`; "-" is the standard output."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sent = 0
        self._file: FileIO | None = None
        if path == STDOUT:
            return
        try:
            # Open as long as the exporter is: no `with`.
            self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115
        except OSError as exc:
            raise self._failed(exc) from exc

    def export(self, spans: Sequence[Span]) -> None:
        """Write the spans, all or none: readers of a file see whole lines only."""
        text = "".join(f"{zipkin_json(span)}\n" for span in spans)
        try:
            if self._file is None:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                _append(self._file, text.encode())
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise self._failed(exc) from exc
        self._sent += len(spans)

    def tick(self) -> None:
        """Nothing waits here."""

    def counters(self) -> dict[str, int]:
        """Return the number of spans written."""
        return {"sent": self._sent}

    def close(self, timeout_s: float) -> None:  # noqa: ARG002
        """Close the file; the standard output is not ours to close."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: OSError) -> ExportError:
        return ExportError(
            f"cannot write spans to {self._path}: {exc.strerror}",
            "check --json: its directory must exist and have room",
        )


def _append(file: FileIO, data: bytes) -> None:
    status = os.fstat(file.fileno())
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        if stat.S_ISREG(status.st_mode):
            with suppress(OSError):
                file.truncate(status.st_size)
        raise
