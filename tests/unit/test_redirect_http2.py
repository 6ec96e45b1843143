"""The HTTP/2 layer between two h2 peers in memory: what one sends, the other gets."""

from collections import defaultdict, deque
from itertools import count
from random import Random

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    PingReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes
from hpack import Encoder
from hpack.struct import NeverIndexedHeaderTuple
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from podspan.agent.exchange import FLAG_INJECTED, FLAG_SAMPLED, FLAG_SHARED
from podspan.agent.exchange import End as How
from podspan.agent.redirect import http2
from podspan.agent.redirect.http2 import (
    CONNECTION_WINDOW,
    FRAME_SIZE_MAX,
    HEADER_LIST_MAX,
    PREMATURE_STREAMS,
    Http2,
    ReceivedIds,
)
from podspan.agent.redirect.inject import Direction, Propagation
from podspan.agent.redirect.layer import Abort, Count, End, Report, Send, Side

UP, DOWN = Side.UP, Side.DOWN
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TRACE_ID = b"463ac35c9f6413ad48485a3953bb6124"

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/shop.Reviews/Get"),
    (b":authority", b"reviews:50051"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"grpc-python/1.85"),
]
WITH_CONTEXT = [
    *REQUEST,
    (b"x-b3-traceid", TRACE_ID),
    (b"x-b3-spanid", b"a2fb4a1d1a96d312"),
    (b"x-b3-sampled", b"1"),
]
RESPONSE = [(b":status", b"200"), (b"content-type", b"application/grpc")]
GRPC_OK = [(b"grpc-status", b"0"), (b"grpc-message", b"")]


def lenient(client_side):
    return H2Configuration(
        client_side=client_side,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
    )


class Endpoint(H2Connection):
    """An h2 connection that goes on after GOAWAY, which h2 takes for the end."""

    def _receive_goaway_frame(self, frame):
        state = self.state_machine.state
        try:
            return super()._receive_goaway_frame(frame)
        finally:
            self.state_machine.state = state

    def close_connection(self, *args):
        state = self.state_machine.state
        super().close_connection(*args)
        self.state_machine.state = state


def whole(data):
    return [data]


class Wire:
    """A client and a server with the layer between them.

    Bytes travel when `run` is called. A side in `stalled` does not read: the relay's
    buffer towards it is not drained.
    """

    def __init__(
        self, direction=Direction.OUTBOUND, cut=whole, received_ids=None, **options
    ):
        self.now_ns = 1_000_000_000
        self._random = Random(7)
        self.cut = cut
        self.layer = Http2(
            direction,
            Propagation(**options),
            lambda: self.now_ns,
            lambda: self._random.getrandbits(64),
            received_ids,
        )
        self.client = Endpoint(lenient(True))
        self.server = Endpoint(lenient(False))
        self.peers = {DOWN: self.client, UP: self.server}
        self.events: dict[Side, list[Event]] = {DOWN: [], UP: []}
        self.stalled = set()
        self.buffered: dict[Side, deque[bytes]] = {DOWN: deque(), UP: deque()}
        self.records = []
        self.others = []  # actions that are neither bytes nor records
        self.auto_credit = {DOWN, UP}

    def start(self, client_settings=None, server_settings=None):
        for peer, more in (
            (self.client, client_settings),
            (self.server, server_settings),
        ):
            peer.local_settings.update(more or {})
            peer.local_settings.acknowledge()
            peer.initiate_connection()
        self.run()
        return self

    def run(self):
        """Carry bytes until nothing moves."""
        moved = True
        while moved:
            moved = False
            for side, peer in self.peers.items():
                data = peer.data_to_send()
                if data:
                    moved = True
                    self.give(side, data)
            for side, waiting in self.buffered.items():
                if side in self.stalled or not waiting:
                    continue
                moved = True
                while waiting:
                    self.read(side, waiting.popleft())
                self.take(self.layer.drained(side))
        return self

    def give(self, side, data):
        for part in self.cut(data):
            self.take(self.layer.received(side, part))

    def take(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.buffered[action.side].append(action.data)
            elif isinstance(action, Report):
                self.records.append(action.record)
            else:
                self.others.append(action)

    def read(self, side, data):
        for event in self.peers[side].receive_data(data):
            self.events[side].append(event)
            if isinstance(event, DataReceived) and side in self.auto_credit:
                self.peers[side].acknowledge_received_data(
                    event.flow_controlled_length, event.stream_id
                )

    def seen(self, side, kind):
        return [event for event in self.events[side] if isinstance(event, kind)]

    def body(self, side, stream_id):
        events = self.seen(side, DataReceived)
        return b"".join(e.data for e in events if e.stream_id == stream_id)

    def ask(self, headers=REQUEST, body=None, **more):
        """Send a request from the client; None: it goes on."""
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, headers, end_stream=body == b"", **more)
        if body:
            self.client.send_data(stream_id, body, end_stream=True)
        self.run()
        return stream_id

    def answer(self, stream_id, body=b"", trailers=GRPC_OK):
        self.server.send_headers(stream_id, RESPONSE)
        if body:
            self.server.send_data(stream_id, body)
        self.server.send_headers(stream_id, trailers, end_stream=True)
        return self.run()


# What passes.


