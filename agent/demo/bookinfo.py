"""Bookinfo: who calls whom, on which path, and how long each works.

Istio's sample application without its pages. Imports next to nothing: every service's
process reads it, and in an emulated machine imports are most of a start.
"""

from typing import NamedTuple

# All of Bookinfo's services listen here.
PORT = 9080


class Service(NamedTuple):
    """One service: what it answers to, and what it does before it answers."""

    name: str
    path: str
    work_ms: int
    calls: tuple[str, ...]  # one after the other


SERVICES = {
    service.name: service
    for service in (
        Service("productpage", "/productpage", 4, ("details", "reviews")),
        Service("details", "/details/0", 2, ()),
        Service("reviews", "/reviews/0", 3, ("ratings",)),
        Service("ratings", "/ratings/0", 2, ()),
    )
}

# Calls productpage, and is called by none.
CLIENT = Service("client", "", 0, ("productpage",))

PODS = (*SERVICES, CLIENT.name)


def subtree_work_ms(name: str) -> int:
    """Return how long a call of this service takes at the very least."""
    service = SERVICES[name]
    return service.work_ms + sum(subtree_work_ms(callee) for callee in service.calls)
