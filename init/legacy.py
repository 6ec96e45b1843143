"""The legacy tables, through python-iptables: the only importer of iptc.

Needs no iptables binary, but the extensions of its package (libxt_*.so). A table is
read, changed in memory and written back whole, so a change takes effect at once or not
at all. iptc does not take the lock by which the iptables commands exclude each other;
we do, because a table written back would undo what another wrote meanwhile.

Rules that are not ours are never decoded: their extensions need not be installed.

Each operation runs in a child process. libxtables registers an extension for the family
in use when its library is loaded, once: in a process that wrote an IPv4 REDIRECT there
is none for IPv6 ("can't find target REDIRECT": python-iptables 1.2.0, iptables 1.8.9).
And libxtables ends the process at some errors.
"""

from __future__ import annotations

import fcntl
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from podspan.agent.errors import RedirectError
from podspan.init.plan import (
    CHAIN_PREFIX,
    RETURN,
    TABLES,
    Family,
    Module,
    Rule,
    chains,
    is_ours,
    of_table,
)

NAME: Final = "legacy"

# XT_LOCK_NAME in iptables' configure.ac, since 1.8.0; flock(2), exclusive.
LOCK_PATH: Final = Path("/run/xtables.lock")
LOCK_TIMEOUT_S: Final = 30  # as Istio's --wait=30
LOCK_POLL_S: Final = 0.05

# The tables that exist in this namespace. Reading a table that does not would make it.
TABLE_NAMES: Final = {
    Family.IPV4: Path("/proc/thread-self/net/ip_tables_names"),
    Family.IPV6: Path("/proc/thread-self/net/ip6_tables_names"),
}

PROBE_CHAIN: Final = CHAIN_PREFIX + "PROBE"

P = ParamSpec("P")
T = TypeVar("T")


def why_unusable(family: Family) -> str | None:
    """Try a rule in nat: None if this variant works here, else what it said."""
    try:
        _in_child(_probe, family)
    except RedirectError as exc:
        return exc.stderr or str(exc)
    return None


def has_rules(family: Family) -> bool:
    """Say whether any legacy table of this namespace holds a rule."""
    names = _existing_tables(family)
    return bool(names) and _in_child(_any_has_rules, family, names)


def holds(family: Family, rules: Sequence[Rule]) -> bool:
    """Say whether `rules`, in their order, are all that there is of ours."""
    names = _existing_tables(family)
    if {rule.table for rule in rules} - set(names):
        return False
    return not names or _in_child(_holds, family, names, rules)


def replace(family: Family, rules: Sequence[Rule]) -> bool:
    """Make `rules` all that there is of ours; without rules: remove it.

    Returns whether there was anything of ours before.
    """
    made = [name for name in TABLES if of_table(rules, name)]
    undone = [name for name in _existing_tables(family) if name not in made]
    undone.sort(key=lambda name: name != "nat")  # what redirects goes first
    names = [*made, *undone]
    return bool(names) and _in_child(_replace, family, names, rules)


