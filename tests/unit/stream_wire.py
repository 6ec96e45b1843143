"""What a worker of the redirect engine sends of a plain sampled gRPC call."""

from dataclasses import asdict
from typing import Any

from podspan.agent.redirect.layer import StreamRecord


def stream_wire(**fields: Any) -> dict[str, Any]:
    """Return it with `fields` changed."""
    record = StreamRecord(
        trace_id=0x463AC35C9F6413AD48485A3953BB6124,
        span_id=0xA2FB4A1D1A96D312,
        parent_id=1,
        flags=3,
        link=1,
        request_first_ns=5_000_000_000,
        request_last_ns=5_000_000_100,
        response_first_ns=5_004_000_000,
        response_last_ns=5_004_200_000,
        request_bytes=12,
        response_bytes=178,
        status=200,
        end=1,
        error=0,
        method="POST",
        target="/shop.Reviews/Get",
        host="Reviews:50051",
        user_agent="grpc-python/1.85",
        request_id="7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f",
        client_trace_id="",
        grpc_status="0",
        grpc_message="",
    )
    where = {
        "role": 1,
        "netns": 4026532000,
        "local_addr": "10.1.0.2",
        "local_port": 40000,
        "peer_addr": "10.1.0.3",
        "peer_port": 50051,
    }
    wire = asdict(record) | where
    assert wire.keys() >= fields.keys()
    return wire | fields
