"""The HTTP/1 grammar as the table that bpf/scanner.h walks.

Pure. States, actions and headers have the names and numbers of the enums there; what is
not listed here leads to OPAQUE. Source: RFC 9112 sections 2 to 7, RFC 9110 section 5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

STATES, CLASSES = 64, 32

TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGIT = b"0123456789"
HEX = b"0123456789abcdefABCDEF"
SPACE = b" \t"
ANY = bytes(range(256))
# What a field value, a reason or a chunk extension may hold: no NUL, no line end.
FIELD = bytes(set(ANY) - set(b"\0\r\n"))
# A request-target: visible ASCII, and UTF-8 as it is, which clients do send.
TARGET = bytes(range(0x21, 0x7F)) + bytes(range(0x80, 0x100))

Rule = tuple[str, bytes, str, str]


def _word(states: list[str], word: bytes, action: str = "NOTHING") -> Iterator[Rule]:
    """`word`, byte by byte in either case where it is lower case, along `states`."""
    for i, byte in enumerate(word):
        char = bytes([byte])
        both = char + char.upper() if char.islower() else char
        yield states[i], both, states[i + 1], action


def _numbered(stem: str, first: str, count: int) -> list[str]:
    return [first, *(f"{stem}_{i}" for i in range(1, count))]


def _request_line() -> Iterator[Rule]:
    """RFC 9112 section 3; empty lines before it: section 2.2."""
    yield "START", TOKEN, "METHOD", "METHOD_FIRST"
    yield "START", b"\r", "START_LF", "NOTHING"
    yield "START_LF", b"\n", "START", "FORGET_LINE"
    yield "METHOD", TOKEN, "METHOD", "METHOD_BYTE"
    yield "METHOD", b" ", "TARGET_FIRST", "NOTHING"
    yield "TARGET_FIRST", TARGET, "TARGET", "TARGET_FIRST"
    yield "TARGET", TARGET, "TARGET", "VALUE_BYTE"
    yield "TARGET", b" ", "REQUEST_VERSION", "NOTHING"
    version = _numbered("REQUEST_VERSION", "REQUEST_VERSION", 7)
    yield from _word([*version, "REQUEST_MINOR"], b"HTTP/1.")
    yield "REQUEST_MINOR", DIGIT, "REQUEST_CR", "MINOR"
    yield "REQUEST_CR", b"\r", "LINE_LF", "NOTHING"


def _status_line() -> Iterator[Rule]:
    """RFC 9112 section 4."""
    version = _numbered("RESPONSE", "RESPONSE", 7)
    yield from _word([*version, "RESPONSE_MINOR"], b"HTTP/1.")
    yield "RESPONSE_MINOR", DIGIT, "RESPONSE_SP", "MINOR"
    yield "RESPONSE_SP", b" ", "STATUS_1", "NOTHING"
    yield "STATUS_1", DIGIT, "STATUS_2", "STATUS"
    yield "STATUS_2", DIGIT, "STATUS_3", "STATUS"
    yield "STATUS_3", DIGIT, "STATUS_END", "STATUS"
    yield "STATUS_END", b" ", "REASON", "NOTHING"
    yield "STATUS_END", b"\r", "LINE_LF", "NOTHING"
    yield "REASON", FIELD, "REASON", "NOTHING"
    yield "REASON", b"\r", "LINE_LF", "NOTHING"


def _header_lines() -> Iterator[Rule]:
    """RFC 9112 section 5; no folding, no space before the colon."""
    yield "LINE_LF", b"\n", "NAME_FIRST", "NOTHING"
    yield "NAME_FIRST", TOKEN, "NAME", "NAME_FIRST"
    yield "NAME_FIRST", b"\r", "END_LF", "NOTHING"
    yield "NAME", TOKEN, "NAME", "NAME_BYTE"
    yield "NAME", b":", "OWS", "NAME_ENDS"
    yield "OWS", FIELD, "VALUE", "VALUE_FIRST"
    yield "OWS", SPACE, "OWS", "NOTHING"
    yield "OWS", b"\r", "LINE_LF", "VALUE_ENDS"
    yield "VALUE", FIELD, "VALUE", "VALUE_BYTE"
    yield "VALUE", SPACE, "VALUE", "VALUE_SPACE"
    yield "VALUE", b"\r", "LINE_LF", "VALUE_ENDS"
    yield "END_LF", b"\n", "HEAD_DONE", "NOTHING"


def _content_length() -> Iterator[Rule]:
    """RFC 9110 section 8.6: digits, and nothing else."""
    yield "LENGTH_OWS", SPACE, "LENGTH_OWS", "NOTHING"
    yield "LENGTH_OWS", DIGIT, "LENGTH", "LENGTH_FIRST"
    yield "LENGTH", DIGIT, "LENGTH", "LENGTH_DIGIT"
    yield "LENGTH", SPACE, "LENGTH_END", "NOTHING"
    yield "LENGTH", b"\r", "LINE_LF", "LENGTH_ENDS"
    yield "LENGTH_END", SPACE, "LENGTH_END", "NOTHING"
    yield "LENGTH_END", b"\r", "LINE_LF", "LENGTH_ENDS"


def _transfer_encoding() -> Iterator[Rule]:
    """RFC 9112 section 6.1: the one coding whose end we can see."""
    coding = _numbered("CODING", "CODING_OWS", 8)
    for state in [*coding, "CODING_OTHER"]:
        yield state, FIELD, "CODING_OTHER", "NOTHING"
        yield state, b"\r", "LINE_LF", "OTHER_CODING"
    yield "CODING_OWS", SPACE, "CODING_OWS", "NOTHING"
    yield from _word(coding, b"chunked")
    yield "CODING_7", SPACE, "CODING_7", "NOTHING"
    yield "CODING_7", b"\r", "LINE_LF", "CHUNKED"


def _chunks() -> Iterator[Rule]:
    """RFC 9112 section 7.1."""
    yield "CHUNK_FIRST", HEX, "CHUNK_SIZE", "CHUNK_FIRST"
    yield "CHUNK_SIZE", HEX, "CHUNK_SIZE", "CHUNK_DIGIT"
    # Space after the size is none of the grammar's, but common: nginx takes it too.
    yield "CHUNK_SIZE", b"; \t", "CHUNK_EXTENSION", "NOTHING"
    yield "CHUNK_SIZE", b"\r", "CHUNK_LF", "NOTHING"
    yield "CHUNK_EXTENSION", FIELD, "CHUNK_EXTENSION", "NOTHING"
    yield "CHUNK_EXTENSION", b"\r", "CHUNK_LF", "NOTHING"
    yield "CHUNK_LF", b"\n", "CHUNK_DATA", "CHUNK_BEGINS"
    yield "CHUNK_CR", b"\r", "CHUNK_DATA_LF", "NOTHING"
    yield "CHUNK_DATA_LF", b"\n", "CHUNK_FIRST", "NOTHING"
    yield "TRAILER_FIRST", FIELD, "TRAILER", "NOTHING"
    yield "TRAILER_FIRST", b"\r", "TRAILERS_LF", "NOTHING"
    yield "TRAILER", FIELD, "TRAILER", "NOTHING"
    yield "TRAILER", b"\r", "TRAILER_LF", "NOTHING"
    yield "TRAILER_LF", b"\n", "TRAILER_FIRST", "NOTHING"
    yield "TRAILERS_LF", b"\n", "DONE", "NOTHING"


def _rules() -> Iterator[Rule]:
    """(state, bytes, next state, action); of rules that overlap the later wins."""
    yield from _request_line()
    yield from _status_line()
    yield from _header_lines()
    yield from _content_length()
    yield from _transfer_encoding()
    yield from _chunks()


# Header, the state that reads its value, whether each line counts, the kept text.
HEADERS = {
    "host": ("HOST", "OWS", False, "host"),
    "user-agent": ("USER_AGENT", "OWS", False, "user_agent"),
    "x-request-id": ("REQUEST_ID", "OWS", False, "request_id"),
    "x-b3-traceid": ("TRACE_ID", "OWS", False, "trace_id"),
    "x-b3-spanid": ("SPAN_ID", "OWS", False, "span_id"),
    "x-b3-parentspanid": ("PARENT_ID", "OWS", False, "parent_id"),
    "x-b3-sampled": ("SAMPLED", "OWS", False, "sampled"),
    "x-b3-flags": ("FLAGS", "OWS", False, "flags"),
    "b3": ("B3", "OWS", False, "b3"),
    "traceparent": ("TRACEPARENT", "OWS", False, "traceparent"),
    "x-client-trace-id": ("CLIENT_TRACE_ID", "OWS", False, "client_trace_id"),
    "content-length": ("LENGTH", "LENGTH_OWS", True, None),
    "transfer-encoding": ("CODING", "CODING_OWS", True, None),
}


def enumerators(source: str, enum: str) -> dict[str, int]:
    """Names and values of `enum` in C `source`, where values are implied or decimal."""
    body = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    match = re.search(rf"enum {enum} {{(.*?)}};", body, flags=re.DOTALL)
    if match is None:
        raise LookupError(f"no enum {enum}")
    values: dict[str, int] = {}
    following = 0
    for item in filter(None, (part.strip() for part in match[1].split(","))):
        name, _, value = item.partition("=")
        following = int(value) if value else following
        values[name.strip()] = following
        following += 1
    return values


def text_fields(source: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each member of `struct scan_text` in C `source`."""
    match = re.search(r"struct scan_text {(.*?)};", source, flags=re.DOTALL)
    if match is None:
        raise LookupError("no struct scan_text")
    method_max = re.search(r"#define METHOD_MAX (\d+)", source)
    sizes = {"METHOD_MAX": int(method_max[1]) if method_max else 0}
    fields: dict[str, tuple[int, int]] = {}
    at = 0
    for name, size_text in re.findall(r"u8 (\w+)\[(\w+)\];", match[1]):
        size = sizes.get(size_text) or int(size_text)
        fields[name] = (at, size)
        at += size
    return fields


