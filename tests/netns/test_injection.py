"""Headers written by the kernel into requests, byte by byte as the server gets them."""

import errno
import http.client
import itertools
import json
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from netns import injection_fixtures
from netns.http_peer import (
    DEADLINE_S,
    FORWARDED,
    PARENT_ID,
    REQUEST_ID,
    SPAN_ID,
    TRACE_ID,
    WITHOUT_PARENT,
    EchoServer,
    chunked,
    headers_of,
    make_head,
    read_all,
)
from netns.injection_fixtures import Injection, two_pods
from netns.injection_model import UUID, Chosen, check, plan_of, with_our_headers
from podspan.agent.exchange import (
    FLAG_INJECTED,
    FLAG_SAMPLED,
    End,
    Link,
    Protocol,
    Role,
)

kernel_stays_calm = injection_fixtures.kernel_stays_calm
shared_injection = injection_fixtures.shared_injection
injection = injection_fixtures.injection

HEADS = {
    "no context": make_head((b"Cookie", b"session=0123456789abcdef; theme=dark")),
    "forwarded context": make_head(*FORWARDED),
    "forwarded root": make_head(*WITHOUT_PARENT),
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
both_families = pytest.mark.parametrize("version", [4, 6])


class TestCuts:
    """The last piece of a head is where all is written; its offset decides."""

    @both_families
    @every_head
    def test_two_pieces_cut_at_every_byte(self, injection, head, version):
        for cut in range(1, len(head)):
            received = injection.send(head[:cut], head[cut:], version=version)
            check_cut(injection, head, cut, received)

    @every_head
    def test_three_pieces(self, injection, head):
        seed = int(time.time())
        print(f"seed {seed}")
        cuts = random.Random(seed)
        for _ in range(200):
            first, second = sorted(cuts.sample(range(1, len(head)), 2))
            received = injection.send(head[:first], head[first:second], head[second:])
            check_cut(injection, head, second, received)

    def test_one_piece_per_byte(self, injection):
        head = HEADS["no context"]
        received = injection.send(*(head[at : at + 1] for at in range(len(head))))
        check_cut(injection, head, len(head) - 1, received)

    def test_a_body_may_follow_in_the_last_piece(self, injection):
        body = b"0123456789"
        head = make_head((b"Content-Length", b"10"), method=b"POST")
        for cut in range(1, len(head)):
            received = injection.send(head[:cut], head[cut:] + body)
            check_cut(injection, head, cut, received, body)

    @pytest.mark.parametrize("empty_lines", [1, 3])
    def test_empty_lines_before_a_head(self, injection, empty_lines):
        """RFC 9112 section 2.2; the offsets of ids count from the head's first byte."""
        head = HEADS["forwarded context"]
        received = injection.send(b"\r\n" * empty_lines + head)
        expected = with_our_headers(head, injection.record())
        assert received == b"\r\n" * empty_lines + expected


def check_cut(injection, head, cut, received, body=b""):
    """One request arrived, the last piece of whose head began at byte `cut`."""
    record = injection.record()
    plan = plan_of(head, Chosen.of_record(record))
    if cut <= min(plan.reach, len(head) - 2):
        assert received == with_our_headers(head, record) + body, cut
        assert record.flags & FLAG_INJECTED
        assert injection.losses() == {}, cut
    else:
        assert received == head + body, cut
        assert not record.flags & FLAG_INJECTED
        assert injection.losses() == {"inject_cut": 1}, cut


SIZES = (
    *(0, 1, 2),
    *(1023, 1024, 1025),
    *(4095, 4096, 4097),
    *(8191, 8192, 8193),
    *(16383, 16384, 16385),
    *(65535, 65536, 65537),
    1 << 20,
)


def in_one_send(sock, head, body):
    sock.sendall(head + body)


def in_separate_sends(sock, head, body):
    sock.sendall(head)
    for at in range(0, len(body), 10007):
        sock.sendall(body[at : at + 10007])


def in_one_writev(sock, head, body):
    whole = head + body
    size = len(whole) // 20 + 1
    left = [whole[at : at + size] for at in range(0, len(whole), size)]
    while left:
        sent = sock.sendmsg(left)
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]


def with_sendfile(sock, head, body):
    sock.send(head, socket.MSG_MORE)
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        sock.sendfile(file, 0, len(body) or None)


WAYS = (in_one_send, in_separate_sends, in_one_writev, with_sendfile)


