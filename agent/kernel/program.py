"""Compile the C of bpf/ on the node, without kernel headers.

bcc insists on a kernel source tree; it gets `bpf/headers`, which holds the few names
that its prelude wants. Fields of kernel structs are reached by offsets from BTF.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import podspan.bpf
from podspan.agent.errors import FeatureMissing, ProgramRejected
from podspan.agent.kernel.btf import Btf

if TYPE_CHECKING:
    from bcc import BPF

SOURCES = Path(podspan.bpf.__path__[0])

INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
# The spellings of bpf/kernel.h.
OFFSET = re.compile(r"\bOFFSET\((\w+), (\w+)\)")
READ = re.compile(r"\bKERNEL_READ\([^;]*?, (\w+), (\w+)\);")
OPTIONAL = re.compile(r"#ifdef OFFSET_([a-z0-9_]+?)__(\w+)")
ENUMERATOR = re.compile(r"\bENUMERATOR\((\w+), (\w+)\)")


def read_source(name: str) -> str:
    """The text of bpf/`name` with its own includes put in, each once.

    bcc rewrites map accesses in the main file only, so there is only that.
    """
    seen: set[str] = set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (SOURCES / file).read_text()
        body = INCLUDE.sub(lambda match: expand(match[1]), text)
        return f'#line 1 "{file}"\n{body}'

    return expand(name)


def kernel_numbers(source: str, btf: Btf) -> Iterator[tuple[str, int]]:
    """Name and value of every kernel offset and enumerator that `source` uses."""
    fields = {*OFFSET.findall(source), *READ.findall(source), *OPTIONAL.findall(source)}
    for struct, field in sorted(fields - {("type", "field")}):
        offset = btf.offset(struct, field)
        if offset is not None:
            yield f"OFFSET_{struct}__{field}", offset
    for enum, name in sorted(set(ENUMERATOR.findall(source)) - {("type", "name")}):
        value = btf.enumerator(enum, name)
        if value is not None:
            yield f"ENUMERATOR_{enum}__{name}", value


def kernel_version() -> int:
    """The running kernel's version as KERNEL_VERSION() packs it."""
    major, minor, patch = re.findall(r"\d+", f"{os.uname().release}.0")[:3]
    return (int(major) << 16) + (int(minor) << 8) + min(int(patch), 255)


def load(name: str, settings: Mapping[str, int] | None = None) -> BPF:
    """Compile bpf/`name`; nothing is verified or attached yet.

    Raises FeatureMissing without bcc or BTF, ProgramRejected where it does not compile.
    """
    try:
        from bcc import BPF  # noqa: PLC0415  importing this file needs no bcc
    except ImportError as exc:
        raise FeatureMissing(
            f"cannot import bcc: {exc}", hint="apt-get install python3-bpfcc"
        ) from exc
    source = read_source(name)
    defines = {
        "PAGE_SIZE": os.sysconf("SC_PAGE_SIZE"),
        "PODSPAN_KERNEL_VERSION": kernel_version(),
        **dict(kernel_numbers(source, Btf.of_running_kernel())),
        **(settings or {}),
    }
    os.environ["BCC_KERNEL_SOURCE"] = str(SOURCES / "headers")
    flags = [f"-D{define}={value}" for define, value in defines.items()]
    try:
        return BPF(text=source.encode(), cflags=[*flags, "-Wno-unused-function"])
    except Exception as exc:  # bcc has no exception type of its own
        raise ProgramRejected(
            f"cannot compile bpf/{name}: {exc}",
            hint="the compiler's messages stand above; please report them",
        ) from exc


def map_fd(bpf: BPF, name: str) -> int:
    """Descriptor of a map, also of the kinds that bcc's tables do not know."""
    from bcc import lib  # noqa: PLC0415  as above

    fd: int = lib.bpf_table_fd(bpf.module, name.encode())
    if fd < 0:
        raise KeyError(name)
    return fd
