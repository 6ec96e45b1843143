"""bpf/b3.h against Python: ids to text and back."""

import ctypes
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.native.scanner import Native

FUZZ = settings(derandomize=True, deadline=None, max_examples=300)

u64 = st.integers(0, 2**64 - 1)
LOWER_HEX = b"0123456789abcdef"


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return Native(tmp_path_factory.mktemp("b3")).lib


def hex_write(lib, value: int) -> bytes:
    buffer = ctypes.create_string_buffer(b"#" * 17, 17)
    lib.b3_hex_write(buffer, value)
    assert buffer.raw[16:] == b"#"
    return buffer.raw[:16]


def hex_read(lib, digits: bytes, bad: int = 0) -> tuple[int, int]:
    flag = ctypes.c_uint(bad)
    value = lib.b3_hex_read(digits, ctypes.byref(flag))
    return value, flag.value


def uuid_write(lib, high: int, low: int, reason: bytes) -> str:
    buffer = ctypes.create_string_buffer(b"#" * 37, 37)
    lib.b3_uuid_write(buffer, high, low, reason[0])
    assert buffer.raw[36:] == b"#"
    return buffer.raw[:36].decode()


@FUZZ
@given(u64)
def test_a_number_is_written_as_16_lower_case_digits_and_read_back(lib, value):
    digits = hex_write(lib, value)
    assert digits == b"%016x" % value
    assert hex_read(lib, digits) == (value, 0)


@FUZZ
@given(st.binary(min_size=16, max_size=16))
def test_any_bytes_are_bad_unless_all_are_lower_case_digits(lib, digits):
    value, bad = hex_read(lib, digits)
    assert bad == (not set(digits) <= set(LOWER_HEX))
    if not bad:
        assert value == int(digits, 16)


@pytest.mark.parametrize("at", range(16))
def test_every_byte_at_every_position(lib, at):
    for byte in range(256):
        digits = b"a" * at + bytes([byte]) + b"9" * (15 - at)
        value, bad = hex_read(lib, digits)
        assert bad == (byte not in LOWER_HEX), (at, byte)
        if not bad:
            assert value == int(digits, 16)


def test_bad_is_never_taken_back(lib):
    assert hex_read(lib, b"0" * 16, bad=1) == (0, 1)


@FUZZ
@given(u64, u64)
def test_a_uuid_is_random_but_for_its_version_and_variant(lib, high, low):
    text = uuid_write(lib, high, low, b"4")
    written = uuid.UUID(text)
    assert str(written) == text
    assert (written.version, written.variant) == (4, uuid.RFC_4122)
    assert written == uuid.UUID(int=high << 64 | low, version=4)


@FUZZ
@given(u64, u64, st.sampled_from([b"9", b"a", b"b"]))
def test_a_trace_reason_stands_in_place_of_the_version(lib, high, low, reason):
    text = uuid_write(lib, high, low, reason)
    plain = uuid_write(lib, high, low, b"4")
    assert text == plain[:14] + reason.decode() + plain[15:]
