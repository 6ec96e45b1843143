"""What the kernel and the redirect engine's workers tell each other: bpf/handoff.h.

What the kernel hands over is decided in kprobes: tests/vm/test_handoff.py.
"""

import ctypes
import socket
import struct
import subprocess
import sys
from ipaddress import IPv6Address

import pytest
from netns import injection_fixtures
from netns.http_peer import DEADLINE_S, FAMILIES, make_head
from podspan.agent.exchange import FLAG_SAMPLED, End, Link, Protocol, Role
from podspan.agent.kernel import handoff, program, syscall
from podspan.agent.kernel.handoff import Handoff, Tuple
from podspan.agent.kernel.options import (
    POLICY_ENROL,
    POLICY_REDIRECT,
    POLICY_TRACE,
    Options,
)
from podspan.agent.kernel.tracer import Tracer
from podspan.agent.redirect.inject import Given
from podspan.init.plan import AGENT_MARK

kernel_stays_calm = injection_fixtures.kernel_stays_calm
shared_injection = injection_fixtures.shared_injection
injection = injection_fixtures.injection

both_families = pytest.mark.parametrize("version", [4, 6])

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOT_HTTP = b"\x16\x03\x01 something else\n"


@pytest.fixture
def tables(injection):
    """The worker's end; what a test leaves in the tables goes."""
    yield Handoff(*injection.programs.handoff_fds())
    for name in ("handed", "claims", "roots", "http2_seen"):
        fd = program.map_fd(injection.programs.bpf, name)
        for key, _ in list(syscall.map_items(fd)):
            syscall.map_delete(fd, key)


@pytest.fixture
def traced_server(injection):
    """The server's pod is traced as well."""
    inode = injection.server.path.stat().st_ino
    injection.programs.set_policy(inode, POLICY_TRACE)
    yield inode
    injection.programs.set_policy(inode, None)


def entries(injection, name):
    return dict(syscall.map_items(program.map_fd(injection.programs.bpf, name)))


def tuple_of(sock, pod):
    local_addr, local_port, *_ = sock.getsockname()
    peer_addr, peer_port, *_ = sock.getpeername()
    inode = pod.path.stat().st_ino
    return Tuple(inode, local_addr, local_port, peer_addr, peer_port)


class TestMark:
    """The agent's own sockets in a pod are nobody's business."""

    @both_families
    def test_a_connection_with_the_agents_mark_is_not_traced(self, injection, version):
        received, followed = self.exchange(injection, version, AGENT_MARK)
        assert received == make_head()
        assert followed == 0
        assert injection.records() == []

    def test_one_with_another_mark_is(self, injection):
        received, followed = self.exchange(injection, 4, AGENT_MARK + 1)
        assert b"x-b3-traceid" in received
        assert followed == 1
        assert injection.record().role is Role.CLIENT

    def exchange(self, injection, version, mark):
        """Send a request by a marked socket; return it and how many are followed."""
        there = injection.server.ipv4 if version == 4 else injection.server.ipv6
        before = len(entries(injection, "connections"))
        with injection.server.inside():
            listener = socket.create_server((there, 0), family=FAMILIES[version])
        with injection.client.inside():
            client = socket.socket(FAMILIES[version])
        with listener, client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.connect(listener.getsockname()[:2])
            server, _ = listener.accept()
            with server:
                server.settimeout(DEADLINE_S)
                client.sendall(make_head())
                received = server.recv(65536)
                followed = len(entries(injection, "connections")) - before
        return received, followed

    @both_families
    @pytest.mark.parametrize(("mark", "followed"), [(AGENT_MARK, 0), (0, 1)])
    def test_what_a_listener_accepts_inherits_its_mark(
        self, injection, traced_server, version, mark, followed
    ):
        there = injection.server.ipv4 if version == 4 else injection.server.ipv6
        with injection.server.inside():
            listener = socket.create_server((there, 0), family=FAMILIES[version])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        # A peer that is not traced itself.
        with listener, injection.server.inside():
            client = socket.socket(FAMILIES[version])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, AGENT_MARK)
            before = len(entries(injection, "connections"))
            with client:
                client.connect(listener.getsockname()[:2])
                server, _ = listener.accept()
                with server:
                    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == mark
                    now = len(entries(injection, "connections"))
        assert now - before == followed

    @pytest.mark.parametrize(("mark", "failures"), [(AGENT_MARK, 0), (0, 1)])
    def test_a_refused_connection(self, injection, mark, failures):
        with injection.client.inside(), socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            with pytest.raises(ConnectionRefusedError):
                client.connect((injection.server.ipv4, 9))
        records = injection.records()
        assert [one.end for one in records] == [End.CONNECT_FAILED] * failures


