"""The files of a home that the command line reads: saved connections, ports, the supervisor's state and pid."""

from __future__ import annotations

import json
import stat
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from keylake.attached import parse_ports
from keylake.cli.cluster import purge_home
from keylake.connections import SavedConnection, load_connections
from keylake.layout import Layout, Ports, write_secret
from keylake.pidlock import Identity, pid_lock
from keylake.supervision import ENTRIES, SupervisorState, choose_proxy_port, pid_file, state_file
from keylake.supervisor import brief
from shared.auth import SignatureVerifier, TokenIssuer, TrustBundle
from shared.errors import ConflictError, CorruptedError, InvalidInputError
from shared.ids import EndpointId, ProjectId

SECRET = "correct horse battery staple"
SAVED = SavedConnection(
    endpoint_id=EndpointId("ep-0123456789abcdef"),
    endpoint_name="main",
    project_id=ProjectId("prj-0123456789abcdef"),
    project_name="shop",
    user="app",
    database="app",
    password=SecretStr(SECRET),
)
PORTS = Ports(1, 2, (3, 4, 5), (6, 7, 8), 9, 10, 11, 12, 13)

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())


def test_a_saved_connection_comes_back(tmp_path: Path) -> None:
    path = SAVED.save(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (loaded,) = load_connections(tmp_path)
    assert loaded == SAVED
    assert loaded.connection("127.0.0.1", 5, Path("/ca")).password == SECRET


def test_the_password_is_in_no_repr() -> None:
    assert SECRET not in repr(SAVED)
    assert SECRET not in str(SAVED)
    assert SECRET not in repr(SAVED.connection("h", 1, Path("/ca")))


def test_a_damaged_connection_is_named_and_not_shown(tmp_path: Path) -> None:
    path = SAVED.save(tmp_path)
    path.write_text(path.read_text().replace('"user"', '"usr"'))
    with pytest.raises(CorruptedError, match=path.name) as caught:
        load_connections(tmp_path)
    assert SECRET not in str(caught.value)


def test_ports_come_back() -> None:
    assert parse_ports(json.dumps({"ports": asdict(PORTS), "later": 1}).encode()) == PORTS


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b'{"ports": {}}', json.dumps({"ports": asdict(PORTS) | {"safekeepers": []}}).encode()],
)
def test_ports_that_are_none(content: bytes) -> None:
    with pytest.raises(CorruptedError):
        parse_ports(content)


@given(st.binary(max_size=200) | documents)
def test_damaged_files_raise_only_what_is_documented(content: bytes) -> None:
    for parse in (parse_ports, Identity.parse, SavedConnection.parse):
        with pytest.raises(CorruptedError):
            parse(content)


def test_damaged_supervisor_state(tmp_path: Path) -> None:
    assert SupervisorState.load(tmp_path) is None
    state_file(tmp_path).write_bytes(b"\xff{")
    with pytest.raises(CorruptedError):
        SupervisorState.load(tmp_path)
    assert choose_proxy_port(tmp_path, None) is None


def a_home(directory: Path) -> Path:
    for name in ENTRIES:
        path = directory / name
        if "." in name:
            path.write_text("x")
        else:
            path.mkdir(parents=True)
            (path / "trust.json").write_text("{}")
    pid_file(directory).write_bytes(b"")
    return directory


def test_purge_removes_a_home(tmp_path: Path) -> None:
    home = a_home(tmp_path / "home")
    assert purge_home(home) == []
    assert not home.exists()


def test_purge_leaves_what_is_not_ours(tmp_path: Path) -> None:
    home = a_home(tmp_path / "home")
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "outside").mkdir()
    (home / "link").symlink_to(tmp_path / "outside")
    assert purge_home(home) == ["link", "thesis.tex"]
    assert sorted(p.name for p in home.iterdir()) == ["link", "thesis.tex"]


def test_purge_follows_no_link(tmp_path: Path) -> None:
    home = a_home(tmp_path / "home")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (home / "logs" / "trust.json").unlink()
    (home / "logs").rmdir()
    (home / "logs").symlink_to(precious)
    purge_home(home)
    assert (precious / "file").exists()


def test_purge_refuses_what_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidInputError, match="not a Keylake home"):
        purge_home(tmp_path)
    assert (tmp_path / "data").exists()


def test_purge_refuses_a_running_one(tmp_path: Path) -> None:
    home = a_home(tmp_path / "home")
    with pid_lock(pid_file(home)), pytest.raises(ConflictError):
        purge_home(home)
    assert (home / "data").exists()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("one", "one"),
        (
            "x ended with code 1: Traceback (most recent call last):\n  File\n\nOSError: no\n",
            "x ended with code 1: OSError: no",
        ),
        ("first\nlast", "first: last"),
        (" \n", "for no known reason"),
    ],
)
def test_a_failed_start_in_one_line(message: str, shown: str) -> None:
    assert brief(message) == shown


def test_a_lock_that_was_deleted_is_not_findable(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pid_lock(path) as lock:
        assert lock.is_findable()
        path.unlink()
        assert not lock.is_findable()
        path.touch()
        assert not lock.is_findable(), "another file by that name"


def test_a_home_of_before_gets_the_key_that_signs_anchors(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "home")
    layout.create()
    before = {name: key for name, key in TrustBundle.load(layout.trust_bundle).keys.items() if name != "keymanager"}
    (layout.keys / "keymanager.json").unlink()
    write_secret(layout.trust_bundle, TrustBundle(keys=before).model_dump_json())
    layout.create()
    bundle, issuer = TrustBundle.load(layout.trust_bundle), TokenIssuer.load(layout.keys / "keymanager.json")
    assert {name: key for name, key in bundle.keys.items() if name != "keymanager"} == before
    assert SignatureVerifier(bundle).verify("keymanager", b"l\0", b"m", issuer.sign(b"l\0", b"m"))
    made = layout.trust_bundle.read_bytes()
    layout.create()
    assert layout.trust_bundle.read_bytes() == made
