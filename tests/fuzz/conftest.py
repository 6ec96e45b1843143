"""How many cases, of which seed; and what a run has to say though nothing failed."""

from collections.abc import Callable

import pytest
from fuzz.batch import Batch, build
from fuzz.generator import cases
from unit.native.scanner import Native

LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=1_000_000, help="streams to compare")
    parser.addoption("--seed", default="1", help="what they are generated from")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: {config.getoption('cases')} cases of seed {config.getoption('seed')}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("fuzz")
    for line in config.stash[LINES]:
        terminalreporter.line(line)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line at the end of the run."""
    return request.config.stash[LINES].append


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Native:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def sample() -> Batch:
    """The same cases whatever the options: what they show is the generator's merit."""
    return Batch(cases("sample", 20_000))
