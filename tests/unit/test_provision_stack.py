"""docker-compose.yml keeps apart what must be apart. Read as YAML: whether it runs is seen on an engine."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Final

import pytest

from keylake.console import container
from keylake.provision import BUNDLES, CONSOLE, KEYMANAGER_NAMES, OPERATOR, PROVISION_DIR, SAFEKEEPER_NAMES, SERVICES
from shared.hardening import hardened_environment
from shared.tracing import STANDARD_VARIABLE

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ONE_SHOTS: Final = {"provision", "account", "objects", OPERATOR}
OURS: Final = "10001:10001"
yaml: Any = importlib.import_module("yaml")  # moto's; it has no types


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def mounts(service: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """[(volume, where, read-only)]"""
    found = []
    for entry in service.get("volumes", []):
        if isinstance(entry, dict):
            found.append((entry["source"], entry["target"], entry.get("read_only", False)))
        else:
            volume, where, *options = entry.split(":")
            found.append((volume, where, options == ["ro"]))
    return found


def test_all_services_are_there(stack: dict[str, Any]) -> None:
    assert set(stack["services"]) == {*BUNDLES, "provision", "account", "objects"}


def test_only_the_proxy_and_the_console_are_published_and_on_loopback(stack: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in stack["services"].items() if "ports" in service}
    console = "${KEYLAKE_CONSOLE_PORT:-8470}"
    assert published == {
        "proxy": ["127.0.0.1:${KEYLAKE_PROXY_PORT:-54320}:5432"],
        # The same inside: the page is told by which name and port it is reached.
        CONSOLE: [f"127.0.0.1:{console}:{console}"],
    }
    assert stack["services"][CONSOLE]["environment"][container.PORT_VARIABLE] == console
    outside = {name: network for name, network in stack["networks"].items() if not network.get("internal")}
    assert set(outside) == {"front"}
    assert outside["front"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    on_it = {name for name, service in stack["services"].items() if "front" in service.get("networks", [])}
    assert on_it == {"proxy", CONSOLE}


def test_the_consoles_address_is_written_to_memory(stack: dict[str, Any]) -> None:
    where = str(container.ADDRESS_FILE.parent)
    assert any(entry.startswith(f"{where}:") and "mode=0700" in entry for entry in stack["services"][CONSOLE]["tmpfs"])
    assert f"cat {container.ADDRESS_FILE}" in (ROOT / "Makefile").read_text()
    assert f"exec -T console cat {container.ADDRESS_FILE}" in (ROOT / "docs" / "compose.md").read_text()


def test_each_service_mounts_its_own_secrets_only_and_cannot_change_them(stack: dict[str, Any]) -> None:
    for name in BUNDLES:
        secrets = [mount for mount in mounts(stack["services"][name]) if mount[0].endswith("-secrets")]
        where = "/etc/minio" if name == "minio" else "/etc/keylake"
        assert secrets == [(f"{name}-secrets", where, True)]


def test_provision_mounts_every_bundle_where_it_looks_for_it(stack: dict[str, Any]) -> None:
    expected = {(f"{name}-secrets", str(PROVISION_DIR / name), False) for name in BUNDLES}
    bundles = {mount for mount in mounts(stack["services"]["provision"]) if mount[0].endswith("-secrets")}
    assert bundles == expected
    assert stack["services"]["provision"]["network_mode"] == "none"


def test_each_service_mounts_its_own_data_only(stack: dict[str, Any]) -> None:
    users: dict[str, set[str]] = {}
    for name, service in stack["services"].items():
        for volume, _, read_only in mounts(service):
            if volume == "metadata-socket":  # who could write there could stand in for the database
                assert read_only == (name != "metadata"), name
            if not volume.endswith("-secrets") and not (name in (OPERATOR, CONSOLE) and read_only):
                users.setdefault(volume, set()).add(name)
    assert users.pop("metadata-socket") == {"metadata", *KEYMANAGER_NAMES, "compute"}
    assert users.pop("pageserver-cache") == {"pageserver", OPERATOR}
    assert users.pop("minio-data") == {"minio", "provision"}  # which gives it its owner
    assert all(len(names) == 1 for names in users.values())


def test_the_trust_boundary_is_a_network(stack: dict[str, Any]) -> None:
    def on(network: str) -> set[str]:
        return {name for name, service in stack["services"].items() if network in service.get("networks", [])}

    assert on("customer") == {"customercloud", *KEYMANAGER_NAMES, "account", CONSOLE, OPERATOR}
    assert on("objects") == {"minio", "objects", "pageserver", *SAFEKEEPER_NAMES, *KEYMANAGER_NAMES, OPERATOR}
    assert on("keylake") == {*SERVICES, CONSOLE, OPERATOR}
    assert stack["services"]["metadata"]["network_mode"] == "none"


def test_nobody_has_more_power_than_it_needs(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "userns_mode", "devices"} & service.keys(), name
        assert "docker.sock" not in str(service), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert any(entry.startswith("/tmp:") for entry in service["tmpfs"]), name  # noqa: S108


def test_lazy_volumes_take_three_things_for_computes_alone() -> None:
    """Each is more of the kernel within reach of users' SQL."""
    overlay = yaml.safe_load((ROOT / "docker-compose.fuse.yml").read_text())
    assert overlay == {
        "services": {
            "compute": {
                "devices": ["${KEYLAKE_FUSE_DEVICE:-/dev/fuse}:/dev/fuse"],
                "cap_add": ["SYS_ADMIN"],
                "security_opt": ["apparmor=unconfined"],
            }
        }
    }


