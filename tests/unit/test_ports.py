"""Ports are given out once, whoever asks."""

from __future__ import annotations

import socket
import subprocess
import sys

from keylake import ports
from keylake.ports import free_port

PICK = "import sys; from keylake.ports import free_port; print(free_port(), flush=True); sys.stdin.read()"


def test_a_port_is_given_out_once_and_can_be_bound() -> None:
    given = [free_port() for _ in range(200)]
    assert len(set(given)) == len(given)
    with socket.socket() as server:
        server.bind(("127.0.0.1", given[0]))


def test_another_process_keeps_its_port_until_it_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PICK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        taken = int(other.stdout.readline())
        assert not ports._reservations.take(taken)
        other.communicate("")
    assert ports._reservations.take(taken)
