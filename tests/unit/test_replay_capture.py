"""Capture files, written by scapy and by hand."""

import gzip
import struct

import pytest
from podspan.agent.errors import ReplayError
from podspan.agent.replay import capture
from podspan.agent.replay.capture import Capture, Packet, in_order_of_time
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgWriter, PcapWriter, RawPcapWriter
from unit.replay_wire import pcapng_bytes

TIMES_NS = (1_700_000_000_000_001_000, 1_700_000_000_500_000_000)
FRAMES = (b"\x01" * 60, b"\x02" * 65_600)  # of which the second is a card's to cut


def packets(link_type=1):
    return [
        Packet(at_ns, link_type, frame, len(frame))
        for at_ns, frame in zip(TIMES_NS, FRAMES, strict=True)
    ]


def pcap(path, endianness="<", nano=False, link_type=1):
    with RawPcapWriter(
        str(path), linktype=link_type, endianness=endianness, nano=nano, snaplen=262144
    ) as writer:
        writer.write_header(None)
        for at_ns, frame in zip(TIMES_NS, FRAMES, strict=True):
            sec, rest = divmod(at_ns, 1_000_000_000)
            writer.write_packet(frame, sec=sec, usec=rest if nano else rest // 1000)
    return path


def pcapng(path):
    path.write_bytes(pcapng_bytes(packets()))
    return path


def read(path):
    with Capture(path) as file:
        return list(file.packets()), file.damage


@pytest.mark.parametrize("nano", [False, True])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_pcap_of_either_byte_order_and_precision(tmp_path, endianness, nano):
    path = pcap(tmp_path / "file", endianness, nano, link_type=276)
    assert read(path) == (packets(276), "")


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_of_either_byte_order_and_several_interfaces(tmp_path, order):
    path = tmp_path / "file"
    written = packets(1) + packets(276)
    path.write_bytes(pcapng_bytes(written, order))
    assert read(path) == (written, "")


def test_pcapng_as_scapy_writes_it(tmp_path):
    path = tmp_path / "file"
    with PcapNgWriter(str(path)) as writer:
        for at_ns, frame in zip(TIMES_NS, FRAMES, strict=True):
            packet = Ether(frame)
            packet.time = at_ns / 1e9
            writer.write(packet)
    found, damage = read(path)
    assert (len(found), damage) == (2, "")
    for packet, at_ns in zip(found, TIMES_NS, strict=True):
        assert abs(packet.at_ns - at_ns) <= 1000


@pytest.mark.parametrize("write", [pcap, pcapng])
def test_gzip_is_unpacked(tmp_path, write):
    plain = write(tmp_path / "plain")
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)


@pytest.mark.parametrize("write", [pcap, pcapng])
@pytest.mark.parametrize("packed", [False, True])
def test_wherever_the_file_is_cut_what_is_before_is_read(tmp_path, write, packed):
    whole = write(tmp_path / "whole")
    data = gzip.compress(whole.read_bytes()) if packed else whole.read_bytes()
    path = tmp_path / "cut"
    known, _ = read(whole)
    for cut in [*range(250), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:cut])
        try:
            found, damage = read(path)
        except ReplayError:
            assert cut < 250
            continue
        assert found == known[: len(found)]
        assert damage in ("", "cut")
        if len(found) < len(known) and damage == "":
            assert not packed  # between two packets nobody can tell
    assert read(path)[1] == "cut"


def test_a_packet_larger_than_any_snapshot_ends_the_reading(tmp_path):
    path = pcap(tmp_path / "file")
    with path.open("ab") as file:
        file.write(struct.pack("<IIII", 0, 0, 1 << 30, 1 << 30) + bytes(1000))
    found, damage = read(path)
    assert (len(found), damage) == (2, "damaged")


def test_a_block_larger_than_any_packet_ends_the_reading(tmp_path):
    path = pcapng(tmp_path / "file")
    with path.open("ab") as file:
        file.write(struct.pack("<II", 6, 1 << 31) + bytes(1000))
    found, damage = read(path)
    assert (len(found), damage) == (2, "damaged")


def test_interfaces_are_bounded(tmp_path):
    path = pcapng(tmp_path / "file")
    block = struct.pack("<IIHHII", 1, 20, 1, 0, 0, 20)
    with path.open("ab") as file:
        file.write(block * (capture.MAX_INTERFACES + 2))
    assert read(path)[1] == "damaged"


def test_packets_without_a_time_are_counted(tmp_path):
    path = pcapng(tmp_path / "file")
    simple = struct.pack("<III4sI", 3, 20, 4, b"data", 20)
    far = struct.pack("<IIIIIII4sI", 6, 36, 0, 0xFFFFFFFF, 0, 4, 4, b"data", 36)
    with path.open("ab") as file:
        file.write(simple + far)
    with Capture(path) as file:
        assert len(list(file.packets())) == 2
        assert file.without_time == 2
        assert file.damage == ""


def test_the_time_zero_is_a_time(tmp_path):
    path = tmp_path / "file"
    with PcapWriter(str(path), linktype=1) as writer:
        writer.write_header(None)
        writer.write_packet(b"x" * 60, sec=0, usec=0)
    assert read(path)[0][0].at_ns == 1


NO_CAPTURES = [
    pytest.param(b"", "is empty", id="empty"),
    pytest.param(b"GET / HTTP/1.1\r\n", "is no capture", id="text"),
    pytest.param(b"\xd4", "is no capture", id="one byte"),
    pytest.param(gzip.compress(b"text"), "is no capture", id="gzipped text"),
    pytest.param(gzip.compress(b""), "is empty", id="gzipped nothing"),
    pytest.param(b"\x1f\x8b\x08\x00garbage", "is no capture", id="broken gzip"),
    pytest.param(b"\xd4\xc3\xb2\xa1\x02\x00", "cut or damaged", id="pcap's begin"),
    pytest.param(
        b"\x0a\x0d\x0d\x0a" + bytes(40), "cut or damaged", id="pcapng's begin"
    ),
    pytest.param(
        b"\x0a\x0d\x0d\x0a\xff\xff\xff\xff\x4d\x3c\x2b\x1a\x01\x00" + bytes(40),
        "cut or damaged",
        id="a section of 4 GB",
    ),
]


@pytest.mark.parametrize(("data", "says"), NO_CAPTURES)
def test_what_is_no_capture_is_told(tmp_path, data, says):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ReplayError, match=says) as raised:
        Capture(path)
    assert str(path) in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize("name", ["absent", "."])
def test_what_cannot_be_opened_is_told(tmp_path, name):
    with pytest.raises(ReplayError, match="cannot read"):
        Capture(tmp_path / name)


def test_packets_a_little_out_of_order_are_sorted():
    times = [5, 1, 2, 9, 3, 3, 8]
    found = in_order_of_time(
        Packet(at_ns, number, b"", 0) for number, at_ns in enumerate(times)
    )
    order = [(packet.at_ns, packet.link_type) for packet in found]
    assert order == [(1, 1), (2, 2), (3, 4), (3, 5), (5, 0), (8, 6), (9, 3)]


def test_a_clock_that_is_set_back_holds_nothing_back():
    hour = 3600 * 1_000_000_000
    packets = (Packet(at_ns, 1, b"", 0) for at_ns in [hour, hour + 1, *range(1, 2000)])
    order = [packet.at_ns for packet in in_order_of_time(packets)]
    assert order == [hour, hour + 1, *range(1, 2000)]
