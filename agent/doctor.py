"""`podspan doctor`: what this node can do, what its agent does, what to do about it.

`look` gathers facts and changes nothing. Each check is a pure function of the facts;
CHECKS is the order in which they are told. Only --self-test loads programs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from http.client import HTTPConnection, HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from podspan.agent import config, values, version
from podspan.agent.config import STATUS_ADDRESS
from podspan.agent.errors import KernelError, PodspanError, UsageError
from podspan.agent.kernel import selftest
from podspan.agent.kernel.guard import PIN_DIR, require_bpffs
from podspan.agent.kernel.options import POLICY_ENROL, POLICY_TRACE, Options
from podspan.agent.kernel.tracer import Programs, cgroup_root, require_kprobes
from podspan.agent.parser import Parser
from podspan.agent.values import Address

# The oldest kernel that the tests run on.
OLDEST: Final = (6, 1)

# linux/capability.h: what the agent uses.
CAPABILITIES: Final = {
    12: "CAP_NET_ADMIN",
    19: "CAP_SYS_PTRACE",
    21: "CAP_SYS_ADMIN",
}

BTF: Final = Path("/sys/kernel/btf/vmlinux")
MODULES: Final = Path("/lib/modules")
QUEUE_FILE: Final = Path("/proc/net/netfilter/nfnetlink_queue")
LOCKS: Final = Path("/proc/locks")
CONTAINER_MARKS: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))

# The first namespaces' inodes (include/linux/proc_ns.h).
INIT_CGROUP_NS: Final = 0xEFFFFFFB
INIT_PID_NS: Final = 0xEFFFFFFC

ADDRESS_VARIABLE: Final = "PODSPAN_STATUS_ADDRESS"
ANSWER_S: Final = 5.0
ANSWER_BYTES: Final = 16 * 1024 * 1024
COMMAND_S: Final = 10.0
TRIAL_CONNECTIONS: Final = 64
SELF_TEST_NEEDS: Final = ("root", "btf", "cgroup", "bcc")  # checks

EXAMPLES: Final = """\
examples:
  sudo podspan doctor
      what this node can do, and what its agent does
  kubectl exec -n podspan POD -- podspan doctor
      the same, POD being the agent's on that node
  sudo podspan doctor --self-test
      try the kernel engine, too, before there is an agent
  podspan doctor --address :9000
      the agent was given --status-address :9000
  sudo podspan doctor --json | jq '.findings[] | select(.level != "ok")'

