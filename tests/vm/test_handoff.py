"""What the kernel hands to the redirect engine's workers, and takes from them.

One tracer in this process for all tests; both ends of each connection are here, so a
record is in the ring when the call that ended its exchange returns. In the client's and
the front pod requests are to be redirected, in the back pod as the node's engine says.
"""

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from podspan.agent.exchange import (
    FLAG_INJECTED,
    FLAG_SAMPLED,
    End,
    Exchange,
    Link,
    Protocol,
    Role,
)
from podspan.agent.ids import derive_id
from podspan.agent.kernel import syscall
from podspan.agent.kernel.handoff import Handoff, Tuple
from podspan.agent.kernel.options import POLICY_REDIRECT, Options
from podspan.agent.kernel.tracer import Tracer
from podspan.agent.redirect.inject import Given
from podspan.init.plan import AGENT_MARK
from vm.conftest import BACK, CLIENT, FRONT, PODS, Agent, Pod

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
REQUEST_ID = "01234567-89ab-4def-8123-456789abcdef"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def inode_of(pod: Pod) -> int:
    return Path("/run/netns", pod.name).stat().st_ino


def head_of(path: str, *lines: str, method: str = "GET") -> bytes:
    text = [f"{method} {path} HTTP/1.1", "host: reviews", *lines, "", ""]
    return "\r\n".join(text).encode()


class Pair(NamedTuple):
    """Both ends of a connection, in one thread."""

    client: socket.socket
    server: socket.socket
    of_client: Tuple
    of_server: Tuple

    def pass_on(self, *pieces: bytes) -> bytes:
        """Send pieces; return what arrives."""
        for piece in pieces:
            self.client.sendall(piece)
        return read(self.server, sum(map(len, pieces)))

    def answer(self, response: bytes = OK) -> None:
        self.server.sendall(response)
        assert read(self.client, len(response)) == response

    def call(self, *pieces: bytes) -> bytes:
        received = self.pass_on(*pieces)
        self.answer()
        return received


def read(sock: socket.socket, size: int) -> bytes:
    """At least so many bytes: headers may have been written into them."""
    received = b""
    while len(received) < size:
        piece = sock.recv(65536)
        assert piece, received
        received += piece
    return received


def tuple_of(sock: socket.socket, pod: Pod) -> Tuple:
    local_addr, local_port, *_ = sock.getsockname()
    peer_addr, peer_port, *_ = sock.getpeername()
    return Tuple(inode_of(pod), local_addr, local_port, peer_addr, peer_port)


@contextmanager
def pair(
    here: Pod = CLIENT,
    there: Pod = FRONT,
    *,
    address: str | None = None,
    mark: int = 0,
    accepted_mark: int = 0,
) -> Iterator[Pair]:
    """A connection from one pod to another, whose ends have these marks."""
    address = address or there.ipv4
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ExitStack() as stack:
        with there.inside():
            listener = stack.enter_context(
                socket.create_server((address, 0), family=family)
            )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, accepted_mark)
        with here.inside():
            client = stack.enter_context(socket.socket(family))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.settimeout(30)
        client.connect(listener.getsockname()[:2])
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(30)
        yield Pair(client, server, tuple_of(client, here), tuple_of(server, there))


@dataclass
class Tracing:
    tracer: Tracer
    taken: list[Exchange]

    def records(self, path: str = "", role: Role | None = None) -> list[Exchange]:
        """The exchanges so far whose target begins so."""
        self.tracer.poll(0)
        return [
            one
            for one in self.taken
            if one.target.startswith(path) and role in {None, one.role}
        ]

    def record(self, path: str, role: Role) -> Exchange:
        [record] = self.records(path, role)
        return record

    def records_of(self, tuple_: Tuple) -> list[Exchange]:
        return [
            one
            for one in self.records()
            if (one.netns, one.local_port, one.peer_port)
            == (tuple_.netns, tuple_.local_port, tuple_.peer_port)
        ]

    def entries(self, number: int) -> list[bytes]:
        """Keys of the table handed, claims, or roots."""
        fd = self.tracer.handoff_fds()[number]
        return [key for key, _ in syscall.map_items(fd)]

    @property
    def handed(self) -> list[bytes]:
        return self.entries(0)

    @property
    def claims(self) -> list[bytes]:
        return self.entries(1)

    @property
    def roots(self) -> list[bytes]:
        return self.entries(2)


@dataclass
class Old:
    """Connections that are older than the tracer."""

    plain: Pair
    marked: Pair


