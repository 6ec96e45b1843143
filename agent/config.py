"""What the user can set: one table of flag, variable, default and help.

A flag beats its variable, a variable the default. The result is one frozen Config;
whatever is wrong in it is a UsageError before anything is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from podspan.agent import values
from podspan.agent.engine import ENGINES
from podspan.agent.errors import UsageError
from podspan.agent.parser import Parser
from podspan.agent.tags import CONVENTIONS
from podspan.agent.url import TARGET_CUT
from podspan.agent.values import Address, Secret

LOG_LEVELS = ("debug", "info", "warning", "error")
SPAN_IDS = ("shared", "child")
SYNCS = ("never", "segment", "batch")
UNSAMPLED = ("0", "defer")
PROPAGATED = ("b3multi", "b3", "tracecontext")
BACKENDS = ("zipkin", "otlp")
OTLP_ENCODINGS = ("protobuf", "json")
INBOUND_SOURCES = ("auto", "loopback")

MAX_CONNECTIONS = 2**20
MAX_WORKERS = 64

# A busy node delays a heartbeat by more than one interval; that ends no redirection.
MISSED_BEATS = 3

EXAMPLES = """\
examples:
  podspan agent
      keep the traces of this machine's calls, and show them on http://127.0.0.1:9411/
  podspan agent --zipkin http://zipkin.istio-system:9411
      send them to Zipkin, or to anything that takes its format
  podspan agent --otlp https://collector:4318 --otlp-headers-file /run/secrets/otlp
      send them to Jaeger, Tempo or an OpenTelemetry Collector
  podspan agent --tree
      print them
  podspan agent --json - --netns 'cni-*' | jq .name
      the spans of pods only, one JSON object per line
  PODSPAN_ZIPKIN=http://localhost:9411 podspan agent
      every option is a variable, too
