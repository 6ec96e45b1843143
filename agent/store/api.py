"""The store's HTTP interface, as a WSGI application over a Database.

    /api/v2/...           Zipkin's API, complete; also under /zipkin/api/v2/
    /api/podspan/v1/...   edges with latencies, live tail, summaries of traces
    /config.json          for Zipkin's own viewer; also /zipkin/config.json
    /health /info /metrics
    all else              the viewer (viewer_files.py)

Status codes and defaults are those of Zipkin's server (ZipkinQueryApiV2 and
ZipkinHttpCollector of Zipkin 3). Other than there, on purpose:

- No site's pages but our own may read or write (origin.py); a body has to be declared
  JSON or protobuf, because a form or text/plain could be sent by any page.
- An answer of several traces ends with the one that makes 100,000 spans, and so does
  a trace (search.py): memory is bounded.
- 405 tells the methods that there are; 413 and 415 are not 500 or 202.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import orjson
from podspan.agent import version
from podspan.agent.errors import StoreError
from podspan.agent.store import viewer_files
from podspan.agent.store.counts import Counts
from podspan.agent.store.origin import check_origin
from podspan.agent.store.query import Query, parse_annotation_query
from podspan.agent.store.request import (
    MAX_UNPACKED_BYTES,
    PLAIN_TEXT,
    Refusal,
    Request,
    Response,
)
from podspan.agent.store.zipkin_v2 import (
    MalformedSpans,
    TooManySpans,
    ZipkinSpan,
    parse_json,
    parse_proto3,
    trace_id_of,
)

if TYPE_CHECKING:
    from podspan.agent.store.database import Database
    from podspan.agent.store.summary import Summary

log = logging.getLogger(__name__)

NO_TRACE: Final = "f" * 32

DAY_MS: Final = 86_400_000
DEFAULT_LIMIT: Final = 10

# In microseconds, an integer of 64 bits. What is later is as late.
MAX_MS: Final = 2**53

# More in one answer would be gigabytes.
MAX_TRACES: Final = 1000
TAIL_SPANS: Final = 100
MAX_TAIL_SPANS: Final = 1000

# Names are cached once there are so many services, so that a beginner sees each appear.
FEW_SERVICES: Final = 3
CACHED_NAMES: Final = {"Cache-Control": "max-age=300, must-revalidate"}

# Of one message. Objects of Python take ten times the room of JSON and more: of a bomb
# of 64 MiB, two gigabytes. A span has about 25 values.
MAX_VALUES: Final = 2_000_000
MAX_PROTO_BYTES: Final = 4 * 1024 * 1024
LARGE_BYTES: Final = 2 * 1024 * 1024  # only one message of so much at the same time

JSON_TYPES: Final = ("", "application/json")
PROTO_TYPES: Final = ("application/x-protobuf", "application/protobuf")

# For Zipkin's own viewer, and whoever else asks for it; the values are its defaults.
CONFIG: Final = {
    "environment": "",
    "queryLimit": DEFAULT_LIMIT,
    "defaultLookback": 15 * 60_000,
    "searchEnabled": True,
    "logsUrl": None,
    "supportUrl": None,
    "archivePostUrl": None,
    "archiveUrl": None,
    "dependency": {"enabled": True, "lowErrorRate": 0.5, "highErrorRate": 0.75},
}

# Of every answer.
SECURITY: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
)

Handler = Callable[[Request], Response]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


class Api:
    """The WSGI application."""

    def __init__(self, database: Database, *, local: bool) -> None:
        """`local`: served on loopback only."""
        self._database = database
        self._local = local
        self._large = threading.Lock()
        self._services = 0
        self._counts = Counts()
        self._trouble = ""
        self._routes = self._all_routes()

    def _all_routes(self) -> dict[str, dict[str, Handler]]:
        """Return the handlers by path, and there by method."""
        get: dict[str, Handler] = {
            "/api/v2/services": self._service_names,
            "/api/v2/remoteServices": self._remote_services,
            "/api/v2/spans": self._span_names,
            "/api/v2/traces": self._traces,
            "/api/v2/traceMany": self._trace_many,
            "/api/v2/dependencies": self._dependencies,
            "/api/v2/autocompleteKeys": self._keys,
            "/api/v2/autocompleteValues": self._values,
            "/api/podspan/v1/edges": self._edges,
            "/api/podspan/v1/keys": self._keys,
            "/api/podspan/v1/summaries": self._summaries,
            "/api/podspan/v1/tail": self._tail,
            "/api/podspan/v1/values": self._values,
            "/config.json": self._config,
            "/zipkin/config.json": self._config,
            "/health": self._health,
            "/info": self._info,
            "/metrics": self._metrics,
        }
        routes = {path: {"GET": handler} for path, handler in get.items()}
        routes["/api/v2/spans"]["POST"] = self._add_spans
        return routes

    def __call__(
        self, environ: Mapping[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer one request."""
        try:
            response = self._answer(environ)
        except Refusal as exc:
            response = _text(exc.status, exc.reason, exc.headers)
        except StoreError as exc:
            self._tell(str(exc))
            response = _text(HTTPStatus.SERVICE_UNAVAILABLE, str(exc))
        except Exception:
            log.exception("store: an answer failed")
            response = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error")
        status = response.status
        self._counts.add(f'requests_total{{code="{int(status)}"}}')
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            *response.headers.items(),
            *SECURITY,
        ]
        start_response(f"{int(status)} {status.phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [response.body]

    def _tell(self, trouble: str) -> None:
        """Log it once: on a full disk, senders try again and again."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("store: %s", trouble)

    def _answer(self, environ: Mapping[str, Any]) -> Response:
        request = Request(environ)
        check_origin(request, local=self._local)
        if request.path.startswith("/zipkin/api/v2/"):
            request.path = request.path.removeprefix("/zipkin")
        path = request.path
        if path.startswith("/api/v2/trace/"):
            methods: Mapping[str, Handler] = {"GET": self._trace}
        elif path in self._routes:
            methods = self._routes[path]
        else:
            methods = {"GET": viewer_files.serve}
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"There is {' and '.join(methods)} here",
                {"Allow": ", ".join(["HEAD", *methods])},
            )
        return methods[method](request)

    # Zipkin's API

    def _add_spans(self, request: Request) -> Response:
        content_type = request.header("Content-Type").partition(";")[0].strip().lower()
        if content_type not in (*JSON_TYPES, *PROTO_TYPES):
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "Send application/json or application/x-protobuf, of Zipkin's v2 model",
            )
        sent = request.body()
        with ExitStack() as stack:
            # Large messages wait for each other: their objects need much memory.
            body = request.unpacked(sent, LARGE_BYTES)
            if body is None:
                stack.enter_context(self._large)
                body = request.unpacked(sent, MAX_UNPACKED_BYTES)
            if body is None:
                raise _too_large(f"{MAX_UNPACKED_BYTES} bytes unpacked")
            self._counts.add("messages_total")
            self._counts.add("message_bytes_total", len(body))
            # Tracers send nothing, too, to see whether we are here.
            spans = _parsed(body, content_type) if body else []
            if spans:
                self._database.add(spans)
                self._trouble = ""
        self._counts.add("spans_received_total", len(spans))
        return Response(status=HTTPStatus.ACCEPTED, content_type=PLAIN_TEXT)

    def _service_names(self, request: Request) -> Response:  # noqa: ARG002
        names = self._database.services()
        self._services = len(names)
        return self._names(names)

    def _remote_services(self, request: Request) -> Response:
        service = request.required("serviceName").lower()
        return self._names(self._database.remote_services(service))

    def _span_names(self, request: Request) -> Response:
        service = request.required("serviceName").lower()
        return self._names(self._database.span_names(service))

    def _names(self, names: Sequence[str]) -> Response:
        headers = CACHED_NAMES if self._services > FEW_SERVICES else {}
        return _json(sorted(names), headers)

    def _traces(self, request: Request) -> Response:
        return _json(self._database.traces(_query(request)))

    def _trace(self, request: Request) -> Response:
        text = request.path.removeprefix("/api/v2/trace/")
        if not text or "/" in text:
            raise _not_found()
        trace_id = _trace_id(text)
        spans = self._database.trace(trace_id)
        if not spans:
            raise Refusal(HTTPStatus.NOT_FOUND, f"{trace_id} not found")
        return _json(spans)

    def _trace_many(self, request: Request) -> Response:
        text = request.required("traceIds")
        if not text:
            raise _bad("traceIds parameter is empty")
        if "," not in text:
            raise _bad(
                "Use /api/v2/trace/{traceId} endpoint to retrieve a single trace"
            )
        trace_ids: dict[str, None] = {}
        if text.count(",") >= MAX_TRACES:
            raise _bad(f"more than {MAX_TRACES} traceIds")
        for each in text.split(","):
            trace_id = _trace_id(each)
            if trace_id in trace_ids:
                raise _bad(f"redundant traceId: {trace_id}")
            trace_ids[trace_id] = None
        return _json(self._database.many(list(trace_ids)))

    def _dependencies(self, request: Request) -> Response:
        links = []
        for edge in self._database.links(*_period(request)):
            link = {"parent": edge.parent, "child": edge.child, "callCount": edge.calls}
            if edge.errors:
                link["errorCount"] = edge.errors
            links.append(link)
        return _json(links)

    def _keys(self, request: Request) -> Response:  # noqa: ARG002
        return self._names(self._database.tag_keys())

    def _values(self, request: Request) -> Response:
        key = request.required("key")
        if not key:
            raise _bad("key was empty")
        return self._names(self._database.tag_values(key))

    def _config(self, request: Request) -> Response:  # noqa: ARG002
        return _json(CONFIG)

    # Ours

    def _edges(self, request: Request) -> Response:
        return _json(
            [
                {
                    "parent": edge.parent,
                    "child": edge.child,
                    "callCount": edge.calls,
                    "errorCount": edge.errors,
                    "p50Us": edge.p50_us,
                    "p95Us": edge.p95_us,
                    "p99Us": edge.p99_us,
                }
                for edge in self._database.links(*_period(request))
            ]
        )

    def _summaries(self, request: Request) -> Response:
        return _json(list(map(_summary, self._database.summaries(_query(request)))))

    def _tail(self, request: Request) -> Response:
        after = request.integer("after")
        if after is not None and after < 0:
            raise _bad("after < 0")
        limit = _limit(request, TAIL_SPANS, MAX_TAIL_SPANS)
        cursor, spans, skipped = self._database.tail(after, limit)
        return _json({"cursor": cursor, "spans": spans, "skipped": skipped})

    # Of the server itself

    def _health(self, request: Request) -> Response:  # noqa: ARG002
        try:
            self._database.trace(NO_TRACE)  # reads the file
        except StoreError as exc:
            down = {"status": "DOWN", "podspan": {"status": "DOWN", "error": str(exc)}}
            return _json(down, status=HTTPStatus.SERVICE_UNAVAILABLE)
        return _json({"status": "UP", "podspan": {"status": "UP"}})

    def _info(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"podspan": {"version": version()}})

    def _metrics(self, request: Request) -> Response:  # noqa: ARG002
        text = self._counts.to_prometheus(self._database.counts())
        return Response(text.encode(), "text/plain; version=0.0.4; charset=utf-8")


def _parsed(body: bytes, content_type: str) -> list[ZipkinSpan]:
    try:
        if content_type in PROTO_TYPES:
            if len(body) > MAX_PROTO_BYTES:
                raise _too_large(f"{MAX_PROTO_BYTES} bytes of protobuf")
            return parse_proto3(body)
        # An upper bound: those in texts count, too.
        if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise _too_large(f"{MAX_VALUES} values")
        return parse_json(body)
    except TooManySpans as exc:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(exc)) from exc
    except MalformedSpans as exc:
        raise _bad(str(exc)) from exc


def _too_large(limit: str) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"One message has more than {limit}"
    )


def _query(request: Request) -> Query:
    """Return what a search asks for."""
    try:
        return Query(
            end_ts_ms=_milliseconds(request, "endTs", time.time_ns() // 1_000_000),
            lookback_ms=_milliseconds(request, "lookback", DAY_MS),
            limit=_limit(request, DEFAULT_LIMIT, MAX_TRACES),
            service=request.text("serviceName"),
            remote_service=request.text("remoteServiceName"),
            span_name=request.text("spanName"),
            annotation_query=parse_annotation_query(request.text("annotationQuery")),
            min_duration_us=request.integer("minDuration"),
            max_duration_us=request.integer("maxDuration"),
        )
    except ValueError as exc:
        raise _bad(str(exc)) from exc


def _period(request: Request) -> tuple[int, int]:
    """Return endTs and lookback, both in milliseconds."""
    request.required("endTs")
    end_ts_ms = _milliseconds(request, "endTs", 0)
    lookback_ms = _milliseconds(request, "lookback", DAY_MS)
    for name, value in (("endTs", end_ts_ms), ("lookback", lookback_ms)):
        if value <= 0:
            raise _bad(f"{name} <= 0")
    return end_ts_ms, lookback_ms


def _milliseconds(request: Request, name: str, default: int) -> int:
    value = request.integer(name)
    return default if value is None else min(value, MAX_MS)


def _limit(request: Request, default: int, most: int) -> int:
    limit = request.integer("limit")
    limit = default if limit is None else limit
    if limit <= 0:
        raise _bad("limit <= 0")
    return min(limit, most)


def _trace_id(text: str) -> str:
    try:
        return trace_id_of(text)
    except MalformedSpans as exc:
        raise _bad(str(exc)) from exc


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "traceId": summary.trace_id,
        "timestamp": summary.start_us,
        "duration": summary.duration_us,
        "spanCount": summary.spans,
        "errorCount": summary.errors,
        "root": {
            "serviceName": summary.root_service,
            "name": summary.root_name,
            "kind": summary.root_kind,
        },
        "services": [
            {
                "serviceName": each.service,
                "spanCount": each.spans,
                "errorCount": each.errors,
            }
            for each in summary.services
        ],
        "tags": summary.tags,
    }


def _json(
    value: object,
    headers: Mapping[str, str] | None = None,
    *,
    status: HTTPStatus = HTTPStatus.OK,
) -> Response:
    return Response(orjson.dumps(value), status=status, headers=headers or {})


def _text(
    status: HTTPStatus, reason: str, headers: Mapping[str, str] | None = None
) -> Response:
    body = f"{reason}\n".encode(errors="backslashreplace")
    return Response(body, PLAIN_TEXT, status, headers or {})


def _bad(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)


def _not_found() -> Refusal:
    return Refusal(HTTPStatus.NOT_FOUND, "Not found")