@pytest.fixture(scope="module")
def old(pods: None, session_agent: Agent) -> Iterator[Old]:
    session_agent.stop()  # there is place for one
    with pair() as plain, pair(mark=AGENT_MARK, accepted_mark=AGENT_MARK) as marked:
        yield Old(plain, marked)


PLANS: Mapping[Pod, int] = {CLIENT: POLICY_REDIRECT, FRONT: POLICY_REDIRECT}


def by_inode(plans: Mapping[Pod, int]) -> dict[int, int]:
    return {inode_of(pod): what for pod, what in plans.items()}


@pytest.fixture(scope="module")
def loaded(old: Old) -> Iterator[Tracing]:
    warnings: list[str] = []
    taken: list[Exchange] = []
    tracer = Tracer(
        max_connections=4096,
        options=Options(span_ids="child"),
        netns=frozenset(inode_of(pod) for pod in PODS),
        roaming=(),
        on_exchange=taken.append,
        on_warning=warnings.append,
        plans=by_inode(PLANS),
    )
    with tracer:
        assert tracer.fault is None, warnings
        yield Tracing(tracer, taken)


@pytest.fixture
def tracing(loaded: Tracing) -> Iterator[Tracing]:
    """Nothing left over from the test before."""
    yield loaded
    loaded.records()
    loaded.taken.clear()
    for fd in loaded.tracer.handoff_fds():
        for key, _ in list(syscall.map_items(fd)):
            syscall.map_delete(fd, key)
    loaded.tracer.set_plans(by_inode(PLANS))


@pytest.fixture
def handoff(tracing: Tracing) -> Handoff:
    return Handoff(*tracing.tracer.handoff_fds())


def given_by(record: Exchange, *, with_request_id: bool = True) -> Given:
    """What a worker should have got for the exchange of this record."""
    assert record.flags & FLAG_INJECTED
    return Given(
        trace_id=record.trace_id,
        span_id=record.span_id,
        parent_id=record.parent_id,
        flags=record.flags & ~FLAG_INJECTED,
        link=record.link,
        request_id=record.request_id.encode() if with_request_id else b"",
    )


@pytest.mark.parametrize("address", [FRONT.ipv4, FRONT.ipv6])
def test_what_is_handed_is_what_is_recorded(
    tracing: Tracing, handoff: Handoff, address: str
) -> None:
    head = head_of("/handed")
    with pair(address=address) as ends:
        assert ends.pass_on(head) == head  # the kernel itself writes nothing
        given = handoff.take(ends.of_client, len(head))
        ends.answer()
        assert tracing.handed == []
    record = tracing.record("/handed", Role.CLIENT)
    assert given == given_by(record)
    assert given.link == Link.NONE
    assert given.parent_id == 0
    assert given.flags == FLAG_SAMPLED
    assert len(given.request_id) == 36


def test_a_head_with_a_context_and_an_id_of_its_own(
    tracing: Tracing, handoff: Handoff
) -> None:
    ids = ("x-b3-traceid: 463ac35c9f6413ad", "x-b3-spanid: a2fb4a1d1a96d312")
    head = head_of("/own", *ids, f"x-request-id: {REQUEST_ID}", "x-b3-sampled: 1")
    with pair() as ends:
        ends.call(head)
        given = handoff.take(ends.of_client, len(head))
    record = tracing.record("/own", Role.CLIENT)
    assert given == given_by(record, with_request_id=False)
    assert (record.link, record.trace_id) == (Link.HEADER, 0x463AC35C9F6413AD)
    assert record.parent_id == 0xA2FB4A1D1A96D312
    assert record.request_id == REQUEST_ID


def test_a_malformed_context_is_handed_over_all_the_same(
    tracing: Tracing, handoff: Handoff
) -> None:
    """What request.c hides the worker removes."""
    head = head_of("/malformed", "x-b3-traceid: 463ac35c", "b3: x")
    with pair() as ends:
        ends.call(head)
        given = handoff.take(ends.of_client, len(head))
    assert given == given_by(tracing.record("/malformed", Role.CLIENT))
    assert given.link == Link.NONE


def test_offsets_count_on_in_a_connection(tracing: Tracing, handoff: Handoff) -> None:
    sent = 0
    with pair() as ends:
        for i in range(3):
            head = head_of(f"/kept/{i}", "content-length: 700", method="POST")
            ends.call(head, bytes(700))
            given = handoff.take(ends.of_client, sent + len(head))
            assert given == given_by(tracing.record(f"/kept/{i}", Role.CLIENT))
            sent += len(head) + 700
    assert tracing.handed == []


