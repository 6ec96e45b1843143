"""How many new traces are sampled, and which: decided in the kernel, by their ids."""

import os
from fractions import Fraction

import pytest
from netns import injection_fixtures
from netns.http_peer import make_head
from netns.injection_fixtures import Injection, two_pods
from netns.injection_model import fields_of, is_sampled
from podspan.agent.context import Decision, HeadContext, read_context
from podspan.agent.ids import sample_hash
from podspan.agent.kernel.options import Options

kernel_stays_calm = injection_fixtures.kernel_stays_calm

ROOTS = 10_000
PIPELINED = 17  # that one connection takes where no response is seen
CONFIDENCE = Fraction(999, 1000)
NODE = 10.0  # per cent
HEAD = make_head()
NO_CONTEXT = HeadContext()


@pytest.fixture(scope="module")
def injection():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with two_pods() as pods, Injection(*pods, Options(sampling=NODE)) as loaded:
        yield loaded


def bounds(tries, chance, confidence=CONFIDENCE):
    """Return the least and the most successes outside of which, on either side, lies
    no more than half of what the confidence leaves. Exact."""
    tail = (1 - confidence) / 2
    # Chances over a common denominator: whole numbers, however small their share.
    hit, of = chance.numerator, chance.denominator
    miss, all_of_it = of - hit, of**tries
    least = None
    exactly = upto = miss**tries
    for successes in range(tries + 1):
        if least is None and upto > tail * all_of_it:
            least = successes
        if upto >= (1 - tail) * all_of_it:
            return least, successes
        exactly = exactly * (tries - successes) * hit // ((successes + 1) * miss)
        upto += exactly
    raise AssertionError


def test_the_bounds_are_the_binomials():
    # Of 3 coins: 1/8, 3/8, 3/8, 1/8.
    coin = Fraction(1, 2)
    assert bounds(3, coin, Fraction(3, 4)) == (1, 2)
    assert bounds(3, coin, Fraction(76, 100)) == (0, 3)
    assert bounds(3, coin, Fraction(74, 100)) == (1, 2)
    # Half of 0.1 % is 3.29 standard deviations away: 30 * 3.29 = 99.
    low, high = bounds(ROOTS, Fraction(1, 10))
    assert abs(low - (1000 - 99)) < 4
    assert abs(high - (1000 + 99)) < 4
    assert low < 1000 < high


def roots(injection, count):
    """Send requests without context; return their heads as they arrive."""
    arrived = []
    left = count
    while left:
        together = min(left, PIPELINED)
        left -= together
        arrived += heads_in(injection.send(*[HEAD] * together))
    return arrived


def heads_in(received):
    return [head + b"\r\n\r\n" for head in received.split(b"\r\n\r\n")[:-1]]


def context_of(head):
    """What the next hop reads."""
    return read_context((one.name, one.value) for one in fields_of(head))


@pytest.mark.parametrize(
    ("own", "percent"), [(None, NODE), (25.0, 25.0), (0.5, 0.5)], ids=str
)
def test_the_measured_rate_is_the_rate(injection, own, percent):
    """Of the node, and of a pod that has one of its own.

    The ids are the kernel's and cannot be seeded: 1 run in 1,000 is out of bounds by
    chance. So it may try again, once: 1 in 1,000,000.
    """
    injection.sample(own)
    low, high = bounds(ROOTS, Fraction(percent) / 100)
    for _ in range(2):
        injection.records()
        arrived = roots(injection, ROOTS)
        assert len(arrived) == ROOTS
        contexts = [context_of(head) for head in arrived]
        sampled = {
            context.trace_id
            for context in contexts
            if context.decision is Decision.ACCEPT
        }
        # Every single one is decided as its id says. All are reported, so that they
        # are counted, and these as sampled.
        threshold = round(percent / 100 * 2**32)
        assert len({context.trace_id for context in contexts}) == ROOTS
        assert sampled == {
            context.trace_id
            for context in contexts
            if sample_hash(context.trace_id) < threshold
        }
        records = injection.records()
        assert len(records) == ROOTS
        assert {record.trace_id for record in records if record.sampled} == sampled
        print(f"{len(sampled)} of {ROOTS} at {percent} %: {low} to {high} are right")
        if low <= len(sampled) <= high:
            break
    else:
        pytest.fail(f"{len(sampled)} sampled of {ROOTS}, not {low} to {high}")
    assert injection.losses() == {}


@pytest.mark.parametrize(("own", "share"), [(0.0, 0), (100.0, 1)])
def test_no_rate_takes_none_and_the_full_one_all(injection, own, share):
    injection.sample(own)
    for head in roots(injection, 1000):
        values = {one.name: one.value for one in fields_of(head)}
        assert values[b"x-b3-sampled"] == b"%d" % share
    records = injection.records()
    assert len(records) == 1000
    assert {record.sampled for record in records} == {bool(share)}


def test_one_trace_is_decided_alike_every_time(injection):
    """Wherever it passes, whatever the span: half-sampled traces help nobody."""
    injection.sample(None)
    for number in range(100):
        trace_id = (number << 100) + number * 0x9E3779B97F4A7C15 + 1
        heads = [
            make_head(
                (b"x-b3-traceid", b"%032x" % trace_id),
                (b"x-b3-spanid", b"%016x" % (span + 1)),
            )
            for span in range(5)
        ]
        contexts = [context_of(head) for head in heads_in(injection.send(*heads))]
        assert len(contexts) == 5
        assert {context.trace_id for context in contexts} == {trace_id}
        expected = is_sampled(NO_CONTEXT, trace_id, NODE)
        decision = Decision.ACCEPT if expected else Decision.DENY
        assert {context.decision for context in contexts} == {decision}
        assert [record.sampled for record in injection.records()] == [expected] * 5
