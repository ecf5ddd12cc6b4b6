"""A local cluster on disk: one directory with certificates, signing keys, settings, logs and sealed data.

    pki/           the private CA's certificate; a certificate and key per service
    keys/          a signing key per service and for the admin; trust.json; passwords of the metadata database
    config/        settings of each service, JSON
    logs/          a log per service
    data/          metadata Postgres, safekeepers, pageserver cache, objects, anchors of the audit chain, the customer's
                   cloud
    cluster.json   addresses of a running cluster

Directories are mode 0700 and files 0600; the CA's key is not kept. Sockets lie under /tmp, because their paths must be
short. A real customer's cloud is on the other side of a trust boundary; here it is `data/customercloud`, which no
service of Keylake is told about.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keylake.client import Addresses
from keylake.ports import free_port
from shared.auth import Service, TokenIssuer, TrustBundle
from shared.config import Address
from shared.roles import SERVICE_SCOPES
from shared.tls import CertificateAuthority, renewal_is_due, service_host_name

SAFEKEEPERS: Final = 3
PROXY_DOMAIN: Final = "db.localhost"
METADATA_ROLES: Final = ("keymanager", "compute")
METADATA_SUPERUSER: Final = "postgres"


def keymanager_name(number: int) -> str:
    """Of a replica, counted from 1. The first one is called as if there were no other."""
    return "keymanager" if number == 1 else f"keymanager-{number}"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens on 127.0.0.1."""

    customercloud: int
    keymanager: int
    safekeepers: tuple[int, ...]
    safekeepers_wal: tuple[int, ...]
    pageserver: int
    pages: int
    manager: int
    proxy: int
    proxy_http: int
    keymanager_others: tuple[int, ...] = ()
    """Of its replicas, when there are several: of keymanager-2, keymanager-3 …"""

    @classmethod
    def pick(cls, proxy: int | None = None, keymanagers: int = 1) -> Ports:
        """Free ones; `proxy` may be chosen, because people put it into their connection strings."""
        return cls(
            free_port(),
            free_port(),
            tuple(free_port() for _ in range(SAFEKEEPERS)),
            tuple(free_port() for _ in range(SAFEKEEPERS)),
            free_port(),
            free_port(),
            free_port(),
            proxy or free_port(),
            free_port(),
            tuple(free_port() for _ in range(keymanagers - 1)),
        )

    @property
    def keymanagers(self) -> dict[str, int]:
        """Of all replicas, by name."""
        ports = (self.keymanager, *self.keymanager_others)
        return {keymanager_name(number): port for number, port in enumerate(ports, 1)}

    def addresses(self) -> Addresses:
        return Addresses(
            tuple(Address(port=p) for p in self.keymanagers.values()),
            Address(port=self.manager),
            Address(port=self.pageserver),
            tuple(Address(port=p) for p in self.safekeepers),
            Address(port=self.proxy),
        )


