"""`podspan init`: decide by `options` and `plan`, act by `apply` and `validate`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from podspan.agent import version
from podspan.agent.errors import NoPrivilege, RedirectError, UsageError
from podspan.agent.kernel import syscall
from podspan.init import apply, namespace, plan, routing, validate
from podspan.init.options import Options, parse
from podspan.init.plan import Family, Redirection

log = logging.getLogger(__name__)

AGENT_POLL_S: Final = 0.05

# linux/capability.h. Legacy tables are read and written over a raw socket.
CAPABILITIES: Final = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW"}


def main(argv: Sequence[str]) -> int:
    """Run `podspan init` with the arguments after the word init."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    options = parse(argv, os.environ)
    for warning in options.warnings:
        log.warning(warning)
    if options.action == "plan" or options.dry_run:
        return _print(options)
    if not options.skip_rules:
        # Whether an agent is there or not: a mistake shows on the first try.
        _require_capabilities()
    if options.network_namespace:
        namespace.enter(options.network_namespace)
    namespace.refuse_host()
    if options.action == "clean":
        apply.clean()
        return 0
    log.info("podspan %s %s", version(), _facts(options.redirection))
    if options.unwanted:
        sys.stdout.write(f"podspan init: nothing installed: {options.unwanted}\n")
        return 0
    return _apply(options)


def _print(options: Options) -> int:
    text = _rendered(options)
    sys.stdout.write(text)
    if options.dry_run and options.dry_run_file:
        try:
            Path(options.dry_run_file).write_text(text)
        except OSError as exc:
            raise UsageError(
                f"podspan init: cannot write {options.dry_run_file}: {exc.strerror}",
                hint="DRY_RUN_FILE_PATH names a file to be written",
            ) from exc
    return 0


def _rendered(options: Options) -> str:
    if options.action == "clean":
        return "# everything that podspan init made would be removed\n"
    if options.unwanted:
        return f"# nothing would be installed: {options.unwanted}\n"
    wanted = options.redirection
    return "".join(
        f"# IPv{family.value}\n"
        f"{plan.render(plan.plan(wanted, family))}"
        f"{plan.render_routing(wanted.source, family)}"
        for family in _families(options)
    )


def _apply(options: Options) -> int:
    families = _families(options)
    if not options.skip_rules:
        wanted = options.redirection
        if wanted.guard and not _agent_is_there(wanted.guard, options.require_agent):
            absence = _absence(wanted.guard)
            sys.stdout.write(f"podspan init: nothing installed: {absence}\n")
            if not options.validate:
                return 0
        else:
            families = apply.apply(wanted, _manner(options))
    if options.validate:
        validate.validate(options.redirection, families, options.probe_timeout)
        log.info("validated families=%s", ",".join(f"IPv{each}" for each in families))
    return 0


def _manner(options: Options) -> apply.Manner:
    return apply.Manner(
        families=_families(options),
        need_ipv6=bool(options.dual_stack),
        need_source=options.need_source,
        need_gate=options.need_gate,
        variant=options.variant,
        always_write=options.always_write,
    )


def _families(options: Options) -> tuple[Family, ...]:
    if options.dual_stack is False and not routing.has_ipv6_first():
        return (Family.IPV4,)
    return tuple(Family)


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


def _facts(wanted: Redirection) -> str:
    """Return the settings as key=value, for the log."""
    return " ".join(
        f"{name}={getattr(wanted, name)!r}" for name in wanted.__dataclass_fields__
    )
