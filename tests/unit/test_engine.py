"""The engine of a pod: option, annotation, self-test, ports; and the reason given."""

import pytest
from podspan.agent.engine import NO_PORTS, Plan, Wish, plan_of
from podspan.agent.exchange import Role

FAULT = "FIONREAD answers 0 where 100 bytes wait"
FAILED = f"the kernel engine's self-test failed: {FAULT}"
ALL = None
GRPC = (50051, Role.SERVER), (50052, Role.CLIENT)


@pytest.mark.parametrize(
    ("option", "fault", "wish", "plan"),
    [
        ("auto", None, Wish(), Plan("kernel", "self-test passed", True)),
        ("auto", FAULT, Wish(), Plan("redirect", FAILED, False, ALL, ALL)),
        (
            "auto",
            None,
            Wish(edge=True),
            Plan(
                "kernel+redirect",
                "self-test passed; inbound redirected: podspan.io/edge",
                True,
                ALL,
                NO_PORTS,
            ),
        ),
        ("kernel", None, Wish(), Plan("kernel", "--engine kernel", True)),
        (
            "redirect",
            None,
            Wish(),
            Plan("redirect", "--engine redirect", False, ALL, ALL),
        ),
        ("off", None, Wish(), Plan("off", "--engine off", False)),
        ("off", None, Wish("auto"), Plan("kernel", "self-test passed", True)),
        ("auto", None, Wish("off"), Plan("off", "podspan.io/engine: off", False)),
        (
            "auto",
            FAULT,
            Wish("kernel"),
            Plan(
                "off",
                f"podspan.io/engine: kernel, but its self-test failed: {FAULT}",
                False,
            ),
        ),
    ],
)
def test_plan(option, fault, wish, plan):
    assert plan_of(option, fault, wish) == plan
    assert plan.redirects == (plan.inbound is ALL)


def test_http2_is_redirected_port_by_port_and_way_by_way():
    plan = plan_of("auto", None, Wish(), GRPC)
    assert plan == Plan(
        "kernel+redirect",
        "self-test passed; HTTP/2 redirected: 50051, 50052",
        True,
        frozenset({50051}),
        frozenset({50052}),
    )


@pytest.mark.parametrize("option", ["kernel", "off"])
def test_http2_is_not_redirected_against_the_users_word(option):
    assert not plan_of(option, None, Wish(), GRPC).redirects