def test_pipelined_requests_each_get_their_own(
    tracing: Tracing, handoff: Handoff
) -> None:
    heads = [head_of(f"/pipelined/{i}", f"x-n: {'n' * i}") for i in range(3)]
    with pair() as ends:
        assert ends.pass_on(b"".join(heads)) == b"".join(heads)
        given = [
            handoff.take(ends.of_client, sum(map(len, heads[: i + 1])))
            for i in range(3)
        ]
        ends.answer(OK * 3)
    assert given == [
        given_by(tracing.record(f"/pipelined/{i}", Role.CLIENT)) for i in range(3)
    ]
    assert len({one.span_id for one in given if one}) == 3
    assert tracing.handed == []


def test_a_head_in_pieces_is_handed_with_its_last(
    tracing: Tracing, handoff: Handoff
) -> None:
    head = head_of("/pieces")
    with pair() as ends:
        ends.pass_on(head[:10])
        ends.pass_on(head[10:-1])
        assert tracing.handed == []
        ends.pass_on(head[-1:])
        given = handoff.take(ends.of_client, len(head))
        ends.answer()
    assert given == given_by(tracing.record("/pieces", Role.CLIENT))


def test_a_child_by_its_thread(tracing: Tracing, handoff: Handoff) -> None:
    """The served request's id goes along, as request.c writes it."""
    outer = head_of("/outer", f"x-request-id: {REQUEST_ID}")
    inner = head_of("/inner")

    def serve() -> Given | None:
        with pair() as ends, pair(FRONT, BACK) as onward:
            ends.pass_on(outer)
            onward.call(inner)
            ends.answer()
            return handoff.take(onward.of_client, len(inner))

    with ThreadPoolExecutor(1) as fresh:  # whose threads no test has used
        given = fresh.submit(serve).result()
    assert given == given_by(tracing.record("/inner", Role.CLIENT))
    served = tracing.record("/outer", Role.SERVER)
    assert given.link == Link.THREAD
    assert (given.trace_id, given.parent_id) == (served.trace_id, served.span_id)
    assert given.request_id == REQUEST_ID.encode()


class TestPlans:
    def test_where_the_kernel_writes_nothing_is_handed(self, tracing: Tracing) -> None:
        tracing.tracer.set_plans({})
        with pair() as ends:
            assert b"x-b3-traceid" in ends.call(head_of("/by-the-kernel"))
        assert tracing.record("/by-the-kernel", Role.CLIENT).flags & FLAG_INJECTED
        assert tracing.handed == []

    def test_engine_off(self, tracing: Tracing) -> None:
        tracing.tracer.set_plans(by_inode({CLIENT: 0}))
        head = head_of("/off")
        with pair() as ends:
            assert ends.call(head) == head
        assert not tracing.record("/off", Role.CLIENT).flags & FLAG_INJECTED
        assert tracing.handed == []

    def test_a_plan_stands_beside_a_rate(self, tracing: Tracing) -> None:
        tracing.tracer.set_sampling({inode_of(CLIENT): 0.0})
        try:
            with pair() as ends:
                ends.call(head_of("/unsampled"))
            assert len(tracing.handed) == 1
            record = tracing.record("/unsampled", Role.CLIENT)
            assert not record.flags & FLAG_SAMPLED
        finally:
            tracing.tracer.set_sampling({})

    def test_connections_keep_the_engine_that_they_began_with(
        self, tracing: Tracing
    ) -> None:
        tracing.tracer.set_plans({})
        with pair() as ends:
            tracing.tracer.set_plans(by_inode(PLANS))
            assert b"x-b3-traceid" in ends.call(head_of("/enrolled"))
            assert tracing.handed == []
            head = head_of("/not-enrolled")
            with pair() as later:
                assert later.call(head) == head
        assert len(tracing.handed) == 1

    def test_old_connections_are_not_enrolled(self, loaded: Tracing) -> None:
        """All of those that were there are in pods that are to be redirected."""
        assert loaded.tracer.enrolment.seen == 0


def test_an_old_connections_offsets_are_not_known(tracing: Tracing, old: Old) -> None:
    for i in range(3):
        old.plain.call(head_of(f"/old/{i}"))
    records = tracing.records("/old/", Role.CLIENT)
    assert records
    assert not any(record.flags & FLAG_INJECTED for record in records)
    assert tracing.handed == []


