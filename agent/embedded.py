"""The embedded store as the agent's child: started, watched, started again.

A process of its own, so that whoever looks at traces takes neither the memory nor the
time of the thread that reads the kernel's ring. The agent sends spans to it as to any
other Zipkin; meanwhile they wait in the spool. It dies with the agent.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from podspan.agent.config import DATABASE, OPTIONS
from podspan.agent.errors import ExportError
from podspan.agent.values import Address, age_text

log = logging.getLogger(__name__)

READY = "store.ready"

# An emulated machine imports for seconds.
START_S = 60.0
STOP_S = 10.0
POLL_S = 0.05

# It talks to strangers: of root's it keeps the files, and no capability.
UNPRIVILEGED = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")

# The other backends' credentials are none of its business.
SECRETS = frozenset(option.variable for option in OPTIONS if option.secret)

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0

HINT = (
    "it says why above; --store-address and --data-dir choose other places, "
    "--zipkin, --otlp, --json or --tree keep no traces here"
)


class EmbeddedStore:
    """`podspan store`, until `close`."""

    def __init__(
        self,
        address: Address,
        folder: Path,
        *,
        max_age_s: int,
        max_bytes: int,
        log_level: str,
    ) -> None:
        """Return once it takes spans; raise ExportError where it does not."""
        self.url = f"http://{address.reachable}/"
        self.restarts = 0
        self._backoff_s = FIRST_BACKOFF_S
        self._started_s = 0.0  # of time.monotonic()
        self._start_at_s = 0.0  # of time.monotonic(), once it has ended
        self._ready = folder / READY
        self._command = [
            *(UNPRIVILEGED if os.geteuid() == 0 and shutil.which("setpriv") else ()),
            *(sys.executable, "-m", "podspan.agent", "store", "--with-parent"),
            *("--listen", str(address)),
            *("--data", str(folder / DATABASE)),
            *("--max-age", age_text(max_age_s)),
            *("--max-size", str(max_bytes)),
            *("--ready-file", str(self._ready)),
            *("--log-level", log_level),
        ]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ready.unlink(missing_ok=True)
        except OSError as exc:
            raise ExportError(
                f"cannot keep traces in {folder}: {exc.strerror}",
                "name a folder that root may write: --data-dir",
            ) from exc
        try:
            self._process = self._start()
        except OSError as exc:
            raise ExportError(
                f"cannot start the embedded store: {exc.strerror}",
                "is there memory, and a process to be had?",
            ) from exc
        self._wait_until_ready()
        log.info("traces are kept and shown: url=%s folder=%s", self.url, folder)

    def tick(self) -> None:
        """Start it again if it has ended, later and later."""
        code = self._process.poll()
        if code is None:
            return
        if not self._start_at_s:
            self._put_off(f"ended: code={code}")
        elif time.monotonic() >= self._start_at_s:
            try:
                self._process = self._start()
            except OSError as exc:  # no memory, no process: no reason to end the agent
                self._put_off(f"cannot be started: error={exc.strerror!r}")
            else:
                self._start_at_s = 0.0
                self.restarts += 1

    def close(self) -> None:
        """End it, after what it has taken is on disk."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("the embedded store did not end in %g s: killed", STOP_S)
            self._process.kill()
            self._process.wait()

    def _put_off(self, why: str) -> None:
        if time.monotonic() - self._started_s > MAX_BACKOFF_S:
            self._backoff_s = FIRST_BACKOFF_S  # it was well for a while
        log.warning(
            "the embedded store %s again_in_s=%g hint='spans wait in the spool'",
            why,
            self._backoff_s,
        )
        self._start_at_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    def _start(self) -> subprocess.Popen[bytes]:
        self._started_s = time.monotonic()
        # A group of its own: Ctrl-C is for the agent, which ends this after its spans.
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            env={name: os.environ[name] for name in os.environ if name not in SECRETS},
            process_group=0,
        )

    def _wait_until_ready(self) -> None:
        until_s = time.monotonic() + START_S
        while not self._ready.exists():
            if self._process.poll() is not None:
                raise ExportError("the embedded store did not start", HINT)
            if time.monotonic() >= until_s:
                self.close()
                raise ExportError(
                    f"the embedded store was not ready within {START_S:g} s", HINT
                )
            time.sleep(POLL_S)