The exit code is 0 if nothing failed, 1 if something did. A warning (warn) is something
that podspan goes on without. Nothing is changed on the node.
"""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # podspan goes on without it
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `hint` says what to do about it."""

    name: str
    level: Level
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks go by. An error stands for what it says is missing."""

    release: str  # the kernel's
    root: bool
    capabilities: int  # effective, as bits
    btf: bool
    kprobes: KernelError | None
    bpffs: KernelError | None
    cgroup: str | KernelError  # where cgroup v2 is mounted
    cgroup_partly: bool  # and shows this container only
    bcc: str | KernelError  # its version
    nft: str  # the version of iptables; "": not installed
    legacy: bool
    queue: str  # nfnetlink_queue is: loaded, loadable, missing, or not known
    container: bool
    node_pids: bool  # the node's processes are seen
    holder: int | None  # the process that holds the agents' lock
    address: Address | None  # of the status port, which was asked
    agent: Mapping[str, Any] | None  # what it answered
    silence: str  # why it did not
    now_s: float  # since 1970
    selftest: str | PodspanError | None = None  # "": passed; None: not run
    untried: str = ""  # why not, where it was asked for


Check = Callable[[Facts], Finding | None]


def _privilege(facts: Facts) -> Finding:
    missing = [
        name for bit, name in CAPABILITIES.items() if not facts.capabilities >> bit & 1
    ]
    if not facts.root:
        hint = "sudo podspan doctor; until then some of the following may be wrong"
        return Finding(
            "root", Level.FAIL, "you are not root, the agent has to be", hint
        )
    if missing:
        return Finding(
            "root",
            Level.FAIL,
            f"root, but without {', '.join(missing)}",
            "the container needs securityContext: privileged: true",
        )
    return Finding("root", Level.OK, "root, with the capabilities that the agent uses")


def _kernel(facts: Facts) -> Finding:
    numbers = facts.release.split("-")[0].split(".")[:2]
    known = all(number.isdecimal() for number in numbers)
    if known and tuple(map(int, numbers)) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Finding(
            "kernel",
            Level.WARN,
            f"Linux {facts.release} is older than {oldest}",
            f"podspan is tested on {oldest} and newer; it may work",
        )
    return Finding("kernel", Level.OK, f"Linux {facts.release}")


def _btf(facts: Facts) -> Finding:
    if facts.btf:
        return Finding("btf", Level.OK, f"the kernel describes its types in {BTF}")
    return Finding(
        "btf",
        Level.FAIL,
        f"no {BTF}",
        "podspan needs CONFIG_DEBUG_INFO_BTF=y; stock distribution kernels have it",
    )


def _kprobes(facts: Facts) -> Finding:
    return _required("kprobes", facts.kprobes, "the kernel can be probed")


def _bpffs(facts: Facts) -> Finding:
    if facts.bpffs is not None and facts.container:
        return Finding(
            "bpffs",
            Level.FAIL,
            str(facts.bpffs),
            f"mount the node's {PIN_DIR.parent} into the container (hostPath), with "
            "mountPropagation: HostToContainer",
        )
    return _required("bpffs", facts.bpffs, f"mounted at {PIN_DIR.parent}")


def _cgroup(facts: Facts) -> Finding:
    if isinstance(facts.cgroup, KernelError):
        return _required("cgroup", facts.cgroup, "")
    if facts.cgroup_partly:
        return Finding(
            "cgroup",
            Level.WARN,
            f"{facts.cgroup} shows this container only: no other pod would be traced",
            "mount the node's /sys/fs/cgroup into the container (hostPath); right "
            "where the node itself is a container, as with kind",
        )
    return Finding("cgroup", Level.OK, f"cgroup v2 is mounted at {facts.cgroup}")


def _bcc(facts: Facts) -> Finding:
    if isinstance(facts.bcc, KernelError):
        return _required("bcc", facts.bcc, "")
    return Finding("bcc", Level.OK, f"bcc {facts.bcc}")


def _processes(facts: Facts) -> Finding | None:
    if facts.node_pids:
        return None
    return Finding(
        "processes",
        Level.WARN,
        "the node's processes are not seen: connections older than the agent and pods "
        "without a name under /run/netns are not found",
        "the pod needs hostPID: true; right where the node itself is a container, as "
        "with kind",
    )


def _iptables(facts: Facts) -> Finding:
    there = [f"nft (iptables {facts.nft})"] if facts.nft else []
    there += ["legacy (python-iptables)"] if facts.legacy else []
    if there:
        return Finding("iptables", Level.OK, f"podspan init can use {', '.join(there)}")
    return Finding(
        "iptables",
        Level.WARN,
        "neither variant is installed: podspan init cannot write redirect rules here",
        "apt-get install iptables; only init containers and --engine redirect need it",
    )


def _queue(facts: Facts) -> Finding:
    module = "nfnetlink_queue"
    if facts.queue == "loaded":
        return Finding("nfqueue", Level.OK, f"{module} is there")
    if facts.queue == "loadable":
        return Finding("nfqueue", Level.OK, f"{module} is loaded when it is needed")
    known = facts.queue == "missing"
    return Finding(
        "nfqueue",
        Level.WARN,
        f"the kernel has no {module}: workers cannot be put into a connection's way"
        if known
        else f"{module} is not loaded, and {MODULES} is not seen",
        "needs CONFIG_NETFILTER_NETLINK_QUEUE; without it HTTP/2 and edge pods are not "
        "redirected"
        if known
        else f"modprobe {module} on the node, if you redirect",
    )


def _selftest(facts: Facts) -> Finding | None:
    if facts.untried:
        return Finding("self-test", Level.WARN, f"not run: {facts.untried}")
    if facts.selftest is None:
        return None
    if isinstance(facts.selftest, PodspanError):
        return Finding(
            "self-test", Level.FAIL, str(facts.selftest), facts.selftest.hint
        )
    if facts.selftest:
        return Finding(
            "self-test",
            Level.WARN,
            f"the kernel engine fails here: {facts.selftest}",
            "--engine auto redirects instead, which needs podspan init in the pods",
        )
    return Finding("self-test", Level.OK, "the kernel engine works here")


def _agent(facts: Facts) -> Finding:
    if facts.agent is not None:
        said = _Said(facts.agent)
        up = _duration(facts.now_s - said.number("started_s"))
        text = f"podspan {said.text('version')}, pid {said.number('pid'):.0f}, up {up}"
        if not said.text("engine"):
            return Finding("agent", Level.WARN, f"{text}, is starting")
        return Finding("agent", Level.OK, f"{text}, answers at {facts.address}")
    if facts.holder is not None:
        where = facts.address or "any address"
        return Finding(
            "agent",
            Level.WARN,
            f"one runs (pid {facts.holder}), but does not answer: {facts.silence}",
            f"asked at {where}; its own --status-address may be another: "
            "podspan doctor --address ADDR:PORT",
        )
    return Finding(
        "agent",
        Level.OK,
        f"none runs here ({facts.silence})",
        "start it: podspan agent",
    )


def _engine(facts: Facts) -> Finding | None:
    if facts.agent is None:
        return None
    said = _Said(facts.agent)
    engine = said.text("engine")
    if not engine:
        return None
    text = f"{engine}: {said.text('engine_reason')}"
    if said.text("selftest"):
        return Finding(
            "engine",
            Level.WARN,
            text,
            "pods are traced by way of workers where podspan init has prepared them; "
            "another kernel may do without",
        )
    return Finding("engine", Level.OK, text)


def _activity(facts: Facts) -> Finding | None:
    if facts.agent is None:
        return None
    said = _Said(facts.agent)
    text = f"exchanges={said.number('exchanges'):.0f} spans={said.number('spans'):.0f}"
    exporters = facts.agent.get("exporters")
    for name, counts in _Said(exporters).all():
        text += "".join(f" {name}_{key}={count}" for key, count in _Said(counts).all())
    return Finding("activity", Level.OK, text)


def _losses(facts: Facts) -> Finding | None:
    if facts.agent is None:
        return None
    lost = _counts(facts.agent.get("losses"))
    if not lost:
        return Finding("losses", Level.OK, "nothing was lost")
    return Finding(
        "losses",
        Level.WARN,
        lost,
        "traces are incomplete, calls are not affected; the agent's log says when",
    )


def _redirect(facts: Facts) -> Finding | None:
    if facts.agent is None:
        return None
    counts = _counts(facts.agent.get("redirect"), "redirect_")
    return Finding("redirect", Level.OK, counts or "no worker is needed")


CHECKS: Final[tuple[Check, ...]] = (
    _privilege,
    _kernel,
    _btf,
    _kprobes,
    _bpffs,
    _cgroup,
    _processes,
    _bcc,
    _iptables,
    _queue,
    _selftest,
    _agent,
    _engine,
    _activity,
    _losses,
    _redirect,
)


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return what all checks have to say."""
    return tuple(finding for check in CHECKS if (finding := check(facts)) is not None)


