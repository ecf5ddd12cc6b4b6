"""Our own TCP protocols (GetPage@LSN, WAL by LSN) share this framing: TLS, a token first, then pipelined frames.

Frame, big-endian::

    offset | size | field
    -------+------+--------------------------------------------
    0      | 4    | length of what follows (type and payload), 1 … limit
    4      | 1    | type
    5      | …    | payload

The client's first frame is HELLO (type 0x01) with a token as payload. The server answers 0x02 (empty) or closes after
an ERROR frame. ERROR (0x7F): u32 request id (0 = the connection), u8 length of code, code, message (UTF-8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from shared.errors import ERRORS_BY_CODE, InvalidInputError, KeylakeError

HELLO: Final = 0x01
HELLO_OK: Final = 0x02
ERROR: Final = 0x7F
_LENGTH_AND_TYPE: Final = struct.Struct(">IB")
_ERROR: Final = struct.Struct(">IB")
_LENGTH_SIZE_BYTES: Final = 4
FRAME_HEADER_SIZE_BYTES: Final = _LENGTH_AND_TYPE.size


class ProtocolError(InvalidInputError):
    """The peer sent bytes that are not this protocol. The connection is closed."""

    code = "protocol"


def pack_frame(kind: int, *payload: bytes | bytearray | memoryview) -> bytes:
    length = 1 + sum(len(part) for part in payload)
    return b"".join((_LENGTH_AND_TYPE.pack(length, kind), *payload))


class FrameDecoder:
    """Cuts a byte stream into frames. Holds at most one incomplete frame, so memory is bounded by `max_size_bytes`."""

    __slots__ = ("_buffer", "_max")

    def __init__(self, max_size_bytes: int) -> None:
        self._buffer = bytearray()
        self._max = max_size_bytes

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Complete (type, payload) frames, in order. Raises ProtocolError for an empty or oversized frame."""
        buffer = self._buffer
        buffer += data
        frames = []
        position, end = 0, len(buffer)
        while end - position >= _LENGTH_SIZE_BYTES:
            # Looked at before the type is here: a frame of no bytes has none.
            length = int.from_bytes(buffer[position : position + _LENGTH_SIZE_BYTES], "big")
            if not 1 <= length <= self._max:
                raise ProtocolError(f"frame of {length} bytes; 1 to {self._max} are allowed")
            if end - position < 4 + length:
                break
            frames.append((buffer[position + 4], bytes(buffer[position + 5 : position + 4 + length])))
            position += 4 + length
        del buffer[:position]
        return frames


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    request_id: int
    code: str
    message: str

    @classmethod
    def of(cls, request_id: int, error: KeylakeError) -> ErrorFrame:
        return cls(request_id, error.code, str(error))

    @classmethod
    def parse(cls, payload: bytes) -> ErrorFrame:
        """Raises ProtocolError."""
        try:
            request_id, code_length = _ERROR.unpack_from(payload)
            code = payload[5 : 5 + code_length].decode("ascii")
            return cls(request_id, code, payload[5 + code_length :].decode())
        except (struct.error, UnicodeDecodeError):
            raise ProtocolError("malformed error frame") from None

    def pack(self) -> bytes:
        code = self.code.encode("ascii")
        return pack_frame(ERROR, _ERROR.pack(self.request_id, len(code)), code, self.message.encode()[:4096])

    def exception(self) -> KeylakeError:
        if self.code == ProtocolError.code:
            return ProtocolError(self.message)
        return ERRORS_BY_CODE.get(self.code, KeylakeError)(self.message)
