"""Whom a load balancer speaks for: the header of the PROXY protocol, versions 1 and 2. A core.

Format: haproxy.org, doc/proxy-protocol.txt (2020/03/05). Version 1 is one line of text, at most 107 bytes:

    PROXY TCP4 192.0.2.1 198.51.100.1 56324 5432\\r\\n        TCP6 likewise; or PROXY UNKNOWN …\\r\\n

Version 2, integers big-endian:

    offset  size  field
    0       12    signature 0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A
    12      1     version (high half, 2) and command (0 LOCAL, 1 PROXY)
    13      1     family (high half: 0 unspecified, 1 IPv4, 2 IPv6) and transport (0 unspecified, 1 stream)
    14      2     length of what follows
    16      12/36 source address, destination address, source port, destination port
    …             TLVs: type (1), length (2), value; type 03 is a CRC-32C over the whole header with itself as zeros

Strict: what is not exactly this is an error, never a guess. Families that cannot be a client of ours (datagrams, Unix
sockets) are errors, too. LOCAL and UNKNOWN name nobody: the connection is the load balancer's own.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

import google_crc32c

from shared.wire.buffer import ProtocolViolationError

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
V1_MAX_BYTES: Final = 107
V2_FIXED_BYTES: Final = 16
V2_MAX_BYTES: Final = 2048
"""The specification allows 64 KiB of TLVs; senders put in some dozens of bytes."""

_CRC32C: Final = 0x03
_CRC32C_BYTES: Final = 4
_TLV: Final = struct.Struct(">BH")
_FIXED: Final = struct.Struct(">12sBBH")
_TCP4: Final = struct.Struct(">4s4sHH")
_TCP6: Final = struct.Struct(">16s16sHH")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Peer:
    """A client, as somebody names it."""

    address: IpAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


def parse_v1(line: bytes) -> Peer | None:
    """`line`: with its end. None for UNKNOWN. Raises ProtocolViolationError."""
    if len(line) > V1_MAX_BYTES or not line.endswith(b"\r\n") or not line.isascii():
        raise _bad("not a line of version 1")
    if line == b"PROXY UNKNOWN\r\n" or line.startswith(b"PROXY UNKNOWN "):
        return None
    words = line[:-2].decode("ascii").split(" ")
    if len(words) != 6 or words[0] != "PROXY":
        raise _bad("not a line of version 1")
    kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]
    match words[1]:
        case "TCP4":
            kind = ipaddress.IPv4Address
        case "TCP6":
            kind = ipaddress.IPv6Address
        case _:
            raise _bad("neither TCP4 nor TCP6")
    _address(kind, words[3]), _port(words[5])
    return Peer(_address(kind, words[2]), _port(words[4]))


def _address(kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], text: str) -> IpAddress:
    try:
        if "%" not in text:  # a scope is no part of an address on the wire
            return kind(text)
    except ValueError:
        pass
    raise _bad("not an address")


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or (text[0] == "0" and text != "0") or int(text) > 65535:
        raise _bad("not a port")
    return int(text)


def rest_of_v2(fixed: bytes) -> int:
    """`fixed`: the first V2_FIXED_BYTES. How many bytes follow them. Raises ProtocolViolationError."""
    signature, version_command, _, length = _FIXED.unpack(fixed)
    if signature != SIGNATURE or version_command >> 4 != 2:
        raise _bad("not a header of version 2")
    if V2_FIXED_BYTES + length > V2_MAX_BYTES:
        raise _bad("too long")
    return int(length)


def parse_v2(header: bytes) -> Peer | None:
    """The whole header. None for LOCAL, and where the sender knows nobody. Raises ProtocolViolationError."""
    if len(header) < V2_FIXED_BYTES or len(header) != V2_FIXED_BYTES + rest_of_v2(header[:V2_FIXED_BYTES]):
        raise _bad("not the length that it says")
    command, family = header[12] & 0x0F, header[13]
    if command > 1:
        raise _bad("unknown command")
    if command == 0:
        return None  # the specification: whatever family it says is to be ignored
    peer: Peer | None
    match family:
        case 0x00:
            return None
        case 0x11:
            peer, end = _ends(_TCP4, ipaddress.IPv4Address, header)
        case 0x21:
            peer, end = _ends(_TCP6, ipaddress.IPv6Address, header)
        case _:
            raise _bad("a family that is no client's")
    _check_tlvs(header, end)
    return peer


def _ends(
    layout: struct.Struct, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], header: bytes
) -> tuple[Peer, int]:
    end = V2_FIXED_BYTES + layout.size
    if len(header) < end:
        raise _bad("too short for its addresses")
    source, _, port, _ = layout.unpack_from(header, V2_FIXED_BYTES)
    return Peer(kind(source), port), end


def _check_tlvs(header: bytes, position: int) -> None:
    while position < len(header):
        if len(header) - position < _TLV.size:
            raise _bad("half a TLV")
        kind, length = _TLV.unpack_from(header, position)
        start, position = position + _TLV.size, position + _TLV.size + length
        if position > len(header):
            raise _bad("a TLV that is longer than the header")
        if kind == _CRC32C:
            if length != _CRC32C_BYTES:
                raise _bad("a checksum of the wrong length")
            zeroed = header[:start] + bytes(_CRC32C_BYTES) + header[position:]
            if google_crc32c.value(zeroed) != int.from_bytes(header[start:position], "big"):
                raise _bad("the checksum is wrong")


def _bad(what: str) -> ProtocolViolationError:
    return ProtocolViolationError(f"invalid PROXY protocol header: {what}")
