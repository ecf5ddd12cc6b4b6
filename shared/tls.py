"""TLS between the parts: a private CA made when a cluster is set up, one certificate per service.

A service is verified by its *name* (`pageserver.keylake`), not by the address at which it happens to listen, so a
safekeeper's certificate does not pass for the keymanager's even on one host. The CA's key is used at set-up and is
not given to any service.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import CorruptedError

_VALIDITY = timedelta(days=365)
RENEWED_BEFORE_END = _VALIDITY / 3
_BACKDATE = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    certificate: Path
    private_key: Path


def service_host_name(service: str) -> str:
    """The DNS name in a service's certificate."""
    return f"{service}.keylake"


class CertificateAuthority:
    """A CA with a P-256 key, which is not kept. Certificates last a year: before that, a new CA issues all of them
    anew (`renewal_is_due`)."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Keylake private CA")])
        self.certificate = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, common_name: str, dns_names: Iterable[str], addresses: Iterable[str] = ()) -> tuple[bytes, bytes]:
        """(certificate PEM, private key PEM) of a new server certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(n) for n in dns_names]
        names += [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = (
            _builder(subject, self._name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def issue_files(
        self, directory: Path, common_name: str, dns_names: Iterable[str], addresses: Iterable[str] = ()
    ) -> CertificateFiles:
        """As `issue`, into `<common_name>.crt` and `<common_name>.key` of `directory`, both of mode 0600."""
        certificate, key = self.issue(common_name, dns_names, addresses)
        files = CertificateFiles(directory / f"{common_name}.crt", directory / f"{common_name}.key")
        for path, content in ((files.certificate, certificate), (files.private_key, key)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
        return files


def valid_until(certificate: Path) -> datetime:
    """Raises CorruptedError unless it is a PEM file with a certificate in it; OSError."""
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except ValueError:
        raise CorruptedError(f"{certificate} is not a certificate") from None


def renewal_is_due(certificate: Path) -> bool:
    """Two thirds of its time are over. Raises as `valid_until`."""
    return datetime.now(UTC) > valid_until(certificate) - RENEWED_BEFORE_END


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + _VALIDITY)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def server_context(files: CertificateFiles) -> ssl.SSLContext:
    """TLS 1.3 only: both ends are ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(files.certificate, files.private_key)
    return context


def client_context(ca_certificate: Path) -> ssl.SSLContext:
    """Trusts the private CA and nothing else; the peer's name is checked (`server_hostname`)."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(ca_certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
