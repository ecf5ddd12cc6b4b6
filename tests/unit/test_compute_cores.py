"""Small cores of the compute manager and the agent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compute.agent.postgres_conf import (
    hba_conf,
    opening_hba_conf,
    postgres_settings,
    render_conf,
    synchronous_standby_names,
)
from compute.agent.protocol import PostgresOptions, Start, Stop, pack_line, parse_from_agent, parse_to_agent
from compute.agent.roles import bootstrap_sql
from compute.branches import acknowledged, ends_of_members
from compute.crashes import MAX_DELAY_S, SETTLED_S, Crashes, delay_s
from compute.endpoint import Event, next_state
from compute.proposer import Membership, check_members, majority
from compute.sealed_log import MAX_BATCH_SIZE_BYTES, SealedLog, read_batches
from compute.sizes import MAX_CONNECTIONS, RESERVED_CONNECTIONS, resources
from shared.api.compute import ChangeEndpoint, EndpointSize, EndpointState
from shared.api.safekeeper import TimelineStatus
from shared.crypto.aead import AeadKey
from shared.crypto.secret import KeyWipedError, SecretKey
from shared.errors import ConflictError, CorruptedError, IntegrityError, InvalidInputError, UnavailableError
from shared.ids import EndpointId, InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.scram import ScramVerifier

VERIFIER = ScramVerifier.compute("x", bytes(16)).serialize()
LEGAL = {
    (EndpointState.STOPPED, Event.START): EndpointState.STARTING,
    (EndpointState.STARTING, Event.STARTED): EndpointState.RUNNING,
    (EndpointState.STARTING, Event.STOP): EndpointState.STOPPING,
    (EndpointState.STARTING, Event.FAILED): EndpointState.STOPPED,
    (EndpointState.RUNNING, Event.STOP): EndpointState.STOPPING,
    (EndpointState.RUNNING, Event.FAILED): EndpointState.STOPPED,
    (EndpointState.STOPPING, Event.RESUMED): EndpointState.RUNNING,
    (EndpointState.STOPPING, Event.STOPPED): EndpointState.STOPPED,
    (EndpointState.STOPPING, Event.FAILED): EndpointState.STOPPED,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(EndpointState, Event)))
def test_every_state_and_event(state: EndpointState, event: Event) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(ConflictError):
            next_state(state, event)


@pytest.mark.parametrize(("nodes", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (9, 5)])
def test_two_majorities_share_a_member(nodes: int, quorum: int) -> None:
    assert majority(nodes) == quorum
    assert 2 * quorum > nodes


# --- postgresql.conf ---


def test_standby_names() -> None:
    names = ["safekeeper-1", "safekeeper-2", "safekeeper-3"]
    assert synchronous_standby_names(names) == 'ANY 2 ("safekeeper-1", "safekeeper-2", "safekeeper-3")'
    assert synchronous_standby_names([]) == ""
    for bad in (["a", "a"], ['a"b'], ["a b"], [""]):
        with pytest.raises(InvalidInputError):
            synchronous_standby_names(bad)


@pytest.mark.parametrize("volume_mib", [128, 512, 1024, 65536])
def test_memory_is_shared_out_and_never_oversold(volume_mib: int) -> None:
    options = PostgresOptions(guard=Path("/lib/guard.so"), standby_names=["a", "b", "c"])
    conf = postgres_settings(options, socket_dir=Path("/run/x"), volume_size_bytes=volume_mib << 20)

    def mib(name: str) -> int:
        return int(str(conf[name]).removesuffix("MB"))

    assert mib("max_wal_size") + mib("wal_keep_size") + mib("temp_file_limit") <= max(volume_mib * 5 // 8, 160)
    assert mib("max_wal_size") >= mib("min_wal_size") >= 32
    assert conf["fsync"] is False
    assert conf["synchronous_commit"] == "on"


@pytest.mark.parametrize("size", EndpointSize)
def test_sizes_grow_and_fit_into_their_memory(size: EndpointSize) -> None:
    sized, smaller = resources(size), [resources(each) for each in EndpointSize if float(each) < float(size)]
    memory_mb = 4096 * float(size)
    sessions = sized.max_connections - RESERVED_CONNECTIONS
    assert sessions == {"0.25": 100, "0.5": 100, "1": 200, "2": 400, "4": 800, "8": 1000}[size.value]
    sorts_mb = sized.work_mem_mb * sessions
    assert 0 < sized.volume_mb + sized.shared_buffers_mb <= memory_mb
    assert 0 < sorts_mb <= memory_mb / 4
    assert all(getattr(each, name) <= getattr(sized, name) for each in smaller for name in each.__slots__)
    assert sized.max_connections <= MAX_CONNECTIONS
    options = PostgresOptions(
        guard=Path("/lib/guard.so"), standby_names=[], read_only=True, max_connections=sized.max_connections
    )
    conf = postgres_settings(options, socket_dir=Path("/run/x"), volume_size_bytes=sized.volume_mb << 20)
    assert conf["max_connections"] == MAX_CONNECTIONS, "a read-only endpoint may follow a primary of any size"


def test_a_change_says_only_what_it_names() -> None:
    assert ChangeEndpoint().model_dump_json() == "{}"
    assert ChangeEndpoint(size=None).model_dump_json() == '{"size":null}'
    assert ChangeEndpoint.model_validate_json('{"size": "0.5"}').model_fields_set == {"size"}


def test_crashes_in_a_row_cost_more_and_more_and_a_good_run_ends_the_row() -> None:
    assert [delay_s(count) for count in range(1, 12)] == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60]
    crashes = Crashes()
    for count in range(1, 7):
        crashes = crashes.and_another(now_s=100.0, ran_s=SETTLED_S - 0.1, reason="x")
        assert crashes.count == count
    assert (crashes.wait_s(100.0), crashes.wait_s(101.5), crashes.wait_s(200.0)) == (2.0, 0.5, 0.0)
    assert crashes.wait_s(-1e6) == MAX_DELAY_S, "a clock that was set back"
    crashes = crashes.and_another(now_s=200.0, ran_s=SETTLED_S, reason="x")
    assert (crashes.count, crashes.wait_s(200.0)) == (1, 0.0)


def test_settings_cannot_break_out_of_their_line() -> None:
    assert render_conf({"a": True, "b": 3, "c": "it's"}) == "a = on\nb = 3\nc = 'it''s'\n"
    for bad in ("a\nb", "a\\", "a\0"):
        with pytest.raises(InvalidInputError):
            render_conf({"x": bad})


@pytest.mark.parametrize("follows", [False, True])
def test_nobody_is_trusted(follows: bool) -> None:
    lines = hba_conf(follows=follows).splitlines()
    assert all(line.split()[-1] in ("scram-sha-256", "reject") for line in lines)
    assert all(line.startswith("local ") for line in lines)
    ours = [line for line in lines if "keylake_" in line]
    assert len(ours) == 4
    assert not follows or all(line.endswith(" reject") for line in ours), "its passwords are a primary's"


def test_a_replica_opens_for_its_agent_alone() -> None:
    trusting, *others = opening_hba_conf().splitlines()
    assert trusting == "local postgres keylake_admin trust"
    assert [line.split()[-1] for line in others] == ["reject", "reject"]


def test_names_and_verifiers_cannot_carry_sql() -> None:
    good: dict[str, Any] = {
        "admin_verifier": VERIFIER,
        "safekeeper_verifier": VERIFIER,
        "owner": "app",
        "owner_verifier": VERIFIER,
        "endpoint_id": EndpointId.new(),
    }
    assert "CREATE ROLE app LOGIN CREATEDB CREATEROLE" in bootstrap_sql(**good)
    assert "ALTER ROLE app SUPERUSER" not in bootstrap_sql(**good)
    assert "NOSUPERUSER" in bootstrap_sql(**good), "superusers of a conformance run do not outlive it"
    assert "ALTER ROLE app SUPERUSER" in bootstrap_sql(**good, superuser_owner=True)
    for name, value in (
        ("owner", "app; DROP TABLE t"),
        ("owner", "keylake_admin"),
        ("owner", "pg_monitor"),
        ("owner", "App"),
        ("owner_verifier", "plain password"),
        ("admin_verifier", VERIFIER + "'"),
        ("admin_verifier", VERIFIER + "\n"),
    ):
        with pytest.raises(InvalidInputError):
            bootstrap_sql(**{**good, name: value})


# --- control pipe ---


def test_lines_round_trip_and_say_nothing_of_what_they_refuse() -> None:
    for message in (Start(term=3, start_lsn=Lsn(77)), Stop(timeout_s=2.5)):
        line = pack_line(message)
        assert line.count(b"\n") == 1
        assert parse_to_agent(line) == message
    for bad in (
        b"",
        b"{}",
        b"[]",
        b'{"op":"start"}',
        b'{"op":"secret-value"}',
        b"\xff",
        b'{"op":"stop","timeout_s":"NaN"}',
    ):
        for parse in (parse_to_agent, parse_from_agent):
            with pytest.raises(InvalidInputError) as caught:
                parse(bad)
            assert "secret-value" not in str(caught.value)


# --- sealed log ---


@contextmanager
def sealed_log(path: Path, limit_bytes: int = 1 << 20) -> Iterator[tuple[SealedLog, AeadKey]]:
    key = AeadKey(SecretKey.generate())
    log = SealedLog(path, key, InstanceId.new(), limit_bytes)
    try:
        yield log, key
    finally:
        log.close()


def test_the_log_reads_back_and_is_noise_without_its_key(tmp_path: Path) -> None:
    with sealed_log(tmp_path / "log") as (log, key):
        for i in range(100):
            log.append(f"line {i} with a canary\n".encode())
        assert log.tail(1 << 20) == b"".join(f"line {i} with a canary\n".encode() for i in range(100))
        assert log.tail(10) == b"a canary\n"[-10:] or log.tail(10).endswith(b"canary\n")
        on_disk = (tmp_path / "log.0").read_bytes()
        assert b"canary" not in on_disk
        assert (tmp_path / "log.0").stat().st_mode & 0o077 == 0
        key.wipe()
        with pytest.raises(KeyWipedError):
            log.tail(100)
        with pytest.raises(KeyWipedError):
            log.append(b"more")
        log.close()
        assert list(tmp_path.iterdir()) == []


def test_the_log_is_bounded_and_keeps_its_end(tmp_path: Path) -> None:
    with sealed_log(tmp_path / "log", 300_000) as (log, _):
        for i in range(200):
            log.append(b"%06d " % i + bytes(5000) + b"\n")
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300_000
        assert b"000199 " in log.tail(10_000)
        assert len(list(tmp_path.iterdir())) == 2


def test_one_nonce_per_batch(tmp_path: Path) -> None:
    with sealed_log(tmp_path / "log", 1 << 22) as (log, _):
        log.append(bytes(3 * MAX_BATCH_SIZE_BYTES + 1))
        log.append(b"x")
        counters = [counter for counter, _ in read_batches((tmp_path / "log.0").read_bytes())]
        assert counters == [1, 2, 3, 4, 5]


def test_tampered_logs_do_not_open(tmp_path: Path) -> None:
    with sealed_log(tmp_path / "log") as (log, _):
        log.append(b"first")
        log.append(b"second")
        path = tmp_path / "log.0"
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        first, second = read_batches(good)
        swapped = good.replace(first[1], b"A" * len(first[1]))
        for bad in (bytes(flipped), swapped):
            path.write_bytes(bad)
            with pytest.raises(IntegrityError):
                log.tail(100)
        record = good[len(good) - len(second[1]) - 12 :]
        cut, doubled, emptied = good[: -len(record)], good + record, good[:8]
        assert [counter for counter, _ in read_batches(cut)] == [1], "between two batches, a file like any"
        for bad in (b"", good[:-1], good[:12], b"X" + good[1:], cut, doubled, emptied):
            path.write_bytes(bad)
            with pytest.raises(CorruptedError):
                log.tail(100)
        path.write_bytes(good)
        assert log.tail(100) == b"firstsecond"
        assert second[0] == 2


def test_a_timeline_on_a_safekeeper_that_is_not_named_any_more_is_not_started() -> None:
    members = ["safekeeper-1", "safekeeper-2", "safekeeper-3"]
    check_members(set(), members)
    check_members({"safekeeper-1", "safekeeper-2"}, members)  # one was down when it was made
    check_members(set(members), members)
    with pytest.raises(ConflictError, match="safekeeper-3, which the settings do not name"):
        check_members(set(members), ["safekeeper-1", "safekeeper-2", "safekeeper-4"])


# --- where a branch begins ---


def test_no_majority_that_answers_can_hide_what_was_acknowledged() -> None:
    for nodes in (1, 3, 5):
        for positions in itertools.product((10, 20, 30), repeat=nodes):
            held = sorted(positions, reverse=True)[majority(nodes) - 1]  # the end of what can have been acknowledged
            for number in range(majority(nodes), nodes + 1):
                for answering in itertools.combinations(positions, number):
                    found = acknowledged([Lsn(each) for each in answering], nodes)
                    assert found.value >= held
                    if number == nodes:
                        assert found.value == held, "no tail that nobody waits for"
            with pytest.raises(UnavailableError):
                acknowledged([Lsn(each) for each in positions[: majority(nodes) - 1]], nodes)


def test_a_disk_that_was_replaced_hides_nothing_that_was_acknowledged() -> None:
    """The member is off, its old disk in its place. What it has acknowledged, one of the others alone may hold."""

    def status(flush_lsn: int, seat: int = 0) -> TimelineStatus:
        return TimelineStatus(
            project_id=ProjectId.new(),
            timeline_id=TimelineId.new(),
            system_identifier=7,
            term=1,
            last_log_term=1,
            term_history=[],
            timeline_start_lsn=Lsn(10),
            flush_lsn=Lsn(flush_lsn),
            commit_lsn=Lsn(10),
            streaming=False,
            wal_size_bytes=0,
            seat=seat,
        )

    answers = [("safekeeper-1", status(30)), ("safekeeper-2", status(10)), ("safekeeper-3", status(20))]
    assert acknowledged(ends_of_members(answers, Membership()), 3) == Lsn(20)
    replaced = Membership(1, {"safekeeper-2": 4})
    assert acknowledged(ends_of_members(answers, replaced), 3) == Lsn(30)
    answers[1] = ("safekeeper-2", status(10, seat=4))
    assert acknowledged(ends_of_members(answers, replaced), 3) == Lsn(20)
    with pytest.raises(UnavailableError):
        acknowledged(ends_of_members([*answers[:1], ("safekeeper-3", None)], replaced), 3)
