"""The scanner's table, and how C's enums and structs are read for it."""

import struct

import pytest
from podspan.agent.kernel import grammar
from podspan.agent.kernel.grammar import enumerators, table, text_fields
from unit.native.scanner import SOURCE

C = """
#define METHOD_MAX 16
enum empty {};
enum colour {
    RED,    /* A, B = 7, "};" in a comment */
    GREY,    /* over
           two lines */
    GREEN = 4,
    BLUE,
    LAST = 12
};
enum colours { ONE, TWO, };
struct scan_text {
    u8 method[METHOD_MAX];
    u8 host[64];
    u8 flags[8];
};
"""


def test_values_are_implied_or_given():
    assert enumerators(C, "colour") == {
        "RED": 0,
        "GREY": 1,
        "GREEN": 4,
        "BLUE": 5,
        "LAST": 12,
    }


def test_an_enum_is_found_by_its_whole_name():
    assert enumerators(C, "colours") == {"ONE": 0, "TWO": 1}
    with pytest.raises(LookupError, match="colou"):
        enumerators(C, "colou")


def test_an_enum_may_be_empty():
    assert enumerators(C, "empty") == {}


def test_fields_lie_one_after_the_other():
    assert text_fields(C) == {"method": (0, 16), "host": (16, 64), "flags": (80, 8)}


def test_no_struct_is_an_error():
    with pytest.raises(LookupError, match="scan_text"):
        text_fields("struct scan_table {};")


def test_the_fields_of_the_scanner_fill_its_text():
    at, size = text_fields(SOURCE)["unused"]
    assert at + size == 1024


def cell(data: bytes, state: str, byte: int) -> tuple[int, int]:
    classes = data[64 * 32 * 2 :]
    number = enumerators(SOURCE, "scan_state")[state] * 32 + classes[byte]
    return data[2 * number], data[2 * number + 1]


def test_the_table_has_the_size_and_order_of_its_struct():
    data = table(SOURCE)
    assert len(data) == 64 * 32 * 2 + 256 + 256
    states = enumerators(SOURCE, "scan_state")
    actions = enumerators(SOURCE, "scan_action")
    assert cell(data, "SCAN_NAME", ord(":")) == (
        states["SCAN_OWS"],
        actions["ACT_NAME_ENDS"],
    )
    assert max(data[64 * 32 * 2 : 64 * 32 * 2 + 256]) < 32
    assert data[-256:] == bytes(range(256)).lower()


def test_what_no_rule_names_leads_to_opaque():
    data = table(SOURCE)
    states = enumerators(SOURCE, "scan_state")
    opaque = (states["SCAN_OPAQUE"], 0)
    assert cell(data, "SCAN_NAME", ord(" ")) == opaque
    assert all(cell(data, "SCAN_START_LF", b) == opaque for b in set(range(256)) - {10})
    for state in ("SCAN_HEAD_DONE", "SCAN_BODY", "SCAN_DONE", "SCAN_OPAQUE"):
        assert {cell(data, state, byte) for byte in range(256)} == {opaque}


def test_every_state_before_a_heads_end_is_reached_by_a_rule():
    data = table(SOURCE)
    states = enumerators(SOURCE, "scan_state")
    entries = {entry[5] for _, entry in grammar.names(SOURCE)}
    reached = {data[2 * i] for i in range(64 * 32)} | entries
    begins = {states["SCAN_START"], states["SCAN_RESPONSE"]}
    by_code = {
        states[f"SCAN_{name}"] for name in ("BODY", "UNTIL_EOF", "CHUNK_CR", "STATES")
    }
    assert set(states.values()) - reached - by_code - begins == set()


def test_every_action_has_a_rule():
    data = table(SOURCE)
    used = {data[2 * i + 1] for i in range(64 * 32)}
    assert used == set(enumerators(SOURCE, "scan_action").values())


def test_too_many_classes_are_refused(monkeypatch):
    def rules():
        states = list(enumerators(SOURCE, "scan_state"))
        for i in range(grammar.CLASSES):
            yield "START", bytes([i]), states[i].removeprefix("SCAN_"), "NOTHING"

    monkeypatch.setattr(grammar, "_rules", rules)
    with pytest.raises(ValueError, match="33 classes"):
        table(SOURCE)


def test_names_are_lower_case_and_end_before_their_24_bytes():
    headers = enumerators(SOURCE, "scan_header")
    fields = text_fields(SOURCE)
    found = {}
    for name, entry in grammar.names(SOURCE):
        assert len(name) == 24
        assert name.endswith(b"\0")
        assert name == name.lower()
        found[name.rstrip(b"\0")] = struct.unpack("<HHBBBB", entry)
    assert len(found) == len(headers) - 1
    assert found[b"x-b3-spanid"][:3] == (*fields["span_id"], headers["HEADER_SPAN_ID"])
    assert found[b"content-length"][:3] == (0, 0, headers["HEADER_LENGTH"])
    assert {name for name, entry in found.items() if entry[4]} == {
        b"content-length",
        b"transfer-encoding",
    }
