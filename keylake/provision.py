"""What the containers of docker-compose.yml need before they start: certificates, signing keys, passwords, settings.

    python -m keylake.provision secrets    first of all: everything that can be made without another service
    python -m keylake.provision account    once the customer's cloud is up: its accounts, and Keylake's access key there
    python -m keylake.provision objects    once the object store is up: the bucket, and who may do what in it
    python -m keylake.provision certificates    new ones, while nothing runs: `make renew`

Each service has a *bundle*: a volume of its own, at /provision/<name> here and at /etc/keylake there, with its own
keys and nobody else's. A bundle is laid out like the home of a local cluster (`keylake.layout`), as far as it goes.
The keys of the two CAs are not kept: one for Keylake's services and the proxy, one for the customer's cloud, which is
on the other side of the trust boundary.

Nothing has a default password: everything secret is made here, once. Passwords of the metadata database and of the
object store are in the bundles of those who serve and those who use them."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keylake.layout import (
    METADATA_ROLES,
    METADATA_SUPERUSER,
    PROXY_DOMAIN,
    SAFEKEEPERS,
    Layout,
    write_secret,
)
from keylake.metadata import METADATA_DATABASE
from shared.audit_anchor import ANCHOR_PREFIX
from shared.auth import Service, TokenIssuer, TrustBundle
from shared.errors import KeylakeError, UnavailableError
from shared.roles import SERVICE_SCOPES
from shared.tls import CertificateAuthority, renewal_is_due, service_host_name, valid_until

PROVISION_DIR: Final = Path("/provision")
BUNDLE: Final = Layout(Path("/etc/keylake"))
"""A bundle as its service sees it."""
DATA_DIR: Final = Path("/var/lib/keylake")
METADATA_SOCKET_DIR: Final = Path("/run/metadata")

HTTP_PORT: Final = 8443
WAL_PORT: Final = 5454
PAGES_PORT: Final = 6400
POSTGRES_PORT: Final = 5432
CLOUD_PORT: Final = 8440
OBJECTS_PORT: Final = 9000
CLOUD_URL: Final = f"https://customercloud:{CLOUD_PORT}"
OBJECTS_URL: Final = f"http://minio:{OBJECTS_PORT}"
BUCKET: Final = "keylake"

KEYMANAGER_NAMES: Final = ("keymanager", "keymanager-2")
SAFEKEEPER_NAMES: Final = tuple(f"safekeeper-{number}" for number in range(1, SAFEKEEPERS + 1))
SERVICES: Final[Mapping[str, Service]] = {
    **dict.fromkeys(KEYMANAGER_NAMES, Service.KEYMANAGER),
    **dict.fromkeys(SAFEKEEPER_NAMES, Service.SAFEKEEPER),
    "pageserver": Service.PAGESERVER,
    "compute": Service.COMPUTE,
    "proxy": Service.PROXY,
}
"""Name of the container, its host name and its node id → what runs there."""

OPERATOR: Final = "operator"
"""Whoever administers the stack, runs the demo, and plays the customer."""
CONSOLE: Final = "console"
BUNDLES: Final = ("customercloud", "metadata", "minio", *SERVICES, CONSOLE, OPERATOR)

_NO_ADMIN_API: Final = "this S3 server has not MinIO's admin API: make the users of storage and anchors by hand"
ACCOUNT_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """What several parts must agree on."""

    metadata_passwords: Mapping[str, str]
    objects_user: str
    objects_password: str
    storage_user: str
    storage_password: str
    anchors_user: str
    anchors_password: str
    cloud_admin_token: str
    external_id: str

    @classmethod
    def generate(cls) -> Secrets:
        return cls(
            # URL-safe, so that they can stand in connection strings and in SQL as they are.
            {role: secrets.token_urlsafe(24) for role in (METADATA_SUPERUSER, *METADATA_ROLES)},
            f"keylake-{secrets.token_hex(4)}",
            secrets.token_urlsafe(30),
            f"keylake-storage-{secrets.token_hex(4)}",
            secrets.token_urlsafe(30),
            f"keylake-anchors-{secrets.token_hex(4)}",
            secrets.token_urlsafe(30),
            secrets.token_urlsafe(32),
            secrets.token_hex(16),
        )


def service_settings(made: Secrets) -> dict[str, dict[str, Any]]:
    """Settings file of each container, by name. Those of the keymanagers lack their access key at the customer's
    cloud."""

    def listen(port: int) -> dict[str, Any]:
        return {"host": "0.0.0.0", "port": port}  # noqa: S104 - inside of its container; compose decides who gets there

    def at(host: str, port: int) -> dict[str, Any]:
        return {"host": host, "port": port}

    def dsn(role: str) -> str:
        password = made.metadata_passwords[role]
        return f"postgresql://{role}:{password}@/{METADATA_DATABASE}?host={METADATA_SOCKET_DIR}"

    keymanager = [at(name, HTTP_PORT) for name in KEYMANAGER_NAMES]
    object_store = {
        "url": f"s3://{BUCKET}?endpoint={OBJECTS_URL}&create_bucket=false",
        "access_key_id": made.storage_user,
        "secret_access_key": made.storage_password,
    }
    settings: dict[str, dict[str, Any]] = {
        "customercloud": {
            "host": "0.0.0.0",  # noqa: S104
            "port": CLOUD_PORT,
            "state_dir": str(DATA_DIR / "customercloud"),
            "tls_cert_path": str(BUNDLE.pki / "customercloud.crt"),
            "tls_key_path": str(BUNDLE.pki / "customercloud.key"),
            "admin_token": made.cloud_admin_token,
        },
        "metadata": {
            "data_dir": str(DATA_DIR / "metadata"),
            "socket_dir": str(METADATA_SOCKET_DIR),
            "ready_file": "/tmp/ready",  # noqa: S108 - a private tmpfs
            "passwords": dict(made.metadata_passwords),
        },
        **{
            name: {
                "metadata_dsn": dsn("keymanager"),
                "audit_anchors": {
                    "url": f"s3://{BUCKET}?endpoint={OBJECTS_URL}&create_bucket=false",
                    "access_key_id": made.anchors_user,
                    "secret_access_key": made.anchors_password,
                    "connections": 4,
                },
            }
            for name in KEYMANAGER_NAMES
        },
        "pageserver": {
            "pages_listen": listen(PAGES_PORT),
            "keymanager": keymanager,
            "safekeepers": [{"node_id": name, "wal": at(name, WAL_PORT)} for name in SAFEKEEPER_NAMES],
            "object_store": object_store,
            "cache_dir": str(DATA_DIR / "cache"),
            "redo_cache_dir": "/opt/keylake/lib",
        },
        "compute": {
            "database_url": dsn("compute"),
            "keymanager": keymanager,
            "pageserver": at("pageserver", HTTP_PORT),
            "pages": at("pageserver", PAGES_PORT),
            "safekeepers": [
                {"node_id": name, "http": at(name, HTTP_PORT), "wal": at(name, WAL_PORT)} for name in SAFEKEEPER_NAMES
            ],
            "runtime_dir": "/run/keylake/c",
            "log_dir": str(DATA_DIR / "logs"),
            "guard_cache_dir": "/opt/keylake/lib",
            # Safekeepers and the proxy are on other hosts.
            "tunnel_listen_host": "0.0.0.0",  # noqa: S104
            "tunnel_advertised_host": "compute",
        },
        "proxy": {
            "postgres_listen": listen(POSTGRES_PORT),
            "certificate": str(BUNDLE.pki / "postgres.crt"),
            "private_key": str(BUNDLE.pki / "postgres.key"),
            "domain": PROXY_DOMAIN,
            "compute": at("compute", HTTP_PORT),
            "keymanager": keymanager,
        },
    }
    for name in SAFEKEEPER_NAMES:
        settings[name] = {
            "wal_listen": listen(WAL_PORT),
            "keymanager": keymanager,
            "data_dir": str(DATA_DIR / "wal"),
            "object_store": object_store,
        }
    for name, service in SERVICES.items():
        settings[name] |= {
            "listen": listen(HTTP_PORT),
            "identity": BUNDLE.identity(service, name),
            "node_id": name,
        }
    return settings


def make_secrets(root: Path) -> bool:
    """Fill every bundle below `root`. False: that was done before, and nothing is changed.

    A run that was interrupted is started over: nobody has used what it made, because services wait for its end.
    """
    bundles = {name: Layout(root / name) for name in BUNDLES}
    operator = bundles[OPERATOR]
    if not operator.is_new:
        if not operator.ca_certificate.exists():
            renew_certificates(root)  # that was interrupted, and nothing could start since
        return False
    for bundle in bundles.values():
        _empty(bundle.home)
        for directory in (bundle.home, bundle.pki, bundle.keys, bundle.config):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Secrets.generate()
    _certificates(bundles)
    trust = _signing_keys(bundles)
    for name, values in service_settings(made).items():
        bundles[name].write_config(name, values)
    # MinIO reads these two itself (MINIO_ROOT_USER_FILE, MINIO_ROOT_PASSWORD_FILE); the operator looks at the bytes.
    for name in ("minio", OPERATOR):
        write_secret(bundles[name].keys / "objects-user", made.objects_user)
        write_secret(bundles[name].keys / "objects-password", made.objects_password)
    # The operator makes the services' users there (`open_objects`).
    write_secret(operator.keys / "storage-user", made.storage_user)
    write_secret(operator.keys / "storage-password", made.storage_password)
    write_secret(operator.keys / "anchors-user", made.anchors_user)
    write_secret(operator.keys / "anchors-password", made.anchors_password)
    for name in (CONSOLE, OPERATOR):  # both play the customer
        bundle = bundles[name]
        write_secret(bundle.keys / "external-id", made.external_id)
        for directory in (bundle.data, bundle.customercloud):
            directory.mkdir(mode=0o700)
        write_secret(bundle.customer_admin_token, made.cloud_admin_token)
    # Last: this file says that everything is complete.
    write_secret(operator.trust_bundle, trust)
    return True


def renew_certificates(root: Path) -> None:
    """New CAs, whose keys are not kept either, and all that they issue. Everything else stays as it is.

    Nothing may run meanwhile: whoever has read the old ones trusts nobody who has the new ones. What is interrupted is
    done at the next start (`make_secrets`). Raises UnavailableError before the first one.
    """
    bundles = {name: Layout(root / name) for name in BUNDLES}
    if bundles[OPERATOR].is_new:
        raise UnavailableError("there are no certificates yet: `make up` first")
    bundles[OPERATOR].ca_certificate.unlink(missing_ok=True)
    for bundle in bundles.values():
        _empty(bundle.pki)
    _certificates(bundles)


def _empty(directory: Path) -> None:
    """Remove what is in it; the directory itself is a mount point."""
    for entry in directory.iterdir() if directory.exists() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _certificates(bundles: Mapping[str, Layout]) -> None:
    """The operator's copy of the CA's comes last: it says that all are there."""
    authority, cloud = CertificateAuthority(), CertificateAuthority()
    for name in (*SERVICES, CONSOLE):
        bundles[name].ca_certificate.write_bytes(authority.certificate_pem)
    for name, service in SERVICES.items():
        # Peers check the service's name, not the host's; each safekeeper has a key of its own.
        names = [service_host_name(service.value), name]
        authority.issue_files(bundles[name].pki, service.value, names, ["127.0.0.1"])
    postgres_names = ["localhost", f"*.{PROXY_DOMAIN}", "proxy"]
    authority.issue_files(bundles["proxy"].pki, "postgres", postgres_names, ["127.0.0.1", "::1"])
    cloud.issue_files(bundles["customercloud"].pki, "customercloud", ["customercloud"], ["127.0.0.1"])
    bundles["customercloud"].ca_certificate.write_bytes(cloud.certificate_pem)
    for name in (*KEYMANAGER_NAMES, CONSOLE, OPERATOR):
        cloud_ca(bundles[name]).write_bytes(cloud.certificate_pem)
    bundles[OPERATOR].ca_certificate.write_bytes(authority.certificate_pem)


def cloud_ca(bundle: Layout) -> Path:
    """The CA of the customer's cloud, as those who call it trust it."""
    return bundle.pki / "customercloud-ca.crt"