"""


# Istio has 15000 to 15021, 15053 and 15090, and had 15029 to 15032.
STATUS_ADDRESS = Address("127.0.0.1", 15025, named=False)

# Zipkin's port, and its programs' default.
STORE_ADDRESS = Address("127.0.0.1", 9411, named=False)

DATA_DIR = "/var/lib/podspan"
DATABASE = "traces.db"  # of the embedded store, in there


@dataclass(frozen=True, slots=True)
class Config:
    """How to run `podspan agent`. Without any output it keeps traces in a store."""

    zipkin: str | None
    zipkin_headers_file: str | None
    zipkin_headers: Secret | None
    otlp: str | None
    otlp_headers_file: str | None
    otlp_headers: Secret | None
    otlp_encoding: str  # one of OTLP_ENCODINGS
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None
    json: str | None
    tree: bool
    store: bool
    store_address: Address
    store_max_age: int  # seconds
    store_max_size: int  # bytes
    data_dir: str | None  # None: DATA_DIR, where that can be had
    spool_size: int  # bytes; 0: no spool
    spool_sync: str  # one of SYNCS
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
    status_address: Address | None
    log_level: str
    ready_file: str | None

    def facts(self) -> str:
        """Return the settings as key=value, for the log."""
        names = self.__dataclass_fields__
        return " ".join(f"{name}={_shown(getattr(self, name))!r}" for name in names)

    @property
    def wants_store(self) -> bool:
        """Whether traces are to be kept here: where they go nowhere else."""
        return self.store or not (self.zipkin or self.otlp or self.json or self.tree)


def _shown(value: Any) -> Any:
    """Return a value as people write it, without what may be a key."""
    if isinstance(value, Address | Secret):
        return str(value)
    if isinstance(value, str) and value.lower().startswith(("http:", "https:")):
        return value.partition("?")[0]
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
    secret: bool = False  # a variable only: anybody may read a process's arguments
    show: Callable[[Any], Any] = _shown

    @property
    def field(self) -> str:
        """The option's name in Config."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """The option's name in the environment."""
        return f"PODSPAN_{self.field.upper()}"


OPTIONS = (
    Option(
        "--zipkin",
        "URL",
        None,
        values.text,
        "POST spans to this collector, in Zipkin's v2 format",
    ),
    Option(
        "--zipkin-headers-file",
        "FILE",
        None,
        values.text,
        "send the headers in this file, too, one `Name: value` per line; it is read "
        "again when it changes. PODSPAN_ZIPKIN_HEADERS=NAME=VALUE,... adds more",
    ),
    Option("--zipkin-headers", "LIST", None, Secret, "", secret=True),
    Option(
        "--otlp",
        "URL",
        None,
        values.text,
        "POST spans to this collector by OTLP: Jaeger, Tempo, OpenTelemetry's own",
    ),
    Option(
        "--otlp-headers-file",
        "FILE",
        None,
        values.text,
        "as --zipkin-headers-file; PODSPAN_OTLP_HEADERS adds more",
    ),
    Option("--otlp-headers", "LIST", None, Secret, "", secret=True),
    Option(
        "--otlp-encoding",
        "|".join(OTLP_ENCODINGS),
        "protobuf",
        values.one_of(*OTLP_ENCODINGS),
        "how spans are written in OTLP",
    ),
    Option(
        "--tls-ca",
        "FILE",
        None,
        values.text,
        "trust the authorities in this file, not the system's, for https backends",
    ),
    Option(
        "--tls-cert",
        "FILE",
        None,
        values.text,
        "show https backends this certificate; with --tls-key",
    ),
    Option("--tls-key", "FILE", None, values.text, "its private key"),
    Option(
        "--json",
        "FILE",
        None,
        values.text,
        "append spans to this file, one JSON object per line; - is standard output",
    ),
    Option(
        "--tree",
        "",
        False,
        values.switch,
        "print traces as trees",
    ),
    Option(
        "--store",
        "",
        False,
        values.switch,
        "keep traces in the embedded store, with a viewer and Zipkin's API; the "
        "default without --zipkin, --otlp, --json and --tree",
    ),
    Option(
        "--store-address",
        "ADDR:PORT",
        STORE_ADDRESS,
        values.listening,
        "serve them here; :PORT is every address",
    ),
    Option(
        "--store-max-age",
        "AGE",
        7 * values.DAY_S,
        values.age,
        "forget traces that are older",
        show=values.age_text,
    ),
    Option(
        "--store-max-size",
        "SIZE",
        2 * 2**30,
        values.store_size,
        "forget the oldest traces beyond so much on disk",
        show=values.size_text,
    ),
    Option(
        "--data-dir",
        "DIR",
        None,
        values.text,
        f"the embedded store and the spool are in here; by default {DATA_DIR}",
    ),
    Option(
        "--spool-size",
        "SIZE",
        512 * 2**20,  # ten minutes of 1,000 spans a second take 380 MB
        values.size,
        "keep so much on disk, for each backend, while it does not take spans; beyond "
        "that the oldest are dropped; 0: keep nothing",
        show=values.size_text,
    ),
    Option(
        "--spool-sync",
        "|".join(SYNCS),
        "batch",
        values.one_of(*SYNCS),
        "when the spool is forced onto the disk, which matters when the machine "
        "fails, not when the agent does",
    ),
    Option(
        "--netns",
        "GLOB",
        (),
        values.patterns,
        "trace only network namespaces so named; repeatable, commas in the variable",
        repeats=True,
    ),
    Option(
        "--span-ids",
        "|".join(SPAN_IDS),
        None,
        values.one_of(*SPAN_IDS),
        "a server's span has its caller's id, as Zipkin's, or is its child, as "
        "OpenTelemetry's; by default child where spans go by OTLP only, else shared",
    ),
    Option(
        "--sampling",
        "PERCENT",
        100.0,
        values.percent,
        "record so much of what begins here, or comes without a decision",
    ),
    Option(
        "--unsampled",
        "|".join(UNSAMPLED),
        "0",
        values.one_of(*UNSAMPLED),
        "tell the next hop that a request is not sampled, or let it decide",
    ),
    Option(
        "--propagate",
        "LIST",
        frozenset({"b3multi"}),
        values.some_of(*PROPAGATED),
        f"headers to write, with commas between: {', '.join(PROPAGATED)}",
    ),
    Option("--no-tcp", "", False, values.switch, "no spans of what is not HTTP"),
    Option(
        "--tcp-interval",
        "SECONDS",
        0,
        values.number(0, values.DAY_S),
        "a span per so many seconds of a TCP connection; 0, the default: one in all",
    ),
    Option(
        "--tags",
        "|".join(CONVENTIONS),
        "istio",
        values.one_of(*CONVENTIONS),
        "name and tag spans as Istio's sidecars do, or by OpenTelemetry's conventions",
    ),
    Option(
        "--max-path",
        "N",
        TARGET_CUT,
        values.number(1, TARGET_CUT),
        "longest path, its query included, in a tag",
    ),
    Option("--no-query", "", False, values.switch, "leave query strings off"),
    Option(
        "--max-connections",
        "N",
        16384,
        values.number(1, MAX_CONNECTIONS),
        "connections traced at the same time",
    ),
    Option(
        "--engine",
        "|".join(ENGINES),
        "auto",
        values.one_of(*ENGINES),
        "what writes headers into requests; auto: the kernel, where its self-test "
        "passes, and workers for the edge and HTTP/2. A pod's podspan.io/engine wins",
    ),
    Option(
        "--redirect-workers",
        "N",
        1,
        values.number(1, MAX_WORKERS),
        "processes for redirected connections; none runs while no pod needs one",
    ),
    Option(
        "--inbound-source",
        "|".join(INBOUND_SOURCES),
        "auto",
        values.one_of(*INBOUND_SOURCES),
        "a pod sees redirected clients by their own address where init and kernel "
        "allow, else by 127.0.0.6, as in Istio; loopback: always that",
    ),
    Option(
        "--heartbeat-interval",
        "SECONDS",
        0.25,
        values.seconds(0.1, 60),
        "tell the redirect guard so often that the agent is alive",
    ),
    Option(
        "--guard-grace",
        "SECONDS",
        2.0,
        values.seconds(0.3, 600),
        "redirect no new connection once the last heartbeat is older; at least "
        f"{MISSED_BEATS} intervals",
    ),
    Option(
        "--status-address",
        "ADDR:PORT",
        STATUS_ADDRESS,
        values.address,
        "answer /healthz, /readyz, /metrics and podspan doctor here; :PORT is every "
        "address, which probes and Prometheus need in a pod; none: nowhere",
    ),
    Option(
        "--log-level", "L", "info", values.one_of(*LOG_LEVELS), ", ".join(LOG_LEVELS)
    ),
    Option(
        "--ready-file",
        "PATH",
        None,
        values.text,
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
    chosen = {option.field: _value(option, given, environment) for option in OPTIONS}
    if chosen["span_ids"] is None:
        chosen["span_ids"] = _span_ids(chosen)
    config = Config(**chosen)
    _check(config)
    return config


def _span_ids(chosen: Mapping[str, Any]) -> str:
    """Return what all outputs can tell: OTLP knows no shared ids, Zipkin both."""
    others = ("zipkin", "json", "tree", "store")
    return "child" if chosen["otlp"] and not any(map(chosen.get, others)) else "shared"


def _value(
    option: Option, given: argparse.Namespace, environment: Mapping[str, str]
) -> Any:
    value = getattr(given, option.field, None)
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
    _check_backends(config)


def _check_backends(config: Config) -> None:
    for backend in BACKENDS:
        if getattr(config, backend) is None:
            _need(config, f"--{backend}", f"{backend}_headers_file")
    urls = (config.zipkin or "", config.otlp or "")
    if not any(url.lower().startswith("https:") for url in urls):
        _need(config, "an https backend", "tls_ca", "tls_cert", "tls_key")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise UsageError(
            "--tls-cert and --tls-key mean something only together",
            "a file that holds both can be named twice",
        )
    # Here, not above: `podspan agent --help` needs no TLS.
    from podspan.agent.export.destination import checked_url  # noqa: PLC0415

    for backend in BACKENDS:
        if (url := getattr(config, backend)) is not None:
            checked_url(url, f"--{backend}", "")


def _need(config: Config, what: str, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) is not None:
            flag = f"--{field.replace('_', '-')}"
            raise UsageError(f"{flag} means nothing without {what}", "leave it off")


def _unknown(word: str) -> UsageError:
    # What comes after it may be a secret.
    word = word.partition("=")[0] if word.startswith("-") else word
    for option in OPTIONS:
        if option.secret and option.flag == word:
            return UsageError(
                f"{word} would tell a secret to whoever lists processes",
                f"set {option.variable}, or use {word}-file",
            )
    flags = [option.flag for option in OPTIONS if not option.secret]
    close = get_close_matches(word, flags, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    kind = "option" if word.startswith("-") else "argument"
    return UsageError(
        f"unknown {kind} {word!r}", f"{hint}podspan agent --help lists the options"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="podspan agent",
        description="Trace the calls of this node, HTTP and TCP, without sidecars.",
        examples=EXAMPLES,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    for option in OPTIONS:
        if option.secret:
            continue
        text = f"{option.help} [{option.variable}"
        text += f", {option.show(option.default)}]" if option.default else "]"
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
