"""Apply the plan to the network namespace of this process: undo first, then do.

Each family's table changes in one step; over both families and both variants the
promise is kept by rolling back: after an error there is nothing of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from podspan.agent.errors import RedirectError
from podspan.init import legacy, nft
from podspan.init.plan import Family, Rule

log = logging.getLogger(__name__)

# Registered for the first network namespace only (net/core/sysctl_net_core.c,
# net_core_table with init_net): its presence tells where we are also from inside a
# container with hostNetwork, where /proc/1 is the container's own.
INIT_NET_MARK: Final = Path("/proc/sys/net/core/netdev_max_backlog")

# Absent where the kernel has no IPv6 or was booted with ipv6.disable=1.
IPV6_MARK: Final = Path("/proc/thread-self/net/if_inet6")


class Variant(Protocol):
    """One way into the kernel's nat tables; `legacy` and `nft` are such."""

    @property
    def NAME(self) -> str: ...  # noqa: N802

    def why_unusable(self, family: Family, /) -> str | None: ...

    def has_residue(self, family: Family, /) -> bool: ...

    def replace(self, family: Family, rules: Sequence[Rule], /) -> None: ...


VARIANTS: Final[tuple[Variant, ...]] = (legacy, nft)


def apply(plans: Mapping[Family, Sequence[Rule]]) -> None:
    """Install the plans; applying twice equals applying once."""
    try:
        for family, rules in plans.items():
            variant = _choose_or_skip(family)
            if variant is None:
                continue
            for other in VARIANTS:
                if other is not variant:
                    other.replace(family, ())
            variant.replace(family, rules)
            log.info("applied family=IPv%d variant=%s", family, variant.NAME)
    except BaseException:
        _remove_quietly()
        raise


def clean() -> None:
    """Remove all that is ours, of any run, version, variant and family."""
    failures = _remove()
    if failures:
        raise failures[0]


def refuse_host() -> None:
    """Raise in the host's network namespace: rules here would redirect the node.

    Blind: a node that is itself a container (kind) has a namespace like any pod's.
    """
    if INIT_NET_MARK.exists():
        raise RedirectError(
            "this is the host's network namespace, podspan init is for a pod's",
            hint="run it in the pod's init container, or: nsenter --net=FILE "
            "podspan init ...; pods with hostNetwork need no init",
        )


def choose(family: Family) -> Variant:
    """Choose by trying, in Istio's order: legacy in use, else nft, else legacy.

    Istio's last resort is the plain `iptables`. That is one of the two variants, and
    here legacy needs no command.
    """
    reasons: list[str] = []
    if legacy.has_rules(family) and _usable(legacy, family, reasons):
        return legacy
    for variant in (nft, legacy):
        if _usable(variant, family, reasons):
            return variant
    raise RedirectError(
        f"no way to write IPv{family.value} nat rules: {'; '.join(reasons)}",
        hint="needs CAP_NET_ADMIN and CAP_NET_RAW, the package iptables, and a "
        "kernel with nf_tables or iptable_nat",
        stderr="\n".join(reasons),
    )


def _usable(variant: Variant, family: Family, reasons: list[str]) -> bool:
    try:
        reason = variant.why_unusable(family)
    except RedirectError as exc:
        reason = str(exc)
    if reason is not None:
        reasons.append(f"{variant.NAME}: {reason}")
        log.debug("unusable family=IPv%d variant=%s: %s", family, variant.NAME, reason)
    return reason is None


def _choose_or_skip(family: Family) -> Variant | None:
    """IPv4 must work; IPv6 is left alone where kernel or namespace has none."""
    if family is Family.IPV4:
        return choose(family)
    if not IPV6_MARK.exists():
        log.info("skipped family=IPv6: the kernel has no IPv6")
        return None
    try:
        return choose(family)
    except RedirectError as exc:
        log.warning("skipped family=IPv6: %s", exc)
        return None


def _remove() -> list[RedirectError]:
    """Go on after a failure: what one variant refuses another may hold."""
    failures = []
    for family in Family:
        for variant in VARIANTS:
            try:
                variant.replace(family, ())
            except RedirectError as exc:
                failures.append(exc)
    return failures


def _remove_quietly() -> None:
    """Roll back. What failed first is the error that is reported."""
    with suppress(Exception):
        for failure in _remove():
            log.warning("not rolled back: %s", failure)
