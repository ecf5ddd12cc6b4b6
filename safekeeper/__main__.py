"""Process entry: `python -m safekeeper --config FILE`."""

from __future__ import annotations

import asyncio
import os
import sys

from safekeeper.config import SafekeeperSettings
from safekeeper.server import running_safekeeper
from shared.api.keymanager import Role
from shared.auth import TokenIssuer
from shared.entry import run, wait_for_shutdown_signal
from shared.failpoints import arm, refuse_failpoints
from shared.hardening import harden_process
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.settings import settings_from_arguments
from shared.telemetry import configure_logging, get_logger
from shared.tracing import configure_tracing


async def serve_until_shutdown(settings: SafekeeperSettings) -> None:
    """Returns at SIGTERM or SIGINT, or when a newer instance of this node has taken over."""
    issuer = TokenIssuer.load(settings.identity.signing_key)
    async with (
        KeyClient(
            settings.keymanager,
            settings.identity.ca_certificate,
            session_tokens(issuer),
            role=Role.SAFEKEEPER,
            node_id=settings.node_id,
        ) as keys,
        running_safekeeper(settings, issuer, keys, lambda: keys.replaced, keys) as safekeeper,
    ):
        ends = {
            asyncio.create_task(wait_for_shutdown_signal()),
            asyncio.create_task(keys.wait_replaced()),
            asyncio.create_task(keys.tend_deletions(safekeeper.node.delete_project)),
        }
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()


def main() -> None:
    settings = settings_from_arguments(SafekeeperSettings, "safekeeper", "Keylake safekeeper: sealed, quorum-held WAL")
    arm(os.environ)
    refuse_failpoints(settings.listen.host)
    configure_logging("safekeeper", settings.node_id, settings.log_level)
    configure_tracing("safekeeper", settings.node_id, settings.otlp_endpoint)
    # A stream's thread that comes back from fdatasync shall not wait 5 ms (the default) for a busy event loop.
    sys.setswitchinterval(0.0005)
    get_logger(__name__).info("process hardened", **harden_process())
    run(lambda: serve_until_shutdown(settings))


if __name__ == "__main__":
    main()
