"""Read bpf/exchange.h as bcc does: a struct becomes a ctypes class.

A field renamed in C then fails a unit test, without root and without bcc.
"""

import ctypes
import re
from functools import cache
from pathlib import Path

HEADER = Path(__file__).parents[2] / "bpf" / "exchange.h"

CTYPES: dict[str, type] = {
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


def _body(kind: str, name: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    match = re.search(rf"{kind} {name} \{{(.*?)\}};", text, re.DOTALL)
    assert match, f"no {kind} {name} in {HEADER.name}"
    return match[1]
