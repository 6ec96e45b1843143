"""`podspan demo`: a whole trace of applications that know nothing of tracing.

In the order of a real node: the pods' namespaces, the agent, `podspan init` in each
pod, the applications, a call. Every child and namespace ends with this command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from podspan.agent import values
from podspan.agent.config import STORE_ADDRESS
from podspan.agent.demo.bookinfo import CLIENT, SERVICES
from podspan.agent.demo.processes import (
    STOP_SIGNALS,
    Child,
    call_page,
    start,
    start_services,
)
from podspan.agent.demo.topology import Topology, topology
from podspan.agent.demo.verify import HALVES, complaints, missing
from podspan.agent.errors import FeatureMissing, NoPrivilege, PodspanError, UsageError
from podspan.agent.parser import Parser
from podspan.agent.span import Endpoint, Span
from podspan.agent.tree import render

# All kernels with kprobes and perf have this, since 4.17 (e12f03d7031a).
KPROBES = Path("/sys/bus/event_source/devices/kprobe")

# An emulated machine compiles the agent's programs in half a minute.
AGENT_READY_S = 240
INIT_S = 120
SPANS_S = 30
POLL_S = 0.05

EXAMPLES = """\
examples:
  podspan demo
      trace one page of Bookinfo and print the tree
  podspan demo --ipv6 --json spans.jsonl
      the same over IPv6, and keep the spans
  podspan demo --zipkin http://localhost:9411
      send them to Zipkin as well
  podspan demo --serve
      look at the trace in a browser
"""


class DemoError(PodspanError):
    """The trace is not what it has to be."""


@dataclass(frozen=True, slots=True)
class Agent:
    """The running agent and where it writes its spans."""

    child: Child
    spans: Path


def main(argv: Sequence[str]) -> int:
    """Run `podspan demo` with the arguments after the word demo."""
    options = _parser().parse_args(argv)
    _require_root_and_kprobes()
    with _stoppable(), ExitStack() as stack:
        viewer = _Viewer(stack, options.serve) if options.serve else None
        pods = stack.enter_context(topology())
        agent = _start_agent(stack, pods, options)
        _init(pods)
        start_services(stack, pods, ipv6=options.ipv6)
        page = call_page(stack, pods, ipv6=options.ipv6)
        spans = _collect(agent)
        _report(spans, page)
        if viewer is not None:
            viewer.show(spans)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="podspan demo",
        description="Start Bookinfo's four services, each in a network namespace of "
        "its own, call them once, and print the trace that the kernel made of it. "
        "No service forwards a header.",
        examples=EXAMPLES,
    )
    parser.add_argument("--ipv6", action="store_true", help="let them talk over IPv6")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="keep the spans in this new file"
    )
    parser.add_argument("--zipkin", metavar="URL", help="send the spans there, too")
    parser.add_argument(
        "--serve",
        metavar="ADDR:PORT",
        nargs="?",
        type=values.any_port,
        const=STORE_ADDRESS,
        help=f"show the trace in the viewer, until Ctrl-C ({STORE_ADDRESS})",
    )
    return parser


def _require_root_and_kprobes() -> None:
    if os.geteuid() != 0:
        raise NoPrivilege(
            "the demo makes network namespaces and loads programs into the kernel, "
            "which only root may",
            "sudo podspan demo",
        )
    if not KPROBES.exists():
        raise FeatureMissing(
            f"this kernel ({os.uname().release}) has no kprobes (CONFIG_KPROBES)",
            "make demo runs it in a virtual machine by itself, as does "
            "vagrant/vm run -- podspan demo",
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the first signal end the demo, and none the cleaning up after it."""
    # What is ignored from the start (nohup, a shell's background job) stays ignored.
    numbers = [
        number
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise DemoError(f"stopped by {signal.Signals(number).name}")

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _start_agent(
    stack: ExitStack, pods: Topology, options: argparse.Namespace
) -> Agent:
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="podspan-")))
    ready = scratch / "ready"
    spans = options.json or scratch / "spans.jsonl"
    if spans.exists():
        raise UsageError(
            f"{spans} exists already", "name a new file: the demo checks all it holds"
        )
    command = [*_podspan("agent"), "--json", str(spans), "--ready-file", str(ready)]
    if options.zipkin:
        command += ["--zipkin", options.zipkin]
    for name in pods:
        command += ["--netns", name]

    _say("starting the agent")
    child = start(stack, "the agent", command)
    if not _until(ready.exists, child, AGENT_READY_S):
        raise child.failure(f"was not ready within {AGENT_READY_S} s")
    return Agent(child, spans)


