"""Keylake's pytest plugin as its users have it, from a wheel, side by side under pytest-xdist: the example's own suite,
the README's test, and what must fail."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "orders"

MORE_CASES = """
import asyncio

import asyncpg
import pytest

from keylake.testing import assert_sealed


def test_what_is_open_is_not_sealed(keylake_project):
    with pytest.raises(AssertionError, match="not sealed after 0.2 s: its state is ACTIVE"):
        assert_sealed(keylake_project, within=0.2)
    keylake_project.start()
    keylake_project.key.deny()
    assert_sealed(keylake_project, within=5)
    with pytest.raises(AssertionError, match="not active after 0.1 s: its state is REVOKED"):
        keylake_project.wait_until_active(within=0.1)
    assert keylake_project.receipt().startswith(b"{")
    keylake_project.key.allow()
    keylake_project.wait_until_active(within=5)


def test_pending_deletion_can_be_taken_back(keylake_project, customer_key, keylake_dsn):
    assert keylake_dsn == keylake_project.dsn
    customer_key.schedule_deletion()
    assert_sealed(keylake_project, within=5)
    customer_key.enable()
    keylake_project.wait_until_active(within=5)
    customer_key.schedule_deletion()
    customer_key.destroy()
    assert_sealed(keylake_project, within=5)


def test_projects_have_keys_of_their_own(keylake_cluster, keylake_project, customer_key):
    other = keylake_cluster.create_project()
    customer_key.disable()
    assert_sealed(keylake_project, within=5)
    assert other.state == "ACTIVE"
    shared = keylake_cluster.create_project(key=other.key)
    assert shared.key is other.key


async def test_from_a_coroutine(keylake_project):
    connection = await asyncpg.connect(**keylake_project.connection.asyncpg_arguments())
    await asyncio.to_thread(keylake_project.key.disable)
    await asyncio.to_thread(assert_sealed, keylake_project, within=5)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("select 1")
    await connection.close(timeout=1)


def test_a_service_is_killed_and_started(keylake_cluster):
    keylake_cluster.kill("proxy")
    keylake_cluster.start("proxy")
"""
WHERE = """
import keylake
import pytest


@pytest.fixture(autouse=True)
def where(keylake_cluster, record_property):
    record_property("keylake", keylake.__file__)
    record_property("cluster", str(keylake_cluster.cluster.layout.home))
    yield
    for service in keylake_cluster.cluster.services.values():
        record_property("pid", service.pid)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with Keylake from a wheel, which nothing leads out of to the checkout."""
    directory = tmp_path_factory.mktemp("installed")
    sources, venv = directory / "sources", directory / "venv"
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    for package in found["include"]:  # a copy: setuptools would write into the checkout, and take what it finds there
        name = package.removesuffix("*")
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=directory, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    run("pip", "wheel", "--no-deps", "--wheel-dir", directory, sources)
    [wheel] = directory.glob("keylake-*.whl")
    run("venv", "--without-pip", venv)
    run("pip", "--python", venv / "bin" / "python", "install", "--no-deps", wheel)
    [packages] = venv.glob("lib/python*/site-packages")
    # What Keylake needs is this environment's, whose own .pth files are not read there: one leads to the checkout.
    (packages / "rest.pth").write_text(sysconfig.get_path("purelib"))
    return venv


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> ET.Element:
    """What pytest says of the example's tests and of the cases above, in one session of two workers."""
    directory = tmp_path_factory.mktemp("example") / "orders"
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    (directory / "tests" / "test_more.py").write_text(MORE_CASES)
    [readmes] = re.findall(r"^```python\n(def test_.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (directory / "tests" / "test_readme.py").write_text(f"from keylake.testing import assert_sealed\n\n\n{readmes}")
    (directory / "conftest.py").write_text(WHERE)
    results = directory / "results.xml"
    command = [f"{installed}/bin/python", "-m", "pytest", f"--junit-xml={results}", "-p", "no:randomly"]
    command += ["--basetemp", str(directory.parent / "tmp")]  # not the one that sessions share: they set its mode
    command += ["-o", "asyncio_mode=auto", "-o", "junit_family=xunit1", "--numprocesses=2", "--dist=load"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=220)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return ET.parse(results).getroot()  # noqa: S314 - pytest has just written it


def test_the_example_and_the_cases_pass(report: ET.Element) -> None:
    suite = report[0]
    assert (suite.get("errors"), suite.get("failures"), suite.get("skipped")) == ("0", "0", "0")
    names = {case.get("name") for case in suite.iter("testcase")}
    assert {"test_orders_stop_and_come_back_with_the_key", "test_what_is_open_is_not_sealed"} <= names
    assert "test_the_shop_closes" in names, "the README's"


def test_it_was_the_wheels(report: ET.Element, installed: Path) -> None:
    [keylake] = values(report, "keylake")
    assert Path(keylake).is_relative_to(installed)
    command = [f"{installed}/bin/keylake", "--version"]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.split()[0]) == (0, "keylake"), done.stdout + done.stderr


def test_the_wheel_has_every_file(installed: Path) -> None:
    """What is no Python, too, and what the example does not use: the console's pages, migrations, C."""
    [packages] = installed.glob("lib/python*/site-packages")
    sources = installed.parent / "sources"
    wanted = {path.relative_to(sources) for top in sources.glob("*/__init__.py") for path in top.parent.rglob("*.*")}
    assert Path("keylake/console/static/index.html") in wanted
    assert sorted(path for path in wanted if not (packages / path).exists()) == []


def test_workers_have_clusters_of_their_own(report: ET.Element) -> None:
    assert len(values(report, "cluster")) == 2


def values(report: ET.Element, name: str) -> set[str]:
    """All that was recorded under this name."""
    return {entry.get("value", "") for entry in report.iter("property") if entry.get("name") == name}


def test_nothing_of_it_is_left(report: ET.Element) -> None:
    pids = values(report, "pid")
    assert len(pids) > 2 * 8, "of two clusters, and of what was started again"
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        assert b"keylake" not in command, "a service has outlived the session"
    assert not [path for path in values(report, "cluster") if Path(path).exists()]


def test_a_session_that_asks_for_nothing_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\ndef test_plain():\n    assert not {'keylake.cluster', 'boto3'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["--basetemp", str(tmp_path / "tmp")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
