"""The demo's spans, fed to real backends by the real exporters.

The demo runs once, in a VM where this kernel has no kprobes. A backend that cannot be
had skips its tests and says why.
"""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import installed, servers
from peers.servers import Server
from podspan.agent.demo.command import read_spans
from podspan.agent.export.delivery import BackendExporter
from podspan.agent.export.destination import Destination, checked_url
from podspan.agent.export.encoder import Encoder
from podspan.agent.span import Span

CHECKOUT = Path(__file__).parents[2]
KPROBES = Path("/sys/bus/event_source/devices/kprobe")
CLOSE_S = 30.0


@pytest.fixture(scope="session")
def demo() -> Iterator[list[Span]]:
    """The spans of one page of Bookinfo, as the agent made them."""
    # In the checkout: the guest can write nowhere else.
    path = CHECKOUT / ".venv" / "cache" / f"demo-{uuid.uuid4().hex}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "podspan.agent", "demo", "--json", str(path)]
    if not KPROBES.exists():
        command = [str(CHECKOUT / "vagrant" / "vm"), "run", "--", *command]
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield read_spans(path)
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def zipkin_jar() -> Path:
    try:
        return installed.zipkin_jar()
    except installed.Missing as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def zipkin(
    zipkin_jar: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with servers.zipkin(tmp_path_factory.mktemp("zipkin")) as server:
        yield server


@pytest.fixture(scope="session")
def jaeger_program() -> Path:
    try:
        return installed.jaeger()
    except installed.Missing as exc:
        pytest.skip(str(exc))


@pytest.fixture
def jaeger(jaeger_program: Path, tmp_path: Path) -> Iterator[Server]:
    with servers.jaeger(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.store(tmp_path_factory.mktemp("store")) as server:
        yield server


def feed(spans: list[Span], encoder: Encoder, url: str) -> None:
    """Send the spans as the agent would; all are taken."""
    destination = Destination(checked_url(url, "--test", encoder.default_path))
    exporter = BackendExporter("test", encoder, destination, None)
    exporter.export(spans)
    exporter.close(CLOSE_S)
    assert exporter.counters()["sent"] == len(spans), exporter.counters()