class Layout:
    """Paths below one directory, made on first use."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pki = home / "pki"
        self.keys = home / "keys"
        self.config = home / "config"
        self.logs = home / "logs"
        self.data = home / "data"
        self.objects = self.data / "objects"
        self.anchors = self.data / "anchors"
        self.customercloud = self.data / "customercloud"
        self.metadata = self.data / "metadata"
        self.pageserver_cache = self.data / "pageserver"
        self.state_file = home / "cluster.json"

    def safekeeper(self, number: int) -> Path:
        """Data directory of safekeeper `number`, counted from 1."""
        return self.data / f"safekeeper-{number}"

    @property
    def ca_certificate(self) -> Path:
        return self.pki / "ca.crt"

    @property
    def trust_bundle(self) -> Path:
        return self.keys / "trust.json"

    @property
    def admin_key(self) -> Path:
        return self.keys / "admin.json"

    @property
    def customer_admin_token(self) -> Path:
        return self.customercloud / "admin.token"

    @property
    def is_new(self) -> bool:
        return not self.trust_bundle.exists()

    def create(self, keymanagers: int = 1) -> None:
        """Directories, certificates, signing keys, secrets. Only for a new home; an existing one keeps what it has,
        gets keys for keymanagers that it did not have before, and new certificates in time."""
        for directory in (self.home, self.pki, self.keys, self.config, self.logs, self.data):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        self._issue_certificates()
        if self.is_new:
            self._create_keys()
        self._add_keymanager_keys(keymanagers)

    def _issue_certificates(self) -> None:
        """If there are none, or two thirds of their time are over: a new CA, since no CA's key is kept, and all that it
        issues. Nothing runs meanwhile. Whoever has a copy of ca.crt needs the new one.

        A crash leaves the old ones, or none, and then new ones are issued at the next start.
        """
        fresh, old = self.home / "pki.new", self.home / "pki.old"
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        if self.ca_certificate.exists() and not renewal_is_due(self.ca_certificate):
            return
        fresh.mkdir(mode=0o700)
        authority = CertificateAuthority()
        write_secret(fresh / self.ca_certificate.name, authority.certificate_pem.decode("ascii"))
        for service in Service:
            names = [service_host_name(service.value), "localhost"]
            authority.issue_files(fresh, service.value, names, ["127.0.0.1", "::1"])
        authority.issue_files(fresh, "postgres", ["localhost", f"*.{PROXY_DOMAIN}"], ["127.0.0.1", "::1"])
        authority.issue_files(fresh, "customercloud", ["localhost"], ["127.0.0.1"])
        self.pki.rename(old)
        fresh.rename(self.pki)
        shutil.rmtree(old)

    def _create_keys(self) -> None:
        issuers = []
        for kid, scopes in SERVICE_SCOPES.items():
            if kid == Service.KEYMANAGER.value:
                continue  # as many as there are replicas: `_add_keymanager_keys`
            names = [f"safekeeper-{n}" for n in range(1, SAFEKEEPERS + 1)] if kid == "safekeeper" else [kid]
            for name in names:
                issuer = TokenIssuer.create(name, scopes)
                issuer.save(self.keys / f"{name}.json")
                issuers.append(issuer)
        for role in (METADATA_SUPERUSER, *METADATA_ROLES):
            write_secret(self.keys / f"metadata-{role}.password", secrets.token_urlsafe(24))
        write_secret(self.keys / "external-id", secrets.token_hex(16))
        # Last: this file says that the home is complete.
        write_secret(self.trust_bundle, TrustBundle.of(issuers).model_dump_json())

    def _add_keymanager_keys(self, keymanagers: int) -> None:
        """What they sign the audit chain's anchors with."""
        names = [keymanager_name(number) for number in range(1, keymanagers + 1)]
        missing = [name for name in names if not (self.keys / f"{name}.json").exists()]
        if not missing:
            return
        issuers = [TokenIssuer.create(name, SERVICE_SCOPES[Service.KEYMANAGER.value]) for name in missing]
        known = TrustBundle.load(self.trust_bundle).keys
        bundle = TrustBundle(keys={**known, **TrustBundle.of(issuers).keys})
        # Trusted before it is used: a crash in between leaves a key that nobody has.
        write_secret(self.trust_bundle, bundle.model_dump_json())
        for issuer in issuers:
            issuer.save(self.keys / f"{issuer.kid}.json")

    def secret(self, name: str) -> str:
        return (self.keys / name).read_text()

    def identity(self, service: Service, kid: str) -> dict[str, str]:
        """The `identity` of a service's settings."""
        return {
            "certificate": str(self.pki / f"{service.value}.crt"),
            "private_key": str(self.pki / f"{service.value}.key"),
            "ca_certificate": str(self.ca_certificate),
            "signing_key": str(self.keys / f"{kid}.json"),
            "trust_bundle": str(self.trust_bundle),
        }

    def write_config(self, name: str, values: dict[str, Any]) -> Path:
        """Settings may hold a password (of the metadata database), so the file is for its owner only."""
        path = self.config / f"{name}.json"
        write_secret(path, json.dumps(values, indent=2))
        return path


def write_secret(path: Path, text: str) -> None:
    """Replace a file of mode 0600 atomically."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)
