"""podspan: the command. Picks the subcommand; the only one to print errors and exit."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from podspan.agent import config, version
from podspan.agent.errors import PodspanError, UsageError

HELP_HINT = "podspan --help lists the commands"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what it does, and what takes its arguments."""

    summary: str
    run: Callable[[Sequence[str]], int]


def _main_of(module: str) -> Callable[[Sequence[str]], int]:
    """Return `main` of a module that is imported only when called.

    So `podspan init`, which runs in pods, loads neither bcc nor an HTTP client.
    """

    def run(argv: Sequence[str]) -> int:
        code: int = import_module(module).main(argv)
        return code

    return run


def _agent(argv: Sequence[str]) -> int:
    if config.wants_help(argv):
        print(config.help_text(), end="")
        return 0
    settings = config.parse(argv, os.environ)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # Its retries and connections are ours to report, in export/zipkin.py.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    code: int = import_module("podspan.agent.service").run(settings)
    return code


COMMANDS = {
    "agent": Command("trace the HTTP calls of this node", _agent),
    "init": Command(
        "guarded redirect rules in this network namespace",
        _main_of("podspan.init.command"),
    ),
    "doctor": Command(
        "what this node can do, and what its agent does",
        _main_of("podspan.agent.doctor"),
    ),
    "store": Command(
        "keep traces, search and show them: Zipkin's API and a viewer",
        _main_of("podspan.agent.store.command"),
    ),
    "replay": Command(
        "the spans of a capture, without any privilege",
        _main_of("podspan.agent.replay.command"),
    ),
    "demo": Command(
        "start four services, trace them, print the trace",
        _main_of("podspan.agent.demo.command"),
    ),
}


def help_text() -> str:
    """Return what `podspan --help` says."""
    lines = [
        "usage: podspan COMMAND [OPTION]...",
        "",
        "Istio's distributed traces without sidecars, by eBPF.",
        "",
        "commands:",
        *(f"  {name:8}{command.summary}" for name, command in COMMANDS.items()),
        "",
        "podspan COMMAND --help explains one; podspan --version tells the version.",
        "",
        "examples:",
        "  podspan demo",
        "  podspan agent --zipkin http://zipkin.istio-system:9411",
        "  podspan init plan",
        "  sudo podspan doctor",
    ]
    return "\n".join(lines)


def dispatch(argv: Sequence[str]) -> int:
    """Run the subcommand that `argv` names; return its exit code."""
    if not argv:
        raise UsageError("no command given", HELP_HINT)
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"podspan {version()}")
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}? {HELP_HINT}" if close else HELP_HINT
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name!r}", hint)
    return COMMANDS[name].run(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run podspan; the exit code is 0, 1 (it failed) or 2 (wrong usage)."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except PodspanError as exc:
        print(f"podspan: {exc}", file=sys.stderr)
        if exc.hint:
            print(f"hint: {exc.hint}", file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:
        # The reader of our output has enough, as in `podspan agent --tree | head`.
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
