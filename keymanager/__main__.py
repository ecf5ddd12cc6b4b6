"""`python -m keymanager --config FILE`"""

from __future__ import annotations

import asyncio
import os
import resource
import sys

from keymanager.adapters import provider_factory
from keymanager.anchoring import AnchorKeys
from keymanager.config import KeymanagerSettings
from keymanager.replica import Replica
from keymanager.seat import place_of
from shared.auth import Service, TrustBundle
from shared.clock import SystemClock
from shared.config import Address
from shared.entry import run, wait_for_shutdown_signal
from shared.errors import KeylakeError
from shared.failpoints import arm, refuse_failpoints
from shared.hardening import harden_process
from shared.service import HttpServer
from shared.settings import settings_from_arguments
from shared.telemetry import configure_logging, get_logger
from shared.tracing import configure_tracing


async def serve(settings: KeymanagerSettings, hardening: dict[str, bool], open_files: int) -> None:
    """Until a signal comes. Raises what keeps this process from ever leading."""
    log = get_logger(__name__)
    clock = SystemClock()
    trusted = TrustBundle.load(settings.identity.trust_bundle)
    # A key that is missing or broken must be found now, not when the first anchor is due.
    anchor_keys = None if settings.audit_anchors is None else AnchorKeys.of(settings.identity)
    replica = Replica(settings, provider_factory(settings, clock), trusted, anchor_keys, clock)
    async with HttpServer(replica.front, settings.listen, settings.identity.files) as server:
        log.info("listening", port=server.port, open_files=open_files, **hardening)
        place = place_of(Address(host=settings.listen.host, port=server.port))
        running, asked = asyncio.create_task(replica.run(place)), asyncio.create_task(wait_for_shutdown_signal())
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, asked):
            task.cancel()
        await asyncio.wait({running, asked})
        if not running.cancelled():
            running.result()
    log.info("stopped")


def allow_many_sessions() -> int:
    """Each session is an open file, and the soft limit is 1024 where nobody has thought of it: up to the hard one.
    Returns how many files may be open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def main() -> None:
    settings = settings_from_arguments(
        KeymanagerSettings, "keymanager", "Keylake's key manager: KEKs, leases, revocation, audit."
    )
    arm(os.environ)
    refuse_failpoints(settings.listen.host)
    hardening, open_files = harden_process(), allow_many_sessions()
    configure_logging(Service.KEYMANAGER.value, settings.node_id, settings.log_level)
    configure_tracing(Service.KEYMANAGER.value, settings.node_id, settings.otlp_endpoint)
    try:
        run(lambda: serve(settings, hardening, open_files))
    except KeylakeError as error:
        get_logger(__name__).error("cannot run", reason=str(error), code=error.code)
        sys.exit(1)


if __name__ == "__main__":
    main()
