"""Keylake in containers (docker-compose.yml), from inside of the one-shot container `operator`.

Nothing but the proxy is reachable from the host, so whoever administers the stack does it from that container: it is
on the inner networks, and its volume holds the administrator's key and the customer's. It cannot kill or start its
neighbours; for the demo the process that started it on the host does that (`keylake.compose_host`).

    docker compose run --rm operator python -m keylake.compose project shop    a project, and how the host connects
    docker compose run --rm operator keylake cloud key disable "CMK of shop"   the customer disables its key
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import httpx
from pydantic import ValidationError

from keylake.client import Addresses, KeylakeClient
from keylake.compose_host import MAX_LINE_SIZE_BYTES, Reply, Request
from keylake.layout import Layout
from keylake.place import inside
from keylake.provision import (
    BUCKET,
    CLOUD_URL,
    HTTP_PORT,
    KEYMANAGER_NAMES,
    OBJECTS_URL,
    POSTGRES_PORT,
    SAFEKEEPER_NAMES,
    SERVICES,
    cloud_ca,
)
from shared.api.keymanager import AwsKey, CreateKeyConfiguration
from shared.auth import BearerToken, TokenIssuer
from shared.config import Address
from shared.errors import InvalidInputError, KeylakeError, UnavailableError
from shared.tls import client_context, service_host_name

if TYPE_CHECKING:
    from keylake.cluster import Customer

OBSERVED_DIR: Final = Path("/observed")
_START_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.1


def addresses() -> Addresses:
    """As the containers see each other."""
    return Addresses(
        keymanager=tuple(Address(host=name, port=HTTP_PORT) for name in KEYMANAGER_NAMES),
        manager=Address(host="compute", port=HTTP_PORT),
        pageserver=Address(host="pageserver", port=HTTP_PORT),
        safekeepers=tuple(Address(host=name, port=HTTP_PORT) for name in SAFEKEEPER_NAMES),
        proxy=Address(host="proxy", port=POSTGRES_PORT),
    )


def attach(directory: Path) -> tuple[KeylakeClient, Customer]:
    """`client` and `customer` of the operator's bundle in `directory`; close both."""
    return client(directory), customer(directory)


def client(directory: Path, token: str | None = None) -> KeylakeClient:
    """Keylake's own APIs, as the administrator, or as the person with this token. Makes no connection.

    Raises UnavailableError, InvalidInputError.
    """
    bundle = _bundle(directory)
    credentials = TokenIssuer.load(bundle.admin_key) if token is None else BearerToken(token)
    return KeylakeClient(addresses(), bundle.ca_certificate, credentials)


def customer(directory: Path) -> Customer:
    """The customer's side, to be closed. Blocks for one request. Raises UnavailableError."""
    # Only here: boto3 takes as long to import as everything else together.
    from customercloud.client import CloudAdmin
    from customercloud.client import Endpoint as CloudEndpoint
    from keylake.cluster import Customer

    bundle = _bundle(directory)
    admin = CloudAdmin(CLOUD_URL, bundle.customer_admin_token.read_text(), verify=cloud_ca(bundle))
    # Idempotent: it answers with the accounts and credentials that are there.
    bootstrap = admin.bootstrap_aws(bundle.secret("external-id"))
    return Customer(bootstrap, CloudEndpoint(bootstrap.region, CLOUD_URL, cloud_ca(bundle)), admin)


def _bundle(directory: Path) -> Layout:
    bundle = Layout(directory)
    if bundle.is_new:
        raise UnavailableError("the stack has not been provisioned: `make up` first")
    return bundle