class TestBodies:
    @both_families
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    def test_of_every_size_and_sent_in_every_way(
        self, injection, way, framing, version
    ):
        for size in SIZES:
            head, body = request_with_body(size, framing)
            received = injection.send_by(
                lambda sock, head=head, body=body: way(sock, head, body),
                version=version,
            )
            record = injection.record()
            losses = injection.losses()
            check_whole(received, with_our_headers(head, record) + body, size)
            assert record.request_bytes == size, size
            assert losses == {}, size

    @both_families
    def test_a_file_that_holds_the_whole_request_stays_as_it_is(
        self, injection, tmp_path, version
    ):
        """sendfile hands over the file's own pages, in which ids are rewritten."""
        body = random.Random(7).randbytes(100_000)
        head = make_head(*FORWARDED, (b"Content-Length", b"100000"), method=b"PUT")
        (tmp_path / "request").write_bytes(head + body)
        with (tmp_path / "request").open("rb") as file:
            received = injection.send_by(lambda sock: sock.sendfile(file))
        expected = with_our_headers(head, injection.record()) + body
        check_whole(received, expected, "received")
        check_whole((tmp_path / "request").read_bytes(), head + body, "file")
        assert injection.losses() == {}

    def test_in_a_thousand_chunks(self, injection):
        """More than one send's tail calls can follow: the rest is not looked at."""
        head = make_head((b"Transfer-Encoding", b"chunked"), method=b"PUT")
        body = chunked(random.Random(8).randbytes(10_000), size=10)
        received = injection.send(head + body)
        assert received == with_our_headers(head, injection.record()) + body
        assert injection.losses() == {"pieces": 1}


def request_with_body(size, framing):
    body = random.Random(size).randbytes(size)
    if framing == "chunked":
        return make_head((b"Transfer-Encoding", b"chunked"), method=b"PUT"), chunked(
            body
        )
    length = b"%d" % size
    return make_head((b"Content-Length", length), method=b"PUT"), body


def check_whole(received, expected, what):
    """Compare without a megabyte in the message."""
    if received != expected:
        at = next(
            (
                i
                for i, (a, b) in enumerate(zip(received, expected, strict=False))
                if a != b
            ),
            min(len(received), len(expected)),
        )
        window = slice(max(at - 40, 0), at + 200)
        pytest.fail(
            f"{what}: {len(received)} bytes, not {len(expected)}; at {at}"
            f" {received[window]!r} is not {expected[window]!r}"
        )


HEAD_SIZES = (1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 16383, 16384)


class TestLongHeads:
    @both_families
    @pytest.mark.parametrize("headers", [(), FORWARDED], ids=["no context", "context"])
    @pytest.mark.parametrize("size", HEAD_SIZES)
    def test_up_to_16_kb(self, injection, size, headers, version):
        head = make_head(*headers, size=size)
        assert len(head) == size
        # Where it lies in the kernel's page changes from one to the next.
        for _ in range(8):
            received = injection.send(head, version=version)
            check_whole(received, with_our_headers(head, injection.record()), size)
        assert injection.losses() == {}

    @pytest.mark.parametrize("size", HEAD_SIZES)
    def test_in_many_elements(self, injection, size):
        head = make_head(size=size)
        received = injection.send_by(lambda sock: in_one_writev(sock, head, b""))
        check_whole(received, with_our_headers(head, injection.record()), size)
        assert injection.losses() == {}

    @pytest.mark.parametrize("size", HEAD_SIZES)
    def test_in_pieces(self, injection, size):
        head = make_head(size=size)
        seed = int(time.time())
        print(f"seed {seed}")
        for cut in random.Random(seed).sample(range(1, size - 2), 5):
            received = injection.send(head[:cut], head[cut:])
            check_whole(received, with_our_headers(head, injection.record()), cut)
        assert injection.losses() == {}

    @pytest.mark.parametrize("size", [16385, 20000, 65536])
    def test_longer_ones_pass_untouched(self, injection, size):
        head = make_head(size=size)
        check_whole(injection.send(head), head, size)
        check_tcp(injection, size)


def check_tcp(injection, size):
    """The connection was followed as one that speaks no HTTP."""
    record = injection.record()
    assert record.protocol is Protocol.TCP
    assert (record.role, record.end) == (Role.CLIENT, End.CLOSED_HERE)
    assert (record.request_bytes, record.response_bytes) == (size, 0)
    assert (record.link, record.parent_id) == (Link.NONE, 0)
    assert record.trace_id % 2**64 == record.span_id != 0
    assert record.flags == FLAG_SAMPLED
    assert (record.method, record.target, record.status) == ("", "", 0)
    assert record.netns == injection.client.path.stat().st_ino
    assert record.pid == os.getpid()
    assert 0 < record.connect_end_ns <= record.request_first_ns
    assert record.request_first_ns <= record.request_last_ns
    assert injection.losses() == {}


