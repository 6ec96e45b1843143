"""Print spans as trees, for people.

One line per half of an exchange; the halves that share an id stand together, the
client's above the server's, and what they called stands below them, indented:

    trace 57cb7d45ff07b57a7f4a3f4c45f5b7d3: 4 spans, 3 services, 12.0 ms
    client curl           GET /productpage  200  12.000 ms  none    ██████████████████
    server productpage    GET /productpage  200  11.200 ms  header  █████████████████▍
      client productpage  GET /details/0    200   3.000 ms  thread   █████
      server details      GET /details/0    200   2.000 ms  header    ███▎

An exchange whose parent is not among the spans says so (`parent ... not seen`); so
does one that is its own ancestor (`cycle`), which only hostile headers can make.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from podspan.agent.span import Span

WIDTH = 120
TARGET_WIDTH = 40
BAR_WIDTH = 24
MIN_BAR_WIDTH = 8

# Deeper than this, indentation would push everything else off the line.
MAX_INDENT = 16

# Eighths of a character cell, filled from the left.
EIGHTHS = " ▏▎▍▌▋▊▉"

KINDS = ("CLIENT", "SERVER")

DURATION_COLUMN = 3  # of what _columns() returns; aligned to the right


@dataclass(frozen=True, slots=True)
class _Line:
    """A half-span and where it stands."""

    span: Span
    depth: int
    remark: str


def render(spans: Iterable[Span], width: int = WIDTH) -> str:
    """Return the trees of all traces among the spans, the earliest first."""
    traces: dict[str, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    in_order = sorted(traces.values(), key=lambda trace: min(map(_when, trace)))
    return "\n".join(_render_trace(trace, width) for trace in in_order)


def _render_trace(spans: list[Span], width: int) -> str:
    start_us = min(span.timestamp_us for span in spans)
    end_us = max(span.timestamp_us + span.duration_us for span in spans)
    services = {span.local.service for span in spans}
    title = (
        f"trace {spans[0].trace_id}: {_count(len(spans), 'span')}, "
        f"{_count(len(services), 'service')}, {(end_us - start_us) / 1000:.1f} ms"
    )
    lines = list(_walk(spans))
    columns = [_columns(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    left_width = sum(widths) + 2 * len(widths)
    bar_width = max(MIN_BAR_WIDTH, min(BAR_WIDTH, width - left_width))

    text = [title]
    for line, cells in zip(lines, columns, strict=True):
        padded = [
            cell.rjust(size) if number == DURATION_COLUMN else cell.ljust(size)
            for number, (cell, size) in enumerate(zip(cells, widths, strict=True))
        ]
        bar = _bar(line.span, start_us, end_us, bar_width)
        if line.remark:
            bar = f"{bar.ljust(bar_width)}  {line.remark}"
        text.append("  ".join([*padded, bar]).rstrip())
    return "\n".join(text) + "\n"


def _columns(line: _Line) -> tuple[str, ...]:
    """Return what stands left of the bar."""
    span, tags = line.span, line.span.tags
    indent = "  " * min(line.depth, MAX_INDENT)
    return (
        f"{indent}{span.kind.lower()} {_printable(span.local.service) or '?'}",
        _cut(_printable(_request(span))),
        _status(tags),
        f"{span.duration_us / 1000:.3f} ms",
        tags.get("podspan.link", "-"),
    )


def _request(span: Span) -> str:
    """Return method and path, in whichever convention's tags; else the span's name."""
    tags = span.tags
    method = tags.get("http.method") or tags.get("http.request.method", "")
    method = tags.get("http.request.method_original", method)
    url = tags.get("http.url") or tags.get("url.full", "")
    if url:
        target = url.partition("://")[2]
        if method != "CONNECT":
            path = re.search("[/?]", target)
            target = target[path.start() :] if path else "*"
    elif "url.path" in tags:
        query = tags.get("url.query", "")
        target = f"{tags['url.path']}{'?' if query else ''}{query}"
    elif method == "CONNECT":
        target = f"{tags['server.address']}:{tags['server.port']}"
    else:
        return span.name
    return f"{method} {target}"


def _status(tags: dict[str, str]) -> str:
    """Return the status, and how the exchange ended unless that was regular."""
    status = tags.get("http.status_code") or tags.get("http.response.status_code", "")
    words = ["-" if status == "0" else status] if status else []
    end = tags.get("podspan.end", "eof")
    if end != "eof":
        words.append(end)
    if "podspan.error" in tags:
        words.append(tags["podspan.error"])
    return " ".join(words) or "-"


def _bar(span: Span, start_us: int, end_us: int, width: int) -> str:
    """Return blocks from where in the trace the span starts to where it ends."""
    total_us = max(1, end_us - start_us)
    offset_us = span.timestamp_us - start_us
    cell = min(width - 1, offset_us * width // total_us)
    last_eighth = (offset_us + span.duration_us) * width * 8 // total_us
    full, eighths = divmod(max(1, last_eighth - cell * 8), 8)
    return " " * cell + "█" * full + EIGHTHS[eighths].strip()


def _walk(spans: list[Span]) -> Iterator[_Line]:
    """Yield every span once, parents before children, without recursion."""
    exchanges: dict[str, list[Span]] = {}
    for span in sorted(spans, key=_order):
        exchanges.setdefault(span.span_id, []).append(span)

    children: dict[str, list[str]] = {}
    tops: list[tuple[str, str]] = []
    for span_id, halves in exchanges.items():
        parent_id = _parent_id(halves)
        if parent_id in exchanges:
            children.setdefault(parent_id, []).append(span_id)
        else:
            tops.append((span_id, f"parent {parent_id} not seen" if parent_id else ""))
    for siblings in children.values():
        siblings.sort(key=lambda span_id: min(map(_when, exchanges[span_id])))

    seen: set[str] = set()
    # Last come those that no top leads to; from the second on they are seen already.
    for top, remark in [*tops, *((span_id, "cycle") for span_id in exchanges)]:
        stack = [(top, 0, remark)]
        while stack:
            span_id, depth, remark_here = stack.pop()
            if span_id in seen:
                continue
            seen.add(span_id)
            for half in exchanges[span_id]:
                yield _Line(half, depth, remark_here)
            below = children.get(span_id, ())
            stack.extend((child, depth + 1, "") for child in reversed(below))


def _parent_id(halves: list[Span]) -> str:
    """Return the parent that a half knows; the client's half is asked first."""
    return next((half.parent_id for half in halves if half.parent_id), "")


def _order(span: Span) -> tuple[int, int]:
    """Clients before servers, then by time."""
    kind = KINDS.index(span.kind) if span.kind in KINDS else len(KINDS)
    return kind, span.timestamp_us


def _when(span: Span) -> int:
    return span.timestamp_us


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cut(text: str) -> str:
    return text if len(text) <= TARGET_WIDTH else text[: TARGET_WIDTH - 1] + "…"


def _printable(text: str) -> str:
    """Replace what could steer a terminal: the text came from a stranger's request."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
