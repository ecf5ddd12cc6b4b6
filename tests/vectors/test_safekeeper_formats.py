"""Golden bytes of the safekeeper's files: version 1 must be read, as it is here, for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safekeeper.acceptor import AcceptorState
from safekeeper.control_file import ControlState
from safekeeper.log_map import Extent, LogMap, Place
from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import PieceCipher, PieceHeader, PieceId, open_frames, verify_tail
from shared.crypto.aead import AeadKey, Suite
from shared.crypto.secret import SecretKey
from shared.errors import IntegrityError
from shared.ids import ProjectId, TimelineId

HEADER = PieceHeader(PieceId(1, 7, 3), 0x1000028, Suite.AES_256_GCM)
FRAMES = [b"first frame", b"second"]
CONTEXT = b"canonical context"
PIECE_HEX = (
    "4b4c57500101000000000000000000010000000000000007000000030000000001000028bb7faf4bdf37416c0000000b0000"
    "000000000000000000000100002868d5c7adc10ce5cf69c5cc6e53eb71b52a5e720391a444d4c9a17273bb2fb80000000600"
    "00000000000001000000000100003366b3dc932a909bb5744cc235f47303288d495983dfef"
)
CONTROL_1_HEX = (
    "4b4c53430001000c70726a2d30313233343536373839616263646566746c2d66656463626139383736353433323130001122"
    "334455667788000000000100002800000000000000090000000001000080000000040000000200000002736166656b656570"
    "65722d3100000000000000020000000001000028000000000000000700000000010001000000000000000001000000000000"
    "0002000000000000000001000028000000000100010000000000000000010000000000000007000000030000000001000100"
    "ffffffffffffffff9589e610"
)
CONTROL = ControlState(
    "safekeeper-1",
    ProjectId("prj-0123456789abcdef"),
    TimelineId("tl-fedcba9876543210"),
    0x1122334455667788,
    AcceptorState(0x1000028, 9, TermHistory.of([(2, 0x1000028), (7, 0x1000100)]), 0x1000080, 5, 6),
    LogMap(
        0x1000028,
        (
            Extent(PieceId(1, 2, 0), 0x1000028, 0x1000100, Place.REMOTE),
            Extent(PieceId(1, 7, 3), 0x1000100, None),
        ),
        4,
    ),
    0x1000060,
)
CONTROL_2_HEX = (
    "4b4c53430002000c70726a2d30313233343536373839616263646566746c2d6665646362613938373635343332313000"
    "112233445566778800000000010000280000000000000009000000000100008000000004000000020000000200000000"
    "01000060736166656b65657065722d310000000000000002000000000100002800000000000000070000000001000100"
    "000000000000000100000000000000020000000000000000010000280000000001000100020000000000000001000000"
    "0000000007000000030000000001000100ffffffffffffffff00ad543f6b"
)


FIRST_DISK = replace(CONTROL.acceptor, seat=0, generation=0)
CONTROL_3_HEX = (
    "4b4c53430003000c70726a2d30313233343536373839616263646566746c2d6665646362613938373635343332313000"
    "112233445566778800000000010000280000000000000009000000000100008000000004000000020000000200000000"
    "010000600000000500000006736166656b65657065722d31000000000000000200000000010000280000000000000007"
    "000000000100010000000000000000010000000000000002000000000000000001000028000000000100010002000000"
    "00000000010000000000000007000000030000000001000100ffffffffffffffff0087cba7de"
)
TRIMMED = replace(
    CONTROL,
    log=replace(
        CONTROL.log,
        extents=(CONTROL.log.extents[0]._replace(start_lsn=0x1000040), CONTROL.log.extents[1]),
        trimmed_lsn=0x1000040,
    ),
)
CONTROL_HEX = (
    "4b4c53430004000c70726a2d30313233343536373839616263646566746c2d6665646362613938373635343332313000"
    "112233445566778800000000010000280000000000000009000000000100008000000004000000020000000200000000"
    "0100006000000005000000060000000001000040736166656b65657065722d3100000000000000020000000001000028"
    "000000000000000700000000010001000000000000000001000000000000000200000000000000000100004000000000"
    "010001000200000000000000010000000000000007000000030000000001000100ffffffffffffffff00b57a02d6"
)


def cipher() -> PieceCipher:
    return PieceCipher(AeadKey(SecretKey(bytes(range(32)))), CONTEXT, HEADER)


def piece() -> bytes:
    made, lsn, parts = cipher(), HEADER.start_lsn, [HEADER.serialize()]
    for number, frame in enumerate(FRAMES):
        parts += made.seal(number, lsn, frame)
        lsn += len(frame)
    return b"".join(parts)


def test_a_golden_piece_is_written_and_read() -> None:
    golden = bytes.fromhex(PIECE_HEX)
    assert piece() == golden
    tail = verify_tail(golden + bytes(1000), cipher())
    assert open_frames(cipher(), tail.index, 0, golden[40:], 2) == FRAMES
    assert HEADER.piece.file_name == "0000000000000001.0000000000000007.0003"
    assert HEADER.piece.object_name("sk") == "wal/sk/0000000000000001.0000000000000007.0003"


@pytest.mark.parametrize("position", range(len(PIECE_HEX) // 2))
def test_its_tampered_twins_are_refused(position: int) -> None:
    twin = bytearray.fromhex(PIECE_HEX)
    twin[position] ^= 0x80
    with pytest.raises(IntegrityError):
        verify_tail(bytes(twin) + bytes(1000), cipher())


def test_a_golden_control_file_is_written_and_read() -> None:
    assert TRIMMED.serialize().hex() == CONTROL_HEX
    assert ControlState.parse(bytes.fromhex(CONTROL_HEX)) == TRIMMED


def test_a_control_file_of_version_1_is_read() -> None:
    everything_local = replace(
        CONTROL,
        acceptor=FIRST_DISK,
        log=replace(CONTROL.log, extents=tuple(e._replace(place=Place.LOCAL) for e in CONTROL.log.extents)),
        remote_consistent_lsn=0,
    )
    assert ControlState.parse(bytes.fromhex(CONTROL_1_HEX)) == everything_local


def test_a_control_file_of_version_2_is_read() -> None:
    assert ControlState.parse(bytes.fromhex(CONTROL_2_HEX)) == replace(CONTROL, acceptor=FIRST_DISK)


def test_a_control_file_of_version_3_is_read() -> None:
    assert ControlState.parse(bytes.fromhex(CONTROL_3_HEX)) == CONTROL


@pytest.mark.parametrize("position", range(len(CONTROL_HEX) // 2))
def test_tampered_twins_of_the_control_file_are_refused(position: int) -> None:
    twin = bytearray.fromhex(CONTROL_HEX)
    twin[position] ^= 0x01
    with pytest.raises(IntegrityError):
        ControlState.parse(bytes(twin))
