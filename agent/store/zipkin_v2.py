"""Zipkin's v2 span formats: JSON and protobuf in, normalised dictionaries out.

Whoever sends spans is not trusted: a value that Zipkin's model has no place for makes
the whole message malformed, as in Zipkin's server, and nothing is kept of it. What is
normalised, as by Zipkin's zipkin2.Span and zipkin2.Endpoint:

- Ids become lower hex of 16 digits, trace ids of 16 or 32 (with a zero high half: 16).
- Names of spans and services become lower case; empty ones are left out, as are
  endpoints that say nothing, addresses that are none, and times that are not positive.
- A parent that is zero or the span itself is none; a client's span is never shared.
- Tags are sorted by key, annotations by time, without repetitions.

Numbers are taken where texts belong and texts where integers do, as Gson does for
Zipkin. Stricter than Zipkin is what no JSON has: bytes after the list, control
characters and lone surrogates in texts, invalid UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Final, TypedDict, cast

import orjson
from podspan.agent.errors import PodspanError

KINDS: Final = frozenset({"CLIENT", "SERVER", "PRODUCER", "CONSUMER"})

# Zipkin keeps times as Java's long, and SQLite its integers in as many bits.
MAX_INTEGER: Final = 2**63 - 1
MAX_PORT: Final = 0xFFFF

# The longest text of an IPv6 address, with an IPv4 address in it (INET6_ADDRSTRLEN).
ADDRESS_TEXT: Final = 45

# Of one message: whoever sends more at once wants our memory.
MAX_SPANS: Final = 100_000

LOWER_HEX: Final = "0123456789abcdef"

V1_FIELD: Final = "binaryAnnotations"

_decimal = re.compile(r"-?[0-9]{1,19}").fullmatch


class MalformedSpans(PodspanError):
    """A message that is not a list of v2 spans; says what is wrong with which span."""


class TooManySpans(MalformedSpans):
    """A message of more than MAX_SPANS."""


class Endpoint(TypedDict, total=False):
    """One end of a call, with what is known of it."""

    serviceName: str
    ipv4: str
    ipv6: str
    port: int


class Annotation(TypedDict):
    """Something happened."""

    timestamp: int  # microseconds since 1970
    value: str


class ZipkinSpan(TypedDict, total=False):
    """A normalised span; `traceId` and `id` are always there. Times in microseconds."""

    traceId: str
    parentId: str
    id: str
    kind: str  # one of KINDS
    name: str
    timestamp: int
    duration: int
    localEndpoint: Endpoint
    remoteEndpoint: Endpoint
    annotations: list[Annotation]
    tags: dict[str, str]
    debug: bool
    shared: bool


def parse_json(body: bytes) -> list[ZipkinSpan]:
    """Return the spans of a JSON list of them."""
    try:
        items = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise MalformedSpans(f"Malformed JSON: {exc}") from exc
    if type(items) is not list:
        raise MalformedSpans("Expected a JSON_V2 encoded list")
    return _read_all(items, len(items))


def parse_proto3(body: bytes) -> list[ZipkinSpan]:
    """Return the spans of a message zipkin.proto3.ListOfSpans."""
    # A server that is sent JSON only need not load it.
    from podspan.agent.store import zipkin_proto  # noqa: PLC0415

    message = zipkin_proto.decode(body)
    return _read_all(map(zipkin_proto.as_json, message.spans), len(message.spans))


def trace_id_of(value: object) -> str:
    """Return a trace id, normalised; raise MalformedSpans."""
    digits = _hex_digits(value, "traceId", 32)
    length = len(digits)
    if length == 32:
        return digits[16:] if digits.startswith("0" * 16) else digits
    return digits.zfill(16 if length <= 16 else 32)


def _read_all(items: Iterable[object], count: int) -> list[ZipkinSpan]:
    if count > MAX_SPANS:
        raise TooManySpans(f"More than {MAX_SPANS} spans in one message")
    spans: list[ZipkinSpan] = []
    for item in items:
        try:
            spans.append(_span(item))
        except MalformedSpans as exc:
            raise MalformedSpans(f"{exc}: span {len(spans)} of the list") from None
    return spans


def _span(raw: Any) -> ZipkinSpan:
    if type(raw) is not dict:
        raise MalformedSpans("Expected an object")
    if V1_FIELD in raw:
        raise MalformedSpans("Expected a JSON_V2 encoded list, but received: JSON_V1")
    get = raw.get
    span: dict[str, Any] = {"traceId": trace_id_of(get("traceId"))}
    for name, read in READERS:
        # What reads as nothing, like an empty name, is left out.
        if (value := get(name)) is not None and (known := read(value)):
            span[name] = known
    if "id" not in span:
        raise MalformedSpans("Missing: id")
    if span.get("parentId") == span["id"]:
        del span["parentId"]
    if "shared" in span and span.get("kind") == "CLIENT":
        del span["shared"]
    return cast(ZipkinSpan, span)


def _id(value: object) -> str:
    return _hex_digits(value, "id", 16).zfill(16)


def _hex_digits(value: object, what: str, longest: int) -> str:
    """Return at most `longest` lower hex digits, not all of them zero."""
    if type(value) is not str:
        if value is None:
            raise MalformedSpans(f"Missing: {what}")
        value = _text(value, what)
    if not value:
        raise MalformedSpans(f"{what} is empty")
    if len(value) > longest:
        raise MalformedSpans(f"{what}.length > {longest}")
    if value.strip(LOWER_HEX):
        raise MalformedSpans(f"{what} should be lower-hex encoded with no prefix")
    if not value.strip("0"):
        raise MalformedSpans(f"{what} is all zeros")
    return value


def _parent_id(value: object) -> str:
    """Return the parent's id; "" where it is zero, which tracers send for none."""
    if type(value) is str and 0 < len(value) <= 16 and not value.strip("0"):
        return ""
    return _hex_digits(value, "parentId", 16).zfill(16)


