"""The console's own HTTP on a running cluster: who gets in, what each hat sees, what its buttons do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from keylake.attached import Attached
from keylake.console.app import KEY_HEADER
from keylake.console.hats import Hat
from shared.api.keymanager import AwsKey, CreateKeyConfiguration
from tests.fixtures.keylake_command import KeylakeCommand, running_console

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@contextmanager
def running(home: Path, directory: Path) -> Iterator[KeylakeCommand]:
    command = KeylakeCommand(home, directory)
    command("up", "--links")
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


def events(console: httpx.Client, hat: Hat) -> Generator[dict[str, Any], None, None]:
    """A hat's stream, to be closed."""
    with console.stream("GET", "/api/stream", params={"hat": hat}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def look(console: httpx.Client, hat: Hat) -> dict[str, Any]:
    """The first event of a hat's stream."""
    with closing(events(console, hat)) as stream:
        return next(stream)


def endpoint(console: httpx.Client) -> str:
    """Of the project called demo."""
    parts = look(console, Hat.DATA_USER)["parts"]
    [demo] = [each["project_id"] for each in parts["projects"]["value"] if each["name"] == "demo"]
    [found] = [each for each in parts["endpoints"]["value"] if each["project_id"] == demo]
    return str(found["endpoint_id"])


def sql(console: httpx.Client, hat: Hat, statement: str) -> dict[str, Any]:
    answer = console.post("/api/sql", json={"hat": hat, "endpoint_id": endpoint(console), "sql": statement})
    body: dict[str, Any] = answer.json()
    return body


def act(console: httpx.Client, hat: Hat, action: str, target: str = "", **more: str) -> httpx.Response:
    return console.post("/api/act", json={"hat": hat, "action": action, "target": target, **more})


def key_of(console: httpx.Client, name: str = "demo") -> dict[str, Any]:
    keys = look(console, Hat.CUSTOMER)["parts"]["cloud"]["value"]["keys"]
    [found] = [key for key in keys if key["description"] == name]
    return dict(found)


def project_of(console: httpx.Client, name: str = "demo") -> dict[str, Any]:
    """As an auditor sees it."""
    projects = look(console, Hat.AUDITOR)["parts"]["projects"]["value"]
    [found] = [project for project in projects if project["name"] == name]
    return dict(found)


def eventually(looked: Callable[[], Any]) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + 30
    while not (found := looked()):
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.1)
    return found


def wait_for(console: httpx.Client, state: str, name: str = "demo") -> None:
    eventually(lambda: project_of(console, name)["state"] == state)


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
    assert set(sees[Hat.OPERATOR]) == set(), "who runs the machines sees neither keys nor data"

    def denials() -> int:
        tail = look(console, Hat.AUDITOR)["parts"]["audit"]["value"]
        return sum(record["action"] == "admin.denied" for record in tail)

    before = denials()
    for _ in range(3):
        look(console, Hat.DATA_USER)
    assert denials() == before, "a refusal is a record in the audit chain: it is not asked for again every second"


def test_buttons_are_the_services_to_refuse(console: httpx.Client) -> None:
    project = project_of(console)["project_id"]
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
        (Hat.AUDITOR, "link.heal", ""),
        (Hat.OPERATOR, "project.revoke", project),
        (Hat.OPERATOR, "link.cut", "pageserver/nobody"),
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
    project = project_of(console)["project_id"]
    eventually(lambda: revocation(console, project)["sealed_after_s"] is not None)
    of_it = {"project_id": project, "revocation_id": revocation(console, project)["revocation_id"]}
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
    assert rows_again(console) == [["the treasure lies under the oak"]]
    assert console.post("/api/setup").json()["code"] == "conflict"


def revocation(console: httpx.Client, project_id: str) -> dict[str, Any]:
    """The project's newest."""
    found = look(console, Hat.SECURITY_ADMIN)["parts"]["revocations"]["value"][project_id]
    return dict(max(found, key=lambda each: str(each["detected_at"])))


def rows_again(console: httpx.Client) -> Any:
    """What is in the table, once the services have heard that the key is there again."""

    def read() -> Any:
        answer = sql(console, Hat.DATA_USER, "select note from notes")
        return answer if answer.get("sqlstate") != "KL003" else None

    return eventually(read)["rows"]


# --- every button has an effect ---


@pytest.fixture
def spare(keylake: KeylakeCommand, request: pytest.FixtureRequest) -> str:
    """A project without storage under a key of its own. The key, the workspace and it have the same name."""
    name = str(request.node.name).removeprefix("test_")

    async def make() -> None:
        attached = Attached.to(keylake.home)
        customer = attached.customer()
        arn = customer.aws.create_key(name, role_arn=customer.bootstrap.role_arn)
        key = AwsKey(key_arn=arn, role_arn=customer.bootstrap.role_arn, external_id=customer.bootstrap.external_id)
        async with attached.client() as client:
            configuration = await client.create_key_configuration(CreateKeyConfiguration(name=name, key=key))
            workspace = await client.create_workspace(name, configuration.key_configuration_id)
            await client.create_project(workspace.workspace_id, name)
        customer.close()

    asyncio.run(make())
    return name


