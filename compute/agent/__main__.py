"""`python -m compute.agent`: one compute. Started by the manager only, inside of its sandbox; see protocol.py."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from compute.agent.control_pipe import ControlPipe
from compute.agent.life import Agent
from compute.agent.processes import become_subreaper
from compute.agent.protocol import Boot, Tokens
from compute.volume.base import VolumeKind
from compute.volume.fuse import make_volume
from shared.entry import run
from shared.hardening import harden_process
from shared.postgres import unprivileged
from shared.sandbox import Isolation, Sandbox
from shared.telemetry import configure_logging, get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where it runs; nothing of it is about a project."""

    sandbox: Sandbox
    volume: VolumeKind
    blocks_dir: Path
    blocks_size_bytes: int


async def main(place: Place) -> None:
    hardening = harden_process()
    become_subreaper()
    sandbox = place.sandbox
    unprivileged()  # finds Postgres and how to run it, while there is nothing else to do
    volume = await make_volume(place.volume, sandbox, place.blocks_dir, place.blocks_size_bytes)
    pipe = await ControlPipe.open()
    boot = await pipe.receive()
    if not isinstance(boot, Boot):
        return  # the manager ended before it needed us
    configure_logging("compute-agent", str(boot.endpoint_id), boot.log_level)
    tokens = await pipe.receive()
    if not isinstance(tokens, Tokens):
        return
    _log.info("compute starts", project_id=str(boot.project_id), instance_id=str(boot.instance_id), **hardening)
    ended = await Agent(boot, tokens, pipe, volume, no_network=sandbox.isolation.private_mounts).run()
    _log.info("compute ended", reason=ended.reason, **ended.steps_s)
    await pipe.send(ended)


def _arguments() -> Place:
    parser = argparse.ArgumentParser(prog="python -m compute.agent", description=__doc__)
    parser.add_argument("--isolation", type=Isolation, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--volume", type=VolumeKind, default=VolumeKind.TMPFS)
    parser.add_argument("--blocks-dir", type=Path, help="where a FUSE volume keeps its sealed blocks")
    parser.add_argument("--blocks-size-bytes", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.volume is not VolumeKind.TMPFS and arguments.blocks_dir is None:
        parser.error("a FUSE volume needs --blocks-dir")
    sandbox = Sandbox(arguments.isolation, arguments.directory, arguments.size_bytes, network=True)
    return Place(sandbox, arguments.volume, arguments.blocks_dir, arguments.blocks_size_bytes)


if __name__ == "__main__":
    place = _arguments()
    run(lambda: main(place))
