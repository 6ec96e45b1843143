"""Apply the plan to the network namespace of this process: undo first, then do.

Each table changes in one step, and the one that redirects last; over tables, families
and variants the promise is kept by rolling back: after an error there is nothing of
ours. What is in place already and asks no guard is left as it is, its counters too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol

from podspan.agent.errors import RedirectError
from podspan.init import legacy, nft, routing
from podspan.init.plan import Family, Redirection, Rule, Source, plan

log = logging.getLogger(__name__)


class Variant(Protocol):
    """One way into the kernel's nat tables; `legacy` and `nft` are such."""

    @property
    def NAME(self) -> str: ...  # noqa: N802

    def why_unusable(self, family: Family, /) -> str | None: ...

    def holds(self, family: Family, rules: Sequence[Rule], /) -> bool: ...

    def replace(self, family: Family, rules: Sequence[Rule], /) -> bool: ...


VARIANTS: Final[Mapping[str, Variant]] = {"legacy": legacy, "nft": nft}


@dataclass(frozen=True, slots=True)
class Manner:
    """How to apply; the defaults choose and degrade, what is asked for must work."""

    families: tuple[Family, ...] = tuple(Family)
    need_ipv6: bool = False
    need_source: bool = False  # else loopback where transparent does not work
    need_gate: bool = False  # else none where the kernel has no queues
    variant: str | None = None  # a key of VARIANTS; None: choose by trying
    always_write: bool = False  # also what is in place already


def apply(wanted: Redirection, manner: Manner) -> tuple[Family, ...]:
    """Install the rules; applying twice equals applying once.

    Returns the families that have them.
    """
    applied = []
    try:
        for family in Family:
            variant = _choose_or_skip(family, manner)
            if variant is None:
                for failure in _remove_family(family):
                    log.warning("not removed family=IPv%d: %s", family, failure)
            else:
                _apply_family(wanted, family, variant, manner)
                applied.append(family)
    except BaseException:
        _remove_quietly()
        raise
    return tuple(applied)


def _apply_family(
    wanted: Redirection, family: Family, variant: Variant, manner: Manner
) -> None:
    failures: list[RedirectError] = []
    for attempt in _attempts(wanted, manner):
        try:
            _install(attempt, family, variant, manner)
        except RedirectError as exc:
            failures.append(exc)
            continue
        if attempt.source is not wanted.source:
            log.warning(
                "IPv%d: applications will see 127.0.0.6 or ::6 as their client where "
                "the agent relays a call: transparent sources do not work here: %s",
                family,
                failures[0],
            )
        if attempt.gate is not wanted.gate:
            log.warning(
                "IPv%d: connect(2) will succeed also where nobody answers: there is no "
                "NFQUEUE here: %s",
                family,
                failures[0],
            )
        return
    raise failures[0]


def _attempts(wanted: Redirection, manner: Manner) -> list[Redirection]:
    """Return what is wanted, and what will do where the kernel has less."""
    attempts = [wanted]
    if wanted.source is not Source.LOOPBACK and not manner.need_source:
        attempts.append(replace(wanted, source=Source.LOOPBACK))
    if wanted.guard and wanted.gate and not manner.need_gate:
        attempts += [replace(attempt, gate=False) for attempt in attempts]
    return attempts


def _install(
    wanted: Redirection, family: Family, variant: Variant, manner: Manner
) -> None:
    rules = plan(wanted, family)
    facts = f"family=IPv{family.value} variant={variant.NAME} source={wanted.source}"
    routing.replace(family, wanted.source)
    for other in VARIANTS.values():
        if other is not variant:
            other.replace(family, ())
    # Rules hold the guard that was pinned when they were written, and no listing tells
    # whether that is the one of today: what asks a guard is always written.
    lasting = not (manner.always_write or wanted.guard)
    if lasting and variant.holds(family, rules):
        log.info("in place already %s", facts)
        return
    replaced = variant.replace(family, rules)
    log.info("applied %s%s", facts, " in place of other rules" if replaced else "")


def clean() -> None:
    """Remove all that is ours, of any run, version, variant and family."""
    failures = _remove()
    if failures:
        raise failures[0]


def choose(family: Family, forced: str | None = None) -> Variant:
    """Choose by trying, in Istio's order: legacy in use, else nft, else legacy.

    Istio's last resort is the plain `iptables`. That is one of the two variants, and
    here legacy needs no command.
    """
    reasons: list[str] = []
    for variant in _candidates(family, forced):
        if _usable(variant, family, reasons):
            return variant
    raise RedirectError(
        f"no way to write IPv{family.value} nat rules: {'; '.join(reasons)}",
        hint="needs CAP_NET_ADMIN and CAP_NET_RAW, the package iptables, and a "
        "kernel with nf_tables or iptable_nat",
        stderr="\n".join(reasons),
    )


def _candidates(family: Family, forced: str | None) -> Iterable[Variant]:
    if forced is not None:
        return (VARIANTS[forced],)
    return (legacy, nft) if legacy.has_rules(family) else (nft, legacy)


def _usable(variant: Variant, family: Family, reasons: list[str]) -> bool:
    try:
        reason = variant.why_unusable(family)
    except RedirectError as exc:
        reason = str(exc)
    if reason is not None:
        reasons.append(f"{variant.NAME}: {reason}")
        log.debug("unusable family=IPv%d variant=%s: %s", family, variant.NAME, reason)
    return reason is None


def _choose_or_skip(family: Family, manner: Manner) -> Variant | None:
    """IPv4 must work; IPv6 is left alone where kernel or namespace has none."""
    if family not in manner.families:
        log.info("skipped family=IPv%d: not asked for", family)
        return None
    if family is Family.IPV4 or manner.need_ipv6:
        return choose(family, manner.variant)
    if not routing.IPV6_MARK.exists():
        log.info("skipped family=IPv6: the kernel has no IPv6")
        return None
    try:
        return choose(family, manner.variant)
    except RedirectError as exc:
        log.warning("skipped family=IPv6: %s", exc)
        return None


def _remove() -> list[RedirectError]:
    return [failure for family in Family for failure in _remove_family(family)]


def _remove_family(family: Family) -> list[RedirectError]:
    """Go on after a failure: what one variant refuses another may hold."""
    failures = []
    for variant in VARIANTS.values():
        try:
            variant.replace(family, ())
        except RedirectError as exc:
            failures.append(exc)
    try:
        routing.replace(family, None)
    except RedirectError as exc:
        failures.append(exc)
    return failures


def _remove_quietly() -> None:
    """Roll back. What failed first is the error that is reported."""
    with suppress(Exception):
        for failure in _remove():
            log.warning("not rolled back: %s", failure)