def done(console: httpx.Client, hat: Hat, action: str, target: str = "", **more: str) -> None:
    answer = act(console, hat, action, target, **more)
    assert answer.status_code == 204, answer.text


def test_kill_start_and_stop_of_a_compute(console: httpx.Client) -> None:
    target = endpoint(console)

    def now() -> dict[str, Any]:
        found = look(console, Hat.WORKSPACE_ADMIN)["parts"]["endpoints"]["value"]
        return dict(next(each for each in found if each["endpoint_id"] == target))

    def pages_served() -> int:
        return int(look(console, Hat.AUDITOR)["parts"]["pageserver"]["value"]["pages_served"])

    rows_again(console)
    before, served_before = now(), pages_served()
    assert before["state"] == "RUNNING"
    assert served_before > 0
    done(console, Hat.WORKSPACE_ADMIN, "endpoint.kill", target)
    assert (now()["state"], now()["boot_key_made_at"]) == ("STOPPED", None)
    done(console, Hat.WORKSPACE_ADMIN, "endpoint.start", target)
    again = now()
    assert again["state"] == "RUNNING"
    assert again["term"] > before["term"]
    assert again["boot_key_made_at"] > before["boot_key_made_at"]
    assert pages_served() > served_before, "what it started from"
    assert rows_again(console) == [["the treasure lies under the oak"]]
    done(console, Hat.WORKSPACE_ADMIN, "endpoint.stop", target)
    assert now()["state"] == "STOPPED"


def test_rotations_of_the_customer_and_of_a_security_admin(console: httpx.Client, spare: str) -> None:
    before, project = key_of(console, spare), project_of(console, spare)["project_id"]
    done(console, Hat.CUSTOMER, "key.rotate", before["arn"])
    material = key_of(console, spare)["material"]
    assert material != before["material"]
    done(console, Hat.SECURITY_ADMIN, "project.rotate-kek", project)
    first, second = look(console, Hat.SECURITY_ADMIN)["parts"]["keks"]["value"][project]["keks"]
    assert (first["kek_version"], second["kek_version"]) == (1, 2)
    assert before["material"] in first["cmk_key_version"]
    assert material in second["cmk_key_version"]


def test_deks_are_counted_and_not_guessed(console: httpx.Client) -> None:
    project = project_of(console)["project_id"]
    parts = look(console, Hat.SECURITY_ADMIN)["parts"]
    counted = parts["deks"]["value"][project]
    [kek] = parts["keks"]["value"][project]["keks"]
    objects, size_bytes = counted["keks"]["1"]
    assert counted["complete"]
    assert 0 < objects < kek["wraps"], "wraps is what may have been made, reserved in blocks of 4096"
    assert size_bytes > objects


def test_deny_and_allow(console: httpx.Client, spare: str) -> None:
    arn = key_of(console, spare)["arn"]
    done(console, Hat.CUSTOMER, "key.deny", arn)
    assert (key_of(console, spare)["keylake"], key_of(console, spare)["state"]) == ("denied", "Enabled")
    wait_for(console, "REVOKED", spare)
    done(console, Hat.CUSTOMER, "key.allow", arn)
    assert key_of(console, spare)["keylake"] == "allowed"
    wait_for(console, "ACTIVE", spare)


def test_a_deletion_is_scheduled_and_taken_back(console: httpx.Client, spare: str) -> None:
    arn = key_of(console, spare)["arn"]
    done(console, Hat.CUSTOMER, "key.schedule-deletion", arn)
    assert key_of(console, spare)["state"] == "PendingDeletion"
    assert key_of(console, spare)["deletion"] is not None
    wait_for(console, "REVOKED", spare)
    done(console, Hat.CUSTOMER, "key.cancel-deletion", arn)
    assert key_of(console, spare)["state"] == "Disabled", "as AWS has it: to use it again is another decision"
    done(console, Hat.CUSTOMER, "key.enable", arn)
    wait_for(console, "ACTIVE", spare)