_REPLICAS: Final = {"safekeeper": SAFEKEEPER_NAMES, "keymanager": KEYMANAGER_NAMES}


def _signing_keys(bundles: Mapping[str, Layout]) -> str:
    """Give everybody the key that it signs its calls with, and all services the bundle of whom to trust: returned."""
    issuers = []
    for kind, scopes in SERVICE_SCOPES.items():
        for name in _REPLICAS.get(kind, (kind,)):
            issuer = TokenIssuer.create(name, scopes)
            owner = bundles[OPERATOR if kind == "admin" else name]
            issuer.save(owner.keys / f"{name}.json")
            issuers.append(issuer)
    # The console hands out tokens of every role, and nobody can hand out what he may not do himself. Its own key, so
    # that the audit chain tells it from the operator.
    issuer = TokenIssuer.create(CONSOLE, SERVICE_SCOPES["admin"])
    issuer.save(bundles[CONSOLE].admin_key)
    issuers.append(issuer)
    trust = TrustBundle.of(issuers).model_dump_json()
    for name in (*SERVICES, CONSOLE):  # the console checks receipts with it
        bundles[name].trust_bundle.write_text(trust)
    return trust


def open_account(root: Path, cloud_url: str = CLOUD_URL) -> None:
    """Make the cast of the customer's cloud, and give the keymanagers Keylake's access key there. Idempotent.

    Raises UnavailableError when the customer's cloud does not answer within ACCOUNT_TIMEOUT_S.
    """
    from customercloud.client import CloudAdmin

    operator = Layout(root / OPERATOR)
    token = operator.customer_admin_token.read_text()
    admin = CloudAdmin(cloud_url, token, verify=cloud_ca(operator))
    deadline = time.monotonic() + ACCOUNT_TIMEOUT_S
    try:
        while True:
            try:
                bootstrap = admin.bootstrap_aws(operator.secret("external-id"))
                break
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
    finally:
        admin.close()
    aws = {
        "kms_endpoint_url": CLOUD_URL,
        "sts_endpoint_url": CLOUD_URL,
        "ca_bundle": str(cloud_ca(BUNDLE)),
        "access_key_id": bootstrap.vendor.access_key_id,
        "secret_access_key": bootstrap.vendor.secret_access_key,
    }
    for name in KEYMANAGER_NAMES:
        bundle = Layout(root / name)
        settings = json.loads((bundle.config / f"{name}.json").read_text())
        bundle.write_config(name, settings | {"aws": aws})


