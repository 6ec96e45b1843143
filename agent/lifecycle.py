"""When a process of ours is to end, and how it says that it is ready."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from podspan.agent.errors import UsageError


class Stop:
    """Whether a signal has asked for the end.

    A pipe, no threading.Event: a handler that runs while its own thread waits for one
    would wait for the same lock.
    """

    def __init__(self) -> None:
        self.signal = ""  # its name; "": none came
        self._reader, self._writer = os.pipe()

    def __bool__(self) -> bool:
        """Tell whether to end."""
        return bool(self.signal)

    def wait(self) -> None:
        """Return once it is time to end."""
        select.select([self._reader], [], [])

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._reader)
        os.close(self._writer)

    def set(self, number: int) -> None:
        """Note the signal; the first counts."""
        if not self.signal:
            self.signal = signal.Signals(number).name
            os.write(self._writer, b"\0")


@contextmanager
def stop_signals(*, once: bool = False) -> Iterator[Stop]:
    """Yield what SIGTERM and SIGINT set, until the block ends.

    With `once` the second signal does what it did before: it ends at once.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.set(number)
        if once:
            restore()

    with closing(Stop()) as stop:
        try:
            for number in numbers:
                signal.signal(number, on_signal)
            yield stop
        finally:
            restore()


def ready_path(text: str | Path | None) -> Path | None:
    """Return the ready file, which does not exist yet and can be written."""
    if text is None:
        return None
    path = Path(text)
    try:
        # One that a killed process left behind would lie to whoever waits for it.
        path.unlink(missing_ok=True)
        draft = _draft(path)
        draft.touch()
        draft.unlink()
    except OSError as exc:
        raise UsageError(
            f"cannot write --ready-file {path}: {exc.strerror}",
            "its directory must exist, and take files",
        ) from exc
    return path


@contextmanager
def ready(path: Path | None) -> Iterator[None]:
    """Let the file say this process's id, whole or not at all, while we are ready."""
    if path is None:
        yield
        return
    draft = _draft(path)
    draft.write_text(f"{os.getpid()}\n")
    draft.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}")
