"""The context that requests carry on, rule by rule: conformance_rows.py has the table.

And for all that no row says, injection_model.py: every head of the unit tests' table
and generated ones, with every set of options, cut or in one piece.
"""

import os
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from netns import injection_fixtures
from netns.conformance_heads import START, head_of, heads, pattern_of
from netns.conformance_rows import OPTIONS, ROWS, Row
from netns.injection_fixtures import Injection, two_pods
from netns.injection_model import DEFAULTS, Plan, check
from podspan.agent.exchange import (
    FLAG_ACCEPTED_DEBUG,
    FLAG_INJECTED,
    FLAG_SAMPLED,
    Exchange,
    Link,
)
from unit import context_rows

kernel_stays_calm = injection_fixtures.kernel_stays_calm

# Always the same examples: a failure is a change's, not the day's.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Result(NamedTuple):
    """What came of one request."""

    arrived: bytes
    records: list[Exchange]
    losses: dict[str, int]


class Pods:
    """Injections by name of their options, each loaded once."""

    def __init__(self, stack):
        self._stack = stack
        self._loaded: dict[str, Injection] = {}

    def send(self, options, percent, *pieces):
        if options not in self._loaded:
            client, server = self._stack.enter_context(two_pods())
            injection = Injection(client, server, OPTIONS[options])
            self._loaded[options] = self._stack.enter_context(injection)
        injection = self._loaded[options]
        injection.sample(percent)
        return Result(injection.send(*pieces), injection.records(), injection.losses())

    def check(self, head, options="default", percent=None, cut=0) -> Plan:
        pieces = [head[:cut], head[cut:]] if cut else [head]
        result = self.send(options, percent, *pieces)
        return check_model(head, result, options, percent, cut)


def check_model(head, result, options, percent, cut=0) -> Plan:
    arrived, records, losses = result
    return check(head, arrived, records, losses, OPTIONS[options], percent, cut)


@pytest.fixture(scope="module")
def pods():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with ExitStack() as stack:
        yield Pods(stack)


def check_row(row, result):
    match = pattern_of(row).fullmatch(result.arrived.decode())
    assert match, result.arrived.decode()
    assert result.losses == dict.fromkeys(row.lost, 1)
    [record] = result.records
    found = match.groupdict()
    if row.child_of:
        trace_id, parent_id = (int(text, 16) for text in row.child_of)
        assert record.link is Link.HEADER
    else:
        trace_id, parent_id = int(found["high"] + found["low"], 16), 0
        assert record.link is Link.NONE
    assert (record.trace_id, record.parent_id) == (trace_id, parent_id)
    if row.injected:
        span = found["span"] if row.child_of else found["low"]
        assert record.span_id == int(span, 16)
    assert record.span_id not in (0, parent_id)
    assert record.flags == (
        FLAG_SAMPLED * row.sampled
        | FLAG_ACCEPTED_DEBUG * row.debug
        | FLAG_INJECTED * row.injected
    )
    if "uuid" in found:
        assert record.request_id == found["uuid"]


def names(rows):
    return [row.name for row in rows]


def test_no_two_rows_have_the_same_name():
    assert len(set(names(ROWS))) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_the_kernel_writes_what_the_row_says(pods, row: Row):
    head = head_of(row.sent)
    result = pods.send(row.options, row.percent, head)
    check_row(row, result)
    # And so says the model, which the tests below trust.
    check_model(head, result, row.options, row.percent)


CUT = [row for row in ROWS if row.cut]


@pytest.mark.parametrize("row", CUT, ids=names(CUT))
def test_a_head_cut_at_any_byte_gets_all_or_nothing(pods, row: Row):
    head = head_of(row.sent)
    whole = 0
    for cut in range(1, len(head)):
        result = pods.send(row.options, row.percent, head[:cut], head[cut:])
        plan = check_model(head, result, row.options, row.percent, cut)
        if plan.refused or cut <= min(plan.reach, len(head) - 2):
            check_row(row, result)
            whole = cut
    # The lines above ours can be sent before, whatever the rest needs.
    assert whole >= len(START)


@pytest.mark.parametrize("row", context_rows.ROWS, ids=names(context_rows.ROWS))
def test_every_context_is_passed_on_in_every_form(pods, row):
    head = START + b"".join(b"%s: %s\r\n" % line for line in row.headers) + b"\r\n"
    for options in OPTIONS:
        for percent in (0, 100):
            plan = pods.check(head, options, percent)
            assert plan.context == row.says


# A short trace id that begins nothing: all of its line is hidden.
@example(
    head=START + b"x-b3-traceid:A2FB4A1D1A96D312\r\nx-b3-traceid:0-0\r\n\r\n",
    options="all, defer",
    percent=0,
    where=0.585,
)
@FUZZ
@given(
    head=heads(),
    options=st.sampled_from(sorted(OPTIONS)),
    percent=st.sampled_from([0, 10, 100]),
    where=st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_any_head_arrives_as_the_model_says(pods, head, options, percent, where):
    cut = int(where * (len(head) - 1))
    pods.check(head, options, percent, cut)


def test_a_connection_that_speaks_no_http_is_counted_where_tcp_is_off(pods):
    stream = b"EHLO reviews\r\n\r\n"
    assert not OPTIONS["all, defer"].tcp
    assert DEFAULTS.tcp
    result = pods.send("all, defer", None, stream, stream)
    assert result == (stream * 2, [], {"request_unparsed": 1})
