"""What the user can set: one table of flags, variables and annotations.

Names and meanings are istio-iptables' (tools/istio-iptables/pkg/cmd/root.go of Istio
1.31), so that settings carry over; those without a meaning here stand in the table too,
with the reason. A flag beats its variable, a variable the pod's annotation, that the
default. As in Istio, an empty list of what to include includes nothing.
"""

from __future__ import annotations

import argparse
import grp
import pwd
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any, Final, NoReturn

from podspan.agent.errors import UsageError
from podspan.init import plan, podinfo
from podspan.init.plan import EVERY, Every, Network, Redirection, Source

# How long --require-agent waits without a number: a DaemonSet's pod on a new node
# starts, compiles and pins within this.
AGENT_TIMEOUT_S: Final = 30.0
PROBE_TIMEOUT_S: Final = 5.0  # Istio's

TRAFFIC: Final = "traffic.sidecar.istio.io/"
MODE_ANNOTATION: Final = "sidecar.istio.io/interceptionMode"

# As many as Istio allows; a match each, in one rule.
MAX_GROUPS: Final = 64
MAX_ID: Final = 2**32 - 2  # the last number is "no user" to the kernel
IFNAMSIZ: Final = 16  # linux/if.h, the end included

EXAMPLES: Final = """\
examples:
  podspan init apply                     redirect all TCP while the agent wants it
  podspan init apply --require-agent=60  fail unless an agent is there within 60 s
  podspan init apply -d 15020,22 -x 10.96.0.1/32
                                         but not these ports in, nor this address out
  podspan init apply --guard none        redirect unconditionally, as Istio does
  podspan init apply --run-validation    and try a connection; exit code 126 if it fails
  podspan init apply --annotations-file /etc/podinfo/annotations
                                         and heed the pod's own annotations
  podspan init plan                      print the rules, touch nothing
  podspan init clean                     remove all that podspan init made

It acts on the network namespace it runs in and refuses the host's. To reach into
another: --network-namespace FILE, or nsenter --net=FILE. `ip netns exec` hides
/sys/fs/bpf, where the guard is.
"""
SETTINGS: Final = """\
Every option is a variable too: --drop-invalid is DROP_INVALID, as in Istio; those of
podspan's own begin with PODSPAN_. Only the outbound port is none: Kubernetes itself
sets ENVOY_PORT where a service is named envoy. Variables without an option:
"""


# Readers make a value of a text or raise ValueError with a sentence.


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise ValueError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _ports(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_port(part) for part in _parts(text)))


def _ports_or_every(text: str) -> tuple[int, ...] | Every:
    return EVERY if text.strip() == EVERY else _ports(text)


def _status_port(text: str) -> tuple[int, ...]:
    return () if text.strip() == "0" else _ports(text)  # 0: the sidecar has none


def _network(text: str) -> Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as exc:
        raise ValueError(f"{text!r} is not an address or CIDR") from exc


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(_network(part) for part in _parts(text)))


def _networks_or_every(text: str) -> tuple[Network, ...] | Every:
    return EVERY if text.strip() == EVERY else _networks(text)


def _loopback(text: str) -> IPv4Network:
    network = _network(text.strip())
    if not isinstance(network, IPv4Network) or not network.is_loopback:
        raise ValueError(f"{text!r} is not in 127.0.0.0/8")
    return network


def _interfaces(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_parts(text)))
    for name in names:
        # A + at the end is iptables' wildcard; the rest is what could end a word.
        if len(name.encode()) >= IFNAMSIZ or not re.fullmatch(r"[^\s/!\"'\\]+", name):
            raise ValueError(f"{name!r} is not the name of an interface")
    return names


def _id(text: str, number_of: Callable[[str], int]) -> int:
    if text.isascii() and text.isdigit():
        if int(text) > MAX_ID:
            raise ValueError(f"{text!r} is not a user or group number")
        return int(text)
    try:
        return number_of(text)
    except KeyError:
        raise ValueError(
            f"{text!r} is not known here; give the number, as names are those of this "
            "container's /etc/passwd and /etc/group"
        ) from None