class TestPlan:
    def test_a_pod_to_be_redirected_gets_no_headers_from_the_kernel(self, injection):
        inode = injection.client.path.stat().st_ino
        client, server = injection.connect()
        with client, server:
            injection.programs.set_policy(inode, POLICY_TRACE | POLICY_REDIRECT)
            try:
                assert injection.send(make_head()) == make_head()
                # What is enrolled stays so: it was whole all the time.
                client.sendall(make_head())
                assert b"x-b3-traceid" in server.recv(65536)
            finally:
                injection.sample(None)
        assert injection.send(make_head()) != make_head()

    def test_what_failed_its_self_test_is_not_planned_either(self):
        tracer = Tracer(
            max_connections=1,
            options=Options(),
            netns=None,
            roaming=(),
            on_exchange=lambda _: None,
            on_warning=lambda _: None,
            plans={1: POLICY_ENROL | POLICY_REDIRECT},
        )
        assert tracer.fault is not None
        assert tracer._what_in(1) == POLICY_TRACE | POLICY_REDIRECT
        assert tracer._what_in(2) == POLICY_TRACE
        tracer.fault = None
        assert tracer._what_in(1) == POLICY_TRACE | POLICY_ENROL | POLICY_REDIRECT
        assert tracer._what_in(2) == POLICY_TRACE | POLICY_ENROL


class TestClaim:
    @both_families
    def test_no_tcp_record_of_a_claimed_connection(self, injection, tables, version):
        client, server = injection.connect(version)
        with client, server:
            client.sendall(NOT_HTTP)
            tables.claim(tuple_of(client, injection.client))
            assert len(entries(injection, "claims")) == 1
        assert injection.records() == []
        assert entries(injection, "claims") == {}

    def test_the_record_of_one_that_is_not(self, injection, tables):
        client, server = injection.connect()
        other, other_server = injection.connect()
        with other, other_server:
            with client, server:
                client.sendall(NOT_HTTP)
                tables.claim(tuple_of(other, injection.client))
            assert injection.record().protocol is Protocol.TCP
            assert len(entries(injection, "claims")) == 1

    def test_a_connection_from_an_address_claimed_too_late(self, injection, tables):
        """The worker was slow, and the port is another connection's now."""
        with injection.client.inside():
            client = socket.socket()
        client.bind((injection.client.ipv4, 0))
        with injection.server.inside():
            listener = socket.create_server((injection.server.ipv4, 0))
        with client, listener:
            inode = injection.client.path.stat().st_ino
            tables.claim(Tuple(inode, *client.getsockname(), *listener.getsockname()))
            client.connect(listener.getsockname())
            client.sendall(NOT_HTTP)
        assert injection.record().protocol is Protocol.TCP


class TestHttp2:
    @pytest.mark.parametrize("cut", range(len(PREFACE)))
    def test_a_preface_is_noted_however_it_is_cut(self, injection, tables, cut):
        assert injection.programs.http2_ports() == frozenset()
        client, server = injection.connect()
        with client, server:
            client.sendall(PREFACE[:cut])
            client.sendall(PREFACE[cut:])
            assert injection.programs.http2_ports() == {
                (
                    injection.client.path.stat().st_ino,
                    server.getsockname()[1],
                    Role.CLIENT,
                )
            }
        # As before: what is not HTTP/1 is a TCP exchange.
        assert injection.record().protocol is Protocol.TCP

    @pytest.mark.parametrize(
        "sent",
        [
            b"PRI * HTTP/1.1\r\nhost: a\r\n\r\n",
            b"PRI / HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"PRI * HTTX/2.0\r\n\r\nSM\r\n\r\n",
            b"PRIX * HTTP/2.0\r\n\r\n",
            b"PRI *hidden\0",
            make_head() + PREFACE,
            NOT_HTTP,
        ],
    )
    def test_what_only_looks_like_it_is_not(self, injection, tables, sent):
        injection.send(sent)
        assert injection.programs.http2_ports() == frozenset()

    def test_ports_of_namespaces_that_are_gone_are_forgotten(self, injection, tables):
        injection.send(PREFACE)
        [(netns, _, _)] = injection.programs.http2_ports()
        injection.programs.forget_http2_ports(but={netns})
        assert len(injection.programs.http2_ports()) == 1
        injection.programs.forget_http2_ports(but=())
        assert injection.programs.http2_ports() == frozenset()