def _required(name: str, error: KernelError | None, good: str) -> Finding:
    if error is not None:
        return Finding(name, Level.FAIL, str(error), error.hint)
    return Finding(name, Level.OK, good)


# What an agent answered, which may be of another version.


class _Said:
    """Reads a JSON object, whatever is in it."""

    def __init__(self, said: object) -> None:
        self._said = said if isinstance(said, dict) else {}

    def text(self, key: str) -> str:
        return _printable(self._said.get(key, ""))

    def number(self, key: str) -> float:
        value = self._said.get(key)
        return value if isinstance(value, int | float) else 0

    def all(self) -> list[tuple[str, Any]]:
        return [(_printable(key), value) for key, value in self._said.items()]


def _counts(said: object, prefix: str = "") -> str:
    return " ".join(
        f"{name.removeprefix(prefix)}={_printable(count)}"
        for name, count in _Said(said).all()
        if count
    )


def _printable(value: object) -> str:
    """Return a text that does nothing to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


# Facts.


def look(address: Address | None, environment: Mapping[str, str]) -> Facts:
    """Gather the facts of this process's node, without changing anything."""
    agent, silence = ask(address)
    cgroup = _tried(cgroup_root)
    return Facts(
        release=platform.release(),
        root=os.geteuid() == 0,
        capabilities=_capabilities(Path("/proc/self/status").read_text()),
        btf=os.access(BTF, os.R_OK),
        kprobes=_error(require_kprobes),
        bpffs=_error(lambda: require_bpffs(PIN_DIR.parent)),
        cgroup=cgroup,
        cgroup_partly=isinstance(cgroup, str) and _shows_a_part(cgroup),
        bcc=_tried(bcc_version),
        nft=_nft_version(),
        legacy=importlib.util.find_spec("iptc") is not None,
        queue=queue_state(QUEUE_FILE, MODULES / platform.release()),
        container="KUBERNETES_SERVICE_HOST" in environment
        or any(mark.exists() for mark in CONTAINER_MARKS),
        node_pids=_namespace("pid") == INIT_PID_NS,
        holder=lock_holder(PIN_DIR),
        address=address,
        agent=agent,
        silence=silence,
        now_s=time.time(),
    )