def _users(text: str) -> tuple[int, ...]:
    parts = _parts(text)
    return tuple(_id(part, lambda name: pwd.getpwnam(name).pw_uid) for part in parts)


def _groups(text: str) -> tuple[int, ...]:
    parts = _parts(text)
    if len(parts) > MAX_GROUPS:
        raise ValueError(f"{len(parts)} groups are more than {MAX_GROUPS}")
    return tuple(_id(part, lambda name: grp.getgrnam(name).gr_gid) for part in parts)


def _groups_or_every(text: str) -> tuple[int, ...] | Every:
    return EVERY if text.strip() in (EVERY, "") else _groups(text)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _switch(text: str) -> bool:
    # Go's strconv.ParseBool.
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(text: str) -> float:
    """Read 5, 0.5, or Go's 5s, 500ms, 1m30s."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|[smh])", text)
    if parts and "".join(map("".join, parts)) == text:
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f"{text!r} is not a number of seconds")
    return float(text)


def _guard(text: str) -> str | None:
    if text == "none":
        return None
    path = Path(text)
    if not path.is_absolute() or len(text.encode()) > plan.GUARD_PATH_MAX:
        raise ValueError(f"{text!r} is neither 'none' nor a full path")
    if any(character.isspace() or character in "\"'\\" for character in text):
        raise ValueError(f"{text!r} has characters iptables would eat")
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text.lower()

    return read


def _text(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table. Without a flag it is a variable or an annotation only."""

    long: str
    read: Callable[[str], Any]
    help: str
    short: str = ""
    metavar: str = ""  # "": a switch
    variables: tuple[str, ...] | None = None  # None: Istio's; the last one set wins
    annotations: tuple[str, ...] = ()  # the last one set wins
    optional: str | None = None  # the value of the bare flag
    empty: bool = False  # an empty variable is a value
    ignored: str = ""  # why it has no meaning here

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.long.removeprefix("--").replace("-", "_")

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags, short ones first."""
        return tuple(flag for flag in (self.short, self.long) if flag.startswith("-"))

    @property
    def names(self) -> tuple[str, ...]:
        """The variables; what is set by the last one wins."""
        return (self.name.upper(),) if self.variables is None else self.variables


NO_SIDECAR: Final = "podspan puts no proxy into the pod"
NO_DNS: Final = "podspan leaves DNS alone"

WHAT: Final = (
    Option(
        "--istio-inbound-ports",
        _ports_or_every,
        "inbound ports to redirect, comma-separated; * is all, '' none (*)",
        "-b",
        "PORTS",
        annotations=(TRAFFIC + "includeInboundPorts",),
        empty=True,
    ),
    Option(
        "--istio-local-exclude-ports",
        _ports,
        "inbound ports not to redirect, where -b is *",
        "-d",
        "PORTS",
        annotations=(TRAFFIC + "excludeInboundPorts",),
    ),
    Option(
        "--istio-service-cidr",
        _networks_or_every,
        "destinations to redirect, comma-separated; * is all, '' none (*)",
        "-i",
        "CIDRS",
        annotations=(TRAFFIC + "includeOutboundIPRanges",),
        empty=True,
    ),
    Option(
        "--istio-service-exclude-cidr",
        _networks,
        "destinations not to redirect",
        "-x",
        "CIDRS",
        annotations=(TRAFFIC + "excludeOutboundIPRanges",),
    ),
    Option(
        "--istio-outbound-ports",
        _ports,
        "outbound ports to redirect besides what -i says",
        "-q",
        "PORTS",
        annotations=(TRAFFIC + "includeOutboundPorts",),
    ),
    Option(
        "--istio-local-outbound-ports-exclude",
        _ports,
        "outbound ports not to redirect",
        "-o",
        "PORTS",
        annotations=(TRAFFIC + "excludeOutboundPorts",),
    ),
    Option(
        "--istio-exclude-interfaces",
        _interfaces,
        "interfaces whose traffic is left alone, both ways",
        "-c",
        "NAMES",
        annotations=(TRAFFIC + "excludeInterfaces",),
    ),
    Option(
        "--kube-virt-interfaces",
        _interfaces,
        "interfaces of virtual machines in the pod: what comes in there is outbound",
        "-k",
        "NAMES",
        annotations=(
            TRAFFIC + "kubevirtInterfaces",
            "istio.io/reroute-virtual-interfaces",
        ),
    ),
    Option(
        "--proxy-uid",
        _users,
        "users whose connections are left alone (none: the agent's have a mark)",
        "-u",
        "USERS",
    ),
    Option(
        "--proxy-gid",
        _groups,
        "groups whose connections are left alone (none)",
        "-g",
        "GROUPS",
    ),
    Option(
        "--drop-invalid",
        _switch,
        "drop what belongs to no connection",
        variables=("DROP_INVALID", "INVALID_DROP"),
    ),
)
HOW: Final = (
    Option(
        "--envoy-port",
        _port,
        f"where outbound connections go ({plan.OUTBOUND_PORT})",
        "-p",
        "PORT",
        variables=(),
    ),
    Option(
        "--inbound-capture-port",
        _port,
        f"where inbound connections go ({plan.INBOUND_PORT})",
        "-z",
        "PORT",
    ),
    Option(
        "--guard",
        _guard,
        "the agent's pinned program that is asked for each connection; "
        f"none: redirect unconditionally ({plan.GUARD_PATH})",
        metavar="PATH|none",
        variables=("PODSPAN_GUARD",),
    ),
    Option(
        "--gate",
        _one_of("on", "off"),
        "hold a connection's first packet until its destination has answered, so that "
        "connect(2) fails as without redirection; off: redirect at once (on, where it "
        "works)",
        metavar="on|off",
        variables=("PODSPAN_GATE",),
    ),
    Option(
        "--require-agent",
        _seconds,
        f"wait for the agent ({AGENT_TIMEOUT_S:g} s), then fail; "
        "default: without an agent install nothing and succeed",
        metavar="SECONDS",
        variables=("PODSPAN_REQUIRE_AGENT",),
        optional=str(AGENT_TIMEOUT_S),
    ),
    Option(
        "--inbound-source",
        _one_of(*Source),
        "whose address applications see when the agent relays a call to them: the "
        "client's own, or 127.0.0.6 as with Istio (transparent, where it works)",
        metavar="transparent|loopback",
        variables=("PODSPAN_INBOUND_SOURCE",),
    ),
    Option(
        "--annotations-file",
        _text,
        "the pod's annotations, as a downward API volume has them: they are defaults",
        metavar="FILE",
        variables=("PODSPAN_ANNOTATIONS_FILE",),
    ),
    Option(
        "--dual-stack",
        _switch,
        "both families, and IPv6 has to work; =false: IPv6 only where the pod's first "
        "address is one; default: IPv6 where it works",
        variables=("DUAL_STACK", "ISTIO_DUAL_STACK"),
    ),
    Option(
        "--network-namespace",
        _text,
        "act on this namespace instead: a file, as /run/netns/NAME or /proc/PID/ns/net",
        metavar="FILE",
    ),
    Option(
        "--force-iptables-binary",
        _one_of("legacy", "nft"),
        "write to these tables (found by trying)",
        metavar="legacy|nft",
    ),
    Option("--dry-run", _switch, "print the rules, touch nothing", "-n"),
    Option("--cleanup-only", _switch, "remove everything, as `podspan init clean`"),
    Option("--force-apply", _switch, "write the rules even if they are in place"),
    Option(
        "--skip-rule-apply", _switch, "write nothing; for use with --run-validation"
    ),
)
CHECK: Final = (
    Option(
        "--run-validation",
        _switch,
        "see that a connection is redirected; exit code 126 if it is not",
    ),
    Option(
        "--iptables-probe-port",
        _port,
        f"the port of that connection ({plan.PROBE_PORT})",
        metavar="PORT",
    ),
    Option(
        "--probe-timeout",
        _seconds,
        f"how long it may take ({PROBE_TIMEOUT_S:g} s)",
        metavar="SECONDS",
    ),
)
# Variables and annotations without a flag, as in Istio.
OTHERS: Final = (
    Option(
        "loopback_cidr",
        _loopback,
        "what of 127.0.0.0/8 to leave alone where -i has loopback (127.0.0.1/32)",
        metavar="CIDR",
        variables=("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",),
    ),
    Option(
        "owner_groups",
        _groups_or_every,
        "groups whose connections are redirected (*)",
        metavar="GROUPS",
        variables=("ISTIO_OUTBOUND_OWNER_GROUPS",),
    ),
    Option(
        "owner_groups_exclude",
        _groups,
        "groups whose connections are not, where the above is *",
        metavar="GROUPS",
        variables=("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",),
    ),
    Option(
        "dry_run_file_path",
        _text,
        "where --dry-run writes the rules, too",
        metavar="FILE",
        variables=("DRY_RUN_FILE_PATH",),
    ),
    Option(
        "status_port",
        _status_port,
        "a port of the sidecar, not to be redirected",
        metavar="PORT",
        variables=(),
        annotations=("status.sidecar.istio.io/port",),
    ),
)
MODE: Final = Option(
    "--istio-inbound-interception-mode",
    _text,
    "REDIRECT is all there is",
    "-m",
    "MODE",
    annotations=(MODE_ANNOTATION,),
)
IGNORED: Final = (
    MODE,
    Option(
        "--inbound-tunnel-port",
        _text,
        "",
        "-e",
        "PORT",
        ignored="there is no tunnel to be left alone",
    ),
    Option(
        "--istio-inbound-tproxy-mark",
        _text,
        "",
        "-t",
        "MARK",
        ignored="podspan does not use TPROXY",
    ),
    Option(
        "--istio-inbound-tproxy-route-table",
        _text,
        "",
        "-r",
        "TABLE",
        ignored="podspan does not use TPROXY",
    ),
    Option(
        "--redirect-dns",
        _switch,
        "",
        ignored=NO_DNS,
        variables=("REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"),
    ),
    Option("--capture-all-dns", _switch, "", ignored=NO_DNS),
    Option(
        "--cni-mode",
        _switch,
        "",
        ignored="podspan is no CNI plugin; --network-namespace reaches into a pod",
    ),
    Option(
        "--native-nftables",
        _switch,
        "",
        ignored="the rules are written through iptables, to nft's tables as well",
    ),
    Option(
        "--reconcile",
        _switch,
        "",
        ignored="whatever an earlier run left is always replaced",
    ),
    Option(
        "--restore-format", _switch, "", "-f", ignored="the rules are always printed so"
    ),
    Option(
        "--iptables-trace-logging",
        _switch,
        "",
        ignored="Istio has it no more either; `iptables -j TRACE` serves",
    ),
    Option(
        "--host-nsenter-exec",
        _switch,
        "",
        ignored="--network-namespace needs no nsenter",
    ),
    Option(
        "--log_output_level",
        _text,
        "",
        metavar="LEVELS",
        variables=(),
        ignored="it is about Istio's log",
    ),
    Option(
        "--log_as_json", _switch, "", variables=(), ignored="it is about Istio's log"
    ),
)
GROUPS: Final = {
    "what is redirected": WHAT,
    "how": HOW,
    "is it redirected?": CHECK,
    "of istio-iptables, without a meaning here": IGNORED,
}
OPTIONS: Final = (*WHAT, *HOW, *CHECK, *OTHERS, *IGNORED)


@dataclass(frozen=True, slots=True)
class Options:
    """What `podspan init` was asked for."""

    action: str  # apply, plan or clean
    redirection: Redirection = field(default_factory=Redirection)
    need_source: bool = False  # the source was asked for
    need_gate: bool = False  # likewise
    dual_stack: bool | None = None  # None: IPv6 where it works
    variant: str | None = None
    always_write: bool = False
    require_agent: float | None = None  # seconds
    network_namespace: str | None = None
    dry_run: bool = False
    dry_run_file: str | None = None
    skip_rules: bool = False
    validate: bool = False
    probe_timeout: float = PROBE_TIMEOUT_S  # seconds
    unwanted: str = ""  # why nothing is to be redirected
    warnings: tuple[str, ...] = ()


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Return what the arguments after `podspan init` ask for."""
    given, rest = _parser().parse_known_args(argv)
    if rest:
        raise _unknown(rest[0])
    if given.action == "clean":
        return Options("clean", network_namespace=given.network_namespace)
    read = _Reader(vars(given), environment)
    read.annotations = _annotations_of(read("annotations_file"))
    return _options(given.action, read)