HANDED = {
    "trace_id_high": 0x463AC35C9F6413AD,
    "trace_id_low": 0x48485A3953BB6124,
    "span_id": 0xA2FB4A1D1A96D312,
    "parent_id": 0x0020000000000001,
    "link": Link.THREAD,
    "flags": FLAG_SAMPLED,
}
REQUEST_ID = b"7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f"
TUPLE = Tuple(4026532000, "10.1.0.2", 40000, "fd78::2", 9080)


def filled(struct_class, **values):
    """A struct as bcc read it from bpf/handoff.h."""
    raw = struct_class()
    for name, value in values.items():
        if isinstance(value, bytes) and not isinstance(getattr(raw, name), bytes):
            ctypes.memmove(getattr(raw, name), value, len(value))
        else:
            setattr(raw, name, value)
    return raw


def c_tuple(injection):
    return filled(
        injection.programs.bpf[b"claims"].Key,
        local_addr=IPv6Address("::ffff:10.1.0.2").packed,
        peer_addr=IPv6Address("fd78::2").packed,
        netns=TUPLE.netns,
        local_port=TUPLE.local_port,
        peer_port=TUPLE.peer_port,
    )


def hand(injection, offset, request_id):
    """As bpf/bytes.c does."""
    table = injection.programs.bpf[b"handed"]
    value = bytearray(filled(table.Leaf, **HANDED))
    at = table.Leaf.request_id.offset
    value[at : at + len(request_id)] = request_id
    key = bytes(c_tuple(injection)) + struct.pack("=Q", offset)
    assert len(key) == ctypes.sizeof(table.Key)
    fd = program.map_fd(injection.programs.bpf, "handed")
    syscall.map_update(fd, key, bytes(value))


class TestStructs:
    """What C declares and Python packs is the same."""

    @pytest.mark.parametrize("request_id", [REQUEST_ID, b""])
    def test_what_is_handed_is_taken_once(self, injection, tables, request_id):
        hand(injection, 123, request_id)
        assert tables.take(TUPLE, 122) is None
        given = tables.take(TUPLE, 123)
        assert given == Given(
            trace_id=HANDED["trace_id_high"] << 64 | HANDED["trace_id_low"],
            span_id=HANDED["span_id"],
            parent_id=HANDED["parent_id"],
            flags=FLAG_SAMPLED,
            link=Link.THREAD,
            request_id=request_id,
        )
        assert tables.take(TUPLE, 123) is None

    def test_a_claim_names_the_connection(self, injection, tables):
        tables.claim(TUPLE)
        assert list(entries(injection, "claims")) == [bytes(c_tuple(injection))]

    def test_a_root_names_namespace_and_span(self, injection, tables):
        tables.root(TUPLE.netns, HANDED["span_id"])
        key = filled(
            injection.programs.bpf[b"roots"].Key,
            span_id=HANDED["span_id"],
            netns=TUPLE.netns,
        )
        assert list(entries(injection, "roots")) == [bytes(key)]

    def test_the_sizes_are_the_tables(self, injection):
        for name, key, value in (
            ("handed", handoff.HANDED_KEY.size, handoff.HANDED.size),
            ("claims", handoff.TUPLE.size, len(handoff.YES)),
            ("roots", handoff.ROOT_KEY.size, len(handoff.YES)),
            ("http2_seen", handoff.HTTP2_KEY.size, len(handoff.YES)),
        ):
            info = syscall.map_info(program.map_fd(injection.programs.bpf, name))
            assert (info.key_size, info.value_size) == (key, value), name

    def test_the_mark_is_the_kernels_and_the_rules(self):
        source = program.read_source("handoff.h")
        assert f"#define AGENT_MARK {AGENT_MARK:#x}\n" in source


CHILD = """
import sys
from podspan.agent.kernel.handoff import Handoff, Tuple
tables = Handoff(*map(int, sys.argv[1:4]))
where = Tuple(int(sys.argv[4]), "10.1.0.2", 40000, "fd78::2", 9080)
print(tables.take(where, 7).span_id)
tables.claim(where)
"""


def test_a_child_inherits_the_tables(injection, tables):
    hand(injection, 7, b"")
    fds = injection.programs.handoff_fds()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, fds), str(TUPLE.netns)],
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == HANDED["span_id"]
    assert list(entries(injection, "claims")) == [bytes(c_tuple(injection))]
