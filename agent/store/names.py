"""The names that a person is offered to choose from; bounded, and kept in memory.

A name is remembered with the hour in which it was seen last, and forgotten when the
oldest trace is younger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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

_NOTHING: Mapping[str, int] = {}


def hour_of(time_s: float) -> int:
    """Return the hour since 1970."""
    return int(time_s // 3600)


class Names:
    """All names that are known, each with the hour in which it was seen last."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._open_tags: dict[str, int] = {}
        self._values: dict[str, dict[str, int]] = {}  # by tag
        self._others: dict[tuple[Kind, str], dict[str, int]] = {}
        for kind, owner, name, hour in rows:
            self._all(kind, owner)[name] = hour

    def learn(self, spans: Iterable[ZipkinSpan], hour: int) -> Iterator[Row]:
        """Return what is new, or new in this hour."""
        for span in spans:
            if service := service_at(span, "local"):
                yield from self._see_service(service, span, hour)
            for key, text in span.get("tags", {}).items():
                # Nearly always one of these.
                if self._open_tags.get(key) == hour:
                    continue
                if self._values.get(key, _NOTHING).get(text) != hour:
                    yield from self._see_tag(key, text, hour)

    def forget(self, hour: int) -> None:
        """Forget what was not seen since that hour began."""
        for names in (self._open_tags, *self._values.values(), *self._others.values()):
            for name in [name for name, seen in names.items() if seen < hour]:
                del names[name]
        self._values = {key: values for key, values in self._values.items() if values}
        self._others = {key: names for key, names in self._others.items() if names}

    def _all(self, kind: Kind, owner: str) -> dict[str, int]:
        """Return the names of a kind that the owner has."""
        if kind == Kind.OPEN_TAG:
            return self._open_tags
        if kind == Kind.VALUE:
            return self._values.setdefault(owner, {})
        return self._others.setdefault((kind, owner), {})

    def _see(self, kind: Kind, owner: str, name: str, hour: int) -> Iterator[Row]:
        if not name:
            return
        known = self._all(kind, owner)
        seen = known.get(name)
        if seen == hour or (seen is None and not _has_room(known, name)):
            return
        known[name] = hour
        yield kind, owner, name, hour

    def _see_service(self, service: str, span: ZipkinSpan, hour: int) -> Iterator[Row]:
        yield from self._see(Kind.SERVICE, "", service, hour)
        if service in self._all(Kind.SERVICE, ""):  # else there are too many
            yield from self._see(Kind.SPAN, service, span.get("name", ""), hour)
            remote = service_at(span, "remote")
            yield from self._see(Kind.REMOTE, service, remote, hour)

    def _see_tag(self, key: str, text: str, hour: int) -> Iterator[Row]:
        values = self._values.get(key)
        if key in self._open_tags or (values and len(values) >= MAX_NAMES):
            yield from self._see(Kind.OPEN_TAG, "", key, hour)
            if (
                key in self._open_tags
            ):  # else there are too many: none comes in addition
                self._values.pop(key, None)
        elif values or _has_room(self._values, key, MAX_TAGS):
            yield from self._see(Kind.VALUE, key, text, hour)


def _has_room(known: Mapping[str, object], name: str, most: int = MAX_NAMES) -> bool:
    return len(known) < most and len(name) <= MAX_NAME_CHARS
