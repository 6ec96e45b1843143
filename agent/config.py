"""What the user can set: one table of flag, variable, default and help.

A flag beats its variable, a variable the default. The result is one frozen Config;
whatever is wrong in it is a UsageError before anything is loaded.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from podspan.agent.engine import ENGINES
from podspan.agent.errors import UsageError
from podspan.agent.tags import CONVENTIONS
from podspan.agent.url import TARGET_CUT

LOG_LEVELS = ("debug", "info", "warning", "error")
SPAN_IDS = ("shared", "child")
UNSAMPLED = ("0", "defer")
PROPAGATED = ("b3multi", "b3", "tracecontext")
INBOUND_SOURCES = ("auto", "loopback")

MAX_CONNECTIONS = 2**20
MAX_WORKERS = 64
DAY_S = 24 * 60 * 60

# A busy node delays a heartbeat by more than one interval; that ends no redirection.
MISSED_BEATS = 3

EXAMPLES = """\
examples:
  podspan agent --tree
      print the traces of this machine's HTTP calls
  podspan agent --zipkin http://zipkin.istio-system:9411
      send them to Zipkin, Jaeger or an OpenTelemetry Collector
  podspan agent --json - --netns 'cni-*' | jq .name
      the spans of pods only, one JSON object per line
  PODSPAN_ZIPKIN=http://localhost:9411 podspan agent
      every option is a variable, too
"""


@dataclass(frozen=True, slots=True)
class StatusAddress:
    """Where the status port is."""

    host: str  # of IPv4 or IPv6, or a name
    port: int
    named: bool = True  # by the user

    def __str__(self) -> str:
        """Return it as it is written."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


# Istio has 15000 to 15021, 15053 and 15090, and had 15029 to 15032.
STATUS_ADDRESS = StatusAddress("127.0.0.1", 15025, named=False)
NONE = "none"


@dataclass(frozen=True, slots=True)
class Config:
    """How to run `podspan agent`. Without any output it prints trees."""

    zipkin: str | None
    json: str | None
    tree: bool
    netns: tuple[str, ...]
    span_ids: str  # one of SPAN_IDS
    sampling: float  # percent, to the hundredth
    unsampled: str  # one of UNSAMPLED
    propagate: frozenset[str]  # of PROPAGATED, never empty
    no_tcp: bool
    tcp_interval: int  # seconds; 0: never
    tags: str  # one of CONVENTIONS
    max_path: int
    no_query: bool
    max_connections: int
    engine: str  # one of ENGINES
    redirect_workers: int
    inbound_source: str  # one of INBOUND_SOURCES
    heartbeat_interval: float  # seconds
    guard_grace: float  # seconds; at least MISSED_BEATS intervals
    status_address: StatusAddress | None
    log_level: str
    ready_file: str | None

    def facts(self) -> str:
        """Return the settings as key=value, for the log."""
        names = self.__dataclass_fields__
        return " ".join(f"{name}={_shown(getattr(self, name))!r}" for name in names)


def _text(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _switch(text: str) -> bool:
    switches = {"1": True, "true": True, "yes": True, "on": True}
    switches |= {"": False, "0": False, "false": False, "no": False, "off": False}
    try:
        return switches[text.lower()]
    except KeyError:
        raise ValueError("use 1 or 0") from None


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        # isdigit: int() also takes signs, spaces, underscores.
        plain = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not plain or not least <= int(text) <= most:
            raise ValueError(f"use a number from {least} to {most}")
        return int(text)

    return read


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        plain = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", text)
        if not plain or not least <= float(text) <= most:
            raise ValueError(
                f"use {least:g} to {most:g} seconds, with three decimals at most"
            )
        return float(text)

    return read


def status_address(text: str) -> StatusAddress | None:
    """Return the address of ADDR:PORT; None where it is `none` or empty.

    Raises ValueError.
    """
    if text in ("", NONE):
        return None
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    # As in a URL: else the end of an IPv6 address would be a port.
    if not colon or (":" in bare) != host.startswith("[") or bare == "[":
        raise ValueError("use ADDR:PORT, [IPV6]:PORT, or none")
    return StatusAddress(bare or "0.0.0.0", _number(1, 65535)(port))


def _percent(text: str) -> float:
    # Istio counts in hundredths of a percent, as Envoy does.
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,2})?", text) or float(text) > 100:
        raise ValueError("use 0 to 100, with two decimals at most")
    return float(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"use one of {', '.join(words)}")
        return text.lower()

    return read