def _kind(value: object) -> str:
    if type(value) is not str or value not in KINDS:
        raise MalformedSpans(f"kind is none of {' '.join(sorted(KINDS))}")
    return value


def _name(value: object) -> str:
    return (value if type(value) is str else _text(value, "name")).lower()


def _text(value: object, what: str) -> str:
    if type(value) is str:
        return value
    if type(value) is int or type(value) is float:
        return str(value)
    raise MalformedSpans(f"Expected a string: {what}")


def _time_us(value: object) -> int:
    """Return a time or a duration in microseconds; 0 where it is none."""
    return max(0, _integer(value, "time"))


def _integer(value: object, what: str) -> int:
    number: int | None = None
    if type(value) is int:
        number = value
    elif (type(value) is float and value.is_integer()) or (
        type(value) is str and _decimal(value)
    ):
        number = int(value)
    if number is None or not -MAX_INTEGER <= number <= MAX_INTEGER:
        raise MalformedSpans(f"Expected an integer of 64 bits: {what}")
    return number


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise MalformedSpans("Expected a boolean: debug or shared")
    return value


def _endpoint(raw: Any) -> Endpoint:
    """Return what it says, which may be nothing."""
    if type(raw) is not dict:
        raise MalformedSpans("Expected an object: endpoint")
    get = raw.get
    endpoint: Endpoint = {}
    if (value := get("serviceName")) is not None and (service := _name(value)):
        endpoint["serviceName"] = service
    # Either field may hold either family: the text decides.
    if (value := get("ipv4")) is not None:
        _add_address(endpoint, _text(value, "ipv4"))
    if (value := get("ipv6")) is not None:
        _add_address(endpoint, _text(value, "ipv6"))
    if (value := get("port")) is not None and (port := _integer(value, "port")) > 0:
        if port > MAX_PORT:
            raise MalformedSpans(f"invalid port {port}")
        endpoint["port"] = port
    return endpoint


def _add_address(endpoint: Endpoint, text: str) -> None:
    if len(text) <= ADDRESS_TEXT:
        ipv4, ipv6 = _address(text)
        if ipv4:
            endpoint["ipv4"] = ipv4
        elif ipv6:
            endpoint["ipv6"] = ipv6


@lru_cache(maxsize=4096)  # the same few hosts again and again
def _address(text: str) -> tuple[str, str]:
    """Return its IPv4 or its IPv6 form; two empty texts where it is no address."""
    try:
        if ":" not in text:
            return str(IPv4Address(text)), ""
        if "%" in text:  # a scope, which means something only on the host it is of
            return "", ""
        address = IPv6Address(text)
    except AddressValueError:
        return "", ""
    # An IPv4 address written as such in an IPv6 one is the IPv4 address.
    if "." in text and int(address) >> 32 in (0, 0xFFFF):
        return str(IPv4Address(int(address) & 0xFFFFFFFF)), ""
    return "", str(address)


def _annotations(raw: Any) -> list[Annotation]:
    if type(raw) is not list:
        raise MalformedSpans("Expected a list: annotations")
    found: set[tuple[int, str]] = set()
    for item in raw:
        if type(item) is not dict:
            raise MalformedSpans("Expected an object: annotation")
        at, value = item.get("timestamp"), item.get("value")
        if at is None or value is None:
            raise MalformedSpans("Incomplete annotation")
        found.add((_integer(at, "annotation's timestamp"), _text(value, "annotation")))
    return [{"timestamp": at_us, "value": value} for at_us, value in sorted(found)]


