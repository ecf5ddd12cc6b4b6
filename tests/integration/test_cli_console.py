"""The console's own HTTP on a running cluster: who gets in, what each hat sees, what its buttons do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from keylake.console.app import KEY_HEADER
from keylake.console.hats import Hat
from tests.fixtures.keylake_command import KeylakeCommand, running_console

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@contextmanager
def running(home: Path, directory: Path) -> Iterator[KeylakeCommand]:
    command = KeylakeCommand(home, directory)
    command("up")
    try:
        yield command
    finally:
        command.run("down", "--purge", "--yes")


@contextmanager
def set_up(address: str) -> Iterator[httpx.Client]:
    """With a project called demo, whose compute runs and holds a table."""
    parts = urlsplit(address)
    headers = {KEY_HEADER: parts.fragment.removeprefix("key=")}
    with httpx.Client(base_url=f"http://{parts.netloc}", headers=headers, timeout=60, trust_env=False) as client:
        assert client.post("/api/setup").status_code == 204
        made = sql(client, Hat.DATA_USER, "create table notes as select 'the treasure lies under the oak' as note")
        assert made["status"] == "SELECT 1"
        yield client


@pytest.fixture(scope="module")
def keylake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeylakeCommand]:
    with running(tmp_path_factory.mktemp("home") / "k", tmp_path_factory.mktemp("cwd")) as command:
        yield command


@pytest.fixture(scope="module")
def address(keylake: KeylakeCommand) -> Iterator[str]:
    with running_console(keylake) as address:
        yield address


@pytest.fixture(scope="module")
def console(address: str) -> Iterator[httpx.Client]:
    with set_up(address) as client:
        yield client


def look(console: httpx.Client, hat: Hat) -> dict[str, Any]:
    """The first event of a hat's stream."""
    with console.stream("GET", "/api/stream", params={"hat": hat}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return event
    raise AssertionError("the stream ended")


def endpoint(console: httpx.Client) -> str:
    [found] = look(console, Hat.DATA_USER)["parts"]["endpoints"]["value"]
    return str(found["endpoint_id"])


def sql(console: httpx.Client, hat: Hat, statement: str) -> dict[str, Any]:
    answer = console.post("/api/sql", json={"hat": hat, "endpoint_id": endpoint(console), "sql": statement})
    body: dict[str, Any] = answer.json()
    return body


def act(console: httpx.Client, hat: Hat, action: str, target: str = "", **more: str) -> httpx.Response:
    return console.post("/api/act", json={"hat": hat, "action": action, "target": target, **more})


def key_of(console: httpx.Client) -> dict[str, Any]:
    [key] = look(console, Hat.CUSTOMER)["parts"]["cloud"]["value"]["keys"]
    found: dict[str, Any] = key
    return found


def wait_for(console: httpx.Client, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        parts: dict[str, Any] = look(console, Hat.AUDITOR)["parts"]
        if parts["projects"]["value"][0]["state"] == state:
            return parts
        assert time.monotonic() < deadline, f"it is not {state}"
        time.sleep(0.1)


def test_who_gets_in(console: httpx.Client, address: str) -> None:
    base = str(console.base_url).rstrip("/")
    with httpx.Client(base_url=base, trust_env=False) as stranger:
        page = stranger.get("/")
        assert page.status_code == 200
        assert "unsafe" not in page.headers["content-security-policy"]
        assert "key=" not in page.text
        for answer in (
            stranger.get("/api/files"),
            stranger.get("/api/files", headers={KEY_HEADER: "wrong"}),
            stranger.get("/api/files", params={"key": address.partition("key=")[2]}),
            stranger.post("/api/setup"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    rebound = console.get("/api/files", headers={"Host": f"evil.example:{urlsplit(base).port}"})
    assert rebound.status_code == 401, "another name for our address (DNS rebinding)"
    assert console.get("/docs").status_code == 404


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd"])
def test_only_its_own_files_are_served(console: httpx.Client, path: str) -> None:
    assert console.get(path).status_code in (404, 405)


@pytest.mark.parametrize(
    "name",
    [
        "objects/../../keys/admin.key",
        "objects//etc/passwd",
        "keys/admin.key",
        "objects/",
        "",
        "objects/a\0b",
        "objects",
    ],
)
def test_only_stored_files_are_shown(console: httpx.Client, name: str) -> None:
    answer = console.get("/api/file", params={"name": name})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["code"] in ("invalid_input", "not_found")


def test_what_is_stored_is_sealed(console: httpx.Client) -> None:
    files = console.get("/api/files").json()
    assert {file["name"].partition("/")[0] for file in files} == {
        "objects",
        "safekeeper-1",
        "safekeeper-2",
        "safekeeper-3",
    }
    shown = console.get("/api/file", params={"name": files[0]["name"], "offset": 0}).json()
    assert 0 < len(bytes.fromhex(shown["hex"])) <= 1024
    found = console.post("/api/find", json={"word": "treasure"}).json()
    assert found["files"] >= len(files) > 0
    assert found["bytes"] > 1 << 20
    assert found["hits"] == []
    name = files[0]["name"].split("/")[-1]
    assert len(console.post("/api/find", json={"word": "KLWP"}).json()["hits"]) >= 3, f"the search finds, see {name}"


def test_every_hat_sees_its_part_and_is_refused_once(console: httpx.Client) -> None:
    sees = {hat: look(console, hat)["parts"] for hat in Hat}

    def may(hat: Hat, part: str) -> bool:
        answer = sees[hat][part]
        assert ("value" in answer) != ("denied" in answer), answer
        return "value" in answer

    assert may(Hat.SECURITY_ADMIN, "keks")
    assert not may(Hat.SECURITY_ADMIN, "endpoints")
    assert may(Hat.DATA_USER, "endpoints")
    assert not may(Hat.DATA_USER, "keks")
    assert not may(Hat.DATA_USER, "key_configurations")
    assert may(Hat.AUDITOR, "audit")
    assert may(Hat.AUDITOR, "keymanager")
    assert may(Hat.AUDITOR, "safekeepers")
    assert set(sees[Hat.CUSTOMER]) == {"cloud"}

    def denials() -> int:
        tail = look(console, Hat.AUDITOR)["parts"]["audit"]["value"]
        return sum(record["action"] == "admin.denied" for record in tail)

    before = denials()
    for _ in range(3):
        look(console, Hat.DATA_USER)
    assert denials() == before, "a refusal is a record in the audit chain: it is not asked for again every second"


def test_buttons_are_the_services_to_refuse(console: httpx.Client) -> None:
    project = look(console, Hat.AUDITOR)["parts"]["projects"]["value"][0]["project_id"]
    for hat, action, target in (
        (Hat.DATA_USER, "project.revoke", project),
        (Hat.WORKSPACE_ADMIN, "project.rotate-kek", project),
        (Hat.SECURITY_ADMIN, "endpoint.kill", endpoint(console)),
        (Hat.AUDITOR, "endpoint.stop", endpoint(console)),
        (Hat.DATA_USER, "endpoint.delete", endpoint(console)),
    ):
        refused = act(console, hat, action, target)
        assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied"), (hat, action)
    for hat, action, target in (
        (Hat.CUSTOMER, "project.revoke", project),
        (Hat.AUDITOR, "key.disable", ""),
        (Hat.SECURITY_ADMIN, "project.revoke", "prj-nonsense"),
        (Hat.CUSTOMER, "key.disable", "no such key"),
        (Hat.SECURITY_ADMIN, "project.ask-shred", project),  # nothing was typed
    ):
        assert act(console, hat, action, target).status_code in (400, 404), (hat, action)
    assert console.post("/api/act", content=b"x" * 100_000).status_code == 400
    assert console.post("/api/act", json={"hat": "owner", "action": "x"}).status_code == 400
    for hat in (Hat.SECURITY_ADMIN, Hat.WORKSPACE_ADMIN, Hat.AUDITOR):
        refused_sql = sql(console, hat, "select 1")
        assert refused_sql["code"] == "permission_denied"


def test_the_story(console: httpx.Client) -> None:
    assert sql(console, Hat.DATA_USER, "select note from notes")["rows"] == [["the treasure lies under the oak"]]
    assert sql(console, Hat.DATA_USER, "select 1/0")["sqlstate"] == "22012"
    many = sql(console, Hat.DATA_USER, "select generate_series(1, 1000)")
    assert (len(many["rows"]), many["more"]) == (200, True)

    arn = key_of(console)["arn"]
    assert act(console, Hat.CUSTOMER, "key.disable", arn).status_code == 204
    assert key_of(console)["state"] == "Disabled"
    log = look(console, Hat.CUSTOMER)["parts"]["cloud"]["value"]["log"]
    [disabled] = [each for each in log if (each["what"], each["outcome"]) == ("DisableKey", "ok")]
    assert disabled["times"] == 1
    assert any(each["what"] == "Decrypt" and each["times"] > 1 for each in log), "the watcher's probes are told once"
    assert not any(each["what"] == "DescribeKey" and each["who"] == disabled["who"] for each in log)
    wait_for(console, "REVOKED")
    refused = sql(console, Hat.DATA_USER, "select note from notes")
    assert refused["sqlstate"] == "KL003"
    deadline = time.monotonic() + 30
    while True:
        [revocations] = look(console, Hat.SECURITY_ADMIN)["parts"]["revocations"]["value"].values()
        if revocations[0]["sealed_after_s"] is not None:
            break
        assert time.monotonic() < deadline
    project = wait_for(console, "REVOKED")["projects"]["value"][0]["project_id"]
    of_it = {"project_id": project, "revocation_id": revocations[0]["revocation_id"]}
    receipt = console.get("/api/receipt", params={"hat": Hat.AUDITOR, **of_it})
    assert receipt.json()["revocation_id"] == of_it["revocation_id"]
    genuine = console.post("/api/verify", content=receipt.content).json()
    assert "REVOKED, sealed after" in genuine["headline"]
    forged = console.post("/api/verify", content=receipt.content.replace(b"REVOKED", b"SUSPENDED"))
    assert forged.json()["code"] == "integrity"
    assert console.post("/api/verify", content=b"{}").json()["code"] == "malformed_receipt"
    assert console.get("/api/receipt", params={"hat": Hat.DATA_USER, **of_it}).status_code == 403

    assert act(console, Hat.CUSTOMER, "key.enable", arn).status_code == 204
    wait_for(console, "ACTIVE")
    deadline = time.monotonic() + 30
    while (answer := sql(console, Hat.DATA_USER, "select note from notes")).get("sqlstate") == "KL003":
        assert time.monotonic() < deadline
    assert answer["rows"] == [["the treasure lies under the oak"]]

    for action, outage in (("cloud.outage", "refuse"), ("cloud.cut", "hang")):
        assert act(console, Hat.CUSTOMER, action).status_code == 204
        assert look(console, Hat.CUSTOMER)["parts"]["cloud"]["value"]["faults"]["outage"] == outage
    wait_for(console, "SUSPENDED")
    assert act(console, Hat.CUSTOMER, "cloud.recover").status_code == 204
    wait_for(console, "ACTIVE")
    assert console.post("/api/setup").json()["code"] == "conflict"


def test_the_end_of_the_story(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shredding takes two people; what is left of the project's endpoint is deleted by a third.

    Nothing is left for other tests, so it has a cluster of its own.
    """
    directory = tmp_path_factory.mktemp("end")
    with (
        running(directory / "k", directory) as keylake,
        running_console(keylake) as address,
        set_up(address) as console,
    ):
        shred_and_delete(console, keylake)


def shred_and_delete(console: httpx.Client, keylake: KeylakeCommand) -> None:
    project = look(console, Hat.AUDITOR)["parts"]["projects"]["value"][0]["project_id"]
    asks, other = Hat.SECURITY_ADMIN, Hat.SECOND_SECURITY_ADMIN
    assert act(console, asks, "project.ask-shred", project, typed="dmeo").status_code == 400
    assert act(console, asks, "project.ask-shred", project, typed="demo").status_code == 204
    shred = look(console, other)["parts"]["shreds"]["value"][project]
    assert shred["state"] == "asked"
    approval = {"typed": "demo", "shred_id": shred["shred_id"]}
    assert act(console, asks, "project.approve-shred", project, **approval).status_code == 403
    assert act(console, other, "project.approve-shred", project, **approval).status_code == 204
    wait_for(console, "SHREDDED")
    deadline = time.monotonic() + 30
    while (shred := look(console, Hat.AUDITOR)["parts"]["shreds"]["value"][project])["state"] != "done":
        assert time.monotonic() < deadline, shred
    receipt = console.get("/api/receipt", params={"hat": Hat.AUDITOR, "project_id": project, "kind": "shred"})
    assert console.post("/api/verify", content=receipt.content).json()["headline"].startswith("shred: demo: SHREDDED")
    gone = endpoint(console)
    assert act(console, Hat.WORKSPACE_ADMIN, "endpoint.delete", gone).status_code == 204
    assert look(console, Hat.DATA_USER)["parts"]["endpoints"]["value"] == []
    assert not (keylake.home / "connections" / f"{gone}.json").exists()


def test_its_tokens_end_with_it(keylake: KeylakeCommand) -> None:
    def console_tokens() -> list[Any]:
        return [each for each in keylake.json("token", "list") if each["subject"] == "console"]

    before = len(console_tokens())
    with running_console(keylake) as address:
        parts = urlsplit(address)
        headers = {KEY_HEADER: parts.fragment.removeprefix("key=")}
        with httpx.Client(base_url=f"http://{parts.netloc}", headers=headers, timeout=60, trust_env=False) as client:
            look(client, Hat.AUDITOR)
        assert len(console_tokens()) == before + 1
    assert console_tokens()[0]["revoked_at"] is not None
