"""The kernel's record, as bpf/exchange.h declares it, becomes an Exchange."""

import ctypes

import pytest
from podspan.agent import exchange as module
from podspan.agent.exchange import End, Exchange, Link, Protocol, Role
from unit.kernel_struct import (
    declared_size,
    exchange_record,
    kernel_enum,
    kernel_struct,
)
from unit.stream_wire import stream_wire

RECORD = kernel_struct("exchange_record")


def test_the_struct_read_here_is_the_struct_the_compiler_sees():
    size = ctypes.sizeof(RECORD)
    assert size == declared_size("exchange_record")


@pytest.mark.parametrize(
    ("enum", "name", "prefix"),
    [
        (Role, "exchange_role", "ROLE_"),
        (Link, "exchange_link", "LINK_"),
        (End, "exchange_end", "END_"),
        (Protocol, "exchange_protocol", "PROTOCOL_"),
    ],
)
def test_enums_are_those_of_the_kernel(enum, name, prefix):
    ours = {f"{prefix}{member.name}": member.value for member in enum}
    ours.pop("PROTOCOL_HTTP2", None)  # the kernel does not parse it
    assert ours == kernel_enum(name)


def test_flags_are_those_of_the_kernel():
    ours = {name: value for name, value in vars(module).items() if "FLAG_" in name}
    assert ours == kernel_enum("exchange_flags")


def test_every_field_arrives():
    numbers = {
        name: 1000 + at
        for at, (name, ctype, *_) in enumerate(RECORD._fields_)
        if ctype in (ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_ushort)
    }
    bytes_ = {"role": 2, "link": 1, "end": 6, "flags": 5, "request_minor": 0}
    bytes_ |= {"protocol": 2}
    exchange = Exchange.from_kernel(exchange_record(**numbers, **bytes_))

    high, low = numbers.pop("trace_id_high"), numbers.pop("trace_id_low")
    assert exchange.trace_id == high * 2**64 + low
    assert {name: getattr(exchange, name) for name in numbers} == numbers
    assert exchange.role is Role.SERVER
    assert exchange.link is Link.HEADER
    assert exchange.end is End.NEXT_REQUEST
    assert exchange.flags == 5
    assert exchange.sampled
    assert exchange.shared
    assert exchange.request_minor == 0
    assert exchange.protocol is Protocol.TCP
    assert exchange.method == "GET"
    assert exchange.target == "/details/0?u=1"
    assert exchange.host == "Details:9080"
    assert exchange.user_agent == "python"
    assert exchange.request_id == "7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f"
    assert exchange.comm == "productpage"


def test_addresses_are_text_in_their_own_family():
    exchange = Exchange.from_kernel(
        exchange_record(local_addr="10.0.0.1", peer_addr="fd00::a")
    )
    assert exchange.local_addr == "10.0.0.1"
    assert exchange.peer_addr == "fd00::a"


def test_a_text_that_fills_its_field_and_is_cut_in_a_character():
    target = "/" + "é" * 150
    exchange = Exchange.from_kernel(exchange_record(target=target.encode()[:256]))
    assert exchange.target == target[:128] + "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("packed", [False, True])
def test_every_field_of_a_stream_arrives(packed):
    wire = stream_wire(role=2, link=1, end=5, error=8, grpc_status="14")
    expected = dict(wire)
    if packed:  # msgpack has no numbers of 128 bits
        wire["trace_id"] = wire["trace_id"].to_bytes(16, "big")
    exchange = Exchange.from_worker(wire)
    assert {name: getattr(exchange, name) for name in expected} == expected
    assert exchange.role is Role.SERVER
    assert exchange.link is Link.HEADER
    assert exchange.end is End.RESET
    assert exchange.protocol is Protocol.HTTP2
    assert (exchange.pid, exchange.tid, exchange.comm, exchange.sock) == (0, 0, "", 0)


def test_what_the_kernel_tells_is_no_grpc():
    exchange = Exchange.from_kernel(exchange_record())
    assert (exchange.grpc_status, exchange.grpc_message) == ("", "")
