"""What of a span can be asked for, as words of an index; and a query in these words.

A word is a checksum: two things may have the same one, so what the index finds is a
candidate to be verified. What is not found is not there: each condition of
`query.conditions` that holds for a span has its word among the span's.

Whatever may be asked of one service's spans has a word of its own for that service.
Otherwise, asking for what is rare there and frequent elsewhere would verify all traces.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from zlib import crc32

from podspan.agent.store.logscale import MAX_VALUE, SUBS, bucket_of, doubling_of
from podspan.agent.store.query import Query, service_at
from podspan.agent.store.zipkin_v2 import ZipkinSpan

# The scope of what is asked without a service.
ANY_SERVICE = ""

# So many combinations of a service and a tag, or another name, are kept at hand; none
# of more characters, which only somebody sends who wants our memory.
CACHED = 4096
CACHED_CHARS = 1024


def words_of(spans: Sequence[ZipkinSpan]) -> set[int]:
    """Return the words of a trace's spans."""
    words: set[int] = set()
    add = words.add
    for span in spans:
        service = service_at(span, "local")
        name, remote = span.get("name", ""), service_at(span, "remote")
        names_of = _cached(_names, len(service) + len(name) + len(remote))
        words |= names_of(service, name, remote)
        if tags := span.get("tags"):
            tags_of = _cached(_tags, len(service) + sum(map(len, tags)))
            keys, beginnings = tags_of(service, tuple(tags))
            words |= keys
            for text, (any_value, own_value) in zip(
                tags.values(), beginnings, strict=True
            ):
                encoded = text.encode()
                add(crc32(encoded, any_value))
                if not (len(text) > 3 and text.isdecimal()):  # as _is_measure
                    add(crc32(encoded, own_value))
        for note in span.get("annotations", ()):
            words |= _keys_of(service, note["value"])
        if duration_us := span.get("duration"):
            durations_of = _cached(_durations, len(service))
            words |= durations_of(service, bucket_of(duration_us))
    return words


def alternatives(query: Query) -> list[list[int]]:
    """Return lists of words; a trace has a word of each list, or is no answer."""
    scope = query.service
    wanted = []
    if scope:
        wanted.append([_word("service", scope)])
    if query.remote_service:
        wanted.append([_word("remote", scope, query.remote_service)])
    if query.span_name:
        wanted.append([_word("name", scope, query.span_name)])
    for key, text in query.annotation_query.items():
        if text:
            value_scope = ANY_SERVICE if _is_measure(text) else scope
            wanted.append([_word("value", value_scope, key, text)])
        else:
            wanted.append([_word("key", scope, key)])
    if query.min_duration_us is not None:
        max_us = query.max_duration_us or MAX_VALUE
        wanted.append(_duration_words(scope, query.min_duration_us, max_us))
    return wanted


def text_of(words: Iterable[int]) -> str:
    """Return the words as the index reads them: eight hex digits each."""
    return array("I", words).tobytes().hex(" ", 4)


def _is_measure(text: str) -> bool:
    """Tell whether a tag's value is found under any service only.

    Sizes and times are many, and none is frequent: a word for each service would make
    the index larger and nothing faster.
    """
    return len(text) > 3 and text.isdecimal()


def _duration_words(scope: str, min_us: int, max_us: int) -> list[int]:
    """Cover the range with whole doublings, and with buckets at both ends."""
    first, last = bucket_of(min_us), bucket_of(max_us)
    words = []
    while first <= last:
        if first % SUBS == 0 and first + SUBS - 1 <= last:
            words.append(_word("doubling", scope, str(doubling_of(first))))
            first += SUBS
        else:
            words.append(_word("bucket", scope, str(first)))
            first += 1
    return words


def _cached(work: Any, chars: int) -> Any:
    """Return the work as it is kept at hand, or as it is done anew for long texts."""
    return work if chars <= CACHED_CHARS else work.__wrapped__


def _keys_of(service: str, key: str) -> frozenset[int]:
    words: frozenset[int] = _cached(_keys, len(service) + len(key))(service, key)
    return words


@lru_cache(CACHED)
def _names(service: str, name: str, remote: str) -> frozenset[int]:
    """Return the words of a span's names."""
    words = {_word("service", service)} if service else set()
    for scope in (ANY_SERVICE, service):
        if name:
            words.add(_word("name", scope, name))
        if remote:
            words.add(_word("remote", scope, remote))
    return frozenset(words)


# Most spans of a service have the same tags, with other values.
@lru_cache(CACHED)
def _tags(
    service: str, keys: tuple[str, ...]
) -> tuple[frozenset[int], list[tuple[int, int]]]:
    """Return the words of tags' keys, and for each the beginnings of its value's words.

    A beginning is the checksum of all but the value, for any service and for this one.
    """
    beginnings = [
        (_word("value", ANY_SERVICE, key, ""), _word("value", service, key, ""))
        for key in keys
    ]
    words = frozenset(word for key in keys for word in _keys_of(service, key))
    return words, beginnings


@lru_cache(CACHED)
def _keys(service: str, key: str) -> frozenset[int]:
    """Return the words of a tag's key, or of an annotation."""
    return frozenset(_word("key", scope, key) for scope in (ANY_SERVICE, service))


@lru_cache(CACHED)
def _durations(service: str, bucket: int) -> frozenset[int]:
    """Return the words of a duration."""
    return frozenset(
        _word(what, scope, str(number))
        for what, number in (("bucket", bucket), ("doubling", doubling_of(bucket)))
        for scope in (ANY_SERVICE, service)
    )


def _word(*parts: str) -> int:
    return crc32("\0".join(parts).encode())
