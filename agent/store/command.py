"""`podspan store`: keep spans, answer for them, show them."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from podspan.agent import values, version
from podspan.agent.config import DATA_DIR, DATABASE, LOG_LEVELS, STORE_ADDRESS
from podspan.agent.errors import StoreError
from podspan.agent.lifecycle import Stop, ready, ready_path, stop_signals
from podspan.agent.parser import Parser
from podspan.agent.values import Address

log = logging.getLogger(__name__)

DATA: Final = f"{DATA_DIR}/{DATABASE}"
MAX_AGE: Final = "7d"
MAX_SIZE: Final = "2GiB"

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

EXAMPLES = f"""\
It answers Zipkin's v2 API, so any Zipkin tracer can send to it, and Grafana's Zipkin
data source read from it. The viewer is on the same port. There is no login: who reaches
the port can read and write.

examples:
  podspan store                                    the viewer is at http://{STORE_ADDRESS}/
  podspan store --listen 0.0.0.0:9411 --max-age 30d --max-size 20GiB
  podspan agent --zipkin http://HOST:9411          sends its spans there
  curl http://{STORE_ADDRESS}/api/v2/services
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
    with stop_signals() as stop:
        _run(options, stop)
    return 0


def _run(options: argparse.Namespace, stop: Stop) -> None:
    # SQLite and the server take a while to load; --help does without.
    from podspan.agent.store.database import Database  # noqa: PLC0415
    from podspan.agent.store.server import StoreServer  # noqa: PLC0415

    ready_file = ready_path(options.ready_file)
    _make_folder(options.data.parent)
    max_bytes = _room(options.data, options.max_size)
    database = Database(options.data, max_age_s=options.max_age, max_bytes=max_bytes)
    with closing(database):
        listen = options.listen
        with closing(StoreServer(database, (listen.host, listen.port))) as server:
            log.info(
                "podspan store: version=%s url=http://%s/ data=%s "
                "max_age_s=%d max_bytes=%d pid=%d",
                version(),
                Address(listen.host, server.port),
                options.data,
                options.max_age,
                max_bytes,
                os.getpid(),
            )
            server.start()
            with ready(ready_file):
                stop.wait()
            log.info("ending: finishing what is being answered")
        log.info("ended: %s", database.counts())


def _parser() -> Parser:
    parser = Parser(
        prog="podspan store",
        description="Keep traces in one file, and search and show them.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--listen",
        metavar="ADDR:PORT",
        type=values.any_port,
        default=STORE_ADDRESS,
        help="where to answer; :PORT is every address, port 0 any port "
        f"({STORE_ADDRESS})",
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
        type=values.age,
        default=MAX_AGE,
        help=f"forget traces after so long: 90m, 12h, 7d ({MAX_AGE})",
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        type=values.store_size,
        default=MAX_SIZE,
        help="forget the oldest beyond so much on disk, or what it has room for: "
        f"500MiB, 2GiB ({MAX_SIZE})",
    )
    parser.add_argument(
        "--ready-file",
        metavar="PATH",
        type=Path,
        help="there, with the process's id, while the store answers",
    )
    parser.add_argument(
        "--log-level",
        type=str.lower,
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


def _make_folder(folder: Path) -> None:
    try:
        # Spans tell what a cluster does: nobody else's business.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(
            f"cannot make {folder}: {exc.strerror}",
            "--data FILE chooses another place",
        ) from exc


def _room(data: Path, max_size: int) -> int:
    """Return how large the file may become: less than asked if the disk is smaller.

    On a full disk SQLite cannot even remove; so what is old has to go before.
    """
    log_file = data.with_name(f"{data.name}-wal")
    try:
        there = sum(file.stat().st_size for file in (data, log_file) if file.exists())
        room = max(there + shutil.disk_usage(data.parent).free, values.MIN_STORE_SIZE)
    except OSError:  # whoever opens it tells why
        return max_size
    if room >= max_size:
        return max_size
    log.warning(
        "the disk has less than --max-size: max_bytes=%d instead of %d", room, max_size
    )
    return room


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM when the thread that started this process ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before; then somebody else has adopted us.
    if os.getppid() != parent:
        raise StoreError("--with-parent: the process that started this one has ended")
