"""The conversation between the operator's container and the host: nothing but what the demo needs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylake.compose_host import Host, Reply, Request, parse_request
from keylake.provision import SERVICES
from shared.errors import InvalidInputError, UnavailableError

DOCKER = r"""#!/bin/sh
# Stands for the docker CLI: says what it was asked, and plays the operator's container.
echo "$@" >> "$LOG"
shift
case "$1" in
  version) exit 0 ;;
  run)
    exec 3<&0
    printf '%s\n' "$REQUESTS" | while read -r request; do
      printf '%s\n' "$request"
      read -r reply <&3
      printf '%s\n' "$reply" >> "$REPLIES"
    done
    exit 7 ;;
  kill) echo "no such container" >&2; exit 1 ;;
  logs) echo "a log" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docker-compose.yml").touch()
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("REPLIES", str(tmp_path / "replies"))
    return tmp_path


@pytest.mark.parametrize("service", [*SERVICES])
def test_services_can_be_killed_and_started(service: str) -> None:
    for do in ("kill", "start"):
        line = json.dumps({"do": do, "service": service}).encode()
        assert parse_request(line) == Request.model_validate({"do": do, "service": service})


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello\n",
        b"{}",
        b'{"do": "rm", "service": "proxy"}',
        b'{"do": "kill"}',
        b'{"do": "kill", "service": "minio"}',
        b'{"do": "kill", "service": "--all"}',
        b'{"do": "start", "service": "proxy", "more": 1}',
    ],
)
def test_nothing_else_can_be_asked_for(line: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse_request(line)


@given(st.binary(max_size=200))
def test_no_line_does_more_than_that(line: bytes) -> None:
    try:
        request = parse_request(line)
    except InvalidInputError:
        return
    assert request.do == "logs" or request.service in SERVICES


def test_requests_are_done_and_answered_in_order(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        Request(do="start", service="pageserver").model_dump_json(),
        Request(do="logs").model_dump_json(),
        Request(do="kill", service="safekeeper-2").model_dump_json(),
        "something else",
    ]
    monkeypatch.setenv("REQUESTS", "\n".join(requests))
    assert Host(checkout).run_operator(["keylake", "demo", "--compose"]) == 7
    asked = (checkout / "log").read_text().splitlines()
    assert asked == [
        "compose version",
        "compose run --rm --no-deps -T operator keylake demo --compose",
        "compose start pageserver",
        "compose logs --no-color",
        "compose kill -s SIGKILL safekeeper-2",
    ]
    replies = [Reply.model_validate_json(line) for line in (checkout / "replies").read_text().splitlines()]
    assert replies[:2] == [Reply(), Reply(text="a log\n")]
    assert "no such container" in replies[2].error
    assert "protocol" in replies[3].error


def test_a_container_that_ends_in_the_middle_is_no_error_of_ours(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = checkout / "bin" / "docker"
    ask = Request(do="logs").model_dump_json()
    docker.write_text(f"#!/bin/sh\nif [ $2 = run ]; then exec <&-; echo '{ask}'; echo '{ask}'; exit 3; fi\n")
    assert Host(checkout).run_operator(["keylake"]) == 3


def test_without_a_checkout_or_compose_the_error_says_so(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="checkout"):
        Host(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UnavailableError, match="docker compose"):
        Host(checkout)