CLIENT_HELLO = bytes.fromhex(
    "16030100c8010000c40303ebbd2a0f7f6e1a0f3c5d9f6b4ac0e2d4d6f8"
    "00112233445566778899aabbcc20deadbeef0a0d0a0d"
)
NOT_HTTP_1 = {
    "TLS": CLIENT_HELLO,
    "random": random.Random(23).randbytes(5000),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30),
    "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "version 2": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "LF after CRLF": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "folded": b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: a\0\r\n\r\n",
    "no name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "method too long": b"G" * 17 + b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    "two lengths": b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "no length": b"PUT / HTTP/1.1\r\nContent-Length: ten\r\n\r\n",
    "huge length": b"PUT / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % 10**19,
}


class TestUntouched:
    @pytest.mark.parametrize("stream", NOT_HTTP_1.values(), ids=NOT_HTTP_1.keys())
    def test_what_is_no_http_1(self, injection, stream):
        # And nothing that comes later on such a connection.
        later = make_head()
        whole = stream + later + later
        assert injection.send(stream, later, later) == whole
        check_tcp(injection, len(whole))

    @pytest.mark.parametrize("together", [True, False])
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_a_body_that_looks_like_a_head(self, injection, together, framing):
        body = make_head(*FORWARDED) * 3
        if framing == "length":
            head = make_head((b"Content-Length", b"%d" % len(body)), method=b"POST")
        else:
            head = make_head((b"Transfer-Encoding", b"chunked"), method=b"POST")
            body = chunked(body)
        pieces = [head + body] if together else [head, body]
        received = injection.send(*pieces)
        assert received == with_our_headers(head, injection.record()) + body
        assert injection.losses() == {}

    def test_two_framings_pass_as_they_are(self, injection):
        head = make_head(
            (b"Content-Length", b"3"), (b"Transfer-Encoding", b"chunked"), method=b"PUT"
        )
        body = b"3\r\nabc\r\n0\r\n\r\n" + make_head()
        assert injection.send(head + body) == head + body
        # It is HTTP, so there is no TCP span of it either.
        assert injection.records() == []
        assert injection.losses() == {"request_unparsed": 1}

    def test_a_pod_that_nobody_traces(self, injection):
        here, there = injection.server, injection.client
        head = make_head()
        assert injection.send(head, here=here, there=there) == head
        assert injection.records() == []
        assert injection.losses() == {}

    def test_connections_that_the_pod_accepts(self, injection):
        """What the traced pod answers, and what is asked of it, is left alone."""
        client, server = injection.connect(
            here=injection.server, there=injection.client
        )
        with client, server:
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(make_head())
                assert receiver.recv(4096) == make_head()
        assert injection.losses() == {}


class TestPipelining:
    """Here no response is ever seen: all requests of a connection wait for theirs."""

    @pytest.mark.parametrize("together", [1, 2, 7])
    def test_each_of_17_requests_gets_headers_of_its_own(self, injection, together):
        heads = ([*HEADS.values()] * 6)[:17]
        pieces = [b"".join(heads[at : at + together]) for at in range(0, 17, together)]
        received = injection.send(*pieces)
        records = injection.records()
        assert received == b"".join(map(with_our_headers, heads, records))
        assert len({record.span_id for record in records}) == 17
        assert injection.losses() == {}

    @pytest.mark.parametrize("seed", range(20))
    def test_however_17_requests_are_cut(self, injection, seed):
        """Each is injected or not as if it were alone: its own last cut decides."""
        chance = random.Random(seed)
        heads = [chance.choice([*HEADS.values()]) for _ in range(17)]
        stream = b"".join(heads)
        cuts = sorted(chance.sample(range(1, len(stream)), 17 + 2 * seed))
        edges = [0, *cuts, len(stream)]
        received = injection.send(*(stream[a:b] for a, b in itertools.pairwise(edges)))
        expected = b""
        missed = start = 0
        for head, record in zip(heads, injection.records(), strict=True):
            end = start + len(head)
            cut = max((at - start for at in cuts if start < at < end), default=0)
            plan = plan_of(head, Chosen.of_record(record))
            whole = cut <= min(plan.reach, len(head) - 2)
            expected += with_our_headers(head, record) if whole else head
            missed += not whole
            start = end
        assert received == expected
        assert injection.losses() == ({"inject_cut": missed} if missed else {})

    def test_what_comes_after_17_passes_untouched(self, injection):
        heads = [make_head(target=b"/%d" % number) for number in range(20)]
        received = injection.send(*heads)
        records = injection.records()
        ours = map(with_our_headers, heads[:17], records)
        assert received == b"".join([*ours, *heads[17:]])
        assert len(records) == 17
        assert injection.losses() == {"pipelined": 1}

    def test_a_body_between_them(self, injection):
        requests = [request_with_body(3000, "length"), request_with_body(9, "chunked")]
        received = injection.send(*(head + body for head, body in requests * 3))
        records = injection.records()
        assert received == b"".join(
            with_our_headers(head, record) + body
            for (head, body), record in zip(requests * 3, records, strict=True)
        )
        assert [record.request_bytes for record in records] == [3000, 9] * 3
        assert injection.losses() == {}


