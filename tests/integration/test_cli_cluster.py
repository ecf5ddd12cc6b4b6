"""The command line on a real local cluster, from `keylake up` to `keylake down --purge`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keylake.cli.session import customer
from tests.fixtures.fuse import why_no_fuse
from tests.fixtures.keylake_command import KeylakeCommand

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KEYLAKE = str(Path(sys.executable).with_name("keylake"))

MAIN = ("--workspace", "main")


@pytest.fixture(scope="module")
def keylake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeylakeCommand]:
    """A running cluster with a key, a configuration and a workspace, all called `main`; tests make their projects.

    It runs in a directory in which somebody's own packages have the names of ours.
    """
    directory = tmp_path_factory.mktemp("cwd")
    for name in ("shared", "keylake", "compute", "pageserver", "safekeeper", "keymanager"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text("raise SystemExit('somebody else package was imported')")
    command = KeylakeCommand(tmp_path_factory.mktemp("home") / "k", directory)
    command.start("up", "--keymanagers", "2")
    try:
        command("cloud", "key", "create", "main")
        command("key-config", "create", "main", "--key", "main")
        command("workspace", "create", "main")
        yield command
    finally:
        command.run("down", "--purge", "--yes")
        assert not command.home.exists(), "while it runs, too"


def eventually(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return answer


def select(keylake: KeylakeCommand, project: str, sql: str) -> str:
    return keylake("psql", project, "--", "-X", "-At", "-v", "ON_ERROR_STOP=1", "-c", sql).strip()


def test_a_project_and_psql_on_it(keylake: KeylakeCommand) -> None:
    made = keylake.json("project", "create", "first", *MAIN)
    assert made["project"]["state"] == "ACTIVE"
    assert made["dsn"].startswith("postgresql://app:")
    assert select(keylake, "first", "select 1") == "1"
    assert select(keylake, made["endpoint"]["endpoint_id"], "select current_user") == "app"
    assert select(keylake, "first/main", "select ssl from pg_stat_ssl where pid = pg_backend_pid()") in ("t", "f")
    shown = keylake.json("project", "show", "first")
    assert [e["state"] for e in shown["endpoints"]] == ["RUNNING"]
    volume = shown["endpoints"][0]["volume"]
    assert volume.startswith("tmpfs" if why_no_fuse() else "FUSE")
    assert why_no_fuse() in volume, "and why it is not the other one"
    # The clients' rows are behind: the proxy has told the manager of the first one by the time that psql has ended.
    stages = {stage["stage"] for stage in shown["endpoints"][0]["stages"]}
    assert stages >= {"election", "basebackup", "postgres", "login", "first_query"}
    assert why_no_fuse() or "mount" in stages
    assert "first" in keylake("project", "list")
    status = keylake.json("status")
    assert status["healthy"]
    services = {"metadata", "customercloud", "pageserver", "compute", "proxy"}
    services |= {f"safekeeper-{n}" for n in (1, 2, 3)}
    health = {s["name"]: s["health"] for s in status["services"]}
    assert {health.pop("keymanager"), health.pop("keymanager-2")} == {"ready", "standby"}
    assert health == dict.fromkeys(services, "ready")
    [leading] = [s for s in status["services"] if s["name"] == status["leader"]]
    assert leading["health"] == "ready"
    assert f"{status['leader']} " in keylake("status")
    assert "leads (epoch" in keylake("status")
    assert {lease["role"] for lease in status["leases"]} >= {"safekeeper", "pageserver", "compute", "proxy"}


def test_branches_of_a_project(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "trunk", *MAIN)
    select(keylake, "trunk", "create table t as select 1 as v; insert into t values (2)")
    time = select(
        keylake, "trunk", "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
    )
    select(keylake, "trunk", "drop table t")
    made = keylake.json("branch", "create", "rescue", "--project", "trunk", "--at", time)
    assert select(keylake, "trunk/rescue", "select sum(v) from t") == "3"
    assert select(keylake, "trunk", "select to_regclass('t') is null") == "t"
    keylake("endpoint", "create", "trunk", "--name", "past", "--branch", "rescue", "--read-only-at", time)
    refused = keylake.run("psql", "trunk/past", "--", "-c", "insert into t values (3)")
    assert "read-only transaction" in refused.stderr
    keylake("branch", "create", "twig", "--project", "trunk", "--from", "rescue", "--bare")
    listed = {each["name"]: each for each in keylake.json("branch", "list", "--project", "trunk")}
    assert listed["rescue"]["ancestor_timeline_id"] == listed["main"]["timeline_id"]
    shown = keylake.json("branch", "show", "rescue", "--project", "trunk")
    assert [each["name"] for each in shown["branches"]] == ["twig"]
    assert {each["name"] for each in shown["endpoints"]} == {"rescue", "past"}
    assert "twig" in keylake("branch", "show", "rescue", "--project", "trunk")
    assert keylake("branch", "at", "main", time, "--project", "trunk").split()[0] == listed["rescue"]["start_lsn"]
    of_main = ("main", "--project", "trunk")
    held = keylake.json("branch", "hold", of_main[0], listed["rescue"]["start_lsn"], *of_main[1:], "--for", "10m")
    assert held["ttl_s"] == pytest.approx(600)
    kept = keylake.json("branch", "retain", *of_main, "--for", "8h", "--wal-mb", "7")
    assert kept["retention"] == {"age_s": 8 * 3600, "lsn_bytes": 7_000_000}
    sealed = keylake.json("branch", "checkpoint", *of_main)
    assert sealed["in_memory_size_bytes"] == 0
    assert keylake.json("branch", "compact", *of_main, "--force")["l0_layers"] == 0
    collected = keylake.run("branch", "gc", *of_main)  # not in a pageserver's first minutes
    assert "every version is kept from" in collected.stdout or "LSN leases from before" in collected.stderr
    assert listed["rescue"]["timeline_id"] in keylake.json("branch", "storage", *of_main)["branches"]
    assert keylake.run("branch", "hold", "main", time, "--project", "trunk").returncode == 2
    delete = ("branch", "delete", "rescue", "--project", "trunk", "--yes")
    kept = keylake.run(*delete)
    assert kept.returncode == 1
    assert "delete twig first" in kept.stderr
    keylake("branch", "delete", "twig", "--project", "trunk", "--yes")
    keylake(*delete)
    assert not Path(made["saved_as"]).exists()
    for wrong in ("2026-11-26T10:00:00", "FFFF/0"):
        assert keylake.run("branch", "create", "x", "--project", "trunk", "--at", wrong).returncode == 2
    # Under a key of its own it is a project.
    keylake("cloud", "key", "create", "partners")
    keylake("key-config", "create", "partners", "--key", "partners")
    keylake("branch", "create", "partner", "--project", "trunk", "--key-config", "partners")
    assert select(keylake, "trunk/partner", "select to_regclass('t') is null") == "t"
    assert select(keylake, "trunk", "select 1") == "1"


def test_the_password_is_told_once_and_stands_in_no_command_line(keylake: KeylakeCommand) -> None:
    made = keylake.json("project", "create", "secretive", *MAIN)
    password = made["dsn"].partition("app:")[2].partition("@")[0]
    assert len(password) >= 16
    assert Path(made["saved_as"]).stat().st_mode & 0o777 == 0o600
    for arguments in (("project", "show", "secretive"), ("endpoint", "show", "secretive"), ("status",)):
        assert password not in keylake(*arguments)
        assert password not in keylake(*arguments, "--json")
    with subprocess.Popen(
        [KEYLAKE, "psql", "secretive", "--", "-c", "select pg_sleep(30)"],
        env=keylake.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            running = (
                "select count(*) from pg_stat_activity where query like '%pg_sleep(30)' and pid <> pg_backend_pid()"
            )
            eventually(lambda: select(keylake, "secretive", running) == "1")
            assert password.encode() not in b"".join(command_lines())
            # Ctrl-C at the terminal goes to both of us and psql; the query is cancelled, through the relay.
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert "canceling statement due to user request" in errors
    assert process.returncode == 1
    for log in keylake.home.glob("logs/*"):
        assert password.encode() not in log.read_bytes()


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_scrub_and_inspect(keylake: KeylakeCommand, tmp_path: Path) -> None:
    """What lies in the object store: by the pageserver, which has keys, and by whoever has a file and none."""
    keylake("project", "create", "scrubbed", *MAIN)
    assert select(keylake, "scrubbed", "select 1") == "1"
    found = keylake.json("scrub", "scrubbed")
    [timeline] = [name for name in found if name.startswith("tl-")]
    report = found[timeline]["layers"]
    assert not report["damaged"]
    assert report["layers"] >= 1
    assert report["size_bytes"] > 1_000_000
    assert not found[timeline]["wal"]["damaged"]
    [strays] = [parts["strays"] for name, parts in found.items() if name != timeline]
    assert strays["findings"] == []
    assert strays["objects"] > 0
    assert " MB read" in keylake("scrub", "scrubbed")
    files = [path for path in keylake.home.rglob("image-*") if f"{timeline}@" in path.parts and path.suffix != ".key"]
    shown = keylake.json("inspect", "layer", str(files[0]))
    assert (shown["kind"], shown["suite"], shown["envelope"]["kek_version"]) == ("image", "AES_256_GCM", 1)
    index = max(files[0].parents[1].glob("index@/*[0-9a-f]"))
    assert keylake.json("inspect", "index", str(index))["slot"] == int(index.name, 16)
    # What is in them says who has the keys, to an auditor, and no value of it.
    assert select(keylake, "scrubbed", "create table t as select 'planted' as word") == "SELECT 1"
    create = "token create --ttl 10m --project scrubbed --role"
    auditor, user = [keylake(*f"{create} {role}".split()).strip() for role in ("auditor", "data-user")]
    piece = min((keylake.home / "data" / "safekeeper-1" / "timelines").glob(f"*/{timeline}/*[0-9]"))
    told = {}
    for kind, file in (("layer", files[0]), ("index", index), ("wal", piece)):
        asked = ("inspect", kind, str(file), "--contents", "--json")
        assert keylake.run(*asked, KEYLAKE_TOKEN=user).returncode == 4
        done = keylake.run(*asked, KEYLAKE_TOKEN=auditor)
        assert done.returncode == 0, done.stderr
        told[kind] = json.loads(done.stdout)["content"]
    assert sum(each["blocks"] for each in told["layer"]["blocks"]) > 100
    assert files[0].name in {layer["name"] for layer in told["index"]["layers"]}
    records = told["wal"]["records"]
    assert {"Heap", "Transaction"} <= {each["resource_manager"] for each in records}
    assert any(each["blocks"] for each in records)
    assert "planted" not in json.dumps(told)
    assert "Heap" in keylake("inspect", "wal", str(piece), "--contents")
    elsewhere = tmp_path / index.name
    elsewhere.write_bytes(index.read_bytes())
    assert keylake.run("inspect", "index", str(elsewhere), "--contents").returncode == 2
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1])
    damaged = keylake.run("scrub", "scrubbed")
    assert damaged.returncode == 1
    assert "unreadable" in damaged.stdout
    files[0].write_bytes(whole)


def test_the_life_of_a_projects_keys(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "turning", *MAIN)
    select(keylake, "turning", "create table t as select generate_series(1, 1000) n")

    def shares() -> dict[int, bool]:
        found = keylake.json("project", "encryption", "turning")
        return {kek["kek_version"]: kek["objects"] > 0 for kek in found["keks"]}

    eventually(lambda: shares() == {1: True})
    keylake("project", "rotate-key", "turning")
    before = keylake.json("project", "rewrap", "turning", "--dry-run")
    assert before["size_bytes"] > 0
    done = keylake.json("project", "rewrap", "turning")
    assert (done["outdated_objects"], done["current_share"]) == (0, 1.0)
    assert shares() == {1: False, 2: True}
    assert keylake.json("project", "rekey", "turning", "--dry-run")["dek_floor"] == 0
    done = keylake.json("project", "rekey", "turning")
    assert (done["dek_floor"], done["old_dek_objects"]) == (3, 0)
    eventually(lambda: keylake.json("project", "retire-keks", "turning", "--dry-run")["retired"] == [1, 2])
    assert keylake.json("project", "retire-keks", "turning")["retired"] == [1, 2]
    assert select(keylake, "turning", "select count(*) from t") == "1000"
    shown = keylake("project", "encryption", "turning")
    assert "100.00%" in shown
    assert "safekeeper-3" in shown
    keylake("project", "create", "empty", "--bare", *MAIN)
    keylake("project", "rotate-key", "empty")
    assert keylake.json("project", "rewrap", "empty")["objects"] == 0
    assert "keeps nothing" in keylake("project", "encryption", "empty")
    assert keylake.json("project", "retire-keks", "empty")["retired"] == [1]


def test_a_compute_that_nobody_uses_is_suspended_and_woken(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "sleepy", *MAIN)
    select(keylake, "sleepy", "create table t as select 1 as n")
    assert keylake.json("endpoint", "set", "sleepy", "--suspend-after", "1")["suspend_after_s"] == 1

    def endpoint() -> dict[str, Any]:
        shown: dict[str, Any] = keylake.json("endpoint", "show", "sleepy")
        return shown

    eventually(lambda: endpoint()["state"] == "STOPPED")
    assert endpoint()["reason"] == "suspended: nobody used it for 1 s"
    assert select(keylake, "sleepy", "select n from t") == "1", "the client simply waits"
    assert keylake.json("endpoint", "set", "sleepy", "--suspend-after", "never")["suspend_after_s"] == 0
    assert keylake.json("endpoint", "set", "sleepy", "--suspend-after", "default")["suspend_after_s"] == 300
    assert keylake.run("endpoint", "set", "sleepy", "--suspend-after", "soon").returncode == 2
    assert keylake.json("endpoint", "set", "sleepy", "--size", "0.5")["size"] == "0.5"
    assert keylake.json("endpoint", "set", "sleepy", "--size", "default")["size"] is None
    for wrong in (("--size", "3"), ()):
        assert keylake.run("endpoint", "set", "sleepy", *wrong).returncode == 2


def test_the_end_of_a_project(keylake: KeylakeCommand, tmp_path: Path) -> None:
    keylake("project", "create", "doomed", "--bare", *MAIN)
    alice, bob = (
        keylake("token", "create", "--role", "security-admin", "--ttl", "10m", "--for", name).strip()
        for name in ("alice", "bob")
    )
    shred = ("project", "shred")
    refused = keylake.run(*shred, "ask", "doomed", "--reason", "the end", "--name", "domed", KEYLAKE_TOKEN=alice)
    assert (refused.returncode, "not the name" in refused.stderr) == (2, True)
    asked = keylake.run(
        *shred, "ask", "doomed", "--reason", "the end", "--name", "doomed", "--json", KEYLAKE_TOKEN=alice
    )
    shred_id = json.loads(asked.stdout)["shred_id"]
    approve = (*shred, "approve", "doomed", "--id", shred_id, "--name", "doomed")
    assert keylake.run(*approve, KEYLAKE_TOKEN=alice).returncode == 4
    done = keylake.run(*approve, KEYLAKE_TOKEN=bob)
    assert done.returncode == 0, done.stderr
    eventually(lambda: keylake.json(*shred, "status", "doomed")["state"] == "done")
    assert "over after" in keylake(*shred, "status", "doomed")
    receipt, shown = tmp_path / "shred.json", tmp_path / "shred.html"
    keylake("receipt", "get", "doomed", "--kind", "shred", "--out", str(receipt))
    assert "shred: doomed: SHREDDED" in keylake("receipt", "verify", str(receipt))
    keylake("receipt", "show", str(receipt), "--out", str(shown))
    assert "What is left" in shown.read_text()
    erased = keylake.run("project", "verify-erasure", "doomed", "--attest-backups", "none", KEYLAKE_TOKEN=alice)
    assert erased.returncode == 1, "the key is alive"
    assert "SHREDDED" in erased.stdout


def test_psqls_own_exit_code_and_arguments(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "codes", *MAIN)
    failed = keylake.run("psql", "codes", "--", "-c", "select 1/0")
    assert failed.returncode == 1
    assert "division by zero" in failed.stderr
    assert keylake.run("psql", "codes", "--", "-d", "nowhere", "-c", "select 1").returncode == 2
    copied = keylake("psql", "codes", "--", "-At", "-c", "copy (select generate_series(1, 200000)) to stdout")
    assert copied.splitlines()[-1] == "200000"


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs a psql of the system")
def test_the_dsn_is_good_for_a_psql_with_tls(keylake: KeylakeCommand) -> None:
    dsn = keylake.json("project", "create", "direct", *MAIN)["dsn"]
    answer = subprocess.run(
        ["psql", "-X", "-At", "-c", "select 'over TLS'", dsn], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.strip() == "over TLS", answer.stderr


def test_names_that_two_projects_have(keylake: KeylakeCommand) -> None:
    keylake("workspace", "create", "twins", "--key-config", "main")
    made = [keylake.json("project", "create", "twin", "--bare", "--workspace", w) for w in ("main", "twins")]
    one, two = (m["project"]["project_id"] for m in made)
    again = keylake.run("project", "create", "twin", "--bare", *MAIN)
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
    ambiguous = keylake.run("project", "show", "twin")
    assert ambiguous.returncode == 2
    assert one in ambiguous.stderr
    assert two in ambiguous.stderr
    assert keylake.json("project", "show", one)["timelines"] == []


def test_a_bare_project_gets_storage_with_its_first_endpoint(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "late", *MAIN, "--bare")
    made = keylake.json("endpoint", "create", "late", "--name", "reports")
    assert select(keylake, "late/reports", "select 2") == "2"
    assert keylake.json("endpoint", "show", "late/reports")["endpoint_id"] == made["endpoint"]["endpoint_id"]


def test_an_endpoint_stops_and_starts_and_is_killed(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "moves", *MAIN)
    select(keylake, "moves", "create table t as select 42 as x")
    assert keylake.json("endpoint", "stop", "moves")["state"] == "STOPPED"
    started = keylake.json("endpoint", "start", "moves")
    assert started["state"] == "RUNNING"
    assert {s["stage"] for s in started["stages"]} >= {"election", "basebackup", "postgres"}
    assert keylake.json("endpoint", "kill", "moves")["state"] == "STOPPED"
    assert select(keylake, "moves", "select x from t") == "42"
    # Deleted while it runs; the branch keeps the data, and another endpoint gets a new password for it.
    [saved] = [each["endpoint_id"] for each in keylake.json("project", "show", "moves")["endpoints"]]
    assert keylake.json("endpoint", "delete", "moves", "--yes")["deleted"]["endpoint_id"] == saved
    assert not (keylake.home / "connections" / f"{saved}.json").exists()
    assert keylake.run("endpoint", "delete", saved, "--yes").returncode == 2
    keylake("endpoint", "create", "moves")
    assert select(keylake, "moves", "select x from t") == "42"


def test_a_replica_follows(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "followed", *MAIN)
    made = keylake.json("endpoint", "create", "followed", "--name", "replica", "--follow")
    assert made["endpoint"]["follows"]
    assert Path(made["saved_as"]).exists(), "with the password of the endpoint that writes"
    select(keylake, "followed/main", "create table t as select 42 as x")
    assert select(keylake, "followed/replica", "select x from t") == "42"
    refused = keylake.run("psql", "followed/replica", "--", "-c", "drop table t")
    assert "read-only transaction" in refused.stderr
    eventually(lambda: keylake.json("endpoint", "show", "followed/replica")["lag_bytes"] == 0)
    assert "bytes of WAL behind" in keylake("endpoint", "show", "followed/replica")
    both = keylake.run("endpoint", "create", "followed", "--name", "x", "--follow", "--read-only-at", "0/1")
    assert both.returncode == 2


def test_the_customer_says_no_and_yes_again(keylake: KeylakeCommand) -> None:
    """A key, configuration and workspace of its own: the other tests go on."""
    arn = keylake("cloud", "key", "create", "switch").strip()
    keylake("key-config", "create", "switch", "--key", arn)
    keylake("workspace", "create", "switch", "--key-config", "switch")
    keylake("project", "create", "switched", "--workspace", "switch")
    select(keylake, "switched", "create table t as select 7 as x")

    assert keylake.json("cloud", "key", "disable", "switch")["KeyState"] == "Disabled"
    asked = keylake.json("workspace", "revalidate", "switch")
    assert [(each["name"], each["state"]) for each in asked] == [("switched", "REVOKED")], "of this workspace alone"
    refused = keylake.run("endpoint", "start", "switched")
    assert refused.returncode == 4
    assert "revoked" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    connection = keylake.run("psql", "switched", "--", "-c", "select x from t")
    assert connection.returncode == 2
    assert "revoked" in connection.stderr
    (revocation,) = keylake.json("project", "revocations", "switched")
    assert revocation["state"] == "REVOKED"
    assert "DisabledException" in keylake("project", "revocations", "switched")

    keylake("cloud", "key", "enable", "switch")
    eventually(lambda: keylake.json("project", "revalidate", "switched")["state"] == "ACTIVE")
    assert select(keylake, "switched", "select x from t") == "7"

    log = keylake.json("cloud", "key", "log", "switch", "--limit", "200")
    assert {r["eventName"] for r in log} >= {"CreateKey", "DisableKey", "EnableKey", "Decrypt"}
    assert any(r.get("errorCode") for r in log)
    assert [r["eventTime"] for r in log] == sorted(r["eventTime"] for r in log)
    (disabled,) = keylake.json("cloud", "key", "log", "switch", "--event", "DisableKey")
    assert disabled["eventName"] == "DisableKey"

    assert keylake.json("cloud", "key", "deny", "switch")["KeylakeRole"] == "denied"
    eventually(lambda: keylake.json("project", "show", "switched")["project"]["state"] == "REVOKED")
    assert keylake.json("cloud", "key", "allow", "switch")["KeylakeRole"] == "allowed"
    eventually(lambda: keylake.json("project", "show", "switched")["project"]["state"] == "ACTIVE")


def test_an_operators_revocation(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "halted", *MAIN, "--bare")
    assert keylake.json("project", "revoke", "halted", "--reason", "stolen laptop")["state"] == "REVOKED"
    assert "stolen laptop" in keylake("project", "list")
    keylake("project", "restore", "halted")
    eventually(lambda: keylake.json("project", "show", "halted")["project"]["state"] == "ACTIVE")
    actions = [r["action"] for r in keylake.json("audit", "list", "--project", "halted", "--limit", "1000")]
    assert any("revoke" in action for action in actions), actions


def test_keys_rotate(keylake: KeylakeCommand) -> None:
    keylake("cloud", "key", "create", "turning")
    keylake("key-config", "create", "turning", "--key", "turning")
    keylake("workspace", "create", "turning", "--key-config", "turning")
    keylake("project", "create", "turned", "--workspace", "turning", "--bare")
    for options, versions in (
        (("--dry-run",), [1]),
        (("--from-version", "1"), [1, 2]),
        (("--from-version", "1"), [1, 2]),
    ):
        keks = keylake.json("project", "rotate-key", "turned", *options)["keks"]
        assert [k["kek_version"] for k in keks] == versions
    material = keylake.json("cloud", "key", "rotate", "turning")["CurrentKeyMaterialId"]
    assert keylake.json("key-config", "rewrap", "turning", "--dry-run")["outdated"] == 2
    assert keylake.json("key-config", "rewrap", "turning")["rewrapped"] == 2
    assert "wrapped again" in keylake("key-config", "rewrap", "turning")
    keks = keylake.json("project", "show", "turned")["project"]["keks"]
    assert {k["cmk_key_version"] for k in keks} == {material}

    keylake("cloud", "key", "create", "successor")
    assert keylake.json("key-config", "replace", "turning", "--key", "successor", "--dry-run")["keks"] == 2
    after = keylake.json("key-config", "replace", "turning", "--key", "successor")
    assert after["key"]["key_arn"] == keylake.json("cloud", "key", "show", "successor")["Arn"]
    keylake("cloud", "key", "disable", "turning")
    assert keylake.json("project", "revalidate", "turned")["state"] == "ACTIVE"
    assert "ACTIVE" in keylake("workspace", "revalidate", "turning")
    for wrong in ((), ("--key", "successor", "--abort"), ("--from", "/nonexistent.json"), ("--abort", "--dry-run")):
        failed = keylake.run("key-config", "replace", "turning", *wrong)
        assert failed.returncode == 2
        assert len(failed.stderr.splitlines()) == 1


def test_the_life_of_a_key(keylake: KeylakeCommand) -> None:
    keylake("cloud", "key", "create", "mortal")
    material = keylake.json("cloud", "key", "show", "mortal")["CurrentKeyMaterialId"]
    assert keylake.json("cloud", "key", "rotate", "mortal")["CurrentKeyMaterialId"] != material
    assert "KeylakeUse" in keylake("cloud", "key", "show", "mortal")
    assert keylake.json("cloud", "key", "schedule-deletion", "mortal")["KeyState"] == "PendingDeletion"
    failed = keylake.run("cloud", "key", "disable", "mortal")
    assert failed.returncode == 1
    assert "KMSInvalidStateException" in failed.stderr
    assert keylake.json("cloud", "key", "cancel-deletion", "mortal")["KeyState"] == "Disabled"
    assert keylake.json("cloud", "key", "enable", "mortal")["KeyState"] == "Enabled"
    keylake("cloud", "key", "schedule-deletion", "mortal")
    keylake("cloud", "key", "complete-deletion", "mortal", "--yes")
    assert "mortal" not in [k["Description"] for k in keylake.json("cloud", "key", "list")]


def test_a_workspace_comes_under_another_key_and_goes(keylake: KeylakeCommand) -> None:
    keylake("workspace", "create", "short-lived", "--key-config", "main")
    keylake("cloud", "key", "create", "next")
    made = keylake.json("key-config", "create", "next", "--key", "next")
    changed = keylake.json("workspace", "set", "short-lived", "--key-config", "next", "--name", "renamed")
    assert (changed["name"], changed["key_configuration_id"]) == ("renamed", made["key_configuration_id"])
    assert keylake.run("workspace", "set", "renamed").returncode == 2
    assert keylake.run("key-config", "delete", "next").returncode == 1
    assert keylake.json("workspace", "delete", "renamed") == {"deleted": changed["workspace_id"]}
    keylake("key-config", "delete", "next")


def test_a_configuration_that_nobody_uses_can_go(keylake: KeylakeCommand) -> None:
    keylake("cloud", "key", "create", "short")
    keylake("key-config", "create", "short", "--key", "short", "--outage-grace", "60")
    (found,) = [c for c in keylake.json("key-config", "list") if c["name"] == "short"]
    assert found["outage_grace_s"] == 60
    shown = keylake.json("key-config", "show", "short")
    assert shown["worst_cases"] == found["worst_cases"]
    bounds = {case["cause"]: case for case in shown["worst_cases"]}
    # The grace is only granted to a KMS that gives no answer.
    assert bounds["no_answer"]["detection_s"] > 60 > bounds["denied"]["partitioned_s"]
    assert bounds["operator"]["detection_s"] == 0
    text = keylake("key-config", "show", "short")
    assert "Worst case" in text
    assert f"{bounds['no_answer']['partitioned_s']:.1f}" in text
    keylake("key-config", "delete", "short")
    assert "short" not in [c["name"] for c in keylake.json("key-config", "list")]
    used = keylake.run("key-config", "delete", "main")
    assert used.returncode == 1
    assert len(used.stderr.splitlines()) == 1


def test_people_come_with_a_token(keylake: KeylakeCommand) -> None:
    keylake("project", "create", "audited", *MAIN, "--bare")
    made = keylake.json("token", "create", "--role", "auditor", "--ttl", "8h", "--for", "alice", "--project", "audited")
    token, token_id = made["token"], made["token_id"]
    as_alice = {"KEYLAKE_TOKEN": token}
    seen = keylake.run("project", "list", "--json", **as_alice)
    assert [project["name"] for project in json.loads(seen.stdout)] == ["audited"]
    refused = keylake.run("project", "revoke", "audited", **as_alice)
    assert refused.returncode == 4, refused.stderr
    assert keylake.run("token", "create", "--role", "auditor", "--ttl", "1h", **as_alice).returncode == 4
    assert keylake.run("project", "list", KEYLAKE_TOKEN=f"{token[:-8]}AAAAAAAA").returncode == 4
    assert keylake.run("project", "list", KEYLAKE_TOKEN="nonsense").returncode == 2
    for ttl in ("", "8", "8w", "0h", "-1h", "1.5h", "91d"):
        assert keylake.run("token", "create", "--role", "auditor", f"--ttl={ttl}").returncode == 2, ttl
    # As it is printed for a person: the token alone on stdout, the rest beside it.
    plain = keylake.run("token", "create", "--role", "data-user", "--ttl", "1m", "--workspace", "main")
    assert plain.stdout.count(".") == 2
    assert plain.stdout.strip() == plain.stdout.rstrip("\n")
    assert "data-user" in plain.stderr
    listed = keylake("token", "list")
    assert token_id in listed
    assert "alice" in listed
    assert token not in listed
    keylake("token", "revoke", token_id)
    assert keylake.run("project", "list", **as_alice).returncode == 4
    for bad in ("prj-0123456789abcdef", "x", "tok-0123456789abcdef"):
        assert keylake.run("token", "revoke", bad).returncode == 2
    for log in keylake.home.glob("logs/*"):
        assert token.split(".")[2].encode() not in log.read_bytes()


def test_a_project_gets_a_key_of_its_own(keylake: KeylakeCommand, tmp_path: Path) -> None:
    arn = keylake("cloud", "key", "create", "its-own").strip()
    [main] = [c for c in keylake.json("key-config", "list") if c["name"] == "main"]
    described = tmp_path / "key.json"
    described.write_text(json.dumps(main["key"] | {"key_arn": arn}))
    made = keylake.json("key-config", "create", "own", "--from", str(described))
    assert made["key"]["key_arn"] == arn
    both = keylake.run("key-config", "create", "both", "--from", str(described), "--key", "main")
    assert both.returncode == 2
    project = keylake.json("project", "create", "owner", *MAIN, "--bare", "--key-config", "own")["project"]
    assert project["key_configuration_id"] == made["key_configuration_id"]
    assert keylake.run("key-config", "delete", "own").returncode == 1
    moved = keylake.json("project", "move-key", "owner", "--key-config", "main")
    assert moved["key_configuration_id"] == main["key_configuration_id"]
    assert main["key_configuration_id"] in keylake("project", "show", "owner")
    changed = keylake.json("key-config", "set", "own", "--name", "nobodys", "--outage-grace", "5")
    assert (changed["name"], changed["outage_grace_s"]) == ("nobodys", 5)
    assert keylake.run("key-config", "set", "nobodys").returncode == 2
    keylake("key-config", "delete", "nobodys")


def test_faults_of_the_cloud(keylake: KeylakeCommand) -> None:
    try:
        set_ = keylake.json("cloud", "fault", "set", "--latency", "0.01", "--trail-delay", "0.1", "--service", "kms")
        assert (set_["latency_s"], set_["trail_delay_s"], set_["services"]) == (0.01, 0.1, ["kms"])
        more = keylake.json("cloud", "fault", "set", "--throttle-rate", "0.01", "--spare-customer")
        assert (more["latency_s"], more["throttle_rate"]) == (0.01, 0.01), "what is not named stays"
        assert len(more["spared_access_key_ids"]) == 1
        assert "throttle_rate" in keylake("cloud", "fault", "show")
    finally:
        keylake("cloud", "fault", "clear")
    assert "healthy" in keylake("cloud", "fault", "show")
    wrong = keylake.run("cloud", "fault", "set", "--service", "s3")
    assert wrong.returncode == 2
    assert "services" in wrong.stderr


def test_the_audit_chain(keylake: KeylakeCommand) -> None:
    records = keylake.json("audit", "list", "--limit", "5")
    assert [r["sequence"] for r in records] == [1, 2, 3, 4, 5]
    assert keylake.json("audit", "list", "--after", "3", "--limit", "1")[0]["sequence"] == 4
    verified = keylake.json("audit", "verify")
    assert (verified["intact"], verified["anchors_problem"]) == (True, None)
    assert verified["anchors"] >= 1


def test_the_audit_chain_leaves_the_house(keylake: KeylakeCommand) -> None:
    """Exported, verified without a service, found out when it was changed."""
    file, anchors = keylake.directory / "audit.jsonl", keylake.home / "data" / "anchors"
    exported = keylake.run("audit", "export", "--out", str(file))
    assert exported.returncode == 0
    lines = file.read_text().splitlines()
    assert f"{len(lines)} records" in exported.stderr
    assert keylake("audit", "export", "--after", "2").splitlines()[0] == lines[2]
    without = {"KEYLAKE_HOME": str(keylake.directory / "nowhere")}
    trust = str(keylake.home / "keys" / "trust.json")
    good = keylake.run("audit", "verify", "--file", str(file), "--anchors", str(anchors), "--trust", trust, **without)
    assert good.returncode == 0, good.stderr + good.stdout
    assert f"intact: records 1 to {len(lines)}" in good.stdout
    assert "anchors agree" in good.stdout
    head = json.loads(lines[-1])["record_hash"]
    assert (
        "the head that was kept"
        in keylake.run("audit", "verify", "--file", str(file), "--head", head, **without).stdout
    )
    file.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    bad = keylake.run("audit", "verify", "--file", str(file), **without)
    assert bad.returncode == 1
    assert "record 3 is missing" in bad.stdout
    assert keylake.run("audit", "verify", "--head", head).returncode == 2


def test_both_sides_of_the_trust_boundary_agree_until_a_call_is_smuggled_in(keylake: KeylakeCommand) -> None:
    key = keylake.json("cloud", "key", "create", "audited")["key_arn"]
    keylake("key-config", "create", "audited", "--key", "audited")
    found = keylake.json("audit", "reconcile", "--key", key)
    assert found["result"]["findings"] == []
    assert found["result"]["joined"] >= 2, "a wrap and an unwrap, at least"
    text = keylake("audit", "reconcile", "--key", key)
    assert "no call stands on one side only" in text
    with customer(keylake.home) as side:
        side.aws.kms.encrypt(KeyId=key, Plaintext=b"x")
    smuggled = keylake.run("audit", "reconcile", "--key", key)
    assert smuggled.returncode == 1
    assert "used by another principal" in smuggled.stdout
    assert key in smuggled.stdout


def drilled(keylake: KeylakeCommand, tmp_path: Path, kind: str, *arguments: str) -> dict[str, Any]:
    """The report of a drill that has kept its promises."""
    report: dict[str, Any] = keylake.json(
        "drill", kind, "--hold", "0.5", "--out", str(tmp_path / kind), "--yes", *arguments
    )
    assert report["passed"]
    assert all(promise["kept"] for promise in report["promises"])
    assert json.loads((tmp_path / kind / "report.json").read_text()) == report
    html = (tmp_path / kind / "report.html").read_text()
    assert "every promise was kept" in html
    drawn = ["answers and errors of clients over"] + (["the last one sealed after"] if report["instances"] else [])
    assert [html.count(what) for what in drawn] == [1] * len(drawn)
    assert html.count("<svg ") == len(drawn)
    assert all(f"<code>{each['code']}</code>" in html for each in report["errors"])
    assert sum(each["done"] for each in report["answers"]) > 0
    return report


def test_drills(keylake: KeylakeCommand, tmp_path: Path) -> None:
    revocation = drilled(keylake, tmp_path, "revocation", "--while", "pgbench", "--clients", "2")
    assert {each["role"] for each in revocation["instances"]} >= {"safekeeper", "pageserver", "compute", "proxy"}
    assert all(each["after_s"] is not None for each in revocation["instances"])
    assert sum(each["errors"] for each in revocation["answers"]) > 0
    assert "acknowledged, all there once" in json.dumps(revocation)
    keylake("receipt", "verify", str(tmp_path / "revocation" / "receipt.json"))
    outage = drilled(keylake, tmp_path, "outage", "--grace", "1", "--while", "pgbench", "--clients", "2")
    assert {each["role"] for each in outage["instances"]} >= {"safekeeper", "pageserver", "compute", "proxy"}
    assert "KL002" in {each["code"] for each in outage["errors"]}
    assert outage["project_id"] == revocation["project_id"]
    [suspended] = [r for r in keylake.json("project", "revocations", "drill") if r["state"] == "SUSPENDED"]
    assert outage["revocation_id"] == suspended["revocation_id"]
    own = keylake.json("key-config", "show", "drill")["key"]
    [another] = [each["key"] for each in keylake.json("key-config", "list") if each["key"] != own][:1]
    (tmp_path / "another.json").write_text(json.dumps(another))
    rotation = drilled(keylake, tmp_path, "rotation", "--through", str(tmp_path / "another.json"))
    measured = {promise["what"]: promise["measured"] for promise in rotation["promises"]}
    assert measured["no data is left under an older data key"] == "0 bytes"
    assert [each["measured"] for each in rotation["promises"] if each["what"] == "the key is replaced"] == [
        another["key_arn"],
        own["key_arn"],
    ]
    # On what belongs to others, only by wish; nobody answers here.
    for arguments in (("revocation", "--project", "first"), ("outage",)):
        assert keylake.run("drill", *arguments).returncode == 1


def test_the_drill_of_a_shredding(keylake: KeylakeCommand, tmp_path: Path) -> None:
    assert "takes two people" in keylake.run("drill", "shred").stderr
    tokens = {
        f"KEYLAKE_TOKEN_{what}": keylake(*f"token create --role security-admin --ttl 10m --for {who}".split()).strip()
        for what, who in (("ASKS", "alice"), ("APPROVES", "bob"))
    }
    words = ("--attest-backups", "none of this cluster", "--attest-key-copies", "made in the KMS")
    out = tmp_path / "shred"
    done = keylake.run("drill", "shred", "--hold", "0.5", "--out", str(out), *words, "--json", **tokens)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["promises"]
    assert report["passed"]
    promises = {each["what"]: each["measured"] for each in report["promises"]}
    assert promises["what it is called"] == "ERASED"
    assert promises["clients are told why"] == "KL004"
    assert json.loads((out / "report.json").read_text()) == report
    html = (out / "report.html").read_text()
    assert "every promise was kept" in html
    assert html.count("<svg ") == 2
    keylake("receipt", "verify", str(out / "receipt.json"))
    receipt = json.loads((out / "receipt.json").read_text())
    kinds = {node["node_id"]: {each["kind"] for each in node["deleted"]} for node in receipt["nodes"]}
    assert kinds["pageserver"] >= {"index", "envelope"}
    assert kinds["safekeeper-1"] >= {"wal", "envelope", "other"}
    [erased] = [p for p in keylake.json("project", "list") if p["project_id"] == report["project_id"]]
    assert erased["state"] == "ERASED"


def test_up_again_changes_nothing(keylake: KeylakeCommand) -> None:
    again = keylake.json("up")
    assert again["already_running"]
    assert again["supervisor_pid"] == json.loads((keylake.home / "supervisor.pid").read_text())["pid"]
    text = keylake.run("up", "--proxy-port", "1")
    assert text.returncode == 0
    assert "already running" in text.stderr


def test_a_service_that_dies_is_seen_and_comes_back(keylake: KeylakeCommand) -> None:
    def proxy() -> dict[str, Any]:
        done = keylake.run("status", "--json")
        (found,) = [s for s in json.loads(done.stdout)["services"] if s["name"] == "proxy"]
        return {**found, "code": done.returncode}

    before = eventually(lambda: p if (p := proxy())["health"] == "ready" else None)
    os.kill(before["pid"], signal.SIGSTOP)  # the supervisor sees a live process; who asks it gets no answer
    try:
        stopped = proxy()
        assert (stopped["health"], stopped["code"]) == ("down", 5)
    finally:
        os.kill(before["pid"], signal.SIGKILL)
    after = eventually(lambda: p if (p := proxy())["restarts"] > before["restarts"] and p["pid"] else None)
    assert after["pid"] != before["pid"]
    eventually(lambda: proxy()["code"] == 0)


def processes_of(home: Path) -> list[int]:
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(home).encode() in read_or_empty(path)
    ]


def read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_life_with_ends_of_all_kinds(tmp_path: Path) -> None:
    """Ctrl-C in the foreground, kill -9 of the supervisor, down, and purge, on a cluster of its own."""
    keylake = KeylakeCommand(tmp_path / "home", tmp_path)
    try:
        with subprocess.Popen(
            [KEYLAKE, "up", "--foreground"], env=keylake.environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        ) as process:
            try:
                eventually(lambda: keylake.run("status").returncode == 0)
                first = keylake.json("up")  # it runs already
                for arguments in ("cloud key create", "key-config create m", "workspace create m"):
                    keylake(*arguments.split())
                dsn = keylake.json("project", "create", "kept")["dsn"]
                select(keylake, "kept", "create table t as select 'still here' as x")
            finally:
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Ctrl-C ends it" in errors
        assert "has stopped" in errors
        assert processes_of(keylake.home) == []
        assert keylake.run("status").returncode == 3

        second = keylake.json("up")
        assert second["proxy"] == first["proxy"], "connection strings stay good"
        assert f":{second['proxy']['port']}/" in dsn
        assert select(keylake, "kept", "select x from t") == "still here"

        os.kill(second["supervisor_pid"], signal.SIGKILL)
        eventually(lambda: processes_of(keylake.home) == [])
        assert keylake.run("status").returncode == 3
        keylake("up")
        assert select(keylake, "kept", "select x from t") == "still here"
        assert keylake.json("audit", "verify")["intact"]

        asked = keylake.run("down", "--purge")
        assert asked.returncode == 2, "nobody is there to ask"
        assert keylake.run("status").returncode == 0
        stopped = keylake.json("down")
        assert (stopped["stopped"], stopped["graceful"], stopped["purged"]) == (True, True, False)
        assert processes_of(keylake.home) == []
        assert keylake.home.exists()
        assert keylake.json("down", "--purge", "--yes")["purged"]
        assert not keylake.home.exists()
    finally:
        keylake.run("down", "--purge", "--yes")


def test_a_home_that_is_deleted_under_it(tmp_path: Path) -> None:
    """Nobody could find it any more to stop it, so it stops by itself."""
    keylake = KeylakeCommand(tmp_path / "home", tmp_path)
    keylake("up")
    assert processes_of(keylake.home)
    try:
        shutil.rmtree(keylake.home)
    finally:
        eventually(lambda: processes_of(keylake.home) == [])


def test_a_port_that_is_taken(keylake: KeylakeCommand, tmp_path: Path) -> None:
    taken = keylake.json("up")["proxy"]["port"]
    other = KeylakeCommand(tmp_path / "home", tmp_path)
    refused = other.run("up", "--proxy-port", str(taken))
    assert refused.returncode == 5
    assert "--proxy-port" in refused.stderr


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    keylake = KeylakeCommand(tmp_path / "home", tmp_path)
    failed = keylake.run("up", KEYLAKE_PG_BIN=str(tmp_path))
    assert failed.returncode == 5
    assert "KEYLAKE_PG_BIN" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert processes_of(keylake.home) == []
    assert keylake.run("status").returncode == 3