T = TypeVar("T")


def _tried(call: Callable[[], T]) -> T | KernelError:
    try:
        return call()
    except KernelError as error:
        return error


def _error(call: Callable[[], None]) -> KernelError | None:
    result = _tried(call)
    return result if isinstance(result, KernelError) else None


def _capabilities(status: str) -> int:
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _namespace(kind: str) -> int:
    with suppress(OSError):
        return Path(f"/proc/self/ns/{kind}").stat().st_ino
    return 0


def _shows_a_part(mount_point: str) -> bool:
    """Whether a cgroup file system begins at this container's own group."""
    if _namespace("cgroup") == INIT_CGROUP_NS:
        return False
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _, _, _, root, where, *_ = line.split()
        if where == mount_point:
            # Relative to our own group: above it there would be "/..".
            return root == "/"
    return False


def bcc_version() -> str:
    """Import bcc and return its version; KernelError where that fails."""
    try:
        return str(getattr(import_module("bcc"), "__version__", "of unknown version"))
    except (ImportError, OSError, AttributeError) as exc:
        raise KernelError(
            f"bcc cannot be imported by {sys.executable}: {exc}",
            "apt-get install python3-bpfcc; a virtual environment needs "
            "--system-site-packages to see it",
        ) from exc


def _nft_version() -> str:
    """Return the version of an iptables that writes nft tables; "": there is none."""
    for program in ("iptables-nft", "iptables"):
        if shutil.which(program) is None:
            continue
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run(
                [program, "-V"],
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
            ).stdout  # iptables v1.8.9 (nf_tables)
            if "nf_tables" in said:
                return said.split()[1].removeprefix("v")
    return ""


def queue_state(file: Path, modules: Path) -> str:
    """Say whether the kernel has nfnetlink_queue, without loading it.

    `file` is there where it is loaded, `modules` holds what modprobe goes by.
    """
    if file.exists():
        return "loaded"
    if not modules.is_dir():
        return "not known"
    for name in ("modules.dep", "modules.builtin"):
        with suppress(OSError):
            if "/nfnetlink_queue.ko" in (modules / name).read_text():
                return "loadable"
    return "missing"


def lock_holder(directory: Path, locks: Path = LOCKS) -> int | None:
    """Return the process that has flock(2)ed a directory; None where none has.

    Of another pid namespace than ours it is not seen.
    """
    try:
        stat = directory.stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 4711 00:1c:12345 0 EOF
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for line in lines:
        words = line.split()
        if words[1] == "FLOCK" and words[5] == device:
            return int(words[4])
    return None