class Requests:
    """The container's end of the conversation. Takes stdout for it: make this before anything is printed, and what is
    printed from then on goes to stderr."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.fdopen(os.dup(1), "wb")
        self._in = os.fdopen(os.dup(0), "rb")
        sys.stdout.flush()
        os.dup2(2, 1)

    def ask(self, request: Request) -> str:
        """Blocks until it is done. Raises UnavailableError when the host cannot do it, or is not there."""
        with self._lock:
            self._out.write(request.model_dump_json().encode() + b"\n")
            self._out.flush()
            line = self._in.readline(MAX_LINE_SIZE_BYTES)
        if not line:
            raise UnavailableError("nobody on the host listens: start this with `keylake demo --compose` there")
        try:
            reply = Reply.model_validate_json(line)
        except ValidationError:
            raise UnavailableError("the host does not speak the protocol") from None
        if reply.error:
            raise UnavailableError(reply.error)
        return reply.text


def copy_objects(operator: Layout, directory: Path) -> None:
    """Every object as the store has it, by another client than the one that wrote it: MinIO's own.

    Objects are written once, so what was copied before is still good; an index has another name in each version.
    What was deleted since it was listed is left out. Raises UnavailableError.
    """
    from minio import Minio
    from minio.error import S3Error

    store = Minio(
        OBJECTS_URL.removeprefix("http://"),
        access_key=operator.secret("objects-user"),
        secret_key=operator.secret("objects-password"),
        region="us-east-1",
        secure=False,
    )
    for entry in store.list_objects(BUCKET, recursive=True):
        name = entry.object_name or ""
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise InvalidInputError("an object's key is not a relative path")
        if path.exists():
            continue
        try:
            store.fget_object(BUCKET, name, str(path))
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise UnavailableError(f"the object store refuses an object: {error.code}") from None


class StackTarget:
    """Implements `keylake.demo.target.Target`. Use as an async context manager, in the operator's container."""

    def __init__(self, client: KeylakeClient, customer: Customer, bundle: Layout, requests: Requests) -> None:
        self.client = client
        self.customer = customer
        self._bundle = bundle
        self._requests = requests
        self._copies = Path(tempfile.mkdtemp(prefix="observed-"))

    @classmethod
    async def open(cls, directory: Path, requests: Requests) -> StackTarget:
        """Raises UnavailableError, InvalidInputError."""
        client, customer = await asyncio.to_thread(attach, directory)
        return cls(client, customer, Layout(directory), requests)

    async def __aenter__(self) -> StackTarget:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.client.aclose()
        self.customer.close()
        shutil.rmtree(self._copies, ignore_errors=True)

    def persistent(self) -> dict[str, list[Path]]:
        """Volumes where they are mounted; copies of objects and of the containers' logs as they are now. Blocks."""
        objects, logs = self._copies / "objects", self._copies / "logs"
        copy_objects(self._bundle, objects)
        logs.mkdir(exist_ok=True)
        (logs / "containers.log").write_text(self._requests.ask(Request(do="logs")))
        return {
            "object store": [objects],
            "safekeepers": [OBSERVED_DIR / name for name in SAFEKEEPER_NAMES],
            "pageserver's cache": [OBSERVED_DIR / "pageserver"],
            "compute logs": [OBSERVED_DIR / "compute"],
            "metadata database": [OBSERVED_DIR / "metadata"],
            "customer's cloud": [OBSERVED_DIR / "customercloud"],
            "service logs": [logs],
        }

    async def kill(self, service: str) -> None:
        await asyncio.to_thread(self._requests.ask, Request(do="kill", service=service))

    async def start(self, service: str) -> None:
        """Returns when it is ready. Raises UnavailableError."""
        await asyncio.to_thread(self._requests.ask, Request(do="start", service=service))
        deadline = monotonic() + _START_TIMEOUT_S
        context = client_context(self._bundle.ca_certificate)
        extensions = {"sni_hostname": service_host_name(SERVICES[service].value)}
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=2) as http:
            while monotonic() < deadline:
                try:
                    answer = await http.get(f"https://{service}:{HTTP_PORT}/readyz", extensions=extensions)
                    if answer.status_code == 200:
                        return
                except httpx.HTTPError:
                    pass  # not there yet
                await asyncio.sleep(_POLL_S)
        raise UnavailableError(f"{service} was not ready within {_START_TIMEOUT_S:g} s")

    async def wipe_pageserver_disk(self) -> None:
        for entry in (OBSERVED_DIR / "pageserver").iterdir():
            await asyncio.to_thread(shutil.rmtree, entry)


# --- `python -m keylake.compose` ---


async def make_project(directory: Path, name: str) -> dict[str, Any]:
    """A project under a CMK of its own, and how the host connects to its endpoint."""
    keylake, cloud = await asyncio.to_thread(attach, directory)
    try:
        key_arn = await cloud.create_key(f"CMK of {name}")
        bootstrap = cloud.bootstrap
        key = AwsKey(key_arn=key_arn, role_arn=bootstrap.role_arn, external_id=bootstrap.external_id)
        configuration = await keylake.create_key_configuration(CreateKeyConfiguration(name=name, key=key))
        workspace = await keylake.create_workspace(name, configuration.key_configuration_id)
        project = await keylake.create_project(workspace.workspace_id, name)
        endpoint = await keylake.create_endpoint(await keylake.create_timeline(project.project_id))
    finally:
        await keylake.aclose()
        cloud.close()
    return {
        "key_arn": key_arn,
        "project_id": str(project.project_id),
        "host": "localhost",
        "port": int(os.environ["KEYLAKE_PROXY_PORT"]),
        "user": endpoint.user,
        "password": endpoint.password,
        "database": endpoint.database,
        "options": f"endpoint={endpoint.endpoint_id}",
        "ca_certificate": Layout(directory).ca_certificate.read_text(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keylake.compose",
        description="First steps with the containers; for the operator's container.",
        epilog="example: docker compose run --rm operator python -m keylake.compose project shop",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("project", help="make one, and print how to connect to it").add_argument("name")
    arguments = parser.parse_args()
    directory = inside()
    if directory is None:
        parser.error("this is for the operator's container: docker compose run --rm operator …")
    try:
        print(json.dumps(asyncio.run(make_project(directory, arguments.name)), indent=2))  # noqa: T201
    except KeylakeError as error:
        print(f"keylake.compose: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
