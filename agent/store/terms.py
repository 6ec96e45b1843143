"""What of a span can be asked for, as words of an index; and a query in these words.

A word is a checksum: two things may have the same one, so what the index finds is a
candidate to be verified. What is not found is not there: each condition of
`query.conditions` that holds for a span has its word among the span's.

Whatever may be asked of one service's spans has a word of its own for that service.
Otherwise, asking for what is rare there and frequent elsewhere would verify all traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from zlib import crc32

from podspan.agent.store.logscale import MAX_VALUE, SUBS, bucket_of, doubling_of
from podspan.agent.store.query import Query, service_at
from podspan.agent.store.zipkin_v2 import ZipkinSpan

ANY_SERVICE = ""


def words_of(spans: Sequence[ZipkinSpan]) -> set[str]:
    """Return the words of a trace's spans."""
    words: set[str] = set()
    for span in spans:
        words.update(_span_words(span))
    return words


def alternatives(query: Query) -> list[list[str]]:
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
            wanted.append([_word("value", _value_scope(scope, text), key, text)])
        else:
            wanted.append([_word("key", scope, key)])
    if query.min_duration_us is not None:
        max_us = query.max_duration_us or MAX_VALUE
        wanted.append(_duration_words(scope, query.min_duration_us, max_us))
    return wanted


def _span_words(span: ZipkinSpan) -> Iterator[str]:
    service = service_at(span, "local")
    if service:
        yield _word("service", service)
    for scope in (ANY_SERVICE, service) if service else (ANY_SERVICE,):
        if remote := service_at(span, "remote"):
            yield _word("remote", scope, remote)
        if name := span.get("name"):
            yield _word("name", scope, name)
        for key, text in span.get("tags", {}).items():
            yield _word("key", scope, key)
            yield _word("value", _value_scope(scope, text), key, text)
        for note in span.get("annotations", ()):
            yield _word("key", scope, note["value"])
        if duration_us := span.get("duration"):
            bucket = bucket_of(duration_us)
            yield _word("lasting", scope, str(bucket))
            yield _word("about", scope, str(doubling_of(bucket)))


def _value_scope(scope: str, text: str) -> str:
    """Return under which service a tag's value is found.

    Sizes and times are many, and none is frequent: a word for each service would make
    the index larger and nothing faster.
    """
    return ANY_SERVICE if len(text) > 3 and text.isdecimal() else scope


def _duration_words(scope: str, min_us: int, max_us: int) -> list[str]:
    """Cover the range with whole doublings, and with buckets at both ends."""
    first, last = bucket_of(min_us), bucket_of(max_us)
    words = []
    while first <= last:
        if first % SUBS == 0 and first + SUBS - 1 <= last:
            words.append(_word("about", scope, str(doubling_of(first))))
            first += SUBS
        else:
            words.append(_word("lasting", scope, str(first)))
            first += 1
    return words


def _word(*parts: str) -> str:
    return f"{crc32(chr(0).join(parts).encode()):08x}"
