"""Read field offsets from the kernel's own type information (BTF).

The programs in bpf/ name kernel fields as `OFFSET(sock, sk_shutdown)`; this module
turns those names into byte offsets of the running kernel, so that no kernel headers
are needed on the node. Bytes in, numbers out.

Source: Documentation/bpf/btf.rst (Linux 6.12), include/uapi/linux/btf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from podspan.agent.errors import FeatureMissing

VMLINUX = Path("/sys/kernel/btf/vmlinux")

MAGIC = 0xEB9F
HEADER = struct.Struct("<HBBIIIII")
TYPE = struct.Struct("<III")
MEMBER = struct.Struct("<III")
ENUM = struct.Struct("<Ii")

INT, PTR, ARRAY, STRUCT, UNION, ENUM32, FWD = 1, 2, 3, 4, 5, 6, 7
TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, PROTO = 8, 9, 10, 11, 12, 13
VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = 14, 15, 16, 17, 18, 19

# Bytes that follow `struct btf_type`: (fixed, per vlen).
TRAILER: Mapping[int, tuple[int, int]] = {
    INT: (4, 0),
    PTR: (0, 0),
    ARRAY: (12, 0),
    STRUCT: (0, 12),
    UNION: (0, 12),
    ENUM32: (0, 8),
    FWD: (0, 0),
    TYPEDEF: (0, 0),
    VOLATILE: (0, 0),
    CONST: (0, 0),
    RESTRICT: (0, 0),
    FUNC: (0, 0),
    PROTO: (0, 8),
    VAR: (4, 0),
    DATASEC: (0, 12),
    FLOAT: (0, 0),
    DECL_TAG: (4, 0),
    TYPE_TAG: (0, 0),
    ENUM64: (0, 12),
}
MODIFIERS = frozenset({TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})


class Btf:
    """The types of one kernel image."""

    def __init__(self, raw: bytes) -> None:
        """Index `raw`, the content of /sys/kernel/btf/vmlinux.

        Raises FeatureMissing where it is not BTF, or has a kind this code predates.
        """
        if len(raw) < HEADER.size or raw[:2] != MAGIC.to_bytes(2, "little"):
            raise FeatureMissing("kernel BTF: not in BTF format")
        _, _version, _flags, header, types, types_len, strings, strings_len = (
            HEADER.unpack_from(raw)
        )
        if header + max(types + types_len, strings + strings_len) > len(raw):
            raise FeatureMissing("kernel BTF: the file ends early")
        self._raw = raw
        self._strings = raw[header + strings : header + strings + strings_len]
        self._offsets = [0]  # type 0 is void
        self._by_name: dict[int, list[int]] = {}
        at = header + types
        end = at + types_len
        unpack, append = TYPE.unpack_from, self._offsets.append
        while at < end:
            name, info, _ = unpack(raw, at)
            kind = info >> 24 & 0x1F
            if kind in (STRUCT, ENUM32) and name:
                self._by_name.setdefault(name, []).append(len(self._offsets))
            append(at)
            try:
                fixed, each = TRAILER[kind]
            except KeyError:
                raise FeatureMissing(f"kernel BTF: unknown kind {kind}") from None
            at += 12 + fixed + each * (info & 0xFFFF)

    @classmethod
    def of_running_kernel(cls, path: Path = VMLINUX) -> Btf:
        """Read the running kernel's BTF; FeatureMissing where it has none."""
        try:
            return cls(path.read_bytes())
        except OSError as exc:
            raise FeatureMissing(
                f"no kernel type information at {path}: {exc.strerror}",
                hint="podspan needs a kernel built with CONFIG_DEBUG_INFO_BTF=y, 5.10 "
                "or newer; stock kernels of Debian 12, Ubuntu 22.04, RHEL 9 have it",
            ) from exc

    def offset(self, type_name: str, path: str) -> int | None:
        """Byte offset of `path` ("__sk_common.skc_num") in struct `type_name`.

        Members of anonymous structs and unions are found as C finds them. None where
        this kernel has no such struct or member; bit fields are not addressable.
        """
        for type_id in self._named(type_name, STRUCT):
            found = self._walk(type_id, path.split("."))
            if found is not None:
                return found
        return None

    def enumerator(self, enum_name: str, value_name: str) -> int | None:
        """Value of `value_name` in `enum enum_name`, None where absent."""
        for type_id in self._named(enum_name, ENUM32):
            at = self._offsets[type_id]
            vlen = TYPE.unpack_from(self._raw, at)[1] & 0xFFFF
            for i in range(vlen):
                name, value = ENUM.unpack_from(self._raw, at + 12 + 8 * i)
                if self._string(name) == value_name:
                    return int(value)
        return None

    def _named(self, name: str, kind: int) -> Iterable[int]:
        # Names are not deduplicated across suffixes, so a string may occur more than
        # once in the section; each occurrence that starts a string is a name_off.
        needle = b"\0" + name.encode() + b"\0"
        at = self._strings.find(needle)
        while at >= 0:
            for type_id in self._by_name.get(at + 1, ()):
                if self._kind(type_id) == kind:
                    yield type_id
            at = self._strings.find(needle, at + 1)

    def _walk(self, type_id: int, path: list[str]) -> int | None:
        type_id = self._resolve(type_id)
        at = self._offsets[type_id]
        _, info, _ = TYPE.unpack_from(self._raw, at)
        if info >> 24 & 0x1F not in (STRUCT, UNION):
            return None
        for i in range(info & 0xFFFF):
            name_off, member, offset = MEMBER.unpack_from(self._raw, at + 12 + 12 * i)
            bits = offset
            if info >> 31:  # kind_flag: bit field size in the upper byte
                if offset >> 24:
                    continue
                bits = offset & 0xFFFFFF
            name = self._string(name_off)
            if name == path[0]:
                if len(path) == 1:
                    return int(bits // 8)
                rest = self._walk(member, path[1:])
            elif not name:
                rest = self._walk(member, path)
            else:
                continue
            if rest is not None:
                return int(bits // 8) + rest
        return None

    def _resolve(self, type_id: int) -> int:
        while self._kind(type_id) in MODIFIERS:
            type_id = TYPE.unpack_from(self._raw, self._offsets[type_id])[2]
        return type_id

    def _kind(self, type_id: int) -> int:
        if type_id == 0:
            return 0
        info: int = TYPE.unpack_from(self._raw, self._offsets[type_id])[1]
        return info >> 24 & 0x1F

    def _string(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()
