"""Ids that both ends of a call find without talking; bpf/b3.h computes the same."""

from __future__ import annotations

_64_BITS = (1 << 64) - 1


def derive_id(span_id: int) -> int:
    """Return the span id of the server of the client `span_id` (64 bit, not 0).

    Never the same and never 0; distinct ids stay distinct. Each step can be undone,
    and the lowest bit changes, which no step before lets depend on the others. The one
    id that would become 0 takes what 0 would become.
    """
    mixed = span_id * 0x9E3779B97F4A7C15 & _64_BITS
    mixed ^= mixed >> 32 & ~1
    mixed = mixed * 0xD6E8FEB86659FD93 & _64_BITS
    return mixed ^ 1 or 1


def sample_hash(trace_id: int) -> int:
    """Return 32 bits, the same wherever the trace passes, to sample it or not.

    The low half of the trace id decides, for some hops know only that. MurmurHash3's
    finalizer.
    """
    mixed = trace_id & _64_BITS
    mixed ^= mixed >> 33
    mixed = mixed * 0xFF51AFD7ED558CCD & _64_BITS
    mixed ^= mixed >> 33
    mixed = mixed * 0xC4CEB9FE1A85EC53 & _64_BITS
    return mixed >> 32
