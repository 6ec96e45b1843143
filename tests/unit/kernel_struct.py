"""Read bpf/exchange.h as bcc does: a struct becomes a ctypes class.

A field renamed in C then fails a unit test, without root and without bcc.
"""

import ctypes
import re
from functools import cache
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parents[2] / "bpf" / "exchange.h"

CTYPES: dict[str, Any] = {
    "u8": ctypes.c_ubyte,
    "u16": ctypes.c_ushort,
    "u32": ctypes.c_uint,
    "u64": ctypes.c_ulonglong,
    "char": ctypes.c_char,
}

FIELD = re.compile(r"(\w+) (\w+)(?:\[(\d+)\])?;")
ENUMERATOR = re.compile(r"(\w+) = (\d+),")


@cache
def kernel_struct(name: str) -> type[ctypes.Structure]:
    """Return the ctypes class of a struct of flat fields."""
    fields = []
    for ctype, field, count in FIELD.findall(_body("struct", name)):
        cls = CTYPES[ctype]
        fields.append((field, cls * int(count) if count else cls))
    assert fields, f"struct {name} has no field"
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@cache
def kernel_enum(name: str) -> dict[str, int]:
    """Return the enumerators of an enum, by name."""
    values = {key: int(value) for key, value in ENUMERATOR.findall(_body("enum", name))}
    assert values, f"enum {name} has no enumerator"
    return values


def declared_size(name: str) -> int:
    """Return the size that the header asserts for a struct."""
    pattern = rf"_Static_assert\(sizeof\(struct {name}\) == (\d+)"
    match = re.search(pattern, HEADER.read_text())
    assert match, f"no size asserted for struct {name}"
    return int(match[1])


def exchange_record(**fields: Any) -> Any:
    """Return a record of a plain sampled call, `fields` changed; addresses as text."""
    values: dict[str, Any] = {
        "trace_id_high": 0x463AC35C9F6413AD,
        "trace_id_low": 0x48485A3953BB6124,
        "span_id": 0xA2FB4A1D1A96D312,
        "request_first_ns": 5_000_000_000,
        "request_last_ns": 5_000_000_100,
        "response_first_ns": 5_004_000_000,
        "response_last_ns": 5_004_200_000,
        "response_bytes": 178,
        "netns": 4026532000,
        "pid": 100,
        "tid": 101,
        "local_addr": "10.1.0.2",
        "local_port": 40000,
        "peer_addr": "10.1.0.3",
        "peer_port": 9080,
        "status": 200,
        "role": 1,
        "end": 1,
        "flags": 1,
        "request_minor": 1,
        "protocol": 1,
        "method": b"GET",
        "target": b"/details/0?u=1",
        "host": b"Details:9080",
        "user_agent": b"python",
        "request_id": b"7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f",
        "comm": b"productpage",
    }
    raw = kernel_struct("exchange_record")()
    for name, value in {**values, **fields}.items():
        if isinstance(value, str):
            text = value if ":" in value else f"::ffff:{value}"
            getattr(raw, name)[:] = IPv6Address(text).packed
        else:
            assert hasattr(raw, name), f"struct exchange_record has no {name}"
            setattr(raw, name, value)
    return raw


def _body(kind: str, name: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    match = re.search(rf"{kind} {name} \{{(.*?)\}};", text, re.DOTALL)
    assert match, f"no {kind} {name} in {HEADER.name}"
    return match[1]
