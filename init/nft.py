"""The nft variant of iptables, through its own save and restore commands.

One restore is one kernel transaction per table: all of it takes effect, or nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from podspan.agent.errors import RedirectError
from podspan.init import saved
from podspan.init.plan import CHAIN_PREFIX, Family, Rule, render

NAME: Final = "nft"

PROGRAMS: Final = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}

# A rule is added and deleted in one transaction, as Istio probes: reading a table, or
# touching the filter table, succeeds where nat rules do not (istio/istio #57380).
PROBE_CHAIN: Final = CHAIN_PREFIX + "PROBE"
PROBE: Final = f"""*nat
:{PROBE_CHAIN} - [0:0]
-A {PROBE_CHAIN} -j RETURN
-F {PROBE_CHAIN}
-X {PROBE_CHAIN}
COMMIT
"""

# What every command says on a kernel without nf_tables: then nothing can be in it.
NO_KERNEL_PART: Final = "Failed to initialize nft"

# A restore takes milliseconds; one that waits for something will wait for ever.
TIMEOUT_S: Final = 30


def why_unusable(family: Family) -> str | None:
    """Try a rule in nat: None if this variant works here, else what it said."""
    try:
        if not _installed(family):
            return f"{PROGRAMS[family]}-nft is not installed"
        _restore(family, PROBE)
    except RedirectError as exc:
        return exc.stderr or str(exc)
    return None


def holds(family: Family, rules: Sequence[Rule]) -> bool:
    """Say whether `rules`, in their order, are all that there is of ours."""
    if not _installed(family):
        return not rules
    return saved.ours(_save(family)) == saved.expected(rules)


def replace(family: Family, rules: Sequence[Rule]) -> bool:
    """Make `rules` all that there is of ours; without rules: remove it.

    Returns whether there was anything of ours before.
    """
    if not rules and not _installed(family):
        return False
    undo = saved.undo_lines(_save(family))
    if rules or undo:
        _restore(family, render(rules, undo))
    return bool(undo)


def _save(family: Family) -> str:
    try:
        return _run([_command(family, "save")])
    except RedirectError as exc:
        if NO_KERNEL_PART in exc.stderr:
            return ""
        raise


def _restore(family: Family, text: str) -> None:
    _run([_command(family, "restore"), "--noflush"], text)


def _command(family: Family, verb: str) -> str:
    """Name the nft flavour of a command, which some distributions have only as plain.

    The plain name is not taken where it means the legacy variant: that one is
    `podspan.init.legacy`'s.
    """
    program = PROGRAMS[family]
    if shutil.which(f"{program}-nft"):
        program += "-nft"
    return f"{program}-{verb}"


def _installed(family: Family) -> bool:
    program = PROGRAMS[family]
    if shutil.which(f"{program}-nft"):
        return True
    return shutil.which(program) is not None and "nf_tables" in _run([program, "-V"])


def _run(argv: list[str], text: str | None = None) -> str:
    command = " ".join(argv)
    try:
        done = subprocess.run(
            argv,
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise RedirectError(
            f"{argv[0]} is not installed",
            hint="install the package iptables (1.8 or later)",
            command=command,
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise RedirectError(
            f"{command} did not end within {TIMEOUT_S} s", command=command
        ) from exc
    if done.returncode != 0:
        said = done.stderr.strip()
        raise RedirectError(
            f"{command} failed: {said.splitlines()[0] if said else done.returncode}",
            command=command,
            stderr=said,
        )
    return done.stdout