def _some_of(*words: str) -> Callable[[str], frozenset[str]]:
    def read(text: str) -> frozenset[str]:
        parts = frozenset(part.lower() for part in _patterns(text))
        if not parts or not parts <= set(words):
            raise ValueError(f"use one or more of {', '.join(words)}")
        return parts

    return read


def _shown(value: Any) -> Any:
    """Return a value as people write it."""
    if isinstance(value, StatusAddress):
        return str(value)
    return ",".join(sorted(value)) if isinstance(value, frozenset) else value


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table; `read` makes a value of a text or raises ValueError."""

    flag: str
    metavar: str  # "": a switch
    default: Any
    read: Callable[[str], Any]
    help: str
    repeats: bool = False

    @property
    def field(self) -> str:
        """The option's name in Config."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """The option's name in the environment."""
        return f"PODSPAN_{self.field.upper()}"


OPTIONS = (
    Option("--zipkin", "URL", None, _text, "POST spans to this collector (Zipkin v2)"),
    Option(
        "--json",
        "FILE",
        None,
        _text,
        "append spans to this file, one JSON object per line; - is standard output",
    ),
    Option(
        "--tree",
        "",
        False,
        _switch,
        "print traces as trees; the default without --zipkin and --json",
    ),
    Option(
        "--netns",
        "GLOB",
        (),
        _patterns,
        "trace only network namespaces so named; repeatable, commas in the variable",
        repeats=True,
    ),
    Option(
        "--span-ids",
        "|".join(SPAN_IDS),
        "shared",
        _one_of(*SPAN_IDS),
        "a server's span has its caller's id, as Zipkin's, or is its child, as "
        "OpenTelemetry's",
    ),
    Option(
        "--sampling",
        "PERCENT",
        100.0,
        _percent,
        "record so much of what begins here, or comes without a decision",
    ),
    Option(
        "--unsampled",
        "|".join(UNSAMPLED),
        "0",
        _one_of(*UNSAMPLED),
        "tell the next hop that a request is not sampled, or let it decide",
    ),
    Option(
        "--propagate",
        "LIST",
        frozenset({"b3multi"}),
        _some_of(*PROPAGATED),
        f"headers to write, with commas between: {', '.join(PROPAGATED)}",
    ),
    Option("--no-tcp", "", False, _switch, "no spans of what is not HTTP"),
    Option(
        "--tcp-interval",
        "SECONDS",
        0,
        _number(0, DAY_S),
        "a span per so many seconds of a TCP connection; 0, the default: one in all",
    ),
    Option(
        "--tags",
        "|".join(CONVENTIONS),
        "istio",
        _one_of(*CONVENTIONS),
        "name and tag spans as Istio's sidecars do, or by OpenTelemetry's conventions",
    ),
    Option(
        "--max-path",
        "N",
        TARGET_CUT,
        _number(1, TARGET_CUT),
        "longest path, its query included, in a tag",
    ),
    Option("--no-query", "", False, _switch, "leave query strings off"),
    Option(
        "--max-connections",
        "N",
        16384,
        _number(1, MAX_CONNECTIONS),
        "connections traced at the same time",
    ),
    Option(
        "--engine",
        "|".join(ENGINES),
        "auto",
        _one_of(*ENGINES),
        "what writes headers into requests; auto: the kernel, where its self-test "
        "passes, and workers for the edge and HTTP/2. A pod's podspan.io/engine wins",
    ),
    Option(
        "--redirect-workers",
        "N",
        1,
        _number(1, MAX_WORKERS),
        "processes for redirected connections; none runs while no pod needs one",
    ),
    Option(
        "--inbound-source",
        "|".join(INBOUND_SOURCES),
        "auto",
        _one_of(*INBOUND_SOURCES),
        "a pod sees redirected clients by their own address where init and kernel "
        "allow, else by 127.0.0.6, as in Istio; loopback: always that",
    ),
    Option(
        "--heartbeat-interval",
        "SECONDS",
        0.25,
        _seconds(0.1, 60),
        "tell the redirect guard so often that the agent is alive",
    ),
    Option(
        "--guard-grace",
        "SECONDS",
        2.0,
        _seconds(0.3, 600),
        "redirect no new connection once the last heartbeat is older; at least "
        f"{MISSED_BEATS} intervals",
    ),
    Option(
        "--status-address",
        "ADDR:PORT",
        STATUS_ADDRESS,
        status_address,
        "answer /healthz, /readyz, /metrics and podspan doctor here; :PORT is every "
        "address, which probes and Prometheus need in a pod; none: nowhere",
    ),
    Option("--log-level", "L", "info", _one_of(*LOG_LEVELS), ", ".join(LOG_LEVELS)),
    Option(
        "--ready-file",
        "PATH",
        None,
        _text,
        "write the process id here once everything is attached",
    ),
)


def wants_help(argv: Sequence[str]) -> bool:
    """Tell whether the user asks for help, whatever else is wrong."""
    return "-h" in argv or "--help" in argv


def help_text() -> str:
    """Return what `podspan agent --help` says."""
    return _parser().format_help()


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Return the settings of `podspan agent`."""
    given, rest = _parser().parse_known_args(argv)
    if rest:
        raise _unknown(rest[0])
    config = Config(
        **{option.field: _value(option, given, environment) for option in OPTIONS}
    )
    _check(config)
    return config