def _init(pods: Topology) -> None:
    """Run the init step in every service's pod, as its init container would."""
    _say("podspan init apply in each pod, then the services")
    with ExitStack() as stack:
        steps = [
            start(
                stack,
                f"podspan init in {name}",
                _podspan("init", "apply"),
                pod=pods[name],
            )
            for name in SERVICES
        ]
        for step in steps:
            said = step.output(INIT_S).strip()
            if said:
                _say(f"{step.name}: {said.removeprefix('podspan init: ')}")


def _collect(agent: Agent) -> list[Span]:
    """Wait for the spans, stop the agent, return all that it wrote."""
    if not _until(lambda: not missing(read_spans(agent.spans)), agent.child, SPANS_S):
        absent = "; ".join(map(str, missing(read_spans(agent.spans))))
        raise agent.child.failure(f"did not write in {SPANS_S} s: {absent}")
    # What is written only at the end would be too much, and must be seen.
    if agent.child.stop():
        raise agent.child.failure("failed when it was asked to stop")
    return read_spans(agent.spans)


class _Viewer:
    """The embedded store, with nothing in it but this demo's trace."""

    def __init__(self, stack: ExitStack, address: values.Address) -> None:
        # SQLite and the server take a while to load; the tree does without.
        from podspan.agent.store.exporter import StoreExporter  # noqa: PLC0415

        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="podspan-"))
        self._store = StoreExporter(Path(scratch, "traces.db"))
        stack.callback(self._store.close, 0)
        self._url = self._store.serve(stack, address)

    def show(self, spans: Sequence[Span]) -> None:
        """Show the trace until Ctrl-C."""
        sys.stdout.flush()  # the tree, now: a pipe would have it at the end
        self._store.export(spans)
        self._store.settle()
        _say(f"{self._url}traces/{spans[0].trace_id} shows it, until Ctrl-C")
        with suppress(KeyboardInterrupt):
            signal.pause()


def _report(spans: Sequence[Span], page: Any) -> None:
    print(render(spans))
    wrong = complaints(spans, page)
    if wrong:
        raise DemoError(
            f"this is not the trace of these calls: {'; '.join(wrong)}",
            "that is a bug in podspan: report it with the output above",
        )
    print(
        f"1 trace, {len(HALVES)} spans, {len(SERVICES)} services + {CLIENT.name}; "
        "no application forwarded a header"
    )


def _until(done: Callable[[], bool], child: Child, timeout_s: float) -> bool:
    """Wait until it is done; False: not in time. The child must live on meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while not done():
        if child.ended:
            raise child.failure("ended too early")
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def read_spans(path: Path) -> list[Span]:
    """Read Zipkin's JSON lines, without one that is still being written."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [_span(json.loads(line)) for line in lines]


def _span(fields: dict[str, Any]) -> Span:
    """Return the span that `podspan.agent.span.zipkin_json` wrote."""
    return Span(
        trace_id=fields["traceId"],
        span_id=fields["id"],
        parent_id=fields.get("parentId", ""),
        kind=fields["kind"],
        name=fields["name"],
        timestamp_us=fields["timestamp"],
        duration_us=fields["duration"],
        local=_endpoint(fields["localEndpoint"]),
        remote=_endpoint(fields["remoteEndpoint"]),
        shared=fields.get("shared", False),
        tags=fields["tags"],
        annotations=tuple(
            (each["timestamp"], each["value"]) for each in fields.get("annotations", ())
        ),
    )


def _endpoint(fields: dict[str, Any]) -> Endpoint:
    address = fields.get("ipv4") or fields.get("ipv6", "")
    return Endpoint(fields.get("serviceName", ""), address, fields["port"])


def _podspan(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "podspan.agent", *arguments]


def _say(what: str) -> None:
    print(f"demo: {what}", file=sys.stderr, flush=True)
