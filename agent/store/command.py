"""`podspan store`: keep spans, answer for them, show them."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from podspan.agent import version
from podspan.agent.errors import StoreError, UsageError

log = logging.getLogger(__name__)

LISTEN: Final = "127.0.0.1:9411"
DATA: Final = "/var/lib/podspan/traces.db"
MAX_AGE: Final = "7d"
MAX_SIZE: Final = "2GiB"
LOG_LEVELS: Final = ("error", "warning", "info", "debug")

AGE_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE_UNITS: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# Smaller is no store: SQLite's own pages, indexes and log take as much.
MIN_SIZE: Final = 16 * 2**20

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

EXAMPLES = f"""\
It answers Zipkin's v2 API, so any Zipkin tracer can send to it, and Grafana's Zipkin
data source read from it. The viewer is on the same port. There is no login: who reaches
the port can read and write.

examples:
  podspan store                                    the viewer is at http://{LISTEN}/
  podspan store --listen 0.0.0.0:9411 --max-age 30d --max-size 20GiB
  podspan agent --zipkin http://HOST:9411          sends its spans there
  curl http://{LISTEN}/api/v2/services
"""


def main(argv: Sequence[str]) -> int:
    """Run `podspan store` with the arguments after the word store."""
    options = _parser().parse_args(argv)
    if options.with_parent:
        _end_with_parent()
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    with _stop_signals() as stop:
        _run(options, stop)
    return 0


def _run(options: argparse.Namespace, stop: threading.Event) -> None:
    # SQLite and the server take a while to load; --help does without.
    from podspan.agent.store.database import Database  # noqa: PLC0415
    from podspan.agent.store.server import StoreServer  # noqa: PLC0415

    ready_file = _ready_path(options.ready_file)
    _make_folder(options.data.parent)
    database = Database(
        options.data, max_age_s=options.max_age, max_bytes=options.max_size
    )
    with closing(database):
        with closing(StoreServer(database, options.listen)) as server:
            host = options.listen[0]
            log.info(
                "podspan store: version=%s url=http://%s:%d/ data=%s "
                "max_age_s=%d max_bytes=%d pid=%d",
                version(),
                f"[{host}]" if ":" in host else host,
                server.port,
                options.data,
                options.max_age,
                options.max_size,
                os.getpid(),
            )
            server.start()
            with _ready(ready_file):
                stop.wait()
            log.info("ending: finishing what is being answered")
        log.info("ended: %s", database.counts())


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "podspan store --help explains the options")


def _parser() -> _Parser:
    parser = _Parser(
        prog="podspan store",
        description="Keep traces in one file, and search and show them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--listen",
        metavar="ADDR:PORT",
        type=_address,
        default=LISTEN,
        help=f"where to answer; [IPV6]:PORT, too, and port 0 is any ({LISTEN})",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        default=Path(DATA),
        help=f"where to keep the traces; made if it is not there ({DATA})",
    )
    parser.add_argument(
        "--max-age",
        metavar="AGE",
        type=_age_s,
        default=MAX_AGE,
        help=f"forget traces after so long: 90m, 12h, 7d ({MAX_AGE})",
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        type=_size,
        default=MAX_SIZE,
        help=f"forget the oldest beyond so much on disk: 500MiB, 2GiB ({MAX_SIZE})",
    )
    parser.add_argument(
        "--ready-file",
        metavar="PATH",
        type=Path,
        help="there, with the process's id, while the store answers",
    )
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="one of %(choices)s (%(default)s)",
    )
    parser.add_argument(
        "--with-parent",
        action="store_true",
        help="end when the process that started it does",
    )
    return parser


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.-]*):([0-9]{1,5})", text)
    if not found or int(found[2]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: use ADDR:PORT or [IPV6]:PORT")
    return found[1].strip("[]") or "0.0.0.0", int(found[2])


def _age_s(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: use a number and s, m, h or d: 7d")
    return int(found[1]) * AGE_UNITS_S[found[2]]


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,9})([KMGT]iB)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r}: use a number and KiB, MiB, GiB or TiB: 2GiB"
        )
    size = int(found[1]) * SIZE_UNITS[found[2]]
    if size < MIN_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r}: at least {MIN_SIZE >> 20}MiB")
    return size


def _make_folder(folder: Path) -> None:
    try:
        # Spans tell what a cluster does: nobody else's business.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(
            f"cannot make {folder}: {exc.strerror}",
            "--data FILE chooses another place",
        ) from exc


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield what SIGTERM and SIGINT set."""
    stop = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, on_signal) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM when the thread that started this process ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before; then somebody else has adopted us.
    if os.getppid() != parent:
        raise StoreError("--with-parent: the process that started this one has ended")


def _ready_path(path: Path | None) -> Path | None:
    """Return the ready file, which does not exist yet and can be written."""
    if path is None:
        return None
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(
            f"cannot write --ready-file {path}", "its directory must exist"
        )
    # One left behind by a store that was killed would lie to whoever waits for it.
    path.unlink(missing_ok=True)
    return path


@contextmanager
def _ready(path: Path | None) -> Iterator[None]:
    """Let the file say this process's id, whole or not at all, while we answer."""
    if path is None:
        yield
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(f"{os.getpid()}\n")
    draft.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    # As `podspan store`, with its way to print errors.
    import sys

    from podspan.agent.__main__ import main as podspan

    sys.exit(podspan(["store", *sys.argv[1:]]))
