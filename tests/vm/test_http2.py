"""HTTP/2 under the default engine: its ports are redirected once they are known."""

from vm.conftest import BACK, FRONT, Agent, serving, wait_for
from vm.redirect_peers import grpc_call, grpc_serving, init, spans_of_target


def test_a_port_that_spoke_http2_is_redirected_from_then_on(agent: Agent) -> None:
    """Its first connection has a TCP span, the next one a span for each call."""
    try:
        for pod in (FRONT, BACK):
            init(pod, "apply")
        with grpc_serving(BACK) as (target, _), serving(FRONT) as marker:
            port = target.rpartition(":")[2]
            grpc_call(FRONT, target, "first")
            wait_for(
                lambda: (
                    f"inbound={port} outbound=none" in agent.log()
                    and f"inbound=none outbound={port}" in agent.log()
                ),
                "the port is redirected at both ends",
                agent.process,
            )
            agent.spans_of("/marker", marker)
            before = spans_of_target(agent, target)
            grpc_call(FRONT, target, "second", "third")
            wait_for(
                lambda: len(spans_of_target(agent, target)) >= 6, "the calls' spans"
            )
            agent.spans_of("/marker", marker)
            spans = [s for s in spans_of_target(agent, target) if s not in before]
    finally:
        for pod in (FRONT, BACK):
            init(pod, "clean")
    assert [span["name"] for span in before] == [f"tcp:{port}"] * 2
    assert [span["kind"] for span in spans] == ["CLIENT"] * 2 + ["SERVER"] * 2
    assert {span["tags"]["http.protocol"] for span in spans} == {"HTTP/2"}
    assert spans[0]["traceId"] == spans[2]["traceId"]
