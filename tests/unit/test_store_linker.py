"""Links of one trace: the cases of Zipkin's DependencyLinker, and shapes that bite.

The rules were compared with Zipkin 3.6.1's server over thousands of random traces.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from podspan.agent.store.linker import Link, link_trace
from podspan.agent.store.zipkin_v2 import merge

FUZZ = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

C, S, P, K = "CLIENT", "SERVER", "PRODUCER", "CONSUMER"


def span(parent, number, kind, local, remote, error="", **more) -> Any:
    made = {"traceId": "0" * 15 + "a", "id": f"{number:016x}", **more}
    if parent:
        made["parentId"] = f"{parent:016x}"
    if kind:
        made["kind"] = kind
    if local:
        made["localEndpoint"] = {"serviceName": local}
    if remote:
        made["remoteEndpoint"] = {"serviceName": remote}
    if error:
        made["tags"] = {"error": ""}
    return made


def links(*spans):
    """Return "parent>child calls/errors" of each link."""
    return {
        f"{link.parent}>{link.child} {link.calls}/{link.errors}"
        for link in link_trace(merge(spans))
    }


CASES = {
    "nothing": ([], set()),
    "server, client and a database that is not traced": (
        [
            span(2, 3, C, "app", "db", "error"),
            span(1, 2, S, "app", "web", shared=True),
            span(1, 2, C, "web", "app"),
            span(0, 1, S, "web", None),
        ],
        {"web>app 1/0", "app>db 1/1"},
    ),
    "a shared server without its parent's id": (
        [
            span(0, 2, S, "link", "arn", shared=True),
            span(1, 2, C, "arn", "link"),
            span(0, 1, S, "arn", None),
        ],
        {"arn>link 1/0"},
    ),
    "a shared server whose client is lost": (
        [
            span(2, 3, C, "app", "db"),
            span(0, 2, S, "app", "web", shared=True),
            span(0, 1, S, "web", None),
        ],
        {"web>app 1/0", "app>db 1/0"},
    ),
    "consumer knows its broker": (
        [span(0, 1, P, "shop", None), span(1, 2, K, "mail", "kafka")],
        {"kafka>mail 1/0"},
    ),
    "producer knows its broker": (
        [span(0, 1, P, "shop", "kafka"), span(1, 2, K, "mail", None)],
        {"shop>kafka 1/0"},
    ),
    "both know it": (
        [span(0, 1, P, "shop", "kafka"), span(1, 2, K, "mail", "kafka", "error")],
        {"shop>kafka 1/0", "kafka>mail 1/1"},
    ),
    "nobody knows the broker": (
        [span(0, 1, P, "shop", None), span(1, 2, K, "mail", None)],
        set(),
    ),
    "a producer whose child is a server": (
        [span(0, 1, P, "shop", None), span(1, 2, S, "mail", None)],
        {"shop>mail 1/0"},
    ),
    "a producer that shares its id with a server": (
        [span(0, 1, P, "shop", None), span(0, 1, S, "mail", None, shared=True)],
        {"shop>mail 1/0"},
    ),
    "a client does not link to a consumer": (
        [span(0, 1, C, "shop", None), span(1, 2, K, "mail", None)],
        set(),
    ),
    "a lone server that knows its client": (
        [span(0, 1, S, "server", "client")],
        {"client>server 1/0"},
    ),
    "a lone client that knows its server": (
        [span(0, 1, C, "client", "server")],
        {"client>server 1/0"},
    ),
    "a server that calls itself": ([span(0, 1, S, "a", "a")], {"a>a 1/0"}),
    **{
        f"{kind} {local} {remote} alone": ([span(0, 1, kind, local, remote)], set())
        for kind, local, remote in [
            (S, None, None),
            (S, "server", None),
            (S, None, "client"),
            (C, None, None),
            (C, "client", None),
            (C, None, "server"),
            (None, "a", None),
        ]
    },
    "clients without a name take their server's": (
        [
            span(0, 1, S, "client", None),
            span(1, 2, C, None, "server"),
            span(1, 3, C, None, "server"),
        ],
        {"client>server 2/0"},
    ),
    "both sides count one call and one error": (
        [
            span(0, 1, C, "client", None, "error"),
            span(1, 2, S, "server", None, "error"),
        ],
        {"client>server 1/1"},
    ),
    "both sides of one id count one error": (
        [
            span(0, 1, C, "client", None, "error"),
            span(0, 1, S, "server", None, "error", shared=True),
        ],
        {"client>server 1/1"},
    ),
    "the server's own name counts": (
        [span(0, 1, C, "client", "vip"), span(1, 2, S, "server", None)],
        {"client>server 1/0"},
    ),
    "retries of one client": (
        [
            span(0, 1, C, "client", None),
            span(1, 2, S, "server", "client", "error"),
            span(1, 3, S, "server", "client"),
        ],
        {"client>server 2/1"},
    ),
    "the client's error is the call's": (
        [span(0, 1, C, "web", None, "error"), span(1, 2, S, "app", None)],
        {"web>app 1/1"},
    ),
    "of one id, the client's error is not the server's": (
        [
            span(0, 1, C, "web", None, "error"),
            span(0, 1, S, "app", None, shared=True),
        ],
        {"web>app 1/0"},
    ),
    "local spans between": (
        [
            span(0, 1, S, "foo", None),
            span(1, 2, None, None, None),
            span(2, 3, C, "bar", "baz", "error"),
            span(2, 4, C, "bar", "baz"),
        ],
        {"foo>bar 2/0", "bar>baz 2/1"},
    ),
    "spans without a kind are clients if they know both sides": (
        [
            span(0, 1, None, "client", "web"),
            span(1, 2, None, "web", "app", "error"),
            span(2, 3, None, "app", "db"),
        ],
        {"client>web 1/0", "web>app 1/1", "app>db 1/0"},
    ),
    "unrelated spans below a missing root": (
        [span(9, 1, S, "a", None), span(9, 2, S, "b", None)],
        set(),
    ),
    "related spans below a missing root": (
        [span(9, 1, S, "a", None), span(1, 2, S, "b", None)],
        {"a>b 1/0"},
    ),
    "a span is missing between": (
        [span(0, 1, S, "web", None), span(1, 2, C, "app", None)],
        {"web>app 1/0"},
    ),
    "two servers answer one client": (
        [
            span(0, 1, C, "client", None),
            span(0, 1, S, "a", None, shared=True),
            span(0, 1, S, "b", None, shared=True),
        ],
        {"client>a 1/0", "client>b 1/0"},
    ),
    "spans that are each other's parent": (
        [span(2, 1, S, "a", "b"), span(1, 2, S, "b", "a")],
        set(),
    ),
}


@pytest.mark.parametrize(("spans", "expected"), CASES.values(), ids=CASES)
def test_links(spans, expected):
    assert links(*spans) == expected
    assert links(*reversed(spans)) == expected


def test_an_annotation_is_no_error():
    called = span(0, 1, C, "a", "b", annotations=[{"timestamp": 1, "value": "error"}])
    assert links(called) == {"a>b 1/0"}


def test_a_calls_duration_is_the_servers_else_the_clients():
    client = span(0, 1, C, "a", "b", duration=9)
    server = span(0, 1, S, "b", "a", shared=True)
    below = span(1, 2, C, "b", "db", duration=3)
    assert link_trace(merge([client, server | {"duration": 5}, below])) == [
        Link("a", "b", 1, 0, (5,)),
        Link("b", "db", 1, 0, (3,)),
    ]
    assert link_trace(merge([client, server])) == [Link("a", "b", 1, 0, (9,))]
    assert link_trace([span(0, 1, C, "a", "b")]) == [Link("a", "b", 1, 0, ())]


def test_a_long_chain_of_local_spans_takes_no_long_time():
    """Each server at the end looks for its caller: not by walking up each time."""
    chain = [span(0, 1, S, "a", None)]
    chain += [span(n, n + 1, None, None, None) for n in range(1, 10_000)]
    ends = [span(10_000, 20_000 + n, S, "b", None) for n in range(10_000)]
    assert links(*chain, *ends) == {"a>b 10000/0"}


numbers = st.integers(1, 6)
services = st.sampled_from(["a", "b", None])
spans = st.builds(
    span,
    st.integers(0, 6),
    numbers,
    st.sampled_from([C, S, P, K, None]),
    services,
    services,
    st.sampled_from(["", "error"]),
    shared=st.booleans(),
)


@FUZZ
@given(st.lists(spans, max_size=12))
def test_whatever_the_spans_each_counts_twice_at_most(trace):
    found = link_trace(merge(trace))
    assert sum(link.calls for link in found) <= 2 * len(trace)
    assert all(0 <= link.errors <= link.calls for link in found)
    assert all(len(link.durations_us) <= link.calls for link in found)