def _in_child(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return or raise what `act` does, with a libxtables of its own."""
    _iptc()  # here, as it takes half a second and loads no extension yet
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        try:
            return pool.submit(act, *args, **kwargs).result()
        except BrokenProcessPool as exc:
            raise RedirectError(
                "libxtables ended the process that used it",
                hint="what it said stands above",
                command="import iptc",
            ) from exc


def _probe(family: Family) -> None:
    with _table(family, "nat", f"add a rule to {PROBE_CHAIN}") as table:
        _undo(table, PROBE_CHAIN)  # a probe that was cut short
        _create(table, family, [Rule(PROBE_CHAIN, RETURN)])
        table.commit()
    with _table(family, "nat", f"remove {PROBE_CHAIN}") as table:
        _undo(table, PROBE_CHAIN)
        table.commit()


def _any_has_rules(family: Family, names: Sequence[str]) -> bool:
    for name in names:
        with _table(family, name, f"read {name}") as table:
            if any(table.first_rule(chain.name) for chain in table.chains):
                return True
    return False


def _holds(family: Family, names: Sequence[str], rules: Sequence[Rule]) -> bool:
    for name in names:
        with _table(family, name, f"read {name}") as table:
            wanted = of_table(rules, name)
            # The chains first: a jump cannot be encoded to one that is not there.
            ours = {chain.name for chain in table.chains if is_ours(chain.name)}
            if ours != set(chains(wanted)):
                return False
            if _ours(table) != _expected(family, wanted):
                return False
    return True


def _ours(table: Any) -> dict[str, list[Any]]:
    """Return our chains, and the chains that jump into them, with our rules there."""
    names = [chain.name for chain in table.chains]
    ours: dict[str, list[Any]] = {name: [] for name in names if is_ours(name)}
    for name in names:
        for entry in _entries(table, name):
            if is_ours(name) or _target_name(table, entry) in ours:
                rule = table.create_rule(entry, _iptc().Chain(table, name))
                ours.setdefault(name, []).append(_facts(rule))
    return ours


def _expected(family: Family, rules: Sequence[Rule]) -> dict[str, list[Any]]:
    """Return what `_ours` finds in a table once the rules are applied."""
    expected: dict[str, list[Any]] = {name: [] for name in chains(rules)}
    for rule in rules:
        facts = _facts(_encode(family, rule))
        expected.setdefault(rule.chain, []).append(facts)
    return expected


def _facts(rule: Any) -> tuple[object, ...]:
    """Return what a rule of iptc says, as values that can be compared.

    iptc's own comparison is blind to the targets' names and the matches' order.
    """
    modules = [*rule.matches, rule.target]
    return (
        *(rule.src, rule.dst, rule.in_interface, rule.out_interface, rule.protocol),
        *((module.name, module.get_all_parameters()) for module in modules),
        bool(rule.target.goto),
    )


def _entries(table: Any, chain: str) -> Iterator[Any]:
    entry = table.first_rule(chain)
    while entry:
        yield entry
        entry = table.next_rule(entry)


def _replace(family: Family, names: Sequence[str], rules: Sequence[Rule]) -> bool:
    any_residue = False
    for name in names:
        with _table(family, name, f"write our rules to {name}") as table:
            mine = of_table(rules, name)
            residue = any(is_ours(chain.name) for chain in table.chains)
            any_residue |= residue
            if mine or residue:
                _undo(table)
                _create(table, family, mine)
                table.commit()
    return any_residue


def _undo(table: Any, prefix: str = CHAIN_PREFIX) -> None:
    ours = [c.name for c in table.chains if c.name.startswith(prefix)]
    others = [c.name for c in table.chains if not c.name.startswith(prefix)]
    for chain in others:
        _delete_jumps(table, chain, ours)
    # All are emptied before the first is deleted: they refer to each other.
    for chain in ours:
        table.flush_entries(chain)
    for chain in ours:
        table.delete_chain(chain)


def _delete_jumps(table: Any, chain: str, ours: list[str]) -> None:
    entry = table.first_rule(chain)
    while entry:
        if _target_name(table, entry) in ours:
            rule = table.create_rule(entry, _iptc().Chain(table, chain))
            table.delete_entry(chain, rule.rule, rule.mask)
            entry = table.first_rule(chain)  # the deletion moved the others
        else:
            entry = table.next_rule(entry)


def _target_name(table: Any, entry: Any) -> str:
    name = table.get_target(entry)
    return name.decode() if name else ""


def _create(table: Any, family: Family, rules: Sequence[Rule]) -> None:
    for chain in chains(rules):
        table.create_chain(chain)
    for rule in rules:
        entry = _encode(family, rule)
        entry.final_check()
        table.append_entry(rule.chain, entry.rule)


def _encode(family: Family, rule: Rule) -> Any:
    iptc = _iptc()
    encoded = iptc.Rule() if family is Family.IPV4 else iptc.Rule6()
    # The protocol first: extensions such as tcp are looked up by it.
    if rule.protocol is not None:
        encoded.protocol = rule.protocol
    if rule.source is not None:
        encoded.src = str(rule.source)
    if rule.destination is not None:
        encoded.dst = str(rule.destination)
    if rule.in_interface is not None:
        encoded.in_interface = rule.in_interface
    if rule.out_interface is not None:
        encoded.out_interface = rule.out_interface
    for match in rule.matches:
        made = encoded.create_match(match.name)
        _set_options(made, match)
    _set_options(encoded.create_target(rule.target.name), rule.target)
    return encoded


def _set_options(made: Any, module: Module) -> None:
    for name, value in module.options:
        negated = ["!"] if name.startswith("!") else []
        made.set_parameter(name.removeprefix("!"), [*negated, value])


def _existing_tables(family: Family) -> list[str]:
    try:
        return TABLE_NAMES[family].read_text().split()
    except FileNotFoundError:  # the kernel has no legacy tables, or not loaded them
        return []


@contextmanager
def _table(family: Family, name: str, what: str) -> Iterator[Any]:
    """Yield a fresh copy of a table; only an explicit commit writes it back."""
    iptc = _iptc()
    command = f"iptc, IPv{family.value}: {what}"
    with _lock():
        try:
            kind = iptc.Table if family is Family.IPV4 else iptc.Table6
            # Else a rule's first jump looks for its chain in all tables of the kernel,
            # and so makes them in this namespace, for good.
            kind.existing_table_names.update({each: each == name for each in kind.ALL})
            table = kind(name, autocommit=False)
            table.refresh()  # the object is shared in this process, and may be old
            yield table
        except (iptc.IPTCError, iptc.XTablesError, ValueError) as exc:
            # iptc quotes libiptc's bytes: can't commit: b'Permission denied'
            said = str(exc).replace("b'", "'")
            raise RedirectError(
                f"legacy iptables cannot {what}: {said}", command=command, stderr=said
            ) from exc


@contextmanager
def _lock() -> Iterator[None]:
    try:
        lock = LOCK_PATH.open("a")
    except OSError:
        # A read-only /run: whoever else is in this container cannot lock either.
        yield
        return
    with lock:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                if time.monotonic() > deadline:
                    raise RedirectError(
                        f"{LOCK_PATH} is locked for {LOCK_TIMEOUT_S} s",
                        hint=f"another iptables is running; see: fuser -v {LOCK_PATH}",
                    ) from exc
                time.sleep(LOCK_POLL_S)
            else:
                break
        yield


def _iptc() -> Any:
    """Import iptc late: it loads libxtables, which nft-only machines may lack."""
    try:
        with warnings.catch_warnings():
            # It looks for modprobe on import, and leaves what it opened.
            warnings.simplefilter("ignore", ResourceWarning)
            import iptc  # noqa: PLC0415
    except Exception as exc:  # it raises XTablesError, OSError or worse on import
        raise RedirectError(
            f"python-iptables does not load: {exc}",
            hint="install the package iptables; XTABLES_LIBDIR names its libxt_*.so",
            command="import iptc",
        ) from exc
    return iptc
