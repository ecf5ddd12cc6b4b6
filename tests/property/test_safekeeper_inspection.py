"""`keylake inspect wal|control`: right about good files, and an error, never more, about any bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from keylake.cli.app import app
from safekeeper.inspection import describe_control, describe_piece, may_be_torn
from shared.crypto.aead import TAG_SIZE_BYTES
from shared.errors import CorruptedError, IntegrityError
from tests.vectors.test_safekeeper_formats import CONTROL, FRAMES, HEADER, piece


def test_a_piece_and_a_control_file_are_told_about(tmp_path: Path) -> None:
    file = tmp_path / HEADER.piece.file_name
    file.write_bytes(piece() + bytes(1000))
    result = CliRunner().invoke(app, ["inspect", "wal", str(file), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert (told["term"], told["frames"], told["behind_bytes"]) == (HEADER.piece.term, len(FRAMES), 0)
    assert told["kek_version"] is None
    sizes = [len(frame) for frame in FRAMES]
    assert (told["smallest_frame_bytes"], told["largest_frame_bytes"]) == (min(sizes), max(sizes))
    assert not any(frame[:8] in result.output.encode() for frame in FRAMES)

    file.write_bytes(piece()[:-TAG_SIZE_BYTES])
    report = describe_piece(file.read_bytes(), None)
    assert report.frames == len(FRAMES) - 1
    assert may_be_torn(report)
    human = CliRunner().invoke(app, ["inspect", "wal", str(file)], env={"COLUMNS": "160"})
    assert "as a crash may leave them" in human.output

    control = tmp_path / "control"
    control.write_bytes(CONTROL.serialize())
    result = CliRunner().invoke(app, ["inspect", "control", str(control), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["term"] == CONTROL.acceptor.term
    assert [place for *_, place in told["pieces"]] == ["remote", "local"]
    for name, content in (("wal", b"no piece"), ("control", b"")):
        file.write_bytes(content)
        result = CliRunner().invoke(app, ["inspect", name, str(file)])
        assert result.exit_code == 1
        assert "Traceback" not in result.output


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_described_or_refused(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([piece(), CONTROL.serialize(), b""])))
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    content = content[:cut] + data.draw(st.binary(max_size=60))
    try:
        report = describe_piece(bytes(content), None)
    except (CorruptedError, IntegrityError):
        pass
    else:
        assert report.start_lsn <= report.end_lsn
        assert report.sealed_size_bytes <= len(content)
        assert report.frames <= len(FRAMES) + 1
    with contextlib.suppress(CorruptedError):
        describe_control(bytes(content))
