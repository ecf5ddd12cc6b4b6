"""`python -m customercloud`: serve until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

from customercloud.app import create_app
from customercloud.config import ENV_PREFIX, CustomerCloudSettings, load_settings
from customercloud.google.grpc_server import GrpcServer
from shared.config import Address
from shared.entry import run, wait_for_shutdown_signal
from shared.errors import KeylakeError
from shared.service import HttpServer
from shared.telemetry import configure_logging, get_logger
from shared.tls import CertificateFiles


def _arguments() -> tuple[Path | None, dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog="python -m customercloud",
        description="The customer's cloud for demos and tests, for unmodified SDKs: AWS KMS, STS and CloudTrail; Azure "
        "Key Vault and Entra ID; Google Cloud KMS and IAM.",
        epilog=f"Every setting is also an environment variable, {ENV_PREFIX}<NAME>, and a key of the file; "
        "the administrator's token (admin_token) is one of those two or made in the state directory. "
        "example: python -m customercloud --state-dir /var/lib/customercloud --port 8440",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON file with settings")
    for name, field in CustomerCloudSettings.model_fields.items():
        if name != "admin_token":  # a secret has no place on a command line
            parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=field.description)
    given = vars(parser.parse_args())
    config: Path | None = given.pop("config")
    return config, {name: value for name, value in given.items() if value is not None}


async def serve(settings: CustomerCloudSettings) -> None:
    """Returns after SIGTERM or SIGINT, when requests under way have been answered (or two seconds have passed)."""
    log = get_logger("customercloud")
    files = None
    if settings.tls_cert_path is not None and settings.tls_key_path is not None:
        files = CertificateFiles(settings.tls_cert_path, settings.tls_key_path)
    app = await asyncio.to_thread(create_app, settings)
    async with contextlib.AsyncExitStack() as servers:
        server = await servers.enter_async_context(
            HttpServer(app, Address(host=settings.host, port=settings.port), files)
        )
        log.info("listening", host=settings.host, port=server.port, tls=files is not None, region=settings.region)
        if settings.google_grpc_port is not None:
            grpc_server = await servers.enter_async_context(
                GrpcServer(app.state.google, settings.host, settings.google_grpc_port, files, app.state.google_answers)
            )
            log.info("listening for gRPC", host=settings.host, port=grpc_server.port, tls=files is not None)
        await wait_for_shutdown_signal()
        log.info("stopping")


def main() -> None:
    config, overrides = _arguments()
    try:
        settings = load_settings(config, overrides)
        configure_logging("customercloud", "customercloud", settings.log_level)
        run(lambda: serve(settings))
    except (KeylakeError, OSError) as error:
        print(f"customercloud: {error}", file=sys.stderr)  # noqa: T201 - logging may not be configured yet
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