class TestContext:
    def test_a_new_root(self, injection):
        received = headers_of(injection.send(HEADS["no context"]))
        record = injection.record()
        assert re.fullmatch(b"[0-9a-f]{32}", received[b"x-b3-traceid"])
        assert received[b"x-b3-spanid"] == received[b"x-b3-traceid"][16:]
        assert b"x-b3-parentspanid" not in received
        assert received[b"x-b3-sampled"] == b"1"
        assert re.fullmatch(UUID % b"9", received[b"x-request-id"])
        assert record.trace_id == int(received[b"x-b3-traceid"], 16)
        assert record.span_id == int(received[b"x-b3-spanid"], 16)
        assert record.request_id.encode() == received[b"x-request-id"]
        assert (record.parent_id, record.link) == (0, Link.NONE)

    def test_the_record_says_what_the_socket_was(self, injection):
        injection.send(HEADS["no context"], version=6)
        record = injection.record()
        assert record.role is Role.CLIENT
        assert record.end is End.CLOSED_HERE  # no kprobes: no response is seen
        assert (record.local_addr, record.peer_addr) == ("fd78::1", "fd78::2")
        assert record.netns == injection.client.path.stat().st_ino
        assert record.pid == os.getpid()
        assert record.tid == threading.get_native_id()
        assert (record.method, record.target) == ("GET", "/reviews/7?verbose=1")
        assert record.host == "reviews:9080"
        assert 0 < record.connect_start_ns <= record.connect_end_ns
        assert record.connect_end_ns <= record.request_first_ns
        assert record.request_first_ns <= record.request_last_ns

    @pytest.mark.parametrize("headers", [FORWARDED, WITHOUT_PARENT])
    def test_a_forwarded_context_becomes_the_parent(self, injection, headers):
        head = make_head(*headers)
        received = injection.send(head)
        record = injection.record()
        got = headers_of(received)
        assert got[b"x-b3-traceid"] == TRACE_ID
        assert got[b"x-b3-parentspanid"] == SPAN_ID
        assert got[b"x-b3-spanid"] not in (SPAN_ID, PARENT_ID, TRACE_ID[16:])
        assert got[b"x-request-id"] == REQUEST_ID
        assert record.request_id.encode() == REQUEST_ID
        assert record.trace_id == int(TRACE_ID, 16)
        assert record.parent_id == int(SPAN_ID, 16)
        assert record.span_id == int(got[b"x-b3-spanid"], 16)
        assert record.link is Link.HEADER
        grown = 0 if headers is FORWARDED else len(b"x-b3-parentspanid: \r\n") + 16
        assert len(received) == len(head) + grown

    @pytest.mark.parametrize("own", [b"abc", b"7" * 40, b"8" * 100, b""])
    def test_an_own_request_id_is_kept(self, injection, own):
        head = make_head((b"x-request-id", own))
        received = injection.send(head)
        record = injection.record()
        assert received == with_our_headers(head, record)
        assert received.count(b"x-request-id") == 1
        assert record.request_id == (
            own.decode() if len(own) <= 40 else own[:40].decode()
        )


def all_at_once(sock, data):
    """Send what is left, whatever that is: what most libraries do."""
    view = memoryview(data)
    while view:
        view = view[send_some(sock, view) :]


def by_16_kb(sock, data):
    """After a partial send, the next begins where that ended, but ends elsewhere."""
    view = memoryview(data)
    while view:
        view = view[send_some(sock, view[:16384]) :]


def by_turns(sock, data):
    """Sizes that have nothing to do with each other."""
    sizes = random.Random(5)
    view = memoryview(data)
    while view:
        view = view[send_some(sock, view[: sizes.randrange(1, 300_000)]) :]


def send_some(sock, data):
    while True:
        try:
            return sock.send(data)
        except BlockingIOError:
            select.select([], [sock], [], DEADLINE_S)


# SO_SNDBUF, bytes of the head, step of the cut
BUFFERS = (
    (2304, 3000, 101),
    (4000, 8000, 211),
    (8000, 3000, 101),
    (8000, 8000, 211),
    (12_000, 8000, 211),
    (12_000, 16000, 331),
)


def read_into(received, sock):
    received.append(read_all(sock))


def send_once(sock, data):
    """Return how much of it the kernel takes now."""
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