def _value(
    option: Option, given: argparse.Namespace, environment: Mapping[str, str]
) -> Any:
    value = getattr(given, option.field)
    source = option.flag
    if value is None:
        source = option.variable
        value = environment.get(source)
        # An empty variable is an unset one: manifests cannot always leave it out.
        if not value:
            return option.default
    if value is True:
        return True
    texts = value if isinstance(value, list) else [value]
    try:
        values = [option.read(text) for text in texts]
    except ValueError as exc:
        what = f"bad value {texts[-1]!r} for {source}: {exc}"
        raise UsageError(what, "podspan agent --help explains the options") from exc
    return (
        tuple(part for each in values for part in each)
        if option.repeats
        else (values[-1])
    )


def _check(config: Config) -> None:
    if config.json == "-" and config.tree:
        raise UsageError(
            "--json - and --tree both write to standard output",
            "write the spans to a file: --json spans.jsonl",
        )
    if config.no_tcp and config.tcp_interval:
        raise UsageError(
            "--tcp-interval asks for TCP spans, --no-tcp for none", "leave one off"
        )
    least = round(MISSED_BEATS * config.heartbeat_interval, 3)
    if config.guard_grace < least:
        raise UsageError(
            f"--guard-grace {config.guard_grace:g} is less than {MISSED_BEATS} times "
            f"--heartbeat-interval {config.heartbeat_interval:g}: one late heartbeat "
            "would end the redirection",
            f"use --guard-grace {least:g} or more, or a shorter interval",
        )
    if config.zipkin is not None:
        # Here, not above: `podspan agent --help` needs no HTTP client.
        from podspan.agent.export.destination import checked_url  # noqa: PLC0415
        from podspan.agent.export.zipkin import ZipkinEncoder  # noqa: PLC0415

        checked_url(config.zipkin, "--zipkin", ZipkinEncoder.default_path)


def _unknown(word: str) -> UsageError:
    flags = [option.flag for option in OPTIONS]
    close = get_close_matches(word.partition("=")[0], flags, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    kind = "option" if word.startswith("-") else "argument"
    return UsageError(
        f"unknown {kind} {word!r}", f"{hint}podspan agent --help lists the options"
    )


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "podspan agent --help explains the options")


def _parser() -> _Parser:
    parser = _Parser(
        prog="podspan agent",
        description="Trace the calls of this node, HTTP and TCP, without sidecars.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    for option in OPTIONS:
        text = f"{option.help} [{option.variable}"
        text += f", {_shown(option.default)}]" if option.default else "]"
        if not option.metavar:
            parser.add_argument(
                option.flag, action="store_const", const=True, help=text
            )
            continue
        parser.add_argument(
            option.flag,
            metavar=option.metavar,
            action="append" if option.repeats else "store",
            help=text,
        )
    return parser