def test_nobody_is_root(stack: dict[str, Any]) -> None:
    assert re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE) == [OURS]
    for name, service in stack["services"].items():
        assert service.get("user") == (OURS if name == "minio" else None), name  # its image is its maker's


def test_a_volume_that_a_foreign_image_fills_has_our_owner(stack: dict[str, Any]) -> None:
    """A new volume takes the owner of the directory in the image that mounts it first, and until it has content, of
    each one after that, unless it is told not to."""
    [data] = [entry for entry in stack["services"]["minio"]["volumes"] if isinstance(entry, dict)]
    assert (data["source"], data["volume"]) == ("minio-data", {"nocopy": True})
    assert "minio-data:/observed/minio" in stack["services"]["provision"]["volumes"]
    assert "provision" in stack["services"]["minio"]["depends_on"]


def test_nothing_that_has_an_identity_can_be_scaled(stack: dict[str, Any]) -> None:
    """Compose refuses to scale what has a name of its own. Two of one identity would fence each other."""
    for name in {*BUNDLES} - ONE_SHOTS:
        assert stack["services"][name]["container_name"] == "${COMPOSE_PROJECT_NAME:-keylake}-" + name


def test_logs_do_not_fill_the_disk(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        assert {"max-size", "max-file"} <= service["logging"]["options"].keys(), name


def test_there_is_no_secret_in_it(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        for variable in service.get("environment", {}):
            assert not re.search("PASSWORD|SECRET|TOKEN|KEY$", variable.replace("_FILE", "")) or variable.endswith(
                "_FILE"
            ), (name, variable)


def test_no_value_in_it_looks_like_a_secret(stack: dict[str, Any]) -> None:
    """Neither a known default, nor something long and random, nor credentials in a URL."""
    values: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)
        else:
            values.append(str(node))

    walk(stack)
    assert len(values) > 200
    for value in values:
        assert not re.search(r"minioadmin|changeme|letmein|://[^/\s]+:[^/\s]+@|password=", value, re.IGNORECASE), value
        assert not [word for word in re.findall(r"[A-Za-z0-9+=_]{24,}", value) if re.search(r"[0-9].*[A-Za-z]", word)]


def test_services_wait_for_what_they_need(stack: dict[str, Any]) -> None:
    services = stack["services"]
    for name in {*BUNDLES} - ONE_SHOTS:
        assert "healthcheck" in services[name], name
        reached, todo = set[str](), [name]
        while todo:
            for other, condition in services[todo.pop()].get("depends_on", {}).items():
                wanted = "service_completed_successfully" if other in ONE_SHOTS else "service_healthy"
                assert condition == {"condition": wanted}, (name, other)
                if other not in reached:
                    reached.add(other)
                    todo.append(other)
        assert "provision" in reached, name
    assert set(services["pageserver"]["depends_on"]) == {"keymanager", "minio", *SAFEKEEPER_NAMES}
    # `up --wait` takes a container that has ended for a failure unless somebody waits for its end.
    awaited = {other for service in services.values() for other in service.get("depends_on", {})}
    assert {"provision", "account", "objects"} <= awaited
    assert services[OPERATOR]["profiles"] == [OPERATOR]


def test_containers_are_started_as_hardened_as_processes(stack: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    image = dict(
        word.split("=", 1) for word in re.findall(r"^ENV (LD_BIND_NOW=.*)$", dockerfile, re.MULTILINE)[0].split()
    )
    assert image == hardened_environment({})
    own = {**stack["services"]["keymanager"]["environment"]}
    del own[STANDARD_VARIABLE]
    assert {**image, **own} == hardened_environment({}, small_objects=True)


def test_traces_of_all_services_go_where_one_variable_says(stack: dict[str, Any]) -> None:
    """Empty: nowhere. A service with an environment of its own does not inherit it by itself."""
    for name in SERVICES:
        assert stack["services"][name]["environment"][STANDARD_VARIABLE] == f"${{{STANDARD_VARIABLE}:-}}", name


def test_foreign_images_are_pinned(stack: dict[str, Any]) -> None:
    image = stack["services"]["minio"]["image"]
    assert re.fullmatch(r"\$\{KEYLAKE_S3_IMAGE:-quay\.io/minio/minio:RELEASE\.[0-9TZ-]+\}", image)
    base = re.findall(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(base) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base[0])
    assert f"BASE_IMAGE=${{BASE_IMAGE:-{base[0]}}}" in stack["services"]["provision"]["build"]["args"]


def test_one_service_builds_the_image_and_nobody_pulls_it(stack: dict[str, Any]) -> None:
    ours = {name: service for name, service in stack["services"].items() if name != "minio"}
    assert {service["image"] for service in ours.values()} == {"${KEYLAKE_IMAGE:-keylake:local}"}
    assert [name for name, service in ours.items() if "build" in service] == ["provision"]
    assert {ours[name]["pull_policy"] for name in ours if name != "provision"} == {"never"}


def test_every_volume_is_declared_and_used(stack: dict[str, Any]) -> None:
    used = {volume for service in stack["services"].values() for volume, _, _ in mounts(service)}
    assert used == set(stack["volumes"])


def test_the_image_has_the_directories_that_are_mounted_over(stack: dict[str, Any]) -> None:
    """A volume takes the owner of the directory below it; one that is not in the image would be root's."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in stack["services"].items():
        for _, where, _ in mounts(service) if name != "minio" else ():
            parent, _, leaf = where.rpartition("/")
            known = parent in ("/provision", "/observed") and re.search(rf"\b{leaf}\b", dockerfile)
            assert known or re.search(rf" {where}\b", dockerfile), where
