"""Exported chains and anchors: what is written reads back, nothing that was changed passes, and no bytes crash."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from keylake.audit_file import FileVerification, verify_file
from shared.audit_anchor import (
    MAX_ANCHOR_SIZE_BYTES,
    Anchor,
    MalformedAnchorError,
    anchor_key,
    anchored_sequence,
    read_anchor,
)
from shared.audit_chain import AuditEntry, ChainHead, Link, append
from shared.audit_export import MAX_LINE_SIZE_BYTES, ExportVerifier, MalformedRecordError, parse_line, write_line
from shared.auth import TokenIssuer
from shared.errors import InvalidInputError
from tests.fixtures.audit_chains import ENTRIES, SIGNATURES, SIGNER, TIMES, anchor, chain

AT = datetime(2026, 11, 26, 5, 0, tzinfo=UTC)
MANY = st.lists(ENTRIES, min_size=3, max_size=8)
on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, links: Sequence[Link]) -> Path:
    path.write_bytes(b"".join(map(write_line, links)))
    return path


def verify(
    directory: Path, links: Sequence[Link], anchors: Sequence[Anchor] = (), head: bytes | None = None
) -> FileVerification:
    """The records and anchors, through files."""
    folder = directory / "anchors"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for each in anchors:
        (folder / Path(each.key).name).write_bytes(each.encode())
    return verify_file(
        write(directory / "audit.jsonl", links),
        head=head,
        anchors=folder if anchors else None,
        signatures=SIGNATURES,
    )


# --- lines ---


@given(MANY, TIMES)
def test_what_is_written_reads_back(entries: list[AuditEntry], at: datetime) -> None:
    for link in chain(entries, at):
        line = write_line(link)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        assert parse_line(line) == link
        assert json.loads(line)["sequence"] == link.sequence


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
@example(b"[" * 100_000)
@example(b'{"sequence":1}')
@example(b'{"a":NaN}')
@example(b"1" * 5000)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecordError) as refused:
        parse_line(data)
    assert len(str(refused.value)) < 100


@given(ENTRIES, st.data())
def test_a_changed_member_is_refused_or_another_record(entry: AuditEntry, data: st.DataObject) -> None:
    [link] = append(ChainHead(), AT, [entry])
    members = json.loads(write_line(link))
    name = data.draw(st.sampled_from([*members, "another"]))
    members[name] = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.just({"a": 1}) | st.just([])
    )
    try:
        parsed = parse_line(json.dumps(members).encode())
    except MalformedRecordError:
        return
    assume(parsed != link)
    verifier = ExportVerifier()
    # Its hash tells, or it is record 2 and says that it follows another record 1, which only a head or anchor refutes.
    assert verifier.feed(write_line(parsed)) is None or parsed.sequence != 1


@given(st.binary(min_size=1, max_size=3), st.integers(0, 400), ENTRIES)
def test_a_changed_byte_is_found(noise: bytes, where: int, entry: AuditEntry) -> None:
    [link] = append(ChainHead(), AT, [entry])
    line = bytearray(write_line(link))
    line[where : where + len(noise)] = noise
    verifier = ExportVerifier()
    assert verifier.feed(bytes(line)) in (None, link)  # the same record in other words is the same record
    assert (verifier.problem is None) == (verifier.head == link.head)


def test_a_member_that_stands_twice_is_refused() -> None:
    [link] = append(ChainHead(), AT, [AuditEntry("a", "b", "ok")])
    line = write_line(link).replace(b'"actor":"a"', b'"actor":"x","actor":"a"')
    with pytest.raises(MalformedRecordError, match="twice"):
        parse_line(line)
    with pytest.raises(MalformedRecordError, match="longer"):
        parse_line(b" " * (MAX_LINE_SIZE_BYTES + 1))
    with pytest.raises(MalformedRecordError):
        parse_line(write_line(link).replace(b'"actor":"a"', b'"actor":"\\ud800"'))


# --- files ---


@on_disk
@given(entries=MANY, data=st.data())
def test_a_broken_chain_is_found_where_it_is(tmp_path: Path, entries: list[AuditEntry], data: st.DataObject) -> None:
    links = chain(entries, AT)
    index = data.draw(st.integers(0, len(links) - 2))
    broken = list(links)
    kind = data.draw(st.sampled_from(["change", "remove", "swap"]))
    if kind == "change":
        broken[index] = replace(links[index], at=links[index].at + timedelta(seconds=9))
    elif kind == "remove":
        assume(index > 0)  # a chain that begins later is a part, which is for heads and anchors to judge
        del broken[index]
    else:
        assume(index > 0)
        broken[index : index + 2] = broken[index : index + 2][::-1]
    found = verify(tmp_path, broken)
    assert not found.intact
    assert f"record {index + 1} " in (found.problem or "")
    assert verify(tmp_path, links).intact


@on_disk
@given(entries=MANY, data=st.data())
def test_a_rewritten_history_contradicts_the_anchor(
    tmp_path: Path, entries: list[AuditEntry], data: st.DataObject
) -> None:
    """Whoever owns the database rewrites records from k on, hashes and head included: the chain fits itself."""
    links = chain(entries, AT)
    anchored = sorted(data.draw(st.sets(st.integers(1, len(links)), min_size=1)))
    anchors = [anchor(links[sequence - 1]) for sequence in anchored]
    good = verify(tmp_path, links, anchors)
    assert (good.intact, good.anchors, good.signatures_checked) == (True, len(anchors), True)
    k = data.draw(st.integers(1, anchored[-1]))
    before = links[: k - 1]
    rewritten = replace(entries[k - 1], actor=entries[k - 1].actor + "?")
    forged = before + chain([rewritten, *entries[k:]], links[k - 1].at, before[-1].head if before else ChainHead())
    assert verify(tmp_path, forged).intact  # nothing in the chain itself tells
    found = verify(tmp_path, forged, anchors)
    assert not found.intact
    contradicting = next(sequence for sequence in anchored if sequence >= k)
    assert Path(anchor_key(contradicting)).name in (found.problem or "")
    last_good = max((sequence for sequence in anchored if sequence < k), default=0)
    assert f"records {last_good + 1} to {contradicting}" in (found.problem or "")


@on_disk
@given(entries=MANY, data=st.data())
def test_a_chain_that_was_cut_off_lacks_what_was_anchored(
    tmp_path: Path, entries: list[AuditEntry], data: st.DataObject
) -> None:
    links = chain(entries, AT)
    end = data.draw(st.integers(1, len(links) - 1))
    found = verify(tmp_path, links[:end], [anchor(links[-1])])
    assert not found.intact
    assert f"there is no record {len(links)}" in (found.problem or "")
    assert "head" in (verify(tmp_path, links[:end], head=links[-1].record_hash).problem or "")
    assert verify(tmp_path, links, head=links[end - 1].record_hash).kept_head == end
    # An export that begins later says nothing about anchors of before.
    part = verify(tmp_path, links[end:], [anchor(links[end - 1]), anchor(links[-1])])
    assert (part.intact, part.first, part.anchors) == (True, end + 1, 1)


def test_an_anchor_that_nobody_trusted_signed_is_not_believed(tmp_path: Path) -> None:
    links = chain([AuditEntry("a", "b", "ok"), AuditEntry("a", "c", "ok")], AT)
    assert "not signed" in (
        verify(tmp_path, links, [anchor(links[0], TokenIssuer.create("keymanager", []))]).problem or ""
    )
    renamed = anchor(links[0])
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / Path(anchor_key(2)).name).write_bytes(renamed.encode())
    found = verify_file(tmp_path / "audit.jsonl", anchors=folder, signatures=None)
    assert "not its name" in (found.problem or "")
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(InvalidInputError):
            verify_file(tmp_path / "audit.jsonl", anchors=nothing / "x")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert not verify_file(tmp_path / "empty.jsonl").intact


def test_a_long_chain_needs_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    def lines() -> Iterator[bytes]:
        head = ChainHead()
        for number in range(10_000):
            [link] = append(
                head, AT, [AuditEntry("actor", "action", "ok", None, {"n": str(number), "text": "x" * 200})]
            )
            head = link.head
            yield write_line(link)

    path = tmp_path / "audit.jsonl"
    with path.open("wb") as file:
        file.writelines(lines())
    assert path.stat().st_size > 4 << 20
    tracemalloc.start()
    try:
        assert verify_file(path).intact
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# --- anchors ---


@given(ENTRIES, TIMES)
def test_an_anchor_reads_back_and_nothing_else_does(entry: AuditEntry, at: datetime) -> None:
    [link] = append(ChainHead(), at, [entry])
    made = anchor(link)
    data = made.encode()
    assert len(data) <= MAX_ANCHOR_SIZE_BYTES
    assert Anchor.parse(data) == made
    assert made.is_signed_by(SIGNATURES)
    assert anchored_sequence(made.key) == 1
    assert read_anchor(made.key, data, SIGNATURES).problem is None


@given(st.integers(0, 300), st.binary(min_size=1, max_size=2))
def test_a_changed_anchor_is_refused(where: int, noise: bytes) -> None:
    [link] = append(ChainHead(), AT, [AuditEntry("a", "b", "ok")])
    good = anchor(link).encode()
    data = bytearray(good)
    data[where : where + len(noise)] = noise
    assume(bytes(data) != good)
    assert read_anchor(anchor_key(1), bytes(data), SIGNATURES).problem is not None


@given(st.binary(max_size=1200))
@example(b"[" * 1024)
@example(b'{"at":1,"kid":2,"record_hash":3,"sequence":4,"version":1,"signature":5}')
def test_other_bytes_are_no_anchor(data: bytes) -> None:
    with pytest.raises(MalformedAnchorError):
        Anchor.parse(data)


def test_a_key_that_may_call_services_signs_no_anchors() -> None:
    """A stolen safekeeper key cannot vouch for a rewritten chain."""
    from shared.auth import Scope, SignatureVerifier, TrustBundle

    safekeeper = TokenIssuer.create("safekeeper-1", [Scope.KEYS_SESSION])
    verifier = SignatureVerifier(TrustBundle.of([safekeeper, SIGNER]))
    [link] = append(ChainHead(), AT, [AuditEntry("a", "b", "ok")])
    assert anchor(link).is_signed_by(verifier)
    assert not anchor(link, safekeeper).is_signed_by(verifier)
    with pytest.raises(ValueError, match="zero byte"):
        SIGNER.sign(b"label", b"")
    with pytest.raises(ValueError, match="empty chain"):
        Anchor.sign(ChainHead(), AT, SIGNER)