def _tags(raw: Any) -> dict[str, str]:
    if type(raw) is not dict:
        raise MalformedSpans("Expected an object: tags")
    tags = {}
    for key in sorted(raw):
        value = raw[key]
        tags[key] = value if type(value) is str else _text(value, f"tag {key[:64]!r}")
    return tags


# Field and reader, in the order of Zipkin's own JSON.
READERS: Final[tuple[tuple[str, Callable[[Any], Any]], ...]] = (
    ("parentId", _parent_id),
    ("id", _id),
    ("kind", _kind),
    ("name", _name),
    ("timestamp", _time_us),
    ("duration", _time_us),
    ("localEndpoint", _endpoint),
    ("remoteEndpoint", _endpoint),
    ("annotations", _annotations),
    ("tags", _tags),
    ("debug", _boolean),
    ("shared", _boolean),
)


def merge(spans: Sequence[ZipkinSpan]) -> list[ZipkinSpan]:
    """Return one trace's spans, each once, as zipkin2.internal.Trace has them.

    A tracer may send a span in pieces, and a server may share its client's id without
    saying so. Sorted by id, the client's before the servers'; `spans` stay as they are.
    """
    if len(spans) <= 1:
        return list(spans)
    trace_id = max((span["traceId"] for span in spans), key=len)
    pieces: list[list[ZipkinSpan]] = []
    end: Endpoint = {}
    for span in sorted(spans, key=_merge_order):
        here = span.get("localEndpoint", {})
        if pieces and _same_span(pieces[-1][0], end, span):
            pieces[-1].append(span)
            end = {**here, **end}
        else:
            pieces.append([span])
            end = here
    return list(_corrected([_joined(each) for each in pieces], trace_id))


def _merge_order(span: ZipkinSpan) -> tuple[Any, ...]:
    """Order by id, then clients, others, sharing servers; then by what names an end.

    One without an endpoint comes first, so that it joins whichever follows.
    """
    end = span.get("localEndpoint")
    rank = 0 if span.get("kind") == "CLIENT" else 1
    if span.get("shared"):
        rank = 2
    if end is None:
        return span["id"], rank, 0
    names = (end.get("serviceName"), end.get("ipv4"), end.get("ipv6"))
    return span["id"], rank, 1, *((name is None, name or "") for name in names)


def _same_span(first: ZipkinSpan, end: Endpoint, span: ZipkinSpan) -> bool:
    """Whether `span` is a piece of `first`, whose pieces were at `end` so far."""
    if first["id"] != span["id"]:
        return False
    if first.get("shared", False) != span.get("shared", False):
        return False
    here = span.get("localEndpoint", {})
    return all(here.get(name, value) == value for name, value in end.items())


def _joined(pieces: Sequence[ZipkinSpan]) -> ZipkinSpan:
    """Return the pieces of one span as one: the first one's word counts."""
    if len(pieces) == 1:
        return pieces[0]
    joined: ZipkinSpan = {}
    local: Endpoint = {}
    remote: Endpoint = {}
    annotations: list[Annotation] = []
    tags: dict[str, str] = {}
    for piece in reversed(pieces):
        joined.update(piece)
        local.update(piece.get("localEndpoint", {}))
        remote.update(piece.get("remoteEndpoint", {}))
    for piece in pieces:
        annotations += piece.get("annotations", [])
        tags |= piece.get("tags", {})  # of tags, the last one's
    if local:
        joined["localEndpoint"] = local
    if remote:
        joined["remoteEndpoint"] = remote
    if annotations:
        joined["annotations"] = _annotations(annotations)
    if tags:
        joined["tags"] = dict(sorted(tags.items()))
    return joined


def _corrected(spans: Sequence[ZipkinSpan], trace_id: str) -> Iterator[ZipkinSpan]:
    """Give each the longest trace id, and to servers what their client's span knows."""
    last: ZipkinSpan | None = None
    for original in spans:
        span = original
        if span["traceId"] != trace_id and len(span["traceId"]) != len(trace_id):
            span = {**span, "traceId": trace_id}
        if last and last["id"] == span["id"]:
            if last.get("kind") == "CLIENT" and span.get("kind") == "SERVER":
                span = {**span, "shared": True}
            if span.get("shared") and "parentId" in last and "parentId" not in span:
                span = {**span, "parentId": last["parentId"]}
        yield span
        last = span
