"""A relay without sockets: carries out what a layer says, and checks the contract."""

from collections import Counter
from typing import NamedTuple

from podspan.agent.redirect.layer import (
    Abort,
    Action,
    Count,
    End,
    Layer,
    Report,
    Send,
    Side,
    Skip,
)


class Skipped(NamedTuple):
    """`size` bytes of `side`, from its byte `at` on, were not to be looked at."""

    side: Side
    at: int
    size: int | None


class Relay:
    """One connection; what has arrived at each side, and all that was said."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.arrived = {Side.DOWN: b"", Side.UP: b""}
        self.came = {Side.DOWN: 0, Side.UP: 0}  # bytes from that side
        self.ended: set[Side] = set()  # sides that have received FIN
        self.aborted: list[str] = []
        self.counts: Counter[str] = Counter()
        self.skipped: list[Skipped] = []
        self.calls = 0
        self._skip: dict[Side, int | None] = {Side.DOWN: 0, Side.UP: 0}

    @property
    def opaque(self) -> bool:
        """Whether the layer wants to see nothing more."""
        return self._skip == {Side.DOWN: None, Side.UP: None}

    def feed(self, side: Side, data: bytes) -> None:
        """Bytes come from that side."""
        skip = self._skip[side]
        passed = data if skip is None else data[:skip]
        if skip is not None:
            self._skip[side] = skip - len(passed)
        self.came[side] += len(passed)
        self.arrived[side.other] += passed
        rest = data[len(passed) :]
        if rest:
            self.calls += 1
            self.came[side] += len(rest)
            self._do(self.layer.received(side, rest))

    def end(self, side: Side) -> None:
        """FIN comes from that side."""
        actions = self.layer.ended(side)
        if self._skip[side] is None:
            assert actions == []
            self._do([End(side.other)])
        else:
            self._do(actions)

    def lose(self, side: Side) -> None:
        """RST comes from that side."""
        self._do(self.layer.lost(side))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(side, data):
                    assert data
                    assert side not in self.ended
                    self.arrived[side] += data
                case End(side):
                    assert side not in self.ended
                    self.ended.add(side)
                case Skip(side, count):
                    assert count is None or (count > 0 and self._skip[side] == 0)
                    self._skip[side] = count
                    self.skipped.append(Skipped(side, self.came[side], count))
                case Abort(reason):
                    self.aborted.append(reason)
                case Count(reason):
                    self.counts[reason] += 1
                case Report():
                    raise AssertionError("not of HTTP/1")