ANCHORS_POLICY: Final[Mapping[str, Any]] = {
    "Version": "2012-10-17",
    "Statement": [
        # Neither delete nor anything outside of the prefix.
        {
            "Effect": "Allow",
            "Action": ["s3:PutObject", "s3:GetObject"],
            "Resource": [f"arn:aws:s3:::{BUCKET}/{ANCHOR_PREFIX}*"],
        },
        {
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{BUCKET}"],
            "Condition": {"StringLike": {"s3:prefix": [f"{ANCHOR_PREFIX}*"]}},
        },
    ],
}
"""What the keymanager may do in the object store."""

STORAGE_POLICY: Final[Mapping[str, Any]] = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:ListBucketVersions"],
            "Resource": [f"arn:aws:s3:::{BUCKET}"],
        },
        {
            "Effect": "Allow",
            "Action": [
                "s3:PutObject",
                "s3:GetObject",
                "s3:GetObjectVersion",
                "s3:DeleteObject",
                "s3:DeleteObjectVersion",
            ],
            "Resource": [f"arn:aws:s3:::{BUCKET}/*"],
        },
        # An explicit deny beats every allow: who stores pages cannot touch what proves the audit chain.
        {"Effect": "Deny", "Action": ["s3:*"], "Resource": [f"arn:aws:s3:::{BUCKET}/{ANCHOR_PREFIX}*"]},
    ],
}
"""What safekeepers and pageserver may do there: objects and their old versions, none of the bucket's own settings."""

