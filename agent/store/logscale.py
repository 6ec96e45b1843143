"""Buckets whose width grows with the value, for durations.

Each doubling is cut into SUBS buckets, so that the middle of a value's bucket is at
most 1/64 away from it; up to SUBS, each value has its own.
"""

from __future__ import annotations

SUBS = 32
_SUB_BITS = SUBS.bit_length() - 1

MAX_VALUE = 2**63 - 1


def bucket_of(value: int) -> int:
    """Return the bucket's number, which never falls as the value grows."""
    shift = max(value.bit_length() - 1 - _SUB_BITS, 0)
    return shift * SUBS + (value >> shift)


def middle_of(bucket: int) -> int:
    """Return the value in the middle of the bucket."""
    if bucket < 2 * SUBS:
        return bucket
    shift = bucket // SUBS - 1
    return ((bucket - shift * SUBS) << shift) + (1 << shift) // 2


def doubling_of(bucket: int) -> int:
    """Return which doubling the bucket is a part of."""
    return bucket // SUBS
