"""The basebackup's tar parser: any chunking gives the same files, and nothing but CorruptedError comes out of
nonsense.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.agent.tar_stream import Directory, FileData, FileEnd, FileStart, TarStream
from shared.errors import CorruptedError

names = st.from_regex(r"[A-Za-z0-9_.]{1,20}(/[A-Za-z0-9_.]{1,20}){0,3}", fullmatch=True).filter(
    lambda name: not any(part in (".", "..") for part in name.split("/"))
)


def archive(files: dict[str, bytes | None], **header: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            for key, value in header.items():
                setattr(info, key, value)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    return out.getvalue()


def unpack(chunks: Iterable[bytes]) -> tuple[dict[str, bytes | None], bool]:
    stream = TarStream()
    files: dict[str, bytes | None] = {}
    content = bytearray()
    for chunk in chunks:
        for event in stream.feed(chunk):
            match event:
                case Directory(path):
                    files[str(path)] = None
                case FileStart(_, size):
                    content.clear()
                    assert size <= 1 << 30
                case FileData(data):
                    content += data
                case FileEnd(path):
                    files[str(path)] = bytes(content)
    return files, stream.ended


@given(
    st.dictionaries(names, st.none() | st.binary(max_size=3000), max_size=8),
    st.lists(st.integers(1, 1500), min_size=1, max_size=20),
)
def test_any_chunking_gives_the_same_files(files: dict[str, bytes | None], sizes: list[int]) -> None:
    data = archive(files)
    chunks, position, index = [], 0, 0
    while position < len(data):
        size = sizes[index % len(sizes)]
        chunks.append(data[position : position + size])
        position, index = position + size, index + 1
    assert unpack(chunks) == (files, True)


@given(st.binary(max_size=4096))
def test_nonsense_raises_nothing_else(data: bytes) -> None:
    with suppress(CorruptedError):
        unpack([data])


@given(st.data())
def test_a_flipped_byte_raises_nothing_else(data: st.DataObject) -> None:
    good = bytearray(archive({"PG_VERSION": b"16\n", "base": None, "base/1": bytes(600)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CorruptedError):
        unpack([bytes(good)])


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc/passwd", "a//b", "a\nb", "ä", "a/./b", "x" * 90])
def test_paths_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(CorruptedError):
        unpack([archive({name: b"x"})])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"x", b"L"]
)
def test_other_kinds_of_members(kind: bytes) -> None:
    with pytest.raises(CorruptedError):
        unpack([archive({"a": None}, type=kind)])


def test_twice_the_same_path_and_more_behind_the_end() -> None:
    one = archive({"a": b"1"})
    with pytest.raises(CorruptedError):
        unpack([one[:1024] + one])
    with pytest.raises(CorruptedError):
        unpack([one + one])


def test_a_torn_archive_has_not_ended() -> None:
    files, ended = unpack([archive({"a": bytes(5000)})[:3000]])
    assert files == {}
    assert not ended
