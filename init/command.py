"""`podspan init`: the command line of the init step.

What is wanted becomes a `Redirection` here; `plan` decides and `apply` acts. Names and
meanings of the options are istio-iptables', so that settings carry over.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Final, NoReturn

from podspan.agent.errors import NoPrivilege, RedirectError, UsageError
from podspan.agent.kernel import syscall
from podspan.init import apply, plan
from podspan.init.plan import EVERY, Every, Family, Network, Redirection, Rule

# How long --require-agent waits without a number: a DaemonSet's pod on a new node
# starts, compiles and pins within this.
AGENT_TIMEOUT_S: Final = 30.0
AGENT_POLL_S: Final = 0.05

# linux/capability.h. Legacy tables are read and written over a raw socket.
CAPABILITIES: Final = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW"}

EXAMPLES: Final = """\
examples:
  podspan init apply                     redirect all TCP while the agent wants it
  podspan init apply --require-agent=60  fail unless an agent is there within 60 s
  podspan init apply -d 15020,22 -x 10.96.0.1/32
                                         but not these ports in, nor this address out
  podspan init apply --guard none        redirect unconditionally, as Istio does
  podspan init plan                      print the rules, touch nothing
  podspan init clean                     remove all that podspan init made

It acts on the network namespace it runs in and refuses the host's. To reach into
another use nsenter --net=FILE: `ip netns exec` hides /sys/fs/bpf, where the guard is.
"""


def main(argv: Sequence[str]) -> int:
    """Run `podspan init` with the arguments after the word init."""
    arguments = _parser().parse_args(argv)
    if arguments.action == "plan":
        for family, rules in _plans(_redirection(arguments)).items():
            sys.stdout.write(f"# IPv{family.value}\n{plan.render(rules)}")
        return 0
    # These fail whether an agent is there or not: a mistake shows on the first try.
    _require_capabilities()
    apply.refuse_host()
    if arguments.action == "clean":
        apply.clean()
        return 0
    wanted = _redirection(arguments)
    if wanted.guard and not _agent_is_there(wanted.guard, arguments.require_agent):
        sys.stdout.write(f"podspan init: nothing installed: {_absence(wanted.guard)}\n")
        return 0
    apply.apply(_plans(wanted))
    return 0


class _Parser(argparse.ArgumentParser):
    """Leaves printing and exiting to podspan.agent.__main__."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", hint=f"see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="podspan init",
        description="Redirect a pod's TCP connections to the node's agent, "
        "while the agent is alive and wants them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("apply", "install the rules, in place of any that podspan init made before"),
        ("plan", "print the rules in iptables-restore's format, touch nothing"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        _add_rule_options(action)
        if name == "apply":
            action.add_argument(
                "--require-agent",
                nargs="?",
                type=_seconds,
                const=AGENT_TIMEOUT_S,
                metavar="SECONDS",
                help="wait for the agent (%(const)g s), then fail; "
                "default: without an agent install nothing and succeed",
            )
    text = "remove all rules and chains that podspan init made"
    actions.add_parser("clean", help=text, description=text)
    return parser


def _add_rule_options(parser: argparse.ArgumentParser) -> None:
    default = Redirection()
    parser.add_argument(
        "-p",
        "--envoy-port",
        dest="outbound_port",
        type=_port,
        default=default.outbound_port,
        metavar="PORT",
        help="where outbound connections go (%(default)s)",
    )
    parser.add_argument(
        "-z",
        "--inbound-capture-port",
        dest="inbound_port",
        type=_port,
        default=default.inbound_port,
        metavar="PORT",
        help="where inbound connections go (%(default)s)",
    )
    parser.add_argument(
        "-b",
        "--istio-inbound-ports",
        dest="include_inbound",
        type=_ports_or_every,
        default=EVERY,
        metavar="PORTS",
        help="inbound ports to redirect, comma-separated; * is all, '' none (*)",
    )
    parser.add_argument(
        "-d",
        "--istio-local-exclude-ports",
        dest="exclude_inbound",
        type=_ports,
        default=(),
        metavar="PORTS",
        help="inbound ports not to redirect, where -b is *",
    )
    parser.add_argument(
        "-i",
        "--istio-service-cidr",
        dest="include_outbound",
        type=_networks_or_every,
        default=EVERY,
        metavar="CIDRS",
        help="destinations to redirect, comma-separated; * is all, '' none (*)",
    )
    parser.add_argument(
        "-x",
        "--istio-service-exclude-cidr",
        dest="exclude_outbound",
        type=_networks,
        default=(),
        metavar="CIDRS",
        help="destinations not to redirect",
    )
    parser.add_argument(
        "--guard",
        type=_guard,
        default=plan.GUARD_PATH,
        metavar="PATH|none",
        help="the agent's pinned program that is asked for each connection; "
        "none: redirect unconditionally (%(default)s)",
    )


def _redirection(arguments: argparse.Namespace) -> Redirection:
    return Redirection(
        guard=arguments.guard,
        outbound_port=arguments.outbound_port,
        inbound_port=arguments.inbound_port,
        include_inbound=arguments.include_inbound,
        exclude_inbound=arguments.exclude_inbound,
        include_outbound=arguments.include_outbound,
        exclude_outbound=arguments.exclude_outbound,
    )


def _plans(wanted: Redirection) -> dict[Family, tuple[Rule, ...]]:
    return {family: plan.plan(wanted, family) for family in Family}


def _agent_is_there(guard: str, wait_s: float | None) -> bool:
    """Look for the pinned guard; with `wait_s` wait for it, and raise in the end."""
    deadline = time.monotonic() + (wait_s or 0)
    while not Path(guard).exists():
        if wait_s is None:
            return False
        if time.monotonic() >= deadline:
            raise RedirectError(
                f"no agent within {wait_s:g} s: {_absence(guard)}",
                hint="is the podspan agent running on this node?",
            )
        time.sleep(AGENT_POLL_S)
    return True


def _absence(guard: str) -> str:
    """Say in one line why there is no guard to be seen."""
    # The root that is in every path ends the search.
    existing = next(parent for parent in Path(guard).parents if parent.exists())
    line = f"no agent has pinned {guard}"
    if not syscall.is_bpffs(existing):
        line += (
            f" ({existing} is not a bpf file system here: mount the node's into the "
            "container; `ip netns exec` hides it, nsenter --net=FILE does not)"
        )
    return line


def _require_capabilities() -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    missing = [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise NoPrivilege(
            f"podspan init lacks {' and '.join(missing)}",
            hint="run it as root; in a pod: securityContext.capabilities.add: "
            "[NET_ADMIN, NET_RAW]",
        )


# What argparse calls on each value. Its own text for ValueError names the function, so
# these raise ArgumentTypeError with a sentence.


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _ports(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_port(part) for part in _parts(text)))


def _ports_or_every(text: str) -> tuple[int, ...] | Every:
    return EVERY if text.strip() == EVERY else _ports(text)


def _network(text: str) -> Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or CIDR") from exc


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(_network(part) for part in _parts(text)))


def _networks_or_every(text: str) -> tuple[Network, ...] | Every:
    return EVERY if text.strip() == EVERY else _networks(text)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _guard(text: str) -> str | None:
    if text == "none":
        return None
    path = Path(text)
    if not path.is_absolute() or len(text.encode()) > plan.GUARD_PATH_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'none' nor a full path")
    if any(character.isspace() or character in "\"'\\" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} has characters iptables would eat")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