def table(source: str) -> bytes:
    """`struct scan_table` for the enums of `source`, the text of bpf/scanner.h."""
    states = enumerators(source, "scan_state")
    actions = enumerators(source, "scan_action")
    opaque = states["SCAN_OPAQUE"]
    cells = {
        (state, byte): (opaque, actions["ACT_NOTHING"])
        for state in range(STATES)
        for byte in range(256)
    }
    for before, chars, following, action in _rules():
        for byte in chars:
            cells[states[f"SCAN_{before}"], byte] = (
                states[f"SCAN_{following}"],
                actions[f"ACT_{action}"],
            )
    # Bytes that every state treats alike are one class.
    columns: dict[tuple[tuple[int, int], ...], int] = {}
    classes = bytearray(256)
    for byte in range(256):
        column = tuple(cells[state, byte] for state in range(STATES))
        classes[byte] = columns.setdefault(column, len(columns))
    if len(columns) > CLASSES:
        raise ValueError(f"{len(columns)} classes of bytes, the table holds {CLASSES}")
    rows = bytearray()
    by_class = list(columns)
    for state in range(STATES):
        for number in range(CLASSES):
            cell = by_class[number][state] if number < len(by_class) else (opaque, 0)
            rows += bytes(cell)
    return bytes(rows) + bytes(classes) + bytes(range(256)).lower()


def names(source: str) -> Iterator[tuple[bytes, bytes]]:
    """`struct scan_name` and `struct scan_entry` of each header that matters."""
    states = enumerators(source, "scan_state")
    headers = enumerators(source, "scan_header")
    fields = text_fields(source)
    for name, (header, state, repeats, field) in HEADERS.items():
        at, size = fields[field] if field else (0, 0)
        entry = struct.pack(
            "<HHBBBB",
            at,
            size,
            headers[f"HEADER_{header}"],
            states[f"SCAN_{state}"],
            repeats,
            0,
        )
        yield name.encode().ljust(24, b"\0"), entry