class TestMark:
    def test_neither_end_is_traced(self, tracing: Tracing) -> None:
        head = head_of("/marked")
        with pair(mark=AGENT_MARK, accepted_mark=AGENT_MARK) as ends:
            assert ends.call(head) == head
        assert tracing.records("/marked") == []
        assert tracing.handed == []

    def test_the_other_end_is(self, tracing: Tracing) -> None:
        with pair(mark=AGENT_MARK) as ends:
            ends.call(head_of("/unmarked"))
        assert [one.role for one in tracing.records("/unmarked")] == [Role.SERVER]

    def test_old_connections_neither(self, tracing: Tracing, old: Old) -> None:
        for i in range(3):
            old.marked.call(head_of(f"/old-marked/{i}"))
        assert tracing.records("/old-marked/") == []

    @pytest.mark.parametrize("mark", [AGENT_MARK, 0])
    def test_no_way_to_the_peer(self, tracing: Tracing, mark: int) -> None:
        """connect(2) that fails at once: bpf/failure.c."""
        with CLIENT.inside(), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            with pytest.raises(OSError, match="unreachable"):
                sock.connect(("192.0.2.1", 9))
        failed = [one for one in tracing.records() if one.peer_addr == "192.0.2.1"]
        assert [one.end for one in failed] == (
            [] if mark == AGENT_MARK else [End.CONNECT_FAILED]
        )


class TestRoot:
    """Of each test the ids are its own: what a pod has received is remembered."""

    TRACE_ID = 0x463AC35C9F6413AD48485A3953BB6124

    def ids(self, span_id: int) -> list[str]:
        return [
            f"x-b3-traceid: {self.TRACE_ID:032x}",
            f"x-b3-spanid: {span_id:016x}",
            "x-b3-sampled: 1",
        ]

    def test_the_workers_root_is_one(self, tracing: Tracing, handoff: Handoff) -> None:
        """Its application forwards the ids: its calls are the root's children."""
        span_id = 0x1111
        handoff.root(inode_of(FRONT), span_id)
        inner = head_of("/of-root", *self.ids(span_id))
        with pair(mark=AGENT_MARK) as ends, pair(FRONT, BACK) as onward:
            ends.pass_on(head_of("/root", *self.ids(span_id)))
            onward.call(inner)
            ends.answer()
            given = handoff.take(onward.of_client, len(inner))
        root = tracing.record("/root", Role.SERVER)
        assert (root.link, root.parent_id) == (Link.NONE, 0)
        assert (root.trace_id, root.span_id) == (self.TRACE_ID, span_id)
        assert root.flags == FLAG_SAMPLED
        assert given is not None
        assert given.parent_id == span_id
        assert tracing.roots == []

    def test_only_in_its_pod(self, tracing: Tracing, handoff: Handoff) -> None:
        span_id = 0x2222
        handoff.root(inode_of(BACK), span_id)
        with pair(mark=AGENT_MARK) as ends:
            ends.call(head_of("/no-root", *self.ids(span_id)))
        record = tracing.record("/no-root", Role.SERVER)
        assert (record.link, record.parent_id) == (Link.HEADER, span_id)
        assert record.span_id == derive_id(span_id)
        assert len(tracing.roots) == 1


class TestHttp2:
    @pytest.mark.parametrize("server_first", [False, True])
    def test_both_ends_and_the_port_are_noted(
        self, tracing: Tracing, server_first: bool
    ) -> None:
        with pair() as ends:
            if server_first:
                ends.answer(b"\0\0\x06\x04\0\0\0\0\0" + bytes(6))
            ends.pass_on(PREFACE)
            port = ends.of_client.peer_port
        assert {
            (inode_of(CLIENT), port, Role.CLIENT),
            (inode_of(FRONT), port, Role.SERVER),
        } <= tracing.tracer.http2_ports((inode_of(CLIENT), inode_of(FRONT)))

    def test_claimed_connections_have_no_tcp_record(
        self, tracing: Tracing, handoff: Handoff
    ) -> None:
        with pair() as ends, pair() as unclaimed:
            for one in (ends, unclaimed):
                one.pass_on(PREFACE)
                one.answer(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS
            handoff.claim(ends.of_client)
            handoff.claim(ends.of_server)
            assert len(tracing.claims) == 2
        assert tracing.records_of(ends.of_client) == []
        assert tracing.records_of(ends.of_server) == []
        for end in (unclaimed.of_client, unclaimed.of_server):
            assert [one.protocol for one in tracing.records_of(end)] == [Protocol.TCP]
        assert tracing.claims == []
