"""The generator reaches what there is to reach; else the comparison says little."""

from itertools import islice

import pytest
from fuzz.batch import HEADERS, STATES, Coverage
from fuzz.generator import cases
from podspan.agent.http_head import MAX_HEAD
from podspan.agent.kernel import grammar
from unit.native.scanner import SOURCE

# A feed leaves these before it returns.
PASSING = {"HEAD_DONE", "DONE"}
STATES_THAT_STAY = [name for name in STATES if name not in {*PASSING, "STATES"}]
LOOKED_AT = [name for name in STATES if STATES[name] < STATES["HEAD_DONE"]]
ACTIONS = grammar.enumerators(SOURCE, "scan_action")


@pytest.fixture(scope="module")
def coverage(sample, native) -> Coverage:
    coverage = Coverage()
    assert sample.first_difference(native, coverage) is None
    return coverage


def taken(coverage, state: str) -> list[int]:
    """How often bytes of each class met `state`."""
    at = STATES[state] * grammar.CLASSES
    return list(coverage.cells[at : at + grammar.CLASSES])


def test_the_same_seed_gives_the_same_cases_and_another_gives_others():
    first = list(cases("a", 200))
    assert first == list(islice(cases("a", 1000), 200))
    assert not set(first) & set(cases("b", 200))


@pytest.mark.parametrize("state", LOOKED_AT)
def test_every_state_takes_bytes_and_refuses_bytes(coverage, native, state):
    met = taken(coverage, state)
    at = STATES[state] * grammar.CLASSES
    nexts = native.tables[2 * at : 2 * (at + grammar.CLASSES) : 2]
    opaque = STATES["OPAQUE"]
    refused = sum(met[i] for i in range(len(met)) if nexts[i] == opaque)
    assert sum(met) - refused > 100
    assert refused > 0


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_taken(coverage, native, action):
    actions = native.tables[1 : 2 * grammar.STATES * grammar.CLASSES : 2]
    times = sum(
        count
        for count, number in zip(coverage.cells, actions, strict=True)
        if number == ACTIONS[action]
    )
    assert times > 100


@pytest.mark.parametrize("state", STATES_THAT_STAY)
def test_streams_are_cut_in_every_state(coverage, state):
    assert coverage.cuts[STATES[state]] >= 5


def test_pieces_may_be_empty(sample):
    empty = [
        case
        for case in sample.cases
        if len(set(case.cuts)) < len(case.cuts) or {0, len(case.data)} & set(case.cuts)
    ]
    assert len(empty) > 0.05 * len(sample.cases)


def test_about_half_of_the_streams_are_refused_and_most_have_heads(coverage, sample):
    count = len(sample.cases)
    assert 0.3 < coverage.ends[STATES["OPAQUE"]] / count < 0.7
    assert 0.6 < coverage.all_heads / count < 2
    assert 0.4 < coverage.messages / count < 2
    for state in ("BODY", "CHUNK_DATA", "UNTIL_EOF", "START", "RESPONSE"):
        assert coverage.ends[STATES[state]] > 50


@pytest.mark.parametrize("header", set(HEADERS) - {"other", "coding"})
def test_every_header_is_met(coverage, header):
    assert coverage.heads[HEADERS[header]] > 1000


def test_b3_lines_are_repeated_more_often_than_places_are_kept(coverage):
    assert all(count > 100 for count in coverage.again)


def test_requests_and_responses_also_to_head_are_mixed(sample):
    responses = [case for case in sample.cases if case.is_response]
    assert 0.3 < len(responses) / len(sample.cases) < 0.5
    assert sum(case.after_head for case in responses) > 0.1 * len(responses)


def test_most_streams_are_short_and_some_have_about_the_longest_head(sample):
    sizes = sorted(len(case.data) for case in sample.cases)
    assert 100 < sizes[len(sizes) // 2] < 400
    assert sum(size >= MAX_HEAD for size in sizes) > 0.01 * len(sizes)
