"""What the user can set: one table of flag, variable, default and help.

A flag beats its variable, a variable the default. The result is one frozen Config;
whatever is wrong in it is a UsageError before anything is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from podspan.agent.errors import UsageError

LOG_LEVELS = ("debug", "info", "warning", "error")

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
class Config:
    """How to run `podspan agent`. Without any output it prints trees."""

    zipkin: str | None
    json: str | None
    tree: bool
    netns: tuple[str, ...]
    max_connections: int
    log_level: str
    ready_file: str | None

    def facts(self) -> str:
        """Return the settings as key=value, for the log."""
        names = self.__dataclass_fields__
        return " ".join(f"{name}={getattr(self, name)!r}" for name in names)


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


def _count(text: str) -> int:
    # isdigit: int() also takes signs, spaces, underscores.
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 2**20:
        raise ValueError("use a number from 1 to 1048576")
    return int(text)


def _level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"use one of {', '.join(LOG_LEVELS)}")
    return text.lower()


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
        "--max-connections",
        "N",
        16384,
        _count,
        "connections traced at the same time",
    ),
    Option("--log-level", "L", "info", _level, ", ".join(LOG_LEVELS)),
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
    if config.zipkin is not None:
        # Here, not above: `podspan agent --help` needs no HTTP client.
        from podspan.agent.export.zipkin import zipkin_endpoint  # noqa: PLC0415

        zipkin_endpoint(config.zipkin)


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
        description="Trace the HTTP calls of this node, without sidecars.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    for option in OPTIONS:
        text = f"{option.help} [{option.variable}"
        text += f", {option.default}]" if option.default else "]"
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
