"""`podspan replay`: the spans of a capture, on a laptop and without any privilege."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from podspan.agent import values
from podspan.agent.config import SPAN_IDS, STORE_ADDRESS
from podspan.agent.errors import ReplayError, UsageError
from podspan.agent.export import Exporter
from podspan.agent.export.jsonl import STDOUT, JsonLinesExporter
from podspan.agent.export.tree import TreeExporter
from podspan.agent.lifecycle import Stop, stop_signals
from podspan.agent.parser import Parser
from podspan.agent.replay.capture import Capture, in_order_of_time
from podspan.agent.replay.names import ServiceNames, read_hosts
from podspan.agent.replay.packets import LINK_TYPE
from podspan.agent.replay.progress import ProgressBar
from podspan.agent.replay.replay import Replay, Summary
from podspan.agent.span import Span, SpanOptions
from podspan.agent.tags import CONVENTIONS

if TYPE_CHECKING:
    from podspan.agent.store.exporter import StoreExporter

# A trace is printed once nothing of it came for so long in the capture's time.
QUIET_S = 60.0

# Packets between looks at the clock.
PACKETS_PER_TICK = 2000

EXAMPLES = f"""\
Spans are those that the agent would have made: the ids are on the wire. Without such
headers each call is a trace of its own; no parent is guessed. Capture with

  tcpdump -i any -s 0 -w incident.pcap tcp

examples:
  podspan replay incident.pcap
      print the traces
  podspan replay incident.pcap.gz --json - | jq .name
      one JSON object per span
  podspan replay incident.pcapng --hosts pods.txt --serve
      look at them in the browser, at http://{STORE_ADDRESS}/
"""


def main(argv: Sequence[str]) -> int:
    """Run `podspan replay` with the arguments after the word replay."""
    options = _parser().parse_args(argv)
    if options.json == STDOUT and options.tree:
        raise UsageError(
            "--json - and --tree both write to standard output",
            "write the spans to a file: --json spans.jsonl",
        )
    names = ServiceNames(_hosts(options.hosts))
    with ExitStack() as stack:
        capture = stack.enter_context(Capture(options.file))
        outputs = _Outputs(stack, options)
        replay = Replay(
            outputs.export,
            names,
            child_ids=options.span_ids == "child",
            options=SpanOptions(tags=options.tags),
        )
        stop = stack.enter_context(stop_signals(once=True))
        _run(capture, replay, outputs, stop)
        outputs.settle()
        _report(capture, replay.summary(), interrupted=bool(stop))
        if stop:
            return 130
        if outputs.url:
            _serve(outputs.url, replay, stop)
    return 0


class _Outputs:
    """All places that the user wants the spans in, until the stack closes them."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace) -> None:
        self._exporters: list[Exporter] = []
        self._stack = stack
        self._now_s = 0.0  # the capture's time
        self._store: StoreExporter | None = None
        self.url = ""  # of the viewer
        if options.json:
            self._add(JsonLinesExporter(options.json))
        if options.store or options.serve:
            self._add_store(options)
        if options.tree or not self._exporters:
            self._add(TreeExporter.on_terminal(QUIET_S, lambda: self._now_s))

    def export(self, spans: Sequence[Span]) -> None:
        """Take the spans."""
        for exporter in self._exporters:
            exporter.export(spans)

    def tick(self, now_ns: int) -> None:
        """Do what is due by now in the capture's time."""
        self._now_s = now_ns / 1e9
        for exporter in self._exporters:
            exporter.tick()

    def settle(self) -> None:
        """All spans have come."""
        if self._store is not None:
            self._store.settle()

    def _add(self, exporter: Exporter) -> None:
        self._stack.callback(exporter.close, 0)
        self._exporters.append(exporter)

    def _add_store(self, options: argparse.Namespace) -> None:
        # SQLite and the server take a while to load; trees do without.
        from podspan.agent.store.exporter import StoreExporter  # noqa: PLC0415

        path = options.store
        if path is None:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="podspan-replay-")
            )
            path = Path(folder) / "traces.db"
        self._store = store = StoreExporter(path)
        self._add(store)
        if options.serve:
            self.url = store.serve(self._stack, options.serve)


