"""Bounds-checked reading and writing of big-endian binary messages (network byte order, as Postgres's pqformat.c)."""

from __future__ import annotations

import struct
from typing import Final, Self

from shared.errors import InvalidInputError

_INT16: Final = struct.Struct(">h")
_INT32: Final = struct.Struct(">i")
_INT64: Final = struct.Struct(">q")
_UINT32: Final = struct.Struct(">I")
_UINT64: Final = struct.Struct(">Q")


class ProtocolViolationError(InvalidInputError):
    """The peer sent bytes that the protocol does not allow. The connection cannot be used any further.

    Messages name the rule, never the bytes: those may be user data or secrets.
    """

    code = "protocol_violation"


class ReadBuffer:
    """Reads one message from front to back. Every method raises ProtocolViolationError past the end."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = data if isinstance(data, bytes) else bytes(data)
        self._position = 0

    @property
    def remaining_bytes(self) -> int:
        return len(self._data) - self._position

    def _take(self, length_bytes: int) -> int:
        """Step over `length_bytes`; returns where they start."""
        start = self._position
        if length_bytes < 0 or length_bytes > len(self._data) - start:
            raise ProtocolViolationError("message is shorter than its contents")
        self._position = start + length_bytes
        return start

    def uint8(self) -> int:
        return self._data[self._take(1)]

    def int16(self) -> int:
        value: int = _INT16.unpack_from(self._data, self._take(2))[0]
        return value

    def int32(self) -> int:
        value: int = _INT32.unpack_from(self._data, self._take(4))[0]
        return value

    def int64(self) -> int:
        value: int = _INT64.unpack_from(self._data, self._take(8))[0]
        return value

    def uint32(self) -> int:
        value: int = _UINT32.unpack_from(self._data, self._take(4))[0]
        return value

    def uint64(self) -> int:
        value: int = _UINT64.unpack_from(self._data, self._take(8))[0]
        return value

    def bytes_(self, length_bytes: int) -> bytes:
        """Exactly `length_bytes`, copied."""
        start = self._take(length_bytes)
        return self._data[start : self._position]

    def rest(self) -> bytes:
        """All that is left; may be empty."""
        return self.bytes_(self.remaining_bytes)

    def cstring(self) -> str:
        """Text up to a zero byte, which is consumed.

        The encoding is whatever client and server agreed on, and a proxy must not stumble over it: bytes that are
        not UTF-8 become lone surrogates (PEP 383), which `WriteBuffer.cstring` turns back into the same bytes.
        """
        end = self._data.find(b"\0", self._position)
        if end < 0:
            raise ProtocolViolationError("string without its terminating zero byte")
        start, self._position = self._position, end + 1
        return self._data[start:end].decode("utf-8", "surrogateescape")

    def count(self, item_length_min_bytes: int) -> int:
        """An int16 that counts items of at least `item_length_min_bytes` each.

        Refused here when they cannot fit, before anybody loops over or allocates for them.
        """
        value = self.int16()
        if value < 0 or value * item_length_min_bytes > self.remaining_bytes:
            raise ProtocolViolationError("message is shorter than its contents")
        return value

    def end(self) -> None:
        """Raises ProtocolViolationError when something is left."""
        if self.remaining_bytes:
            raise ProtocolViolationError("message is longer than its contents")


class WriteBuffer:
    """Builds one message. Values out of range raise ValueError: they are our mistake, not the peer's."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def uint8(self, value: int) -> Self:
        self._data.append(value)
        return self

    def int16(self, value: int) -> Self:
        return self._pack(_INT16, value)

    def int32(self, value: int) -> Self:
        return self._pack(_INT32, value)

    def int64(self, value: int) -> Self:
        return self._pack(_INT64, value)

    def uint32(self, value: int) -> Self:
        return self._pack(_UINT32, value)

    def uint64(self, value: int) -> Self:
        return self._pack(_UINT64, value)

    def bytes_(self, data: bytes | bytearray | memoryview) -> Self:
        self._data += data
        return self

    def cstring(self, text: str) -> Self:
        """The inverse of `ReadBuffer.cstring`."""
        if "\0" in text:
            raise ValueError("a string with a zero byte cannot be sent")
        self._data += text.encode("utf-8", "surrogateescape")
        self._data.append(0)
        return self

    def getvalue(self) -> bytes:
        return bytes(self._data)

    def _pack(self, form: struct.Struct, value: int) -> Self:
        try:
            self._data += form.pack(value)
        except struct.error:
            raise ValueError(f"integer out of range for {form.size} bytes") from None
        return self
