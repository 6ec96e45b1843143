"""BTF: offsets as C sees them, from a blob made by hand and from this kernel."""

import re
import shutil
import struct
import subprocess

import pytest
from podspan.agent.errors import FeatureMissing
from podspan.agent.kernel import btf
from podspan.agent.kernel.btf import Btf

BITS = 1 << 31  # kind_flag


class Blob:
    """Writes BTF, type by type. Documentation/bpf/btf.rst (Linux 6.12)."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(
        self, kind: int, name: str, size: int, tail: bytes = b"", vlen=0, flag=0
    ) -> int:
        info = kind << 24 | vlen | flag
        self.types += struct.pack("<III", self.name(name), info, size) + tail
        self.count += 1
        return self.count

    def compound(self, kind: int, name: str, size: int, members, flag: int = 0) -> int:
        """`members`: (name, type, offset in bits, size of a bit field)."""
        tail = b"".join(
            struct.pack("<III", self.name(member), of, bits | (width << 24))
            for member, of, bits, width in members
        )
        return self.add(kind, name, size, tail, len(members), flag)

    def enum(self, name: str, values: dict[str, int]) -> int:
        tail = b"".join(
            struct.pack("<Ii", self.name(key), value) for key, value in values.items()
        )
        return self.add(btf.ENUM32, name, 4, tail, len(values))

    def bytes(self, magic: int = btf.MAGIC) -> bytes:
        # Something between the header and the types, as the format allows.
        header = struct.pack(
            "<HBBIIIII",
            *(magic, 1, 0, 24),
            *(4, len(self.types), 4 + len(self.types), len(self.strings)),
        )
        return header + b"gap!" + self.types + self.strings


def made() -> Btf:
    """A kernel whose types are:

    typedef unsigned int u32;
    enum shape { ROUND, SQUARE = 7, NONE = -1 };
    struct inner { u32 first; const volatile u32 second; };
    struct sock_common { u32 num; u32 state; };
    struct sock {
            struct sock_common __sk_common;                 // 0
            union { u32 a; struct { u32 b; u32 c; }; };     // 8
            u32 low : 4, high : 4;                          // 16, bit fields
            u32 whole;                                      // 20
            const struct inner inside;                      // 24
            struct inner *pointer;                          // 32
            u32 numbers[3];                                 // 40
    };
    struct later; struct later { u32 x; };                  // and twice `twin`
    """
    blob = Blob()
    u32 = blob.add(btf.INT, "unsigned int", 4, struct.pack("<I", 32))
    typedef = blob.add(btf.TYPEDEF, "u32", u32)
    volatile = blob.add(btf.VOLATILE, "", typedef)
    const = blob.add(btf.CONST, "", volatile)
    blob.enum("shape", {"ROUND": 0, "SQUARE": 7, "NONE": -1})
    inner = blob.compound(
        btf.STRUCT, "inner", 8, [("first", typedef, 0, 0), ("second", const, 32, 0)]
    )
    common = blob.compound(
        btf.STRUCT, "sock_common", 8, [("num", u32, 0, 0), ("state", u32, 32, 0)]
    )
    pair = blob.compound(btf.STRUCT, "", 8, [("b", u32, 0, 0), ("c", u32, 32, 0)])
    union = blob.compound(btf.UNION, "", 8, [("a", u32, 0, 0), ("", pair, 0, 0)])
    const_inner = blob.add(btf.CONST, "", inner)
    pointer = blob.add(btf.PTR, "", inner)
    array = blob.add(btf.ARRAY, "", 0, struct.pack("<III", u32, u32, 3))
    # One of each kind that only has to be stepped over.
    proto = blob.add(btf.PROTO, "", u32, struct.pack("<II", 0, u32), vlen=1)
    blob.add(btf.FUNC, "sock", proto, vlen=1)
    variable = blob.add(btf.VAR, "sock", u32, struct.pack("<I", 0))
    blob.add(btf.DATASEC, ".data", 4, struct.pack("<III", variable, 0, 4), vlen=1)
    blob.add(btf.FLOAT, "double", 8)
    blob.add(btf.DECL_TAG, "tag", inner, struct.pack("<i", -1))
    blob.add(btf.ENUM64, "big", 8, struct.pack("<III", 0, 1, 1), vlen=1)
    blob.add(btf.RESTRICT, "", pointer)
    tagged = blob.add(btf.TYPE_TAG, "rcu", const_inner)
    blob.add(btf.FWD, "later", 0)
    blob.compound(
        btf.STRUCT,
        "sock",
        56,
        [
            ("__sk_common", common, 0, 0),
            ("", union, 64, 0),
            ("low", u32, 128, 4),
            ("high", u32, 132, 4),
            ("whole", u32, 160, 0),
            ("inside", tagged, 192, 0),
            ("pointer", pointer, 256, 0),
            ("numbers", array, 320, 0),
        ],
        flag=BITS,
    )
    blob.compound(btf.STRUCT, "later", 4, [("x", u32, 0, 0)])
    blob.compound(btf.STRUCT, "twin", 4, [("x", u32, 0, 0)])
    blob.compound(btf.STRUCT, "twin", 8, [("x", u32, 32, 0), ("y", u32, 0, 0)])
    blob.compound(btf.UNION, "alone", 4, [("x", u32, 0, 0)])
    return Btf(blob.bytes())


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("__sk_common", 0),
        ("__sk_common.num", 0),
        ("__sk_common.state", 4),
        ("a", 8),
        ("b", 8),
        ("c", 12),
        ("whole", 20),
        ("inside", 24),
        ("inside.first", 24),
        ("inside.second", 28),
        ("pointer", 32),
        ("numbers", 40),
    ],
)
def test_a_field_lies_where_c_puts_it(path, offset):
    assert made().offset("sock", path) == offset


@pytest.mark.parametrize(
    "path",
    [
        "low",  # bit fields have no byte offset
        "high",
        "absent",
        "num",  # a member of a named member is not reached by its name alone
        "pointer.first",  # nor through a pointer
        "numbers.first",
        "whole.first",
        "__sk_common.absent",
    ],
)
def test_what_is_not_addressable_has_no_offset(path):
    assert made().offset("sock", path) is None


def test_only_structs_are_looked_in():
    types = made()
    for name in ("absent", "alone", "u32", "shape", "ock", "sock_", "", "unsigned"):
        assert types.offset(name, "x") is None, name


def test_a_declaration_does_not_hide_the_struct():
    assert made().offset("later", "x") == 0


def test_of_two_structs_of_one_name_the_first_that_has_the_field_counts():
    assert made().offset("twin", "x") == 0
    assert made().offset("twin", "y") == 0


def test_enumerators():
    types = made()
    assert types.enumerator("shape", "ROUND") == 0
    assert types.enumerator("shape", "SQUARE") == 7
    assert types.enumerator("shape", "NONE") == -1
    assert types.enumerator("shape", "absent") is None
    assert types.enumerator("absent", "ROUND") is None
    assert types.enumerator("sock", "ROUND") is None


def test_what_is_not_btf_is_refused():
    blob = Blob()
    with pytest.raises(FeatureMissing, match="not in BTF format"):
        Btf(blob.bytes(magic=0x9FEB))
    blob.add(31, "future", 0)
    with pytest.raises(FeatureMissing, match="unknown kind 31"):
        Btf(blob.bytes())


def test_a_file_that_ends_early_is_refused():
    blob = Blob()
    blob.enum("shape", {"ROUND": 0})
    whole = blob.bytes()
    for size in range(len(whole)):
        with pytest.raises(FeatureMissing, match="BTF"):
            Btf(whole[:size])


def test_a_kernel_without_btf_is_named_with_a_hint(tmp_path):
    with pytest.raises(FeatureMissing, match="no kernel type information") as missing:
        Btf.of_running_kernel(tmp_path / "vmlinux")
    assert "CONFIG_DEBUG_INFO_BTF" in str(missing.value.hint)


# --- this kernel's ---

FIELDS = [
    ("sock", "sk_shutdown"),
    ("sock", "sk_receive_queue"),
    ("sock", "sk_wmem_queued"),
    ("sock", "sk_sndbuf"),
    ("sock", "__sk_common"),
    ("sock_common", "skc_family"),
    ("sock_common", "skc_num"),
    ("sock_common", "skc_dport"),
    ("sock_common", "skc_net"),
    ("tcp_sock", "write_seq"),
    ("tcp_sock", "copied_seq"),
    ("sk_buff_head", "qlen"),
    ("msghdr", "msg_iter"),
    ("iov_iter", "iter_type"),
    ("iov_iter", "nr_segs"),
    ("net", "ns"),
    ("ns_common", "inum"),
]


@pytest.mark.skipif(not btf.VMLINUX.exists(), reason=f"no {btf.VMLINUX}")
@pytest.mark.skipif(shutil.which("bpftool") is None, reason="no bpftool")
def test_offsets_of_this_kernel_are_those_that_bpftool_says():
    dump = subprocess.run(
        ["bpftool", "btf", "dump", "file", str(btf.VMLINUX)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    compounds: dict[str, dict[str, tuple[str, int]]] = {}  # by id, and structs by name
    for block in re.split(r"^(?=\[\d+\])", dump, flags=re.MULTILINE):
        head = re.match(r"\[(\d+)\] (STRUCT|UNION) '(\S+)'", block)
        if head is None:
            continue
        members = re.findall(r"\t'(\S+)' type_id=(\d+) bits_offset=(\d+)\n", block)
        found: dict[str, tuple[str, int]] = {}
        for i, (name, of, bits) in enumerate(members):
            found[f"(anon) {i}" if name == "(anon)" else name] = (of, int(bits) // 8)
        compounds[head[1]] = found
        if head[2] == "STRUCT":
            compounds.setdefault(head[3], found)

    def offset(members: dict[str, tuple[str, int]], name: str) -> int | None:
        if name in members:
            return members[name][1]
        for member, (of, at) in members.items():
            inside = offset(compounds.get(of, {}), name) if "anon" in member else None
            if inside is not None:
                return at + inside
        return None

    types = Btf.of_running_kernel()
    said = {field: offset(compounds[field[0]], field[1]) for field in FIELDS}
    assert {field: types.offset(*field) for field in FIELDS} == said
    assert sum(at is not None for at in said.values()) >= 15
