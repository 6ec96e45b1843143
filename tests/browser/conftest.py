"""A real store, and Chromium to look at it.

Screenshots go to .venv/cache/screenshots/ for a person to look at. A test fails on any
error that the page reports: of a script, of the console, of the CSP.
"""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from browser.traces import Span, an_hour
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Page,
    expect,
    sync_playwright,
)

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOTS = Path(__file__).parents[2] / ".venv/cache/screenshots"
WIDE = (1280, 800)
NARROW = (400, 800)
# `podspan store`, whether or not the command is wired.
STORE = "import sys; from podspan.agent.store.command import main; main(sys.argv[1:])"
START_S = 20
WAIT_MS = 15_000  # on a machine that is busy with other things

expect.set_options(timeout=WAIT_MS)


@dataclass
class Store:
    """A `podspan store` process on a port of its own; it can be stopped and started."""

    data: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        argv = ["--listen", f"127.0.0.1:{self.port}", "--data", str(self.data)]
        self.process = subprocess.Popen([sys.executable, "-c", STORE, *argv])
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, "the store ended at once"
            assert time.monotonic() < deadline, f"the store is not up after {START_S} s"
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)
            self.process = None

    def post(self, spans: list[Span]) -> None:
        """Send spans; they are stored when this returns."""
        request = Request(
            f"{self.url}/api/v2/spans",
            json.dumps(spans).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=20) as answer:
            assert answer.status == 202

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=5):
                return True
        except (URLError, ConnectionError):
            return False


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Iterator[Store]:
    """A store with an hour of Bookinfo and a hostile trace; tests may add to it."""
    store = Store(tmp_path_factory.mktemp("store") / "traces.db", free_port())
    store.start()
    try:
        store.post(an_hour(now_us()))
        yield store
    finally:
        store.stop()


@pytest.fixture(scope="session")
def live_store(tmp_path_factory) -> Iterator[Store]:
    """A store for tests that send spans and stop it; it has those of earlier tests."""
    store = Store(tmp_path_factory.mktemp("live_store") / "traces.db", free_port())
    store.start()
    try:
        yield store
    finally:
        store.stop()


@pytest.fixture
def empty_store(tmp_path) -> Iterator[Store]:
    """A store without spans, for this test alone; ask for it before the page."""
    store = Store(tmp_path / "traces.db", free_port())
    store.start()
    try:
        yield store
    finally:
        store.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM} (Debian package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@dataclass
class Complaints:
    """What the page reported; a test names what it provokes, as regular expressions."""

    expected: list[str] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.reported.append(f"{message.type}: {message.text} {message.location}")

    def on_error(self, error: Error) -> None:
        self.reported.append(f"uncaught: {error}")

    def unexpected(self) -> list[str]:
        return [
            text
            for text in self.reported
            if not any(re.search(pattern, text) for pattern in self.expected)
        ]


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def page(browser: Browser, complaints: Complaints) -> Iterator[Page]:
    """A page of a browser without history, in light, in UTC."""
    context = browser.new_context(
        viewport={"width": WIDE[0], "height": WIDE[1]},
        locale="en-GB",
        timezone_id="UTC",
        color_scheme="light",
        reduced_motion="reduce",
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.on("console", complaints.on_console)
    page.on("pageerror", complaints.on_error)
    yield page
    context.close()
    assert complaints.unexpected() == []


@pytest.fixture
def shoot(page: Page) -> Callable[[str], None]:
    """Take pictures of the page as it is: NAME-light, -dark and -narrow."""

    def take(name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}.png")
        size(page, NARROW)
        page.screenshot(path=SCREENSHOTS / f"{name}-narrow.png")
        size(page, WIDE)

    return take


def size(page: Page, size: tuple[int, int]) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})


def now_us() -> int:
    return time.time_ns() // 1000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