class _Reader:
    """Looks up the table's rows in flags, variables and annotations."""

    def __init__(
        self, flags: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self.flags = flags
        self.environment = environment
        self.annotations: Mapping[str, str] = {}

    def __call__(self, name: str, default: Any = None) -> Any:
        """Return the value of a row, or the default where it is set nowhere."""
        option = next(option for option in OPTIONS if option.name == name)
        source, text = self.found(option)
        if text is None:
            return default
        try:
            return option.read(text)
        except ValueError as exc:
            raise UsageError(
                f"podspan init: {source}: {exc}",
                hint="podspan init apply --help explains the options",
            ) from exc

    def found(self, option: Option) -> tuple[str, str | None]:
        """Return where an option is set, and to what; None where nowhere."""
        text = self.flags.get(option.name)
        if text is not None:
            return "/".join(option.flags), text
        for variable in reversed(option.names):
            text = self.environment.get(variable)
            # Else an empty one is unset: manifests cannot always leave it out.
            if text or (text is not None and option.empty):
                return f"variable {variable}", text
        for annotation in reversed(option.annotations):
            if annotation in self.annotations:
                return f"annotation {annotation}", self.annotations[annotation]
        return "", None


def _options(action: str, read: _Reader) -> Options:
    source = read("inbound_source")
    gate = read("gate")
    excluded = (
        *read("istio_local_exclude_ports", ()),
        *read("status_port", ()),
    )
    default = Redirection()
    redirection = Redirection(
        guard=read("guard", default.guard),
        gate=gate != "off",
        outbound_port=read("envoy_port", default.outbound_port),
        inbound_port=read("inbound_capture_port", default.inbound_port),
        include_inbound=read("istio_inbound_ports", EVERY),
        exclude_inbound=tuple(dict.fromkeys(excluded)),
        include_outbound=read("istio_service_cidr", EVERY),
        exclude_outbound=read("istio_service_exclude_cidr", ()),
        include_outbound_ports=read("istio_outbound_ports", ()),
        exclude_outbound_ports=read("istio_local_outbound_ports_exclude", ()),
        exclude_interfaces=read("istio_exclude_interfaces", ()),
        virtual_interfaces=read("kube_virt_interfaces", ()),
        exclude_users=read("proxy_uid", ()),
        exclude_groups=_excluded_groups(read),
        include_groups=read("owner_groups", EVERY),
        drop_invalid=read("drop_invalid", False),
        loopback=read("loopback_cidr", default.loopback),
        probe_port=read("iptables_probe_port", default.probe_port),
        source=Source(source or default.source),
    )
    _check_ports(redirection)
    if gate == "on" and redirection.virtual_interfaces:
        raise UsageError(
            "podspan init: --gate on does not go with --kube-virt-interfaces: what "
            "comes in there is outbound, which the gate cannot tell",
            hint="leave --gate out: it is off where there are such interfaces",
        )
    unwanted, mode_warnings = _mode(read)
    return Options(
        "clean" if read("cleanup_only", False) and action == "apply" else action,
        redirection,
        need_source=source is not None,
        need_gate=gate == "on",
        dual_stack=read("dual_stack"),
        variant=read("force_iptables_binary"),
        always_write=read("force_apply", False),
        require_agent=read("require_agent"),
        network_namespace=read("network_namespace"),
        dry_run=read("dry_run", False),
        dry_run_file=read("dry_run_file_path"),
        skip_rules=read("skip_rule_apply", False),
        validate=read("run_validation", False),
        probe_timeout=read("probe_timeout", PROBE_TIMEOUT_S),
        unwanted=unwanted,
        warnings=(*mode_warnings, *_warnings(read)),
    )


def _excluded_groups(read: _Reader) -> tuple[int, ...]:
    """As in Istio, groups to exclude count only where no others are chosen."""
    groups: tuple[int, ...] = read("proxy_gid", ())
    if read("owner_groups", EVERY) == EVERY:
        groups += read("owner_groups_exclude", ())
    return tuple(dict.fromkeys(groups))


def _check_ports(wanted: Redirection) -> None:
    ports = {
        "-p": wanted.outbound_port,
        "-z": wanted.inbound_port,
        "--iptables-probe-port": wanted.probe_port,
    }
    if len(set(ports.values())) < len(ports):
        shown = ", ".join(f"{flag} {port}" for flag, port in ports.items())
        raise UsageError(
            f"podspan init: ports have to differ: {shown}",
            hint="without these options they are 15001, 15006 and 15002",
        )


def _mode(read: _Reader) -> tuple[str, list[str]]:
    """Return why nothing is to be redirected, if so, and warnings.

    A flag is meant for us, and refused where we cannot do it. An annotation is meant
    for Istio, perhaps for a pod that has run there for years: it is met half-way.
    """
    source, text = read.found(MODE)
    mode = (text or "REDIRECT").upper()
    if mode == "REDIRECT":
        return "", []
    if source.startswith("annotation"):
        if mode == "NONE":
            return f"the pod's {source} is NONE", []
        if mode == "TPROXY":
            what = "REDIRECT is used; the client's address is kept, as TPROXY does"
            return "", [f"{source} is TPROXY: {what}"]
    hints = {
        "TPROXY": "leave it out: --inbound-source transparent keeps the client's "
        "address, which is what TPROXY is for",
        "NONE": "leave podspan init out of this pod, or use -b '' -i '' to redirect "
        "nothing",
    }
    raise UsageError(
        f"podspan init: {source}: mode {text} is not supported",
        hint=hints.get(mode, "the only mode is REDIRECT"),
    )


def _warnings(read: _Reader) -> Iterator[str]:
    """Say of what was given that it does nothing, and why."""
    for option in IGNORED:
        if not option.ignored:
            continue
        source, text = read.found(option)
        if text is None or (not option.metavar and not read(option.name)):
            continue
        yield f"{source} does nothing here: {option.ignored}"
    known = {name for option in OPTIONS for name in option.annotations}
    for name in read.annotations:
        if name.startswith(TRAFFIC) and name not in known:
            yield f"annotation {name} does nothing: Istio has none of that name"
    if read("owner_groups", EVERY) != EVERY and read("owner_groups_exclude"):
        yield (
            "variable ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE does nothing: "
            "ISTIO_OUTBOUND_OWNER_GROUPS already names groups"
        )


def _annotations_of(path: str | None) -> Mapping[str, str]:
    if path is None:
        return {}
    try:
        return podinfo.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(
            f"podspan init: annotations file {path}: {reason}",
            hint="mount a downwardAPI volume with the item fieldRef: fieldPath: "
            "metadata.annotations",
        ) from exc


def _unknown(word: str) -> UsageError:
    flags = [flag for option in OPTIONS for flag in option.flags]
    close = get_close_matches(word.partition("=")[0], flags, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UsageError(
        f"podspan init: unknown argument {word!r}",
        hint=f"{hint}podspan init apply --help lists the options",
    )


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
        action = actions.add_parser(
            name,
            help=text,
            description=text,
            epilog=_settings() + "\n" + EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for title, options in GROUPS.items():
            group = action.add_argument_group(title)
            for option in options:
                _add(group, option)
    text = "remove all rules and chains that podspan init made"
    clean = actions.add_parser("clean", help=text, description=text)
    _add(clean, next(each for each in HOW if each.name == "network_namespace"))
    return parser


def _add(parser: argparse._ActionsContainer, option: Option) -> None:
    fields: dict[str, Any] = {"metavar": option.metavar or "BOOL"}
    if not option.metavar or option.optional:
        fields |= {"nargs": "?", "const": option.optional or "true"}
    text = f"does nothing: {option.ignored}" if option.ignored else option.help
    parser.add_argument(
        *option.flags, dest=option.name, help=text.replace("%", "%%"), **fields
    )


def _settings() -> str:
    """Return the table's rows that have no flag, for the help."""
    rows = [
        f"  {variable}\n        {option.help}\n"
        for option in OTHERS
        for variable in option.names
    ]
    return SETTINGS + "".join(rows)