_USERS: Final = {"storage": STORAGE_POLICY, "anchors": ANCHORS_POLICY}
"""Users of the object store beside its root. Name: of their policy, and of their secrets in the operator's bundle."""


def open_objects(root: Path, endpoint: str = OBJECTS_URL) -> bool:
    """Make the bucket and the services' users of the object store, by MinIO's admin API. Idempotent.

    False: this server has no such API, and whoever runs it has to make users with STORAGE_POLICY and ANCHORS_POLICY.
    Until then nothing is stored, and the audit chain is not anchored; both say so. Raises UnavailableError.
    """
    from minio import Minio
    from minio.credentials.providers import StaticProvider
    from minio.error import MinioAdminException, MinioException
    from minio.minioadmin import MinioAdmin
    from urllib3.exceptions import HTTPError

    operator = Layout(root / OPERATOR)
    user, password = operator.secret("objects-user"), operator.secret("objects-password")
    host = endpoint.removeprefix("http://")
    store = Minio(host, access_key=user, secret_key=password, region="us-east-1", secure=False)
    admin = MinioAdmin(endpoint=host, credentials=StaticProvider(user, password), region="us-east-1", secure=False)
    try:
        if not store.bucket_exists(BUCKET):
            store.make_bucket(BUCKET)
        for name, policy in _USERS.items():
            admin.policy_add(f"keylake-{name}", policy=dict(policy))
            admin.user_add(operator.secret(f"{name}-user"), operator.secret(f"{name}-password"))
            admin.policy_set(f"keylake-{name}", user=operator.secret(f"{name}-user"))
    except MinioAdminException:
        return False
    except (MinioException, HTTPError) as error:
        raise UnavailableError(f"the object store could not be set up: {type(error).__name__}") from None
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keylake.provision",
        description="Make what the containers of docker-compose.yml need. They run this themselves.",
        epilog="example: python -m keylake.provision secrets --directory /provision",
    )
    parser.add_argument("step", choices=("secrets", "account", "objects", "certificates"))
    parser.add_argument("--directory", type=Path, default=PROVISION_DIR, help="where the bundles are mounted")
    arguments = parser.parse_args()
    try:
        match arguments.step:
            case "secrets":
                done = make_secrets(arguments.directory)
                print("made" if done else "kept what is there")  # noqa: T201 - it is a command
                certificate = Layout(arguments.directory / OPERATOR).ca_certificate
                if renewal_is_due(certificate):
                    print(f"certificates end on {valid_until(certificate):%Y-%m-%d}: make renew")  # noqa: T201
            case "account":
                open_account(arguments.directory)
                print("the keymanagers have their access key")  # noqa: T201
            case "objects":
                made = open_objects(arguments.directory)
                print("storage and the keymanager have users of their own" if made else _NO_ADMIN_API)  # noqa: T201
            case "certificates":
                renew_certificates(arguments.directory)
                print("all certificates are new")  # noqa: T201
    except (KeylakeError, OSError) as error:
        print(f"provision: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