class TestFullBuffers:
    """A push into a full buffer is cut short, and the application sends the rest."""

    @pytest.mark.parametrize(
        "blocking", [False, True], ids=["non-blocking", "blocking"]
    )
    @pytest.mark.parametrize("way", [all_at_once, by_16_kb, by_turns])
    @pytest.mark.parametrize("sndbuf", [0, 2304, 10_000, 50_000, 100_000, 400_000])
    def test_every_byte_arrives_once(self, injection, sndbuf, way, blocking):
        for framing in ("length", "chunked"):
            head, body = request_with_body(3_000_000, framing)

            def send(sock, data=head + body):
                sock.setblocking(blocking)
                way(sock, data)

            received = injection.send_by(send, sndbuf=sndbuf)
            record = injection.record()
            losses = injection.losses()
            # A message that the kernel does not show may hide where a chunk ends.
            assert losses.pop("bytes_missed", 0) <= (framing == "chunked")
            injected = record.flags & FLAG_INJECTED
            expected = with_our_headers(head, record) if injected else head
            check_whole(received, expected + body, framing)
            assert losses == ({} if injected else {"inject_buffer": 1}), framing

    @pytest.mark.parametrize(
        "blocking", [False, True], ids=["non-blocking", "blocking"]
    )
    @pytest.mark.parametrize("way", [all_at_once, by_16_kb, by_turns])
    def test_the_body_is_counted_to_its_end(self, injection, way, blocking):
        head, body = request_with_body(3_000_000, "length")

        def send(sock):
            sock.setblocking(blocking)
            way(sock, head + body)

        received = injection.send_by(send, sndbuf=50_000)
        assert received.endswith(body)
        assert injection.record().request_bytes == len(body)

    def test_a_second_request_is_found_behind_the_body(self, injection):
        head, body = request_with_body(3_000_000, "length")

        def send(sock):
            sock.setblocking(False)
            by_turns(sock, head + body)
            all_at_once(sock, make_head())

        received = injection.send_by(send, sndbuf=50_000)
        *records, last = injection.records()
        assert received.endswith(body + with_our_headers(make_head(), last))
        assert len(records) == 1
        assert last.flags & FLAG_INJECTED

    def test_nothing_is_inserted_that_may_not_fit(self, injection):
        """Of what a push leaves unsent the application must not be told too much.

        The server does not read, so the head's first piece fills the buffer more or
        less; then the second is sent once, and may be cut short.
        """
        injected = refused = cut_short = 0
        for sndbuf, size, step in BUFFERS:
            head = make_head(size=size)
            for first in range(500, size - 200, step):
                client, server = injection.connect(sndbuf=sndbuf, rcvbuf=2304)
                with server:
                    with client:
                        client.setblocking(False)
                        at = send_once(client, head[:first])
                        if at == first:
                            at += send_once(client, head[first:])
                            cut_short += first < at < size
                        received: list[bytes] = []
                        reader = threading.Thread(
                            target=read_into, args=(received, server)
                        )
                        reader.start()
                        all_at_once(client, head[at:])
                    reader.join()
                # A first piece that is cut short hides the second: no record then.
                expected = head
                for record in injection.records():
                    if record.flags & FLAG_INJECTED:
                        expected = with_our_headers(head, record)
                        injected += 1
                check_whole(received[0], expected, (sndbuf, size, first))
                losses = injection.losses()
                assert set(losses) <= {"inject_buffer"}
                refused += bool(losses)
        print(f"{injected} injected, {refused} refused, {cut_short} cut short")
        assert injected
        assert refused
        assert cut_short

    def test_a_partial_write_of_a_writev(self, injection):
        head, body = request_with_body(2_000_000, "length")

        def send(sock):
            sock.setblocking(True)
            in_one_writev(sock, head, body)

        received = injection.send_by(send, sndbuf=400_000)
        check_whole(received, with_our_headers(head, injection.record()) + body, "all")


NODE = """
const [url, headers] = process.argv.slice(1);
require("http").get(url, {headers: JSON.parse(headers)}, answer => {
    answer.pipe(process.stdout);
});
"""
PYTHON = """
import json, sys, urllib.request
url, headers = sys.argv[1:]
request = urllib.request.Request(url, headers=json.loads(headers))
sys.stdout.buffer.write(urllib.request.urlopen(request).read())
"""


def with_headers(option, headers):
    return [f"{option}{name}: {value}" for name, value in headers.items()]


