"""`python -m keylake.console.container`: the console as a container of docker-compose.yml.

It wears every hat, so it has a bundle of its own: an owner's signing key, which hands out people's tokens, and the
customer's credentials. Its address, whose key is new at each start, goes to a file in memory and to no log: logs of
containers lie on disk.

    docker compose exec -T console cat /run/keylake/console
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from keylake.console.serve import listen, serve
from keylake.layout import write_secret
from keylake.place import STACK_VARIABLE, inside
from keylake.provision import DATA_DIR
from keylake.stack import Stack
from shared.errors import KeylakeError
from shared.telemetry import configure_logging, get_logger

PORT_VARIABLE: Final = "KEYLAKE_CONSOLE_PORT"
"""Inside of the container and on the host alike: it stands in the address."""
ADDRESS_FILE: Final = Path("/run/keylake/console")

_log = get_logger(__name__)


async def _announce(address: str) -> None:
    write_secret(ADDRESS_FILE, address + "\n")
    _log.info("the console is up; its address is a secret", file=str(ADDRESS_FILE))


def main() -> int:
    configure_logging("console", "console")
    directory = inside()
    if directory is None:
        _log.error("this is for the console's container", variable=STACK_VARIABLE)
        return 2
    try:
        # Which networks the container is on, and that only the host's loopback gets here, is the compose file's matter.
        with contextlib.closing(listen("0.0.0.0", int(os.environ[PORT_VARIABLE]))) as listener:  # noqa: S104
            asyncio.run(serve(Stack(directory, DATA_DIR), listener, _announce))
    except KeylakeError as error:
        _log.error("the console cannot go on", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
