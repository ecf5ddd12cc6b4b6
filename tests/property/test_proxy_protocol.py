"""PROXY protocol headers: what is one is read, what is not is refused, and nothing else happens."""

from __future__ import annotations

import ipaddress
import struct

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.proxy.proxy_protocol import (
    SIGNATURE,
    V2_FIXED_BYTES,
    V2_MAX_BYTES,
    Peer,
    parse_v1,
    parse_v2,
    rest_of_v2,
)
from shared.wire.buffer import ProtocolViolationError

ports = st.integers(0, 65535)
addresses = st.ip_addresses()


def v2(family: int, body: bytes, *, version_command: int = 0x21, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack(">BBH", version_command, family, len(body) if length is None else length) + body


def ends(source: Peer) -> tuple[int, bytes]:
    return (0x11 if source.address.version == 4 else 0x21), source.address.packed * 2 + struct.pack(
        ">HH", source.port, 5432
    )


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack(">BH", kind, len(value)) + value


@given(addresses, ports)
def test_version_1_names_the_client(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    line = f"PROXY TCP{address.version} {address} {address} {port} 5432\r\n".encode()
    assert parse_v1(line) == Peer(address, port)


@pytest.mark.parametrize(
    "line",
    [
        "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 1 2",
        "PROXY TCP4 192.0.2.1 198.51.100.1 1 65536\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 01 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 +1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 1\r\n",
        "PROXY TCP4 192.0.2.1  198.51.100.1 1 2\r\n",
        "PROXY TCP4 192.0.2.01 198.51.100.1 1 2\r\n",
        "PROXY TCP4 192.0.2 198.51.100.1 1 2\r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP6 192.0.2.1 198.51.100.1 1 2\r\n",
        "PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        "PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n",
        "proxy TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.1 1 \u0662\r\n",
        "PROXY UNKNOWNX\r\n",
        "PROXY UNKNOWN " + "x" * 100 + "\r\n",
        "\r\n",
    ],
)
def test_version_1_is_strict(line: str) -> None:
    with pytest.raises(ProtocolViolationError):
        parse_v1(line.encode())


def test_the_load_balancers_own_connections() -> None:
    assert parse_v1(b"PROXY UNKNOWN\r\n") is None
    assert parse_v1(b"PROXY UNKNOWN ffff:f ffff:f 65535 65535\r\n") is None
    assert parse_v2(v2(0x00, b"", version_command=0x20)) is None
    assert parse_v2(v2(0x00, b"whatever")) is None


@given(
    addresses, ports, st.lists(st.tuples(st.integers(0x04, 0xFF), st.binary(max_size=40)), max_size=4), st.booleans()
)
def test_version_2_names_the_client(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, tlvs: list[tuple[int, bytes]], checksum: bool
) -> None:
    peer = Peer(address, port)
    family, body = ends(peer)
    body += b"".join(tlv(kind, value) for kind, value in tlvs)
    header = v2(family, body)
    if checksum:
        zeroed = v2(family, body + tlv(0x03, bytes(4)))
        header = zeroed[:-4] + google_crc32c.value(zeroed).to_bytes(4, "big")
        broken = bytes([*header[:-1], header[-1] ^ 1])
        with pytest.raises(ProtocolViolationError, match="checksum"):
            parse_v2(broken)
    assert rest_of_v2(header[:V2_FIXED_BYTES]) == len(header) - V2_FIXED_BYTES
    assert parse_v2(header) == peer


PEER = Peer(ipaddress.IPv4Address("192.0.2.1"), 56324)


@pytest.mark.parametrize(
    "header",
    [
        v2(0x11, ends(PEER)[1], version_command=0x11),
        v2(0x11, ends(PEER)[1], version_command=0x22),
        v2(0x12, ends(PEER)[1]),
        v2(0x21, ends(PEER)[1]),
        v2(0x31, bytes(216)),
        v2(0x11, ends(PEER)[1][:-1]),
        v2(0x11, ends(PEER)[1] + b"\x04"),
        v2(0x11, ends(PEER)[1] + b"\x04\x00\x05abc"),
        v2(0x11, ends(PEER)[1] + tlv(0x03, b"abc")),
        v2(0x11, ends(PEER)[1], length=13),
        v2(0x11, ends(PEER)[1] + bytes(V2_MAX_BYTES)),
        b"X" + v2(0x11, ends(PEER)[1])[1:],
    ],
)
def test_version_2_is_strict(header: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        parse_v2(header)


@given(st.binary(max_size=120), st.data())
def test_nonsense_raises_nothing_else(noise: bytes, data: st.DataObject) -> None:
    header = v2(*ends(PEER))
    position = data.draw(st.integers(0, len(header) - 1))
    flipped = bytes(
        [*header[:position], header[position] ^ (1 + noise[0] % 255 if noise else 1), *header[position + 1 :]]
    )
    for candidate in (noise, SIGNATURE + noise, header + noise, flipped, header[:position]):
        try:
            found = parse_v2(candidate)
        except ProtocolViolationError:
            continue
        assert found is None or isinstance(found, Peer)
    for line in (noise, b"PROXY TCP4 " + noise + b"\r\n", b"PROXY " + noise):
        try:
            found = parse_v1(line)
        except ProtocolViolationError:
            continue
        assert found is None or isinstance(found, Peer)