COMMANDS = {
    "curl": lambda url, headers: [
        *("curl", "--silent", "--fail", "--http1.1"),
        *(f"-H{line}" for line in with_headers("", headers)),
        url,
    ],
    "wget": lambda url, headers: [
        *("wget", "--quiet", "--output-document=-"),
        *with_headers("--header=", headers),
        url,
    ],
    "node": lambda url, headers: ["node", "-e", NODE, url, json.dumps(headers)],
    "python3": lambda url, headers: ["python3", "-c", PYTHON, url, json.dumps(headers)],
}
CARRIED = {
    "nothing": {},
    "multi": {name.decode(): value.decode() for name, value in FORWARDED},
    "single": {"b3": f"{TRACE_ID.decode()}-{SPAN_ID.decode()}-1"},
    "malformed": {"X-B3-TraceId": "junk", "X-B3-Sampled": "true"},
}


class TestClients:
    def test_a_client_that_ends_its_sending_gets_the_answer(self, injection):
        client, server = injection.connect()
        with client, server:
            client.sendall(HEADS["no context"])
            client.shutdown(socket.SHUT_WR)
            request = read_all(server)
            assert injection.records() == []  # the response is still to come
            server.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(100_000))
            server.close()
            assert len(read_all(client)) == 19 + 100_000
        assert request == with_our_headers(HEADS["no context"], injection.record())

    @pytest.fixture
    def server(self, injection):
        with EchoServer(injection.server) as server:
            yield server

    @pytest.mark.parametrize("headers", CARRIED.values(), ids=CARRIED.keys())
    @pytest.mark.parametrize("client", COMMANDS)
    def test_what_a_client_sends_differs_by_our_headers_only(
        self, injection, server, client, headers
    ):
        """The same call, of a pod that nobody traces, and of a traced one."""
        if shutil.which(client) is None:
            pytest.skip(f"there is no {client} here")
        host, port = server.address
        argv = COMMANDS[client](f"http://{host}:{port}/some/path?q", headers)
        argv = injection.client.command(*argv)

        def call():
            done = subprocess.run(argv, capture_output=True, check=True, timeout=60)
            return done.stdout

        inode = injection.client.path.stat().st_ino
        injection.programs.set_policy(inode, 0)
        sent = call()
        assert injection.records() == []
        injection.sample(None)
        arrived = call()

        assert sent.startswith(b"GET /some/path?q HTTP/1.1\r\n")
        check(sent, arrived, injection.records(), injection.losses())

    @pytest.mark.parametrize("size", [0, 100, 2000, 1_000_000])
    def test_curl(self, injection, server, tmp_path, size):
        body = random.Random(size).randbytes(size)
        (tmp_path / "body").write_bytes(body)
        # Beyond a megabyte curl waits for a 100 (Continue) that does not come.
        argv = ["curl", "--silent", "--fail", "--http1.1", "--header", "Expect:"]
        argv += ["--output", str(tmp_path / "echo")]
        if size:
            argv += ["--data-binary", f"@{tmp_path / 'body'}"]
        host, port = server.address
        injection.client.run(*argv, f"http://{host}:{port}/some/path")

        head, _, rest = (tmp_path / "echo").read_bytes().partition(b"\r\n\r\n")
        record = injection.record()
        check_whole(rest, body, "body")
        assert headers_of(head)[b"x-b3-traceid"] == b"%032x" % record.trace_id
        assert headers_of(head)[b"x-request-id"] == record.request_id.encode()
        assert record.target == "/some/path"
        assert record.comm == "curl"
        assert record.request_bytes == size
        assert injection.losses() == {}

    @pytest.mark.parametrize("size", [0, 100, 2000, 1_000_000])
    def test_http_client(self, injection, server, size):
        body = random.Random(size).randbytes(size)
        with injection.client.inside():
            host, port = server.address
            client = http.client.HTTPConnection(host, port, timeout=DEADLINE_S)
            client.request("PUT", "/some/path", body, {"x-b3-sampled": "1"})
        echo = client.getresponse().read()
        client.close()

        head, _, rest = echo.partition(b"\r\n\r\n")
        record = injection.record()
        check_whole(rest, body, "body")
        assert headers_of(head)[b"x-b3-spanid"] == b"%016x" % record.span_id
        assert echo.count(b"x-b3-sampled") == 1
        assert record.request_bytes == size
        assert injection.losses() == {}

    def test_200_connections_at_a_time(self, injection, server):
        """None gets another's ids, and none loses a byte."""
        with injection.client.inside():
            clients = [socket.socket() for _ in range(200)]
        requests = {}
        with ExitStack() as stack:
            for number, client in enumerate(clients):
                stack.enter_context(client)
                client.settimeout(DEADLINE_S)
                client.connect(server.address)
                body = random.Random(number).randbytes(20_000)
                head = make_head(
                    (b"Content-Length", b"%d" % len(body)), target=b"/%d" % number
                )
                requests[client] = (head, body)
            for part in range(4):  # heads and bodies of all, by turns
                for client, (head, body) in requests.items():
                    whole = head + body
                    cut = [0, 50, len(head) - 2, len(whole) // 2, len(whole)]
                    client.sendall(whole[cut[part] : cut[part + 1]])
            echoes = {
                client: read_all(client).partition(b"\r\n\r\n")[2] for client in clients
            }
        records = {record.target.encode(): record for record in injection.records()}

        assert len(records) == 200
        for client, (head, body) in requests.items():
            record = records[head.split()[1]]
            check_whole(echoes[client], with_our_headers(head, record) + body, head)
        assert len({record.span_id for record in records.values()}) == 200
        assert len({record.trace_id for record in records.values()}) == 200
        assert len({record.request_id for record in records.values()}) == 200
        assert injection.losses() == {}

    def test_8_threads_at_a_time(self, injection, server):
        """Programs that run on several processors at once share no state."""
        failed: list[BaseException] = []
        echoes: dict[bytes, bytes] = {}

        def call(thread):
            try:
                for number in range(50):
                    with injection.client.inside():
                        client = socket.socket()
                    with client:
                        client.settimeout(DEADLINE_S)
                        client.connect(server.address)
                        head = make_head(target=b"/%d/%d" % (thread, number))
                        client.sendall(head[:40])
                        client.sendall(head[40:])
                        echo = read_all(client).partition(b"\r\n\r\n")[2]
                    echoes[head] = echo
            except BaseException as exc:
                failed.append(exc)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        records = {record.target.encode(): record for record in injection.records()}
        assert len(records) == len(echoes) == 400
        for head, echo in echoes.items():
            assert echo == with_our_headers(head, records[head.split()[1]])
        assert len({record.span_id for record in records.values()}) == 400


OURS = re.compile(
    rb"x-request-id: [-0-9a-f]{36}\r\nx-b3-traceid: [0-9a-f]{32}\r\n"
    rb"x-b3-spanid: [0-9a-f]{16}\r\nx-b3-sampled: 1\r\n"
)


class TestEnd:
    def test_connections_go_on_when_the_programs_end(self):
        """Half a head sent, a body under way, a send asleep in the kernel."""
        with two_pods() as pods, ExitStack() as stack:
            injection = stack.enter_context(Injection(*pods))

            def connect(sndbuf=0):
                client, server = injection.connect(sndbuf=sndbuf)
                stack.enter_context(client)
                stack.enter_context(server)
                return client, server

            half, busy, asleep = connect(), connect(20_000), connect(20_000)
            idle = [connect() for _ in range(100)]
            head = make_head()
            half[0].sendall(head[:60])
            large, body = request_with_body(20_000_000, "length")
            received = {}

            def read(sock):
                received[sock] = read_all(sock)

            def send(sock):
                all_at_once(sock, large + body)
                sock.shutdown(socket.SHUT_WR)

            threads = [
                threading.Thread(target=send, args=(busy[0],)),
                threading.Thread(target=send, args=(asleep[0],)),
                threading.Thread(target=read, args=(busy[1],)),
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.02)  # the transfer takes longer; nobody reads `asleep` yet

            injection.programs.close()

            # The kernel lets go a little later: until then, all is as before.
            for client, server in idle:
                client.sendall(head)
                client.close()
                got = read_all(server)
                assert OURS.sub(b"", got) == head
                if got == head:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("still injected two seconds after the end")
            half[0].sendall(head[60:])
            half[0].close()
            assert read_all(half[1]) == head
            threads.append(threading.Thread(target=read, args=(asleep[1],)))
            threads[-1].start()
            for thread in threads:
                thread.join(DEADLINE_S)
            for _, server in (busy, asleep):
                got_head, _, got_body = received[server].partition(b"\r\n\r\n")
                check_whole(got_body, body, "body")
                assert OURS.sub(b"", got_head + b"\r\n") == large[:-2]


REQUESTS = 60_000
PAGES_PER_PROCESSOR = (
    256  # that the kernel's count may be off by: include/net/proto_memory.h
)


BALLAST_PAGES = REQUESTS * 148 // 4096 * 3 // 2


class TestMemory:
    """The kernel charges the socket for what is inserted, and discharges what is sent.

    Where these did not agree, the socket's forward allocation would drift, and with it
    the count of pages that limits TCP on the whole node.
    """

    @pytest.fixture(autouse=True)
    def ballast(self, injection):
        """The count is never shown below zero: make room for a fall."""
        with ExitStack() as stack:
            while tcp_pages() < BALLAST_PAGES:
                client, server = injection.connect(here=injection.server)
                stack.enter_context(client)
                stack.enter_context(server)
                client.setblocking(False)
                while send_once(client, bytes(100_000)):
                    pass
            yield

    def test_connections_leave_no_page_behind(self, injection):
        before = settled_tcp_pages()
        for number in range(20_000):
            client, server = injection.connect()
            client.sendall(HEADS["no context"])
            assert len(server.recv(4096)) > len(HEADS["no context"])
            # A reset leaves no TIME_WAIT: there are fewer ports than requests.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            client.close()
            server.close()
            if number % 5000 == 0:
                injection.records()
        after = settled_tcp_pages()
        print(f"20000 connections: {before} pages of TCP before, {after} after")
        assert injection.losses() == {}
        assert abs(after - before) <= noise_pages()

    def test_a_closed_connection_leaves_no_entry(self, injection):
        """However it ends: closed here or there first, reset, half-closed."""
        table = injection.programs.bpf[b"connections"]
        wait_for(lambda: len(table) == 0)
        for end in (close_here, close_there, reset, half_close):
            client, server = injection.connect()
            client.sendall(HEADS["no context"])
            server.recv(4096)
            assert len(table) == 1
            end(client, server)
            client.close()
            server.close()
            wait_for(lambda: len(table) == 0)
            assert injection.record().span_id, end.__name__
        # One that sends nothing.
        for sock in injection.connect():
            sock.close()
        wait_for(lambda: len(table) == 0)
        assert injection.records() == []
        assert injection.losses() == {}

    def test_a_refused_connection_is_told_of_and_leaves_no_entry(self, injection):
        with injection.client.inside():
            refused = socket.socket()
        with refused, pytest.raises(ConnectionRefusedError):
            refused.connect((injection.server.ipv4, 1))
        wait_for(lambda: len(injection.programs.bpf[b"connections"]) == 0)
        record = injection.record()
        assert (record.end, record.error) == (End.CONNECT_FAILED, errno.ECONNREFUSED)
        assert (record.protocol, record.role) == (Protocol.TCP, Role.CLIENT)
        assert (record.peer_addr, record.peer_port) == (injection.server.ipv4, 1)
        assert (record.pid, record.flags) == (os.getpid(), FLAG_SAMPLED)
        assert 0 < record.connect_start_ns <= record.connect_end_ns
        assert (record.request_bytes, record.response_bytes) == (0, 0)
        assert injection.losses() == {}

    def test_a_long_connection_keeps_its_account(self, injection):
        """As if responses were seen, which ends an exchange, between the requests."""
        before = settled_tcp_pages()
        client, server = injection.connect()
        table = injection.programs.bpf[b"connections"]
        [(key, connection)] = table.items()
        head = HEADS["no context"]
        grown = 0
        for number in range(REQUESTS):
            client.sendall(head)
            grown += len(server.recv(4096)) - len(head)
            connection = table[key]
            connection.open = 0
            table[key] = connection
            if number % 10_000 == 0:
                print(number, tcp_pages(), forward_allocation(injection.client, client))
        during = tcp_pages()
        forward = forward_allocation(injection.client, client)
        client.close()
        server.close()
        after = settled_tcp_pages()
        print(
            f"{REQUESTS} requests grew by {grown} bytes, {grown // 4096} pages:"
            f" {before} pages of TCP before, {during} during, {after} after"
        )
        assert grown == 148 * REQUESTS
        assert 0 <= forward < os.sysconf("SC_PAGE_SIZE")
        assert injection.losses() == {}
        assert abs(after - before) <= noise_pages()


LINGER_0 = struct.pack("ii", 1, 0)  # struct linger


def close_here(client, server):
    client.close()
    assert server.recv(1) == b""


def close_there(client, server):
    server.close()
    assert client.recv(1) == b""


def reset(client, server):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)


def half_close(client, server):
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tcp_pages():
    sockstat = Path("/proc/net/sockstat").read_text()
    [pages] = re.findall(r"^TCP: .* mem (-?\d+)$", sockstat, re.MULTILINE)
    return int(pages)


def forward_allocation(pod, client):
    """Bytes that the pod's socket has set aside: `f` of ss(8)'s skmem."""
    port = client.getsockname()[1]
    argv = ["ss", "--tcp", "--memory", "--no-header", "sport", "=", f":{port}"]
    [size] = re.findall(r"skmem:.*,f(-?\d+),", pod.run(*argv).stdout)
    return int(size)


def settled_tcp_pages():
    """Wait until what was closed is freed."""
    pages = [tcp_pages()]
    while len(pages) < 5 or len(set(pages[-5:])) > 1:
        assert len(pages) < 100
        time.sleep(0.05)
        pages.append(tcp_pages())
    return pages[-1]


def noise_pages():
    return PAGES_PER_PROCESSOR * len(os.sched_getaffinity(0))
