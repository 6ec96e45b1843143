"""Who called whom in one trace: the rules of Zipkin's DependencyLinker.

The spans become a tree, which is walked breadth first. A call is seen from both ends
where both are traced; the server's end counts it then, because the server knows its own
name, and the client's end only where nothing is below it. Local spans count nothing;
messages link to their broker only. Source: zipkin2.internal.DependencyLinker and
SpanNode, of Zipkin 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from podspan.agent.store.zipkin_v2 import Endpoint, ZipkinSpan


@dataclass(frozen=True, slots=True)
class Link:
    """The calls of one service to another, in one trace."""

    parent: str
    child: str
    calls: int
    errors: int
    durations_us: tuple[int, ...]  # of the calls where one is known


def link_trace(spans: Sequence[ZipkinSpan]) -> list[Link]:
    """Return the links of one merged trace (`zipkin_v2.merge`), as first met."""
    links: dict[tuple[str, str], _Calls] = {}
    root = _tree(spans)
    for node, ancestor in _breadth_first(root):
        for call in _calls(node, ancestor, is_root=node is root):
            links.setdefault((call.parent, call.child), _Calls()).add(call)
    return [
        Link(parent, child, calls.count, calls.errors, tuple(calls.durations_us))
        for (parent, child), calls in links.items()
    ]


@dataclass(frozen=True, slots=True)
class _Call:
    parent: str
    child: str
    error: bool = False
    duration_us: int = 0  # 0: not known


@dataclass(slots=True)
class _Calls:
    count: int = 0
    errors: int = 0
    durations_us: list[int] = field(default_factory=list)

    def add(self, call: _Call) -> None:
        self.count += 1
        self.errors += call.error
        if call.duration_us:
            self.durations_us.append(call.duration_us)


@dataclass(slots=True, eq=False)
class _Node:
    """A span's place in the tree; a root that was not recorded has no span."""

    span: ZipkinSpan | None
    children: list[_Node] = field(default_factory=list)


# Which span is meant: by its id, or, of servers that share their client's id, by the
# id and the server's own endpoint, because several may have answered one client.
_End = tuple[str | None, str | None, str | None, int | None]
_Key = str | tuple[str, _End]


def _calls(
    node: _Node, ancestor: ZipkinSpan | None, *, is_root: bool
) -> Iterator[_Call]:
    """Return the calls that a span tells of: none, one, or two if a link was missing.

    `ancestor` is the nearest one above it that has a kind: what is between is local.
    """
    span = node.span
    if span is None or (span.get("kind") == "CLIENT" and node.children):
        return
    local = _service(span.get("localEndpoint"))
    remote = _service(span.get("remoteEndpoint"))
    # A span without a kind that knows both sides is as good as a client's.
    kind = span.get("kind") or ("CLIENT" if local and remote else "")
    error = "error" in span.get("tags", ())
    duration_us = span.get("duration", 0)
    if not kind or (kind == "SERVER" and is_root and not remote):
        return

    receives = kind in ("SERVER", "CONSUMER")
    parent, child = (remote, local) if receives else (local, remote)
    caller = _service(ancestor.get("localEndpoint")) if ancestor else ""
    if ancestor and caller and kind in ("CLIENT", "SERVER"):
        # Some tracers put the server's name on the client's span.
        if kind == "CLIENT" and local and local != caller:
            yield _Call(caller, local)
        if kind == "SERVER" or not parent:
            parent = caller
        if ancestor.get("kind") == "CLIENT":
            if span.get("parentId") == ancestor["id"]:
                error = error or "error" in ancestor.get("tags", ())
            if kind == "SERVER" and not duration_us:
                duration_us = ancestor.get("duration", 0)
    if parent and child:
        yield _Call(parent, child, error, duration_us)


def _service(endpoint: Endpoint | None) -> str:
    return endpoint.get("serviceName", "") if endpoint else ""


def _breadth_first(root: _Node) -> Iterator[tuple[_Node, ZipkinSpan | None]]:
    """Walk the tree: each node with its nearest ancestor that has a kind."""
    queue: deque[tuple[_Node, ZipkinSpan | None]] = deque([(root, None)])
    while queue:
        node, ancestor = queue.popleft()
        yield node, ancestor
        if node.span is not None and "kind" in node.span:
            ancestor = node.span
        queue.extend((child, ancestor) for child in node.children)


def _tree(spans: Sequence[ZipkinSpan]) -> _Node:
    """Return the root: the first span without parent, or one without a span.

    What lacks its parent hangs below the root. What is its own ancestor is nowhere.
    """
    parents: dict[_Key, _Key | None] = {
        _key(span): span["id"] if _shared(span) else span.get("parentId")
        for span in spans
    }
    nodes: dict[_Key, _Node] = {}
    root: _Node | None = None
    for span in spans:
        key, node = _key(span), _Node(span)
        parent_id = span.get("parentId")
        if root is None and parent_id is None and not _shared(span):
            root = node
            del parents[key]
            continue
        if parent_id is not None and not _shared(span):
            # Rather the server at this very endpoint than the client it answers.
            server = parent_id, _end(span)
            if server in parents:
                parents[key] = server
        nodes[key] = node

    root = root or _Node(None)
    for key, parent in parents.items():
        above = nodes.get(parent, root) if parent else root
        above.children.append(nodes[key])
    return root


def _shared(span: ZipkinSpan) -> bool:
    return span.get("shared", False)


def _key(span: ZipkinSpan) -> _Key:
    return (span["id"], _end(span)) if _shared(span) else span["id"]


def _end(span: ZipkinSpan) -> _End:
    end = span.get("localEndpoint", {})
    return end.get("serviceName"), end.get("ipv4"), end.get("ipv6"), end.get("port")