def test_a_security_admins_own_buttons(console: httpx.Client, spare: str) -> None:
    """None of them needs the customer, but for what "Ask the KMS now" finds out."""
    project, hat = project_of(console, spare)["project_id"], Hat.SECURITY_ADMIN
    done(console, hat, "project.revoke", project)
    assert project_of(console, spare)["state"] == "REVOKED"
    assert "the console's button" in project_of(console, spare)["state_reason"]
    done(console, hat, "project.restore", project)
    assert project_of(console, spare)["state"] == "ACTIVE"
    done(console, hat, "project.ask-shred", project, typed=spare)
    assert look(console, hat)["parts"]["shreds"]["value"][project]["state"] == "asked"
    done(console, hat, "project.cancel-shred", project)
    assert look(console, hat)["parts"]["shreds"]["value"][project]["state"] == "cancelled"
    done(console, Hat.CUSTOMER, "key.disable", key_of(console, spare)["arn"])
    done(console, hat, "project.revalidate", project)
    assert project_of(console, spare)["state"] == "REVOKED", "without waiting for a probe"


def test_who_is_cut_off_is_waited_for_until_its_lease_ends(console: httpx.Client, keylake: KeylakeCommand) -> None:
    """The operator pulls the cable between pageserver and keymanager, and then the customer takes the key away."""
    for make in (
        ("cloud", "key", "create", "cut"),
        ("key-config", "create", "cut", "--key", "cut"),
        ("workspace", "create", "cut", "--key-config", "cut"),
    ):
        keylake(*make)
    keylake("project", "create", "cut", "--workspace", "cut")
    keylake("psql", "cut", "--", "-c", "create table notes as select 'it is still there' as note")
    project, arn = project_of(console, "cut")["project_id"], key_of(console, "cut")["arn"]

    def timeline() -> Iterator[tuple[str, bool] | None]:
        """The pageserver's step as it happens, and whether everybody is done; to the end."""
        with closing(events(console, Hat.SECURITY_ADMIN)) as stream:
            for event in stream:
                for found in event["parts"]["revocations"]["value"][project]:
                    [step] = [each["outcome"] for each in found["instances"] if each["role"] == "pageserver"]
                    yield step, found["sealed_after_s"] is not None
                    if found["sealed_after_s"] is not None:
                        return
                yield None

    def cuts() -> list[Any]:
        return [(each["between"], each["cut"]) for each in look(console, Hat.AUDITOR)["links"]["value"] if each["cut"]]

    assert cuts() == []
    steps = timeline()
    assert next(steps) is None
    done(console, Hat.OPERATOR, "link.cut", "pageserver/keymanager")
    try:
        done(console, Hat.CUSTOMER, "key.disable", arn)
        done(console, Hat.SECURITY_ADMIN, "project.revalidate", project)  # well before the pageserver's lease ends
        assert [each for each, _ in groupby(filter(None, steps))] == [("pending", False), ("fenced", True)]
        instances = revocation(console, project)["instances"]
        [pageserver] = [each for each in instances if each["role"] == "pageserver"]
        others = [each for each in instances if each["role"] != "pageserver"]
        assert {each["outcome"] for each in others} == {"acknowledged"}
        assert pageserver["after_s"] > max(each["after_s"] for each in others)
        assert cuts() == [(["keymanager", "pageserver"], "silent")]
        shown = {tuple(each["between"]): each["cut"] for each in keylake.json("link", "show")}
        assert {pair for pair, cut in shown.items() if cut} == {("keymanager", "pageserver")}
        assert shown["compute", "pageserver"] is None
    finally:
        done(console, Hat.OPERATOR, "link.heal")
    assert cuts() == []
    done(console, Hat.CUSTOMER, "key.enable", arn)
    wait_for(console, "ACTIVE", "cut")
    read = ("psql", "cut", "--", "-At", "-c", "select note from notes")
    assert eventually(lambda: keylake.run(*read).stdout) == "it is still there\n"
    keylake("link", "cut", "proxy", "--refused")
    assert {how for _, how in cuts()} == {"refused"}
    keylake("link", "heal")
    assert cuts() == []
    assert "no link of pageserver with nobody" in keylake.run("link", "cut", "pageserver", "nobody").stderr
    keylake("endpoint", "delete", "cut", "--yes")


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
        stop_and_start_the_kms(console)
        shred_and_delete(console, keylake)


def stop_and_start_the_kms(console: httpx.Client) -> None:
    """Felt by every project there is."""

    def faults() -> Any:
        return look(console, Hat.CUSTOMER)["parts"]["cloud"]["value"]["faults"].get("outage")

    done(console, Hat.CUSTOMER, "cloud.outage")
    assert faults() == "refuse"
    wait_for(console, "SUSPENDED")
    assert sql(console, Hat.DATA_USER, "select 1")["sqlstate"] == "KL002"
    done(console, Hat.CUSTOMER, "cloud.cut")
    assert faults() == "hang"
    done(console, Hat.CUSTOMER, "cloud.recover")
    assert faults() is None
    wait_for(console, "ACTIVE")


def shred_and_delete(console: httpx.Client, keylake: KeylakeCommand) -> None:
    project = project_of(console)["project_id"]
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
