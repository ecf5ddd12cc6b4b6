"""WAL of the simulation: records of a length byte, a term, a serial number and filling. As real WAL it can end in the
middle of a record, and only whoever reads from a boundary on knows where one is."""

from __future__ import annotations

from typing import Final, Self

HEADER_BYTES: Final = 8
MAX_RECORD_BYTES: Final = 40


def make_record(term: int, serial: int, size_bytes: int) -> bytes:
    """`serial` is never used twice, so no two records are equal."""
    head = bytes([size_bytes]) + term.to_bytes(3, "big") + serial.to_bytes(4, "big")
    return head.ljust(size_bytes, b"\xee")


def split(data: bytes) -> list[bytes]:
    """The complete records at the beginning of `data`."""
    found, position = [], 0
    while position < len(data) and position + data[position] <= len(data):
        assert data[position] >= HEADER_BYTES, "not WAL"
        found.append(data[position : position + data[position]])
        position += data[position]
    return found


def end_of_wal(start_lsn: int, log: bytes) -> tuple[int, int]:
    """(start, end) of the last complete record; (0, start of the log) when there is none."""
    last, position = 0, 0
    while position < len(log) and position + log[position] <= len(log):
        assert log[position] >= HEADER_BYTES, "not WAL"
        last = start_lsn + position
        position += log[position]
    return last, start_lsn + position


class Decoder:
    """Stands in for `shared.wal.reader.WalStreamDecoder`."""

    def __init__(self, start_lsn: int) -> None:
        self.next_lsn = start_lsn
        self.end_lsn = start_lsn
        self._rest = b""

    def feed(self, lsn: int, data: bytes) -> list[tuple[int, bytes]]:
        assert lsn == self.next_lsn
        self.next_lsn += len(data)
        self._rest += data
        records = []
        for record in split(self._rest):
            records.append((self.end_lsn, record))
            self.end_lsn += len(record)
            self._rest = self._rest[len(record) :]
        return records

    def restarted(self) -> Self:
        return type(self)(self.end_lsn)
