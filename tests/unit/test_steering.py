"""Kernel, guard and workers follow the plans; fakes stand for them."""

import logging
from pathlib import Path
from typing import Any, cast

import pytest
from podspan.agent import config, steering
from podspan.agent.exchange import Role
from podspan.agent.kernel.guard import Want
from podspan.agent.kernel.options import POLICY_ENROL, POLICY_REDIRECT
from podspan.agent.steering import Steering

FRONT, BACK = 4026530001, 4026530002
BOTH = frozenset({Want(True, None), Want(False, None)})


class Kernel:
    def __init__(self):
        self.fault: str | None = None
        self.plans: dict[int, int] = {}
        self.redirected: dict[int, frozenset[Want]] = {}
        self.http2: frozenset[tuple[int, int, Role]] = frozenset()

    def set_plans(self, plans):
        self.plans = dict(plans)

    def redirect(self, netns, wants):
        self.redirected[netns] = wants

    def http2_ports(self, netns):
        self.http2 = frozenset(seen for seen in self.http2 if seen[0] in netns)
        return self.http2

    def handoff_fds(self):
        return (3, 4, 5)


class Names:
    def __init__(self):
        self.by_netns = {}

    def pod(self, netns):
        return self.by_netns.get(netns)

    def pods(self):
        return frozenset(self.by_netns)

    def select(self, patterns):
        assert patterns == ("*",)
        return frozenset({FRONT, BACK})

    def paths(self):
        return {FRONT: Path("/run/netns/front"), BACK: Path("/run/netns/back")}


class Workers:
    made: Any = None

    def __init__(self, **options):
        self.options = options
        self.pods = {}
        self.ready = set()
        self.closed = False
        Workers.made = self

    def serve(self, pods):
        self.pods = dict(pods)

    def poll(self):
        pass

    def serving(self):
        return frozenset(self.ready & self.pods.keys())

    def counters(self):
        return {"redirect_connections_open": 1, "redirect_no_context": 2}

    def close(self, drain_s):
        self.closed = True


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    Workers.made = None
    monkeypatch.setattr(steering, "RedirectEngine", Workers)


def steer(*argv, selected=None):
    kernel, names = Kernel(), Names()
    made = Steering(
        config.parse(argv, {}),
        kernel,
        cast(Any, names),
        lambda: selected,
        lambda _: None,
    )
    return made, kernel, names


def test_the_kernel_engine_needs_no_worker():
    steered, kernel, _ = steer()
    steered.follow()
    assert kernel.plans == {FRONT: POLICY_ENROL, BACK: POLICY_ENROL}
    assert Workers.made is None
    assert steered.losses() == {}
    steered.close()


def test_a_pod_is_redirected_once_a_worker_serves_it_and_no_longer():
    steered, kernel, _ = steer("--engine", "redirect", selected=frozenset({FRONT}))
    steered.follow()
    assert kernel.plans == {FRONT: POLICY_REDIRECT}
    assert kernel.redirected == {}
    assert Workers.made.pods[FRONT].where == Path("/run/netns/front")

    Workers.made.ready = {FRONT, BACK}
    steered.poll()
    assert kernel.redirected == {FRONT: BOTH}

    Workers.made.ready = set()
    steered.poll()
    assert kernel.redirected == {FRONT: frozenset()}


def test_a_failed_self_test_redirects(caplog):
    caplog.set_level(logging.INFO)
    steered, kernel, _ = steer()
    kernel.fault = "FIONREAD"
    steered.follow()
    assert Workers.made.pods.keys() == {FRONT, BACK}
    steered.follow()
    told = [text for text in caplog.messages if text.startswith("engine:")]
    assert told == [
        "engine: engine=redirect reason=\"the kernel engine's self-test failed: "
        'FIONREAD"'
    ]


def test_ports_that_speak_http2_are_redirected():
    steered, kernel, _ = steer()
    steered.follow()
    kernel.http2 = frozenset({(FRONT, 50051, Role.SERVER)})
    steered.follow()
    assert kernel.plans == {FRONT: POLICY_ENROL | POLICY_REDIRECT, BACK: POLICY_ENROL}
    Workers.made.ready = {FRONT}
    steered.poll()
    assert kernel.redirected == {FRONT: frozenset({Want(True, 50051)})}


def test_at_the_end_nothing_is_redirected_before_the_workers_end():
    steered, kernel, _ = steer("--engine", "redirect")
    steered.follow()
    Workers.made.ready = {FRONT, BACK}
    steered.poll()
    steered.close()
    assert kernel.redirected == {FRONT: frozenset(), BACK: frozenset()}
    assert Workers.made.closed


def test_what_workers_do_is_no_loss():
    steered, _, _ = steer("--engine", "redirect")
    steered.follow()
    assert steered.losses() == {"redirect_no_context": 2}
