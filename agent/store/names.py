"""The names that a person is offered to choose from; bounded, and kept in memory.

A name is remembered with the hour in which it was seen last, and forgotten when the
oldest trace is younger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum

from podspan.agent.store.query import service_at
from podspan.agent.store.zipkin_v2 import ZipkinSpan

# Of one owner; what is beyond is not offered. A tag with more values is not offered.
MAX_NAMES = 1000
MAX_TAGS = 200
# Nobody chooses what is longer.
MAX_NAME_CHARS = 256


class Kind(IntEnum):
    """What is named; the owner is a service, or, of VALUE, a tag's key."""

    SERVICE = 1  # no owner
    SPAN = 2
    REMOTE = 3
    VALUE = 4
    OPEN_TAG = 5  # no owner: a tag that has too many values


Row = tuple[Kind, str, str, int]  # kind, owner, name, hour


def hour_of(time_s: float) -> int:
    """Return the hour since 1970."""
    return int(time_s // 3600)


class Names:
    """All names that are known."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._known: dict[tuple[Kind, str], dict[str, int]] = {}
        self._tags: set[str] = set()
        for kind, owner, name, hour in rows:
            self._known.setdefault((Kind(kind), owner), {})[name] = hour
            if kind == Kind.VALUE:
                self._tags.add(owner)

    def learn(self, spans: Iterable[ZipkinSpan], hour: int) -> Iterator[Row]:
        """Return what is new, or new in this hour."""
        for span in spans:
            if service := service_at(span, "local"):
                yield from self._see(Kind.SERVICE, "", service, hour)
                if name := span.get("name"):
                    yield from self._see(Kind.SPAN, service, name, hour)
                if remote := service_at(span, "remote"):
                    yield from self._see(Kind.REMOTE, service, remote, hour)
            for key, text in span.get("tags", {}).items():
                yield from self._see_tag(key, text, hour)

    def forget(self, hour: int) -> None:
        """Forget what was not seen since that hour began."""
        for (kind, owner), known in self._known.items():
            kept = {name: seen for name, seen in known.items() if seen >= hour}
            if len(kept) < len(known):
                known.clear()
                known.update(kept)
                if kind == Kind.VALUE and not kept:
                    self._tags.discard(owner)

    def _see(self, kind: Kind, owner: str, name: str, hour: int) -> Iterator[Row]:
        known = self._known.setdefault((kind, owner), {})
        if known.get(name, -1) >= hour or len(name) > MAX_NAME_CHARS:
            return
        if name in known or len(known) < MAX_NAMES:
            known[name] = hour
            yield kind, owner, name, hour

    def _see_tag(self, key: str, text: str, hour: int) -> Iterator[Row]:
        opened = self._known.setdefault((Kind.OPEN_TAG, ""), {})
        if key in opened:
            yield from self._see(Kind.OPEN_TAG, "", key, hour)
            return
        if key not in self._tags:
            if len(self._tags) >= MAX_TAGS or len(key) > MAX_NAME_CHARS:
                return
            self._tags.add(key)
        values = self._known.setdefault((Kind.VALUE, key), {})
        if text not in values and len(values) >= MAX_NAMES:
            yield from self._see(Kind.OPEN_TAG, "", key, hour)
            if key in opened:
                values.clear()
                self._tags.discard(key)
            return
        yield from self._see(Kind.VALUE, key, text, hour)