def test_a_call_passes_whole_and_is_recorded():
    wire = Wire().start()
    stream_id = wire.ask(WITH_CONTEXT, b"question")
    wire.now_ns += 5_000_000
    wire.answer(stream_id, b"the answer")

    [request] = wire.seen(UP, RequestReceived)
    assert request.headers[: len(REQUEST)] == REQUEST
    assert wire.body(UP, stream_id) == b"question"
    [response] = wire.seen(DOWN, ResponseReceived)
    assert response.headers == RESPONSE
    assert wire.body(DOWN, stream_id) == b"the answer"
    [trailers] = wire.seen(DOWN, TrailersReceived)
    assert trailers.headers == GRPC_OK
    assert len(wire.seen(DOWN, StreamEnded)) == len(wire.seen(UP, StreamEnded)) == 1

    [record] = wire.records
    assert record.trace_id == int(TRACE_ID, 16)
    assert record.parent_id == 0xA2FB4A1D1A96D312
    assert record.flags == FLAG_SAMPLED | FLAG_INJECTED
    assert record.link == 1
    assert (record.request_first_ns, record.request_last_ns) == (10**9, 10**9)
    assert record.response_first_ns == record.response_last_ns == 1_005_000_000
    assert (record.request_bytes, record.response_bytes) == (8, 10)
    assert (record.status, record.end, record.error) == (200, How.COMPLETE, 0)
    assert (record.method, record.target) == ("POST", "/shop.Reviews/Get")
    assert (record.host, record.user_agent) == ("reviews:50051", "grpc-python/1.85")
    assert (record.grpc_status, record.grpc_message) == ("0", "")
    assert wire.others == []


def test_the_context_is_written_into_the_request():
    wire = Wire().start()
    wire.answer(wire.ask(WITH_CONTEXT, b"q"))
    [request] = wire.seen(UP, RequestReceived)
    [record] = wire.records
    headers = dict(request.headers)
    assert headers[b"x-b3-traceid"] == TRACE_ID
    assert headers[b"x-b3-spanid"] == b"%016x" % record.span_id
    assert headers[b"x-b3-parentspanid"] == b"a2fb4a1d1a96d312"
    assert headers[b"x-b3-sampled"] == b"1"
    assert headers[b"x-request-id"].decode() == record.request_id
    assert len(record.request_id) == 36
    names = [name for name, _ in request.headers]
    pseudo = [name.startswith(b":") for name in names]
    assert pseudo == sorted(pseudo, reverse=True)
    assert len(names) == len(set(names))


def test_inbound_context_is_left_as_it_is_and_shared():
    wire = Wire(Direction.INBOUND).start()
    wire.answer(wire.ask(WITH_CONTEXT, b"q"))
    [request] = wire.seen(UP, RequestReceived)
    assert request.headers == WITH_CONTEXT
    [record] = wire.records
    assert record.span_id == 0xA2FB4A1D1A96D312
    assert record.flags == FLAG_SAMPLED | FLAG_SHARED


def test_a_forwarded_id_means_the_span_that_served_it():
    """With --span-ids child a server's span has an id of its own."""
    pod = ReceivedIds()
    entering = Wire(Direction.INBOUND, received_ids=pod, span_ids="child").start()
    entering.answer(entering.ask(WITH_CONTEXT, b"q"))
    leaving = Wire(received_ids=pod, span_ids="child").start()
    leaving.answer(leaving.ask(WITH_CONTEXT, b"q"))
    elsewhere = Wire(span_ids="child").start()
    elsewhere.answer(elsewhere.ask(WITH_CONTEXT, b"q"))

    [served], [called], [other] = entering.records, leaving.records, elsewhere.records
    assert served.parent_id == other.parent_id == 0xA2FB4A1D1A96D312
    assert called.parent_id == served.span_id != served.parent_id


def test_the_oldest_received_id_is_forgotten(monkeypatch):
    monkeypatch.setattr(http2, "RECEIVED_IDS_MAX", 2)
    ids = ReceivedIds()
    for span_id in (1, 2, 3):
        ids.add(span_id)
    assert [span_id in ids for span_id in (1, 2, 3)] == [False, True, True]


def test_inbound_without_context_becomes_a_root():
    wire = Wire(Direction.INBOUND).start()
    wire.answer(wire.ask(REQUEST, b"q"))
    [request] = wire.seen(UP, RequestReceived)
    [record] = wire.records
    assert dict(request.headers)[b"x-b3-spanid"] == b"%016x" % record.span_id
    assert (record.parent_id, record.link, record.flags) == (0, 0, FLAG_SAMPLED)


def test_what_is_not_sampled_propagates_and_is_reported_as_such():
    wire = Wire(sampling=0.0).start()
    wire.answer(wire.ask(REQUEST, b"q"))
    [request] = wire.seen(UP, RequestReceived)
    assert dict(request.headers)[b"x-b3-sampled"] == b"0"
    [record] = wire.records
    assert record.flags == FLAG_INJECTED
    assert record.status == 200


def test_sensitive_headers_stay_sensitive_and_ours_are_not_indexed():
    wire = Wire().start()
    secret = NeverIndexedHeaderTuple(b"authorization", b"Bearer x")
    wire.ask([*REQUEST, secret], b"")
    [request] = wire.seen(UP, RequestReceived)
    kept_out = {header[0] for header in request.headers if not header.indexable}
    assert b"authorization" in kept_out
    assert b"x-b3-spanid" in kept_out
    assert not kept_out & {name for name, _ in REQUEST}


ODD_HEADERS = [
    ("an upper-case name", (b"X-Case", b"v")),
    ("a connection header", (b"connection", b"keep-alive")),
    ("a te that is no trailers", (b"te", b"gzip")),
    ("bytes that are no text", (b"x-bin", b"\xff\xfe\x00")),
    ("space around a value", (b"x-space", b" v ")),
    ("an empty name", (b"", b"v")),
    ("a cookie crumb", (b"cookie", b"a=1")),
]


@pytest.mark.parametrize("header", [h for _, h in ODD_HEADERS], ids=str)
def test_what_both_ends_accept_is_not_judged(header):
    wire = Wire().start()
    stream_id = wire.ask([*REQUEST, header], b"")
    [request] = wire.seen(UP, RequestReceived)
    assert header in request.headers
    wire.server.send_headers(stream_id, [*RESPONSE, header], end_stream=True)
    wire.run()
    [response] = wire.seen(DOWN, ResponseReceived)
    assert header in response.headers
    assert wire.others == []


@pytest.mark.parametrize("length", [b"3", b"100"])
def test_a_wrong_content_length_is_the_ends_affair(length):
    wire = Wire().start()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, [*REQUEST, (b"content-length", length)])
    wire.client.send_data(stream_id, b"12345", end_stream=True)
    wire.take(wire.layer.received(DOWN, wire.client.data_to_send()))
    assert wire.others == []
    sent = b"".join(wire.buffered[UP])
    assert b"12345" in sent


def test_informational_responses_pass_before_the_response():
    wire = Wire().start()
    stream_id = wire.ask([*REQUEST, (b"expect", b"100-continue")])
    wire.server.send_headers(stream_id, [(b":status", b"100")])
    wire.server.send_headers(stream_id, [(b":status", b"103"), (b"link", b"</a>")])
    wire.answer(stream_id)
    codes = [e.headers[0][1] for e in wire.seen(DOWN, InformationalResponseReceived)]
    assert codes == [b"100", b"103"]
    assert len(wire.seen(DOWN, ResponseReceived)) == 1
    wire.client.end_stream(stream_id)
    wire.run()
    assert wire.records[0].status == 200


def test_trailers_of_a_request_pass():
    wire = Wire().start()
    stream_id = wire.ask()
    wire.client.send_data(stream_id, b"body")
    wire.client.send_headers(stream_id, [(b"checksum", b"7")], end_stream=True)
    wire.run()
    [trailers] = wire.seen(UP, TrailersReceived)
    assert trailers.headers == [(b"checksum", b"7")]


def test_trailers_alone_have_the_status_of_a_call():
    wire = Wire().start()
    stream_id = wire.ask(body=b"q")
    only = [*RESPONSE, (b"grpc-status", b"5"), (b"grpc-message", b"no%20such")]
    wire.server.send_headers(stream_id, only, end_stream=True)
    wire.run()
    [record] = wire.records
    assert (record.grpc_status, record.grpc_message) == ("5", "no%20such")
    assert record.end == How.COMPLETE


def test_an_end_in_an_empty_data_frame_and_padding():
    wire = Wire().start()
    stream_id = wire.ask()
    wire.client.send_data(stream_id, b"padded", pad_length=200)
    wire.client.send_data(stream_id, b"")
    wire.client.end_stream(stream_id)
    wire.run()
    assert wire.body(UP, stream_id) == b"padded"
    assert len(wire.seen(UP, StreamEnded)) == 1
    assert wire.client.local_flow_control_window(stream_id) == 65535 - 6


def test_padding_is_given_back():
    wire = Wire().start()
    stream_id = wire.ask()
    for _ in range(CONNECTION_WINDOW // 255):
        wire.client.send_data(stream_id, b"x", pad_length=255)
        wire.run()
    assert wire.client.outbound_flow_control_window > CONNECTION_WINDOW // 2


def test_the_servers_limit_of_heads_is_the_servers_to_judge():
    wire = Wire().start(server_settings={SettingCodes.MAX_HEADER_LIST_SIZE: 1000})
    wire.server.decoder.max_header_list_size = HEADER_LIST_MAX
    wire.ask([*REQUEST, (b"x-big", b"v" * 5000)], b"")
    assert len(wire.seen(UP, RequestReceived)) == 1


def test_heads_larger_than_a_frame_pass():
    wire = Wire().start()
    wire.server.decoder.max_header_list_size = HEADER_LIST_MAX
    big = [(b"x-%d" % i, b"%d" % i * 2000) for i in range(20)]
    wire.ask([*REQUEST, *big], b"")
    [request] = wire.seen(UP, RequestReceived)
    assert request.headers[len(REQUEST) : len(REQUEST) + 20] == big


def test_pings_go_to_the_far_end_and_their_answers_back():
    wire = Wire().start()
    wire.client.ping(b"12345678")
    wire.server.ping(b"abcdefgh")
    wire.run()
    for side, asked, answered in (
        (UP, b"12345678", b"abcdefgh"),
        (DOWN, b"abcdefgh", b"12345678"),
    ):
        assert [e.ping_data for e in wire.seen(side, PingReceived)] == [asked]
        assert [e.ping_data for e in wire.seen(side, PingAckReceived)] == [answered]


def test_a_ping_to_a_dead_end_is_not_answered():
    wire = Wire().start()
    wire.stalled.add(UP)
    wire.client.ping(b"12345678")
    wire.run()
    assert wire.seen(DOWN, PingAckReceived) == []


def test_priority_and_extensions_end_here():
    wire = Wire().start()
    unknown = b"\0\0\1\xf0\0\0\0\0\0x"
    wire.give(DOWN, PriorityFrame(5, depends_on=3).serialize() + unknown)
    wire.ask(body=b"q", priority_weight=3)
    assert len(wire.seen(UP, RequestReceived)) == 1
    assert wire.others == []


# Settings.

SERVER_SETTINGS = {
    SettingCodes.MAX_CONCURRENT_STREAMS: 7,
    SettingCodes.INITIAL_WINDOW_SIZE: 1000,
    SettingCodes.MAX_FRAME_SIZE: 1 << 20,
    SettingCodes.MAX_HEADER_LIST_SIZE: 8192,
    SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
}


def test_the_client_has_the_servers_limits():
    wire = Wire().start(server_settings=SERVER_SETTINGS)
    theirs = wire.client.remote_settings
    assert theirs.max_concurrent_streams == 7
    assert theirs.initial_window_size == 1000
    assert theirs.max_frame_size == FRAME_SIZE_MAX
    assert theirs.max_header_list_size == 8192
    assert theirs.enable_connect_protocol == 1
    assert theirs.header_table_size == 4096


def test_the_server_has_the_clients_window_and_may_not_push():
    wire = Wire().start(
        client_settings={
            SettingCodes.INITIAL_WINDOW_SIZE: 4 << 20,
            SettingCodes.MAX_CONCURRENT_STREAMS: 1,
        }
    )
    theirs = wire.server.remote_settings
    assert theirs.initial_window_size == 4 << 20
    assert theirs.enable_push == 0
    assert theirs.max_concurrent_streams > 100  # that is for what a server pushes


def test_no_limit_and_no_extension_that_nobody_set():
    wire = Wire()
    wire.server.local_settings.max_concurrent_streams = 0
    wire.server.local_settings.acknowledge()
    del wire.server.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS]
    wire.start()
    assert wire.client.remote_settings.max_concurrent_streams > 2**31
    assert wire.client.remote_settings.enable_connect_protocol == 0


def test_settings_change_while_streams_are_open():
    wire = Wire().start()
    stream_id = wire.ask()
    assert wire.client.local_flow_control_window(stream_id) == 65535
    for size in (200_000, 10):
        wire.server.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: size})
        wire.run()
        assert wire.client.streams[stream_id].outbound_flow_control_window == size
    wire.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 3})
    wire.run()
    assert wire.client.remote_settings.max_concurrent_streams == 3


def test_the_clients_settings_wait_for_the_servers():
    wire = Wire()
    wire.client.initiate_connection()
    wire.stalled.add(UP)
    early = wire.ask(body=b"q")
    assert wire.events[DOWN] == []
    wire.stalled.clear()
    wire.server.initiate_connection()
    wire.run()
    assert isinstance(wire.events[DOWN][0], RemoteSettingsChanged)
    wire.answer(early, b"a")
    assert wire.body(DOWN, early) == b"a"


def test_more_streams_than_the_server_allows_are_refused_for_another_try():
    wire = Wire().start()
    first = wire.ask()
    wire.stalled.add(DOWN)  # the client does not yet hear of it
    wire.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    wire.run()
    late = wire.ask()
    assert wire.others == [Count("http2_refused")]
    wire.stalled.clear()
    wire.run()
    [reset] = wire.seen(DOWN, StreamReset)
    assert (reset.stream_id, reset.error_code) == (late, ErrorCodes.REFUSED_STREAM)
    wire.client.end_stream(first)
    wire.answer(first, b"a")
    assert wire.body(DOWN, first) == b"a"


def test_a_giant_table_for_our_heads_is_not_used():
    wire = Wire().start({SettingCodes.HEADER_TABLE_SIZE: 2**31})
    stream_id = wire.ask(body=b"q")
    wire.answer(stream_id, trailers=[(b"x-%d" % i, b"v" * 500) for i in range(40)])
    encoder = wire.layer._peers[DOWN].h2.encoder
    assert encoder.header_table_size == 4096
    assert encoder.header_table._current_size <= 4096
    assert len(wire.seen(DOWN, TrailersReceived)) == 1


# Ends.


@pytest.mark.parametrize(
    ("direction", "by", "end"),
    [
        (Direction.OUTBOUND, DOWN, How.CLOSED_HERE),
        (Direction.OUTBOUND, UP, How.RESET),
        (Direction.INBOUND, DOWN, How.RESET),
        (Direction.INBOUND, UP, How.CLOSED_HERE),
    ],
)
@pytest.mark.parametrize("code", [0, 7, 8, 13])
def test_a_reset_passes_with_its_code(direction, by, end, code):
    wire = Wire(direction).start()
    stream_id = wire.ask()
    wire.peers[by].reset_stream(stream_id, code)
    wire.run()
    [reset] = wire.seen(by.other, StreamReset)
    assert (reset.stream_id, reset.error_code) == (stream_id, code)
    [record] = wire.records
    assert (record.end, record.error) == (end, code)
    assert wire.others == []
    # The next stream is none the worse.
    wire.answer(wire.ask(body=b"q"), b"a")
    assert len(wire.records) == 2


def test_an_unknown_code_passes_and_is_recorded_as_internal():
    wire = Wire().start()
    stream_id = wire.ask()
    wire.server.reset_stream(stream_id, 0xDEAD)
    wire.run()
    assert wire.seen(DOWN, StreamReset)[0].error_code == 0xDEAD
    assert wire.records[0].error == ErrorCodes.INTERNAL_ERROR


def test_an_answer_before_the_requests_end_and_its_reset_are_complete():
    """As gRPC servers do that need no more of the request."""
    wire = Wire().start()
    stream_id = wire.ask()
    wire.answer(stream_id, b"enough")
    wire.server.reset_stream(stream_id, ErrorCodes.NO_ERROR)
    wire.run()
    assert wire.body(DOWN, stream_id) == b"enough"
    assert len(wire.seen(DOWN, TrailersReceived)) == 1
    assert wire.seen(DOWN, StreamReset)[0].error_code == ErrorCodes.NO_ERROR
    [record] = wire.records
    assert (record.end, record.error, record.grpc_status) == (How.COMPLETE, 0, "0")


def test_a_reset_comes_after_what_was_sent_before_it():
    wire = Wire().start()
    wire.auto_credit.clear()
    big, small = wire.ask(body=b""), wire.ask()
    wire.server.send_headers(big, RESPONSE)
    wire.server.send_headers(small, RESPONSE)
    for _ in range(4):  # the client's window of the connection is used up
        wire.server.send_data(big, bytes(16000))
    wire.run()
    wire.server.send_data(small, bytes(10000))
    wire.server.reset_stream(small, 11)
    wire.run()
    assert len(wire.body(DOWN, small)) < 10000
    assert wire.seen(DOWN, StreamReset) == []
    wire.client.increment_flow_control_window(64000)
    wire.run()
    assert len(wire.body(DOWN, small)) == 10000
    assert wire.seen(DOWN, StreamReset)[0].error_code == 11


def test_a_graceful_shutdown_in_two_steps():
    wire = Wire().start()
    first = wire.ask()
    wire.server.close_connection(0, b"soon", 2**31 - 1)
    wire.run()
    second = wire.ask()
    wire.server.close_connection(0, b"now", second)
    wire.run()
    lasts = [
        (e.last_stream_id, e.error_code, e.additional_data)
        for e in wire.seen(DOWN, ConnectionTerminated)
    ]
    assert lasts == [(2**31 - 1, 0, b"soon"), (second, 0, b"now")]
    for stream_id in (first, second):
        wire.client.end_stream(stream_id)
        wire.answer(stream_id, b"still")
        assert wire.body(DOWN, stream_id) == b"still"
    assert [record.end for record in wire.records] == [How.COMPLETE] * 2
    assert wire.others == []


def test_streams_after_the_last_of_a_goaway_were_refused():
    wire = Wire().start()
    kept, dropped = wire.ask(), wire.ask()
    wire.server.close_connection(ErrorCodes.NO_ERROR, None, kept)
    wire.run()
    late = wire.ask(body=b"q")
    resets = {e.stream_id: e.error_code for e in wire.seen(DOWN, StreamReset)}
    refused = ErrorCodes.REFUSED_STREAM
    assert resets == {dropped: refused, late: refused}
    assert len(wire.seen(UP, RequestReceived)) == 2
    assert [(r.end, r.error) for r in wire.records] == [(How.RESET, refused)]
    wire.client.end_stream(kept)
    wire.answer(kept, b"kept")
    assert wire.body(DOWN, kept) == b"kept"


def test_too_many_pings_reaches_the_client_as_the_server_says_it():
    wire = Wire().start()
    wire.server.close_connection(ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
    wire.run()
    [event] = wire.seen(DOWN, ConnectionTerminated)
    assert event.error_code == ErrorCodes.ENHANCE_YOUR_CALM
    assert event.additional_data == b"too_many_pings"


def test_a_clients_goaway_reaches_the_server():
    wire = Wire().start()
    stream_id = wire.ask(body=b"q")
    wire.client.close_connection(0, b"bye", 0)
    wire.run()
    assert wire.seen(UP, ConnectionTerminated)[0].additional_data == b"bye"
    wire.answer(stream_id, b"a")
    assert wire.body(DOWN, stream_id) == b"a"


@pytest.mark.parametrize("first", [DOWN, UP])
def test_fins_pass_and_open_streams_are_closed(first):
    wire = Wire().start()
    wire.ask()
    assert wire.layer.ended(first) == [End(first.other)]
    wire.take(wire.layer.ended(first.other))
    assert wire.others == [End(first)]
    [record] = wire.records
    ends = {DOWN: How.CLOSED_HERE, UP: How.CLOSED_THERE}
    assert record.end == ends[first]


def test_a_fin_comes_after_what_still_waits():
    wire = Wire().start()
    wire.auto_credit.clear()
    stream_id = wire.ask(body=b"")
    wire.server.send_headers(stream_id, RESPONSE)
    wire.run()
    wire.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
    wire.stalled.add(UP)  # the server has not heard of it
    wire.run()
    wire.server.send_data(stream_id, b"x" * 100, end_stream=True)
    wire.run()
    wire.take(wire.layer.ended(UP))
    assert wire.others == []
    assert len(wire.body(DOWN, stream_id)) == 10
    wire.client.increment_flow_control_window(90, stream_id)
    wire.stalled.clear()
    wire.run()
    assert len(wire.body(DOWN, stream_id)) == 100
    assert wire.others == [End(DOWN)]


@pytest.mark.parametrize("lost", [DOWN, UP])
def test_a_lost_side_resets_the_other(lost):
    wire = Wire().start()
    wire.ask()
    wire.take(wire.layer.lost(lost))
    wire.take(wire.layer.lost(lost.other))
    assert wire.others == [Abort("reset")]
    [record] = wire.records
    assert record.end == (How.CLOSED_HERE if lost is DOWN else How.RESET)
    assert record.error == 104


# Flow control.


def test_a_big_body_both_ways_however_the_reader_stalls():
    wire = Wire().start()
    body = Random(1).randbytes(3_000_000)
    up, down = wire.ask(), wire.ask(body=b"")
    wire.server.send_headers(down, RESPONSE)
    for stream_id, sender, side in ((up, wire.client, UP), (down, wire.server, DOWN)):
        sent = 0
        for turn in count():
            wire.stalled = {side} if turn % 3 else set()
            room = sender.local_flow_control_window(stream_id)
            part = body[sent : sent + min(room, sender.max_outbound_frame_size)]
            if part:
                sender.send_data(stream_id, part)
            sent += len(part)
            wire.run()
            if sent == len(body):
                break
        wire.stalled.clear()
        wire.run()
        assert wire.body(side, stream_id) == body


def flood(wire, sender, stream_id):
    """Send until the windows are used up; returns how much went."""
    sent = 0
    while True:
        room = sender.local_flow_control_window(stream_id)
        size = min(room, sender.max_outbound_frame_size)
        if not size:
            return sent
        sender.send_data(stream_id, bytes(size))
        sent += size
        wire.run()


@pytest.mark.parametrize("streams", [1, 8])
def test_a_socket_that_takes_nothing_stops_the_sender(streams):
    """Whatever the receiver's windows say: as nginx's, of 2 GiB."""
    wire = Wire().start(server_settings={SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    wire.server.increment_flow_control_window(2**31 - 1 - 65535)
    ids = [wire.ask() for _ in range(streams)]
    wire.stalled.add(UP)
    sent = sum(flood(wire, wire.client, stream_id) for stream_id in ids)
    assert sent == CONNECTION_WINDOW
    assert held(wire, UP) <= CONNECTION_WINDOW + 10_000
    wire.stalled.clear()
    wire.run()
    assert sum(len(wire.body(UP, stream_id)) for stream_id in ids) == sent
    assert wire.client.outbound_flow_control_window > CONNECTION_WINDOW // 2


def test_a_stream_that_is_not_read_takes_no_room_from_the_others():
    wire = Wire().start()
    wire.auto_credit.clear()
    wire.server.increment_flow_control_window(2**31 - 1 - 65535)
    stalled = [wire.ask() for _ in range(50)]
    assert [flood(wire, wire.client, stream_id) for stream_id in stalled] == [
        65535
    ] * 50
    assert held(wire, UP) == 0
    wire.auto_credit.add(UP)
    good = wire.ask(body=b"x" * 16000)
    wire.answer(good, b"y")
    assert wire.body(DOWN, good) == b"y"


def test_a_receivers_connection_window_is_shared_in_turn():
    wire = Wire().start()
    wire.auto_credit.clear()
    ids = [wire.ask() for _ in range(4)]
    for stream_id in ids:
        flood(wire, wire.client, stream_id)
    for _ in range(8):
        wire.server.increment_flow_control_window(16384)
        wire.run()
    got = [len(wire.body(UP, stream_id)) for stream_id in ids]
    assert sum(got) == 65535 + 8 * 16384
    assert all(size >= 16384 for size in got)
    for _ in range(16):
        wire.server.increment_flow_control_window(16384)
        wire.run()
    assert [len(wire.body(UP, stream_id)) for stream_id in ids] == [65535] * 4


def test_what_a_reset_stream_held_is_given_back():
    wire = Wire().start()
    wire.auto_credit.clear()
    for _ in range(40):  # 40 streams of 64 KiB: more than the connection's window
        stream_id = wire.ask()
        flood(wire, wire.client, stream_id)
        wire.server.reset_stream(stream_id, 8)
        wire.run()
    assert wire.layer._streams == {}
    assert wire.client.outbound_flow_control_window > 65535
    assert held(wire, UP) == 0


def test_an_end_needs_no_window():
    """Also where the receiver has made it less than what it had been sent."""
    wire = Wire().start()
    wire.auto_credit.clear()
    stream_id = wire.ask()
    flood(wire, wire.client, stream_id)
    wire.server.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
    wire.run()
    assert wire.client.streams[stream_id].outbound_flow_control_window < 0
    wire.client.end_stream(stream_id)
    wire.take(wire.layer.received(DOWN, wire.client.data_to_send()))
    assert wire.others == []
    assert b"".join(wire.buffered[UP]) == DataFrame(1, flags=["END_STREAM"]).serialize()


def held(wire, side):
    """Bytes that the layer and the relay's buffer hold for a side."""
    waiting = sum(
        len(what.data)
        for stream in wire.layer._streams.values()
        for what in stream.waiting[side]
        if hasattr(what, "data")
    )
    return waiting + sum(map(len, wire.buffered[side]))


def test_nothing_is_kept_of_calls_that_are_over():
    wire = Wire().start()
    for _ in range(300):
        wire.answer(wire.ask(body=b"q"), b"a")
    assert len(wire.records) == 300
    assert wire.layer._streams == {}
    for peer in wire.layer._peers.values():
        assert not peer.blocked
        assert not peer.incoming
        assert len(peer.h2.streams) <= 2
        assert len(peer.h2._closed_streams) <= 1024


# Cuts.


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**16))
def test_the_same_however_the_bytes_are_cut(size, seed):
    random = Random(seed)

    def cut(data):
        parts, at = [], 0
        while at < len(data):
            step = random.randint(1, size)
            parts.append(data[at : at + step])
            at += step
        return parts

    seen = []
    for how in (whole, cut):
        wire = Wire(cut=how).start()
        first = wire.ask(WITH_CONTEXT, b"question" * 300)
        wire.client.ping(b"12345678")
        second = wire.ask()
        wire.client.send_data(second, b"part", pad_length=9)
        wire.answer(first, b"answer" * 700)
        wire.client.send_headers(second, [(b"a", b"b")], end_stream=True)
        wire.run()
        wire.server.reset_stream(second, 5)
        wire.run()
        assert wire.others == []
        bodies = [wire.body(side, i) for side in Side for i in (first, second)]
        heads = [e.headers for e in wire.seen(UP, RequestReceived)]
        trailers = [
            e.headers for side in Side for e in wire.seen(side, TrailersReceived)
        ]
        resets = [e.error_code for e in wire.seen(DOWN, StreamReset)]
        seen.append((bodies, heads, trailers, resets, wire.records))
    assert seen[0] == seen[1]


# Any traffic of two ends that keep to the protocol.


class Traffic:
    """Two ends that do at random what they may; what each sent is kept."""

    def __init__(self, seed):
        self.random = Random(seed)
        self.wire = Wire(cut=self.cut).start()
        self.sent: dict[Side, dict[int, bytes]] = {
            side: defaultdict(bytes) for side in Side
        }
        self.ended: dict[Side, set[int]] = {side: set() for side in Side}
        self.answered: set[int] = set()
        self.reset: set[int] = set()
        self.window = 65535

    def cut(self, data):
        at = self.random.randrange(len(data) + 1)
        return [data[:at], data[at:]]

    def act(self):
        act = self.random.choice(
            [self.open, self.answer, self.send, self.send, self.send, self.end] * 3
            + [self.abandon, self.resize, self.stall, self.wire.run]
        )
        act()

    def open(self):
        client = self.wire.client
        if client.open_outbound_streams < 20:
            stream_id = client.get_next_available_stream_id()
            client.send_headers(stream_id, WITH_CONTEXT)

    def answer(self):
        server = self.wire.server
        for stream_id, stream in server.streams.items():
            if stream_id not in self.answered and stream.open:
                self.answered.add(stream_id)
                server.send_headers(stream_id, RESPONSE)
                return

    def pick(self):
        side = self.random.choice(list(Side))
        ids = [
            stream_id
            for stream_id, stream in self.wire.peers[side].streams.items()
            if stream.open
            and stream_id not in self.ended[side]
            and (side is DOWN or stream_id in self.answered)
        ]
        return side, self.random.choice(ids) if ids else None

    def send(self):
        side, stream_id = self.pick()
        if stream_id is None:
            return
        peer = self.wire.peers[side]
        room = min(peer.local_flow_control_window(stream_id), 16000)
        padding = self.random.choice([None, None, 0, 40])
        size = self.random.randrange(20_000)
        size = min(size, room - (0 if padding is None else padding + 1))
        if size > 0:
            data = self.random.randbytes(size)
            peer.send_data(stream_id, data, pad_length=padding)
            self.sent[side][stream_id] += data

    def end(self):
        side, stream_id = self.pick()
        if stream_id is None:
            return
        peer = self.wire.peers[side]
        if self.random.random() < 0.5:
            peer.send_headers(stream_id, GRPC_OK, end_stream=True)
        else:
            peer.end_stream(stream_id)
        self.ended[side].add(stream_id)

    def abandon(self):
        side, stream_id = self.pick()
        if stream_id is not None:
            self.wire.now_ns += 2_000_000_000
            self.wire.peers[side].reset_stream(stream_id, 8)
            self.reset.add(stream_id)

    def resize(self):
        # Only upwards: see test_an_end_needs_no_window.
        self.window += self.random.randrange(50_000)
        peer = self.random.choice(list(self.wire.peers.values()))
        peer.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: self.window})

    def stall(self):
        self.wire.stalled = set(
            self.random.sample(list(Side), self.random.randrange(3))
        )


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**32))
@example(1538132)  # a response to a stream that was reset while its request waited
def test_any_traffic_of_two_good_ends_arrives(seed):
    traffic = Traffic(seed)
    wire = traffic.wire
    for _ in range(150):
        traffic.act()
    wire.stalled.clear()
    wire.run()
    for peer in wire.peers.values():
        peer.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    wire.run()

    assert wire.others == []
    for side in Side:
        for stream_id, data in traffic.sent[side].items():
            got = wire.body(side.other, stream_id)
            if stream_id in traffic.reset:
                assert data.startswith(got)
            else:
                assert data == got
        ended = {e.stream_id for e in wire.seen(side.other, StreamEnded)}
        assert traffic.ended[side] - traffic.reset == ended - traffic.reset
    assert held(wire, DOWN) == held(wire, UP) == 0
    over = traffic.reset | (traffic.ended[DOWN] & traffic.ended[UP])
    assert len(wire.records) == len(over)
    assert not over & wire.layer._streams.keys()


# Who does not keep to the protocol.

HEAD = Encoder().encode(REQUEST)


def head(stream_id=1, flags=("END_HEADERS",), data=HEAD):
    return HeadersFrame(stream_id, data, flags=flags).serialize()


def bomb():
    """A value of 4000 bytes, and 100 references to it."""
    encoder = Encoder()
    block = encoder.encode([(b"x-bomb", b"v" * 4000)], huffman=False)
    return head(data=block + b"\xbe" * 100)


SETTINGS = SettingsFrame(0).serialize()
PUSH = PushPromiseFrame(1, promised_stream_id=2, data=HEAD, flags=("END_HEADERS",))
MALFORMED = {
    "no preface": (b"GET / HTTP/1.1\r\n\r\n" * 2, 1),
    "no SETTINGS first": (PREFACE + PingFrame(0, b"12345678").serialize(), 1),
    "an overlong frame": (PREFACE + SETTINGS + b"\x00\x40\x01\0\1\0\0\0\1", 6),
    "a ping on a stream": (PREFACE + SETTINGS + b"\0\0\x08\6\0\0\0\0\1" + b"p" * 8, 1),
    "a short ping": (PREFACE + SETTINGS + b"\0\0\4\6\0\0\0\0\0" + b"p" * 4, None),
    "DATA of no stream": (PREFACE + SETTINGS + DataFrame(1, b"x").serialize(), 1),
    "DATA of stream 0": (PREFACE + SETTINGS + b"\0\0\1\0\0\0\0\0\0x", 1),
    "an even stream": (PREFACE + SETTINGS + head(2), 1),
    "a head without a header": (PREFACE + SETTINGS + head(data=b""), 1),
    "a stream twice": (PREFACE + SETTINGS + head(3) + head(1), 1),
    "a lone CONTINUATION": (
        PREFACE + SETTINGS + ContinuationFrame(1, HEAD).serialize(),
        1,
    ),
    "a frame within a head": (
        PREFACE + SETTINGS + head(flags=()) + PingFrame(0, b"12345678").serialize(),
        1,
    ),
    "too many CONTINUATIONs": (
        PREFACE
        + SETTINGS
        + head(flags=())
        + ContinuationFrame(1, b"").serialize() * 100,
        1,
    ),
    "a compression that is none": (PREFACE + SETTINGS + head(data=b"\xff" * 9), None),
    "a compression bomb": (PREFACE + SETTINGS + bomb(), 11),
    "a window of nothing": (
        PREFACE + SETTINGS + head() + b"\0\0\4\x08\0\0\0\0\1\0\0\0\0",
        1,
    ),
    "a window that overflows": (
        PREFACE + SETTINGS + WindowUpdateFrame(0, 2**31 - 1).serialize(),
        3,
    ),
    "a setting that is none": (
        PREFACE
        + SettingsFrame(0, {SettingCodes.INITIAL_WINDOW_SIZE: 2**31}).serialize(),
        3,
    ),
    "a pushing client": (PREFACE + SETTINGS + head() + PUSH.serialize(), 1),
    "more than its window": (
        PREFACE + SETTINGS + head() + DataFrame(1, bytes(16384)).serialize() * 5,
        3,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_who_breaks_the_protocol_is_told_and_both_are_aborted(name):
    data, code = MALFORMED[name]
    wire = Wire()
    wire.server.initiate_connection()
    wire.take(wire.layer.received(DOWN, data))
    aborts = [action for action in wire.others if isinstance(action, Abort)]
    assert [a.reason for a in aborts] in (["http2_malformed"], ["http2_flood"])
    assert isinstance(wire.others[-1], Abort)
    last = b"".join(wire.buffered[DOWN])[-17:]
    assert last[:4] == b"\0\0\x08\x07", "GOAWAY"
    if code is not None:
        assert int.from_bytes(last[-4:], "big") == code
    # Nothing more comes of it.
    assert wire.layer.received(DOWN, data) == []
    assert wire.layer.received(UP, b"x") == []
    assert wire.layer.ended(DOWN) == wire.layer.lost(UP) == []


def test_a_server_that_pushes_is_told_not_to():
    wire = Wire().start()
    wire.ask()
    wire.give(UP, PUSH.serialize())
    assert wire.others == [Abort("http2_malformed")]
    assert wire.records[0].end == How.RESET


def test_rapid_resets_cost_the_connection():
    wire = Wire().start()
    resets = 0
    while not wire.others:
        wire.client.reset_stream(wire.ask(), 8)
        wire.run()
        resets += 1
    assert resets == PREMATURE_STREAMS // 2
    assert wire.others == [Abort("http2_flood")]


def test_calls_that_are_cancelled_when_late_or_answered_are_no_flood():
    wire = Wire().start()
    for turn in range(PREMATURE_STREAMS):
        stream_id = wire.ask()
        if turn % 2:
            wire.server.send_headers(stream_id, RESPONSE)
            wire.run()
        else:
            wire.now_ns += 2_000_000_000
        wire.client.reset_stream(stream_id, 8)
        wire.run()
    assert wire.others == []


FLOODS = {
    "pings": (PingFrame(0, b"12345678").serialize() * 1000, "http2_backlog"),
    "settings": (SETTINGS * 1000, "http2_backlog"),
    "settings that are passed on": (
        SettingsFrame(0, {SettingCodes.INITIAL_WINDOW_SIZE: 70000}).serialize()
        + SettingsFrame(0, {SettingCodes.INITIAL_WINDOW_SIZE: 80000}).serialize(),
        "http2_flood",
    ),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_who_makes_work_and_does_not_read_is_aborted(flood, monkeypatch):
    most_bytes = 1 << 18
    monkeypatch.setattr(http2, "BACKLOG_MAX", most_bytes)
    data, reason = FLOODS[flood]
    wire = Wire().start()
    wire.stalled |= {DOWN, UP}
    most = 0
    for _ in range(most_bytes // len(data) * 20):
        wire.take(wire.layer.received(DOWN, data))
        most = max(most, held(wire, DOWN) + held(wire, UP))
        if wire.others:
            break
    assert wire.others == [Abort(reason)]
    assert most <= most_bytes + CONNECTION_WINDOW


def test_settings_before_the_server_speaks_are_bounded():
    wire = Wire()
    wire.take(wire.layer.received(DOWN, PREFACE + SETTINGS * 10_000))
    assert wire.others == [Abort("http2_flood")]


frames = st.builds(
    lambda kind, flags, stream_id, body: (
        len(body).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream_id.to_bytes(4, "big")
        + body
    ),
    st.integers(0, 12),
    st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0x25, 0xFF]),
    st.sampled_from([0, 1, 1, 3, 2, 2**31 + 1]),
    st.one_of(
        st.binary(max_size=12),
        st.just(HEAD),
        st.sampled_from(
            [b"", b"\0\0\0\1", bytes(8), b"\0\4\0\1\0\0", b"\0\1\0\0\0\0", b"\x88"]
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Side), frames), max_size=30),
    st.booleans(),
)
def test_hostile_frames_never_raise(script, both):
    wire = Wire()
    wire.take(wire.layer.received(DOWN, PREFACE + SETTINGS + head()))
    if both:
        wire.take(wire.layer.received(UP, SETTINGS))
    for side, frame in script:
        wire.take(wire.layer.received(side, frame))
        wire.take(wire.layer.drained(side))
    wire.take(wire.layer.ended(DOWN))
    wire.take(wire.layer.lost(UP))
    aborts = [action for action in wire.others if isinstance(action, Abort)]
    assert len(aborts) == 1
    assert len(wire.records) <= 40


def test_frames_for_streams_that_are_over_are_no_harm():
    wire = Wire().start()
    over = wire.ask(body=b"q")
    wire.answer(over, b"a")
    for side in Side:
        late = RstStreamFrame(over, 8).serialize()
        wire.give(side, late + WindowUpdateFrame(over, 1).serialize())
    wire.answer(wire.ask(body=b"q"), b"a")
    assert [record.end for record in wire.records] == [How.COMPLETE] * 2
    assert wire.others == []
