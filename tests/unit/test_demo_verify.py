"""The demo's own judgement: the right trace passes, each fault is named."""

from dataclasses import replace

import pytest
from podspan.agent.demo.bookinfo import SERVICES, subtree_work_ms
from podspan.agent.demo.verify import CALLS, HALVES, Half, complaints, missing
from podspan.agent.span import Endpoint, Span

TRACE = "463ac35c9f6413ad48485a3953bb6124"
OTHER_TRACE = "80f198ee56343ba864fe8b2a57d3eff7"

# Per called service: id, parent id, start and duration of its two halves in ms.
CALLED = {
    "productpage": ("000000000000000a", "", (0, 20), (1, 18)),
    "details": ("000000000000000b", "000000000000000a", (5, 4), (6, 2)),
    "reviews": ("000000000000000c", "000000000000000a", (9, 9), (10, 7)),
    "ratings": ("000000000000000d", "000000000000000c", (13, 3), (14, 2)),
}

START_US = 1_700_000_000_000_000


def right_trace():
    spans = {}
    for caller, called in CALLS:
        for kind, at in (("CLIENT", caller), ("SERVER", called)):
            span_id, parent_id, *times = CALLED[called]
            start_ms, duration_ms = times[kind == "SERVER"]
            spans[Half(kind, caller, called)] = Span(
                trace_id=TRACE,
                span_id=span_id,
                parent_id=parent_id,
                kind=kind,
                name=f"{called}:9080/*",
                timestamp_us=START_US + start_ms * 1000,
                duration_us=duration_ms * 1000,
                local=Endpoint(at, "10.97.0.2", 9080),
                remote=Endpoint("", "10.97.0.3", 40000),
                shared=kind == "SERVER",
                tags={"http.status_code": "200"},
            )
    return spans


def page_of(called="productpage", without=""):
    span_id, parent_id, *_ = CALLED[called]
    headers = {
        "Host": f"{called}:9080",
        "x-request-id": "7",
        "x-b3-traceid": TRACE,
        "x-b3-spanid": span_id,
        "x-b3-parentspanid": parent_id,
        "x-b3-sampled": "1",
    }
    return {
        "service": called,
        "received": [[k, v] for k, v in headers.items() if v and k != without],
        "answers": {name: page_of(name, without) for name in SERVICES[called].calls},
    }


@pytest.fixture
def spans():
    return right_trace()


def judge(spans, page=None):
    return complaints(list(spans.values()), page or page_of())


def half(text):
    kind, caller, called = text.split()
    return Half(kind, caller, called)


def test_there_are_seven_halves_and_the_clients_own():
    assert len(HALVES) == 8
    assert HALVES[0] == Half("CLIENT", "client", "productpage")


def test_the_least_duration_of_a_call_is_the_work_below_it():
    assert subtree_work_ms("productpage") == 4 + 2 + 3 + 2


def test_the_right_trace_passes(spans):
    assert judge(spans) == []


def test_the_order_of_the_spans_does_not_matter(spans):
    assert complaints(list(reversed(spans.values())), page_of()) == []


def test_a_server_half_with_an_id_of_its_own_passes_as_the_clients_child(spans):
    own = {called: f"{number:016x}" for number, called in enumerate(CALLED, start=100)}
    for which, span in spans.items():
        if which.kind == "SERVER":
            spans[which] = replace(
                span,
                span_id=own[which.called],
                parent_id=span.span_id,
                shared=False,
            )
        elif span.parent_id:
            spans[which] = replace(span, parent_id=own[which.caller])
    page = page_of()
    for answer in page["answers"].values():
        reheader(answer, own["productpage"])
    reheader(page["answers"]["reviews"]["answers"]["ratings"], own["reviews"])
    assert judge(spans, page) == []


def reheader(answer, parent_id):
    answer["received"] = [
        [name, parent_id if name == "x-b3-parentspanid" else value]
        for name, value in answer["received"]
    ]