def ask(address: Address | None) -> tuple[Mapping[str, Any] | None, str]:
    """Return what an agent says at its status port, or None and why it does not."""
    if address is None:
        return None, "it was not asked"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    connection = HTTPConnection(host, address.port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/status")
        with connection.getresponse() as response:
            said = json.loads(response.read(ANSWER_BYTES))
    except OSError as exc:
        return None, f"{address}: {exc.strerror or exc}"
    except (HTTPException, ValueError, RecursionError):
        return None, f"what answers at {address} is no podspan agent"
    finally:
        connection.close()
    if not isinstance(said, dict) or "engine_reason" not in said:
        return None, f"what answers at {address} is no podspan agent"
    return said, ""


def try_kernel_engine() -> str | PodspanError:
    """Run the self-test as an agent does; return the fault, "" where there is none."""
    try:
        programs = Programs(TRIAL_CONNECTIONS, Options.of(config.parse([], {})))
        try:
            programs.attach_requests()
            return (
                selftest.find_fault(
                    lambda netns: programs.set_policy(
                        netns, POLICY_TRACE | POLICY_ENROL, 100.0
                    )
                )
                or ""
            )
        finally:
            programs.close()
    except PodspanError as error:
        return error


# The command.


def main(argv: Sequence[str]) -> int:
    """Run `podspan doctor`; the exit code is 1 if something failed."""
    arguments = _parser().parse_args(argv)
    facts = look(_address(arguments.address, os.environ), os.environ)
    findings = examine(facts)
    if arguments.self_test:
        facts = _with_self_test(facts, findings)
        findings = examine(facts)
    text = as_json(facts, findings) if arguments.json else as_text(facts, findings)
    sys.stdout.write(text)
    return int(any(finding.level is Level.FAIL for finding in findings))


def _with_self_test(facts: Facts, findings: Sequence[Finding]) -> Facts:
    """Run it where it makes sense."""
    if facts.agent is not None or facts.holder is not None:
        return replace(facts, untried="an agent runs, and has done it when it started")
    missing = [
        finding.name
        for finding in findings
        if finding.level is Level.FAIL and finding.name in SELF_TEST_NEEDS
    ]
    if missing:
        return replace(facts, untried=f"repair first: {', '.join(missing)}")
    return replace(facts, selftest=try_kernel_engine())


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return it all for machines; `agent` is what its status port says, or null."""
    said = {
        "version": version(),
        "failed": sum(finding.level is Level.FAIL for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "agent": facts.agent,
    }
    return json.dumps(said, indent=2) + "\n"


def as_text(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return it all for people."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5}{finding.name:<11}{finding.text}")
        if finding.hint:
            lines.append(f"{'':<16}-> {finding.hint}")
    lines += _pods(facts.agent)
    lines += ["", _verdict(findings)]
    return "\n".join(lines) + "\n"


def _verdict(findings: Sequence[Finding]) -> str:
    failed = [finding.name for finding in findings if finding.level is Level.FAIL]
    warned = [finding.name for finding in findings if finding.level is Level.WARN]
    text = (
        f"The agent cannot run here; failed: {', '.join(failed)}"
        if failed
        else "The agent can run here"
    )
    return text + (f"; warnings: {', '.join(warned)}" if warned else "") + "."


def _pods(agent: Mapping[str, Any] | None) -> list[str]:
    """Return a table of pods, their engines and the reasons."""
    pods = agent.get("pods") if agent else None
    if not isinstance(pods, list) or not pods:
        return []
    rows = [("POD", "NETNS", "ENGINE", "WHY")]
    for pod in map(_Said, pods):
        namespace, name = pod.text("namespace"), pod.text("name")
        shown = f"{namespace}/{name}" if namespace else name or "-"
        rows.append((shown, pod.text("netns"), pod.text("engine"), pod.text("reason")))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "",
        *(
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]
            )
            for row in rows
        ),
    ]


def _address(given: str | None, environment: Mapping[str, str]) -> Address | None:
    """Return where to ask: as said, else as the agent in this pod is told."""
    text = given if given is not None else environment.get(ADDRESS_VARIABLE, "")
    if given is None and not text:
        return STATUS_ADDRESS
    try:
        return values.address(text)
    except ValueError as exc:
        source = ADDRESS_VARIABLE if given is None else "--address"
        raise UsageError(
            f"bad value {text!r} for {source}: {exc}", "podspan doctor --help"
        ) from exc


def _parser() -> Parser:
    parser = Parser(
        prog="podspan doctor",
        description="Say what this node can do, what its agent does, and what to do "
        "about what is wrong.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--address",
        metavar="ADDR:PORT",
        help=f"the agent's --status-address; none: do not ask [{ADDRESS_VARIABLE}, "
        f"{STATUS_ADDRESS}]",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="try the kernel engine on sockets of its own, in a network namespace of "
        "its own, unless an agent runs",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser
