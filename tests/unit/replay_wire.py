"""TCP conversations as captured packets, for the tests of `podspan replay`."""

import random
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address

from podspan.agent.replay.capture import Packet, in_order_of_time
from podspan.agent.replay.names import ServiceNames
from podspan.agent.replay.packets import ACK, FIN, RST, SYN
from podspan.agent.replay.replay import Replay
from podspan.agent.span import Span

ETHERNET, SLL, SLL2, NULL, LOOP, RAW = 1, 113, 276, 0, 108, 101

START_NS = 1_700_000_000_000_000_000
STEP_NS = 100_000

TRACE = "463ac35c9f6413ad48485a3953bb6124"
SPAN = "a2fb4a1d1a96d312"
PARENT = "0020000000000001"
B3 = (
    f"X-B3-TraceId: {TRACE}\r\nX-B3-SpanId: {SPAN}\r\n"
    f"X-B3-ParentSpanId: {PARENT}\r\nX-B3-Sampled: 1\r\n"
).encode()


def request(target="/", *, method="GET", host="reviews:9080", more=b"", body=b""):
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    line = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n".encode()
    return line + more + length + b"\r\n" + body


def response(status=200, body=b"hello", more=b""):
    return (
        b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), more)
        + body
    )


def chunked(*parts):
    return b"".join(
        [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    )


@dataclass
class Talk:
    """One TCP connection; every method adds packets. Sides: "c" and "s"."""

    client: tuple[str, int] = ("10.0.0.1", 40000)
    server: tuple[str, int] = ("10.0.0.2", 9080)
    isn: tuple[int, int] = (0xFFFFFF00, 5000)  # the client's soon wraps
    at_ns: int = START_NS
    packets: list[tuple[int, bytes]] = field(default_factory=list)  # times, IP

    def __post_init__(self):
        self._next = dict(zip("cs", self.isn, strict=True))
        self._number = 0

    def handshake(self):
        self.segment("c", SYN)
        self._next["c"] += 1
        self.segment("s", SYN | ACK)
        self._next["s"] += 1
        self.segment("c", ACK)
        return self

    def say(self, side, data, size=1448, ack=True):
        for at in range(0, len(data), size):
            part = data[at : at + size]
            self.segment(side, ACK, part)
            self._next[side] += len(part)
            if ack:
                self.segment("s" if side == "c" else "c", ACK)
        return self

    def exchange(self, asked, answered, **how):
        return self.say("c", asked, **how).say("s", answered, **how)

    def fin(self, side):
        self.segment(side, FIN | ACK)
        self._next[side] += 1
        return self

    def bye(self, first="c"):
        last = "s" if first == "c" else "c"
        self.fin(first).fin(last)
        self.segment(first, ACK)
        return self

    def rst(self, side):
        self.segment(side, RST | ACK)
        return self

    def skip(self, side, size):
        """Let bytes pass that are not captured."""
        self._next[side] += size
        return self

    def segment(self, side, flags, data=b"", seq=None):
        there = "s" if side == "c" else "c"
        seq = self._next[side] if seq is None else seq
        ack = self._next[there] if flags & ACK else 0
        ends = (self.client, self.server) if side == "c" else (self.server, self.client)
        self._number += 1
        self.at_ns += STEP_NS
        tsval = (self.at_ns // 1_000_000) & 0xFFFFFFFF
        packet = ip_packet(ends, seq, ack, flags, data, self._number, tsval)
        self.packets.append((self.at_ns, packet))


def ip_packet(ends, seq, ack, flags, data, number=1, tsval=1):
    (source, source_port), (target, target_port) = ends
    tcp = struct.pack(
        "!HHIIHHHH",
        source_port,
        target_port,
        seq & 0xFFFFFFFF,
        ack & 0xFFFFFFFF,
        8 << 12 | flags,
        512,
        0,
        0,
    )
    tcp += struct.pack("!BBBBII", 1, 1, 8, 10, tsval, 0) + data
    addresses = ip_address(source).packed + ip_address(target).packed
    if len(addresses) == 32:
        return struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + addresses + tcp
    return (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), number, 0x4000, 64, 6, 0)
        + addresses
        + tcp
    )


def framed(link_type, ip, tags=()):
    """The packet as a link layer captures it; `tags` are VLANs' ethertypes."""
    protocol = 0x86DD if ip[0] >> 4 == 6 else 0x0800
    ethertypes: list[int] = [*tags, protocol]
    first = ethertypes[0]
    tagged = b"".join(struct.pack("!HH", 7, each) for each in ethertypes[1:])
    head = {
        ETHERNET: b"\x02" * 12 + struct.pack("!H", first),
        SLL: struct.pack("!HHH8sH", 0, 1, 6, b"\x02" * 6, first),
        SLL2: struct.pack("!HHIHBB8s", first, 0, 2, 1, 0, 6, b"\x02" * 6),
        NULL: struct.pack("<I", 30 if protocol == 0x86DD else 2),
        LOOP: struct.pack(">I", 24 if protocol == 0x86DD else 2),
        RAW: b"",
    }[link_type]
    return head + tagged + ip


def captured(*talks, link_type=ETHERNET, tags=(), snaplen=1 << 18):
    """The packets of all talks, by time."""
    packets = [packet for talk in talks for packet in talk.packets]
    packets.sort(key=lambda packet: packet[0])
    frames = ((at_ns, framed(link_type, ip, tags)) for at_ns, ip in packets)
    return [
        Packet(at_ns, link_type, frame[:snaplen], len(frame)) for at_ns, frame in frames
    ]


def pcapng_bytes(packets, order="<"):
    """A pcapng file with times in nanoseconds, an interface per link layer."""

    def block(kind, body):
        size = 12 + len(body) + -len(body) % 4
        padding = bytes(-len(body) % 4)
        return (
            struct.pack(order + "II", kind, size)
            + body
            + padding
            + (struct.pack(order + "I", size))
        )

    nanoseconds = struct.pack(order + "HHB3xHH", 9, 1, 9, 0, 0)
    link_types = list(dict.fromkeys(packet.link_type for packet in packets))
    blocks = [block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))]
    for link_type in link_types:
        body = struct.pack(order + "HHI", link_type, 0, 0) + nanoseconds
        blocks.append(block(1, body))
    for at_ns, link_type, data, wire_length in packets:
        body = struct.pack(
            order + "IIIII",
            link_types.index(link_type),
            at_ns >> 32,
            at_ns & 0xFFFFFFFF,
            len(data),
            wire_length,
        )
        blocks.append(block(6, body + data))
    return b"".join(blocks)


def replayed(packets, hosts=(), **options):
    """Return spans, in an order of their own, and the summary."""
    spans: list[Span] = []
    replay = Replay(spans.extend, ServiceNames(dict(hosts)), **options)
    for packet in in_order_of_time(packets):
        replay.packet(packet)
    replay.close()
    return sorted(spans, key=lambda span: (span.timestamp_us, span.kind)), (
        replay.summary()
    )


def shuffled(packets, seed, reach=20):
    """The packets in another order, none further than `reach` from its place."""
    chance = random.Random(seed)
    places = {
        id(packet): n + chance.random() * reach for n, packet in enumerate(packets)
    }
    return sorted(packets, key=lambda packet: places[id(packet)])
