"""agent/ids.py and its twin in bpf/b3.h: what both ends of a call compute alike."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from podspan.agent.ids import derive_id, sample_hash
from unit.native.scanner import B3_SOURCE, Native

FUZZ = settings(derandomize=True, deadline=None, max_examples=500)

u64 = st.integers(0, 2**64 - 1)
some_ids = st.integers(1, 2**64 - 1)

FIRST, SECOND = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def underived(derived: int) -> int:
    """The id that becomes `derived`, if neither is the exception."""
    mixed = (derived ^ 1) * pow(SECOND, -1, 2**64) % 2**64
    mixed ^= mixed >> 32 & ~1
    return mixed * pow(FIRST, -1, 2**64) % 2**64


EXCEPTION = underived(0)


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return Native(tmp_path_factory.mktemp("ids")).lib


@FUZZ
@given(some_ids)
@example(EXCEPTION)
@example(1)
@example(2**64 - 1)
def test_a_derived_id_is_an_id_and_another_one(lib, span_id):
    derived = derive_id(span_id)
    assert 0 < derived < 2**64
    assert derived != span_id
    assert lib.b3_derive_id(span_id) == derived


@FUZZ
@given(some_ids.filter(lambda span_id: span_id != EXCEPTION))
def test_distinct_ids_stay_distinct(span_id):
    assert underived(derive_id(span_id)) == span_id


def test_the_exception_takes_the_place_of_0():
    assert derive_id(EXCEPTION) == derive_id(0) == 1


@FUZZ
@given(u64)
def test_the_hash_is_the_same_in_the_kernel(lib, trace_id):
    assert lib.b3_sample_hash(trace_id) == sample_hash(trace_id)


@FUZZ
@given(u64, u64)
def test_the_high_half_of_a_trace_id_decides_nothing(high, low):
    assert sample_hash(high << 64 | low) == sample_hash(low)


@pytest.mark.parametrize("shift", [0, 8, 32, 48])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_of_trace_ids_that_only_count_the_wanted_share_is_sampled(shift, share):
    count = 20_000
    sampled = sum(sample_hash(i << shift) < share * 2**32 for i in range(count))
    assert sampled == pytest.approx(share * count, rel=0.15)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return id ? id : 1;", "return id;"),
        ("id ^= 1;", ";"),
        ("id >> 32 & ~1ULL", "id >> 32"),
        ("hash ^= hash >> 33;", ";"),
        ("return hash >> 32;", "return hash;"),
    ],
)
def test_a_mutant_of_the_source_is_found(tmp_path, old, new):
    assert old in B3_SOURCE
    lib = Native(tmp_path, b3_source=B3_SOURCE.replace(old, new)).lib
    ids = [EXCEPTION, *(1 << bit | 3 << 32 for bit in range(64))]
    assert any(lib.b3_derive_id(i) != derive_id(i) for i in ids) or any(
        lib.b3_sample_hash(i) != sample_hash(i) for i in ids
    )