def _run(capture: Capture, replay: Replay, outputs: _Outputs, stop: Stop) -> None:
    """Replay all packets, or those before it is time to end."""
    bar = ProgressBar(sys.stderr, capture.size)
    packets = in_order_of_time(capture.packets())
    for number, packet in enumerate(packets):
        replay.packet(packet)
        if number % PACKETS_PER_TICK == 0:
            bar.show(capture.position)
            outputs.tick(packet.at_ns)
            if stop:
                break
    replay.close()
    bar.clear()


def _report(capture: Capture, summary: Summary, *, interrupted: bool) -> None:
    skipped = summary.skipped
    if summary.packets and skipped.get(LINK_TYPE) == summary.packets:
        raise ReplayError(
            "no packet has a link layer that is known here",
            "known: Ethernet, Linux cooked (tcpdump -i any), loopback, raw IP",
        )
    how = {
        "cut": "the capture ends in the middle of a packet: it was cut there",
        "damaged": f"the capture is damaged behind packet {summary.packets}: "
        "the rest was not read",
    }
    if capture.damage:
        _say(f"warning: {how[capture.damage]}")
        skipped[f"file_{capture.damage}"] = 1
    if capture.without_time:
        skipped["without_time"] = capture.without_time
    if interrupted:
        _say("warning: interrupted: the rest of the capture was not read")
    _say(str(summary))


def _serve(url: str, replay: Replay, stop: Stop) -> None:
    """Show the viewer until Ctrl-C."""
    # The list looks back from now; the incident was then.
    end_ms = replay.last_ns // 1_000_000 + 1
    lookback_ms = end_ms - replay.first_ns // 1_000_000 + 1
    _say(f"{url}?endTs={end_ms}&lookback={lookback_ms} shows it, until Ctrl-C")
    stop.wait()


def _hosts(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        return read_hosts(path.read_text("utf-8", "replace"))
    except OSError as exc:
        raise UsageError(
            f"cannot read {path}: {exc.strerror}", "--hosts wants a file as /etc/hosts"
        ) from exc


def _parser() -> Parser:
    parser = Parser(
        prog="podspan replay",
        description="Make spans of the HTTP/1 calls and TCP connections in a capture.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="pcap or pcapng, plain or gzipped"
    )
    parser.add_argument(
        "--tree",
        action="store_true",
        help="print traces as trees; the default without another output",
    )
    parser.add_argument(
        "--json",
        metavar="OUT",
        help="append spans to this file, one JSON object per line; - is standard "
        "output",
    )
    parser.add_argument(
        "--store",
        metavar="DB",
        type=Path,
        help="add spans to this database; podspan store --data DB shows it",
    )
    parser.add_argument(
        "--serve",
        metavar="ADDR:PORT",
        nargs="?",
        type=values.any_port,
        const=STORE_ADDRESS,
        help="show the spans in the viewer, of DB or of a database for the while; "
        f"{STORE_ADDRESS} by default",
    )
    parser.add_argument(
        "--hosts",
        metavar="FILE",
        type=Path,
        help="names for addresses, as in /etc/hosts; else a server's name is the Host "
        "that its clients ask for",
    )
    parser.add_argument(
        "--span-ids",
        choices=SPAN_IDS,
        default=SPAN_IDS[0],
        help="a server's span has its caller's id, or is its child, as the agent's",
    )
    parser.add_argument(
        "--tags",
        choices=tuple(CONVENTIONS),
        default="istio",
        help="name and tag spans as Istio's sidecars do, or by OpenTelemetry",
    )
    return parser


def _say(what: str) -> None:
    print(f"podspan replay: {what}", file=sys.stderr, flush=True)