@pytest.mark.parametrize("lost", HALVES, ids=str)
def test_each_missing_half_is_named(spans, lost):
    del spans[lost]
    assert judge(spans) == [f"{lost} is missing"]
    assert missing(spans.values()) == [lost]


def test_a_half_that_is_there_twice_is_named(spans):
    twice = [*spans.values(), spans[half("SERVER reviews ratings")]]
    assert complaints(twice, page_of()) == [
        "the SERVER half of reviews -> ratings is there 2 times"
    ]


def test_a_span_of_no_call_is_named(spans):
    stray = replace(spans[HALVES[0]], name="get")
    assert complaints([*spans.values(), stray], page_of()) == [
        "a CLIENT span 'get' of client is too much"
    ]


def test_a_call_by_the_wrong_service_is_no_half_of_ours(spans):
    which = half("CLIENT reviews ratings")
    spans[which] = replace(spans[which], local=Endpoint("details", "10.97.0.3", 1))
    assert judge(spans) == [
        f"{which} is missing",
        "a CLIENT span 'ratings:9080/*' of details is too much",
    ]


def test_a_second_trace_id_is_named(spans):
    which = half("CLIENT reviews ratings")
    spans[which] = replace(spans[which], trace_id=OTHER_TRACE)
    first, *_ = judge(spans)
    assert first == f"2 trace ids instead of one: {TRACE}, {OTHER_TRACE}"


def test_a_wrong_parent_is_named(spans):
    for which in (half("CLIENT reviews ratings"), half("SERVER reviews ratings")):
        spans[which] = replace(spans[which], parent_id="000000000000000b")
    assert judge(spans)[0] == (
        "the CLIENT half of reviews -> ratings has parent 000000000000000b "
        "instead of 000000000000000c"
    )


def test_a_root_with_a_parent_is_named(spans):
    for which in HALVES[:2]:
        spans[which] = replace(spans[which], parent_id="000000000000000f")
    assert judge(spans)[0] == (
        "the CLIENT half of client -> productpage has parent 000000000000000f "
        "instead of none"
    )


@pytest.mark.parametrize(
    "change",
    [{"span_id": "00000000000000ff"}, {"shared": False}, {"parent_id": ""}],
    ids=["id", "not shared", "parent"],
)
def test_a_server_half_of_another_call_is_named(spans, change):
    which = half("SERVER productpage details")
    spans[which] = replace(spans[which], **change)
    (complaint,) = judge(spans)
    assert complaint.startswith(f"{which} (id ")
    assert "does not belong to the CLIENT half (id 000000000000000b" in complaint


def test_a_call_shorter_than_the_work_below_it_is_named(spans):
    which = half("SERVER reviews ratings")
    spans[which] = replace(spans[which], duration_us=1999)
    assert judge(spans) == [f"{which} took 1999 us: less than 2000 us"]


def test_a_call_that_outlasts_its_caller_is_named(spans):
    which = half("CLIENT productpage reviews")
    spans[which] = replace(spans[which], duration_us=60_000)
    assert judge(spans) == [
        f"{which} is not within the SERVER half of client -> productpage"
    ]


def test_a_server_that_starts_before_its_client_is_named(spans):
    which = half("SERVER productpage details")
    spans[which] = replace(spans[which], timestamp_us=START_US)
    assert judge(spans) == [f"{which} starts before the CLIENT half"]


def test_an_error_is_named(spans):
    which = half("SERVER client productpage")
    spans[which] = replace(spans[which], tags={"http.status_code": "502"})
    assert judge(spans) == [f"{which} has status 502 instead of 200"]


@pytest.mark.parametrize("header", ["x-b3-traceid", "x-b3-spanid", "x-b3-sampled"])
def test_a_header_that_did_not_arrive_is_named(spans, header):
    complaint, *_ = judge(spans, page_of(without=header))
    assert complaint.startswith(f"productpage received {header} none instead of ")


def test_a_header_that_arrived_twice_is_named(spans):
    page = page_of()
    page["received"].append(["X-B3-Sampled", "0"])
    assert judge(spans, page) == ["productpage received x-b3-sampled 1, 0 instead of 1"]
