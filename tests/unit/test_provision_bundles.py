"""Bundles of the containers: complete, separate, made once."""

from __future__ import annotations

import asyncio
import json
import re
import stat
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from typer.testing import CliRunner

from compute.config import ManagerSettings
from compute.proxy.config import ProxySettings
from customercloud.config import load_settings
from keylake.cli.app import app
from keylake.cli.common import ExitCode
from keylake.compose import addresses, client
from keylake.layout import Layout
from keylake.metadata import MetadataSettings
from keylake.place import STACK_VARIABLE, find_place
from keylake.provision import (
    ANCHORS_POLICY,
    BUCKET,
    BUNDLES,
    KEYMANAGER_NAMES,
    SAFEKEEPER_NAMES,
    SERVICES,
    STORAGE_POLICY,
    Secrets,
    main,
    make_secrets,
    renew_certificates,
)
from keymanager.config import KeymanagerSettings
from pageserver.config import PageserverSettings
from safekeeper.config import SafekeeperSettings
from shared import tls
from shared.audit_anchor import ANCHOR_PREFIX
from shared.auth import Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.config import Address
from shared.errors import PermissionDeniedError, UnavailableError
from shared.roles import SERVICE_SCOPES
from shared.settings import ServiceSettings

SETTINGS: Mapping[Service, type[ServiceSettings]] = {
    Service.KEYMANAGER: KeymanagerSettings,
    Service.SAFEKEEPER: SafekeeperSettings,
    Service.PAGESERVER: PageserverSettings,
    Service.COMPUTE: ManagerSettings,
    Service.PROXY: ProxySettings,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Treat as read-only."""
    directory = tmp_path_factory.mktemp("provision")
    assert make_secrets(directory)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def is_signed_by(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    assert leaf.signature_hash_algorithm is not None
    try:
        key.verify(leaf.signature, leaf.tbs_certificate_bytes, ECDSA(leaf.signature_hash_algorithm))
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_takes_its_settings(root: Path, name: str) -> None:
    settings = SETTINGS[SERVICES[name]].load(Layout(root / name).config / f"{name}.json")
    assert settings.node_id == name


def test_the_others_take_theirs(root: Path) -> None:
    cloud = load_settings(root / "customercloud" / "config" / "customercloud.json")
    assert cloud.admin_token is not None
    assert cloud.admin_token.get_secret_value() == Layout(root / "operator").customer_admin_token.read_text()
    MetadataSettings.load(root / "metadata" / "config" / "metadata.json")


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_that_settings_name_is_in_the_bundle(root: Path, name: str) -> None:
    text = (root / name / "config" / f"{name}.json").read_text()
    named = set(re.findall(r'"/etc/keylake/([^"]+)"', text))
    assert named
    # They sign nothing: nobody's API is a keymanager's business.
    missing = {path for path in named if not (root / name / path).exists()} - {
        f"keys/{name}.json" for name in KEYMANAGER_NAMES
    }
    assert not missing


def test_where_peers_are_sought_is_where_they_listen(root: Path) -> None:
    compute = ManagerSettings.load(root / "compute" / "config" / "compute.json")
    pageserver = PageserverSettings.load(root / "pageserver" / "config" / "pageserver.json")
    proxy = ProxySettings.load(root / "proxy" / "config" / "proxy.json")
    keymanager = KeymanagerSettings.load(root / "keymanager" / "config" / "keymanager.json")
    assert compute.pages.port == pageserver.pages_listen.port
    assert compute.pageserver.port == pageserver.listen.port
    assert proxy.compute.port == compute.listen.port
    for settings in (compute, pageserver, proxy):
        assert [address.host for address in settings.keymanager] == list(KEYMANAGER_NAMES)
        assert {address.port for address in settings.keymanager} == {keymanager.listen.port}
    for number, name in enumerate(SAFEKEEPER_NAMES):
        safekeeper = SafekeeperSettings.load(root / name / "config" / f"{name}.json")
        for wal in (compute.safekeepers[number].wal, pageserver.safekeepers[number].wal):
            assert (wal.host, wal.port) == (name, safekeeper.wal_listen.port)
        assert addresses().safekeepers[number].port == safekeeper.listen.port
    assert addresses().proxy.port == proxy.postgres_listen.port


def test_no_private_key_is_in_two_bundles(root: Path) -> None:
    owners: dict[str, set[str]] = {}
    for name in BUNDLES:
        for content in files(root / name).values():
            text = content.decode().replace("\\n", "\n")
            for key in re.findall(r"-----BEGIN PRIVATE KEY-----\n(.+?)-----END", text, re.DOTALL):
                owners.setdefault(key, set()).add(name)
    assert len(owners) > 10
    assert not [names for names in owners.values() if len(names) > 1]


def test_who_knows_which_password(root: Path) -> None:
    made = json.loads((root / "metadata" / "config" / "metadata.json").read_text())["passwords"]
    objects = Layout(root / "minio").secret("objects-password")
    token = Layout(root / "operator").customer_admin_token.read_text()

    def holders(secret: str) -> set[str]:
        assert len(secret) >= 24
        return {name for name in BUNDLES if any(secret.encode() in c for c in files(root / name).values())}

    assert holders(made["postgres"]) == {"metadata"}
    assert holders(made["keymanager"]) == {"metadata", *KEYMANAGER_NAMES}
    assert holders(made["compute"]) == {"metadata", "compute"}
    assert holders(objects) == {"minio", "operator"}
    assert holders(Layout(root / "operator").secret("storage-password")) == {
        "pageserver",
        "operator",
        *SAFEKEEPER_NAMES,
    }
    assert holders(token) == {"customercloud", "console", "operator"}
    # Anchors of the audit chain: a user of its own, which the operator makes.
    assert holders(Layout(root / "operator").secret("anchors-password")) == {*KEYMANAGER_NAMES, "operator"}
    settings = KeymanagerSettings.load(root / "keymanager" / "config" / "keymanager.json").audit_anchors
    assert settings is not None
    assert settings.access_key_id is not None
    assert settings.access_key_id.get_secret_value() == Layout(root / "operator").secret("anchors-user")
    assert settings.access_key_id.get_secret_value() != Layout(root / "minio").secret("objects-user")


def test_the_keymanager_may_do_nothing_in_the_object_store_but_keep_anchors() -> None:
    statements = ANCHORS_POLICY["Statement"]
    assert {action for s in statements for action in s["Action"]} == {"s3:PutObject", "s3:GetObject", "s3:ListBucket"}
    for statement in statements:
        limited = statement["Resource"] + statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", [])
        assert any(where.endswith(f"{ANCHOR_PREFIX}*") for where in limited)


def test_who_stores_pages_cannot_touch_the_anchors_or_the_bucket_itself() -> None:
    """Actions of IAM; the last statement decides, as a deny does wherever it stands."""
    *allowed, denied = STORAGE_POLICY["Statement"]
    actions = {action for statement in allowed for action in statement["Action"]}
    assert {statement["Effect"] for statement in allowed} == {"Allow"}
    objects = {"s3:PutObject", "s3:GetObject", "s3:GetObjectVersion", "s3:DeleteObject", "s3:DeleteObjectVersion"}
    assert actions == objects | {"s3:ListBucket", "s3:ListBucketVersions"}
    assert denied["Effect"] == "Deny"
    assert denied["Action"] == ["s3:*"]
    assert denied["Resource"] == [f"arn:aws:s3:::{BUCKET}/{ANCHOR_PREFIX}*"]


def test_the_key_of_no_ca_is_kept(root: Path) -> None:
    authorities = [certificate(p).public_key() for p in root.rglob("*ca.crt")]
    for path in root.rglob("*.crt"):
        if path.with_suffix(".key").exists():
            assert certificate(path).public_key() not in authorities
    assert len({p.read_bytes() for p in root.rglob("*ca.crt")}) == 2


def test_the_customers_cloud_cannot_pass_for_a_service(root: Path) -> None:
    ours, theirs = certificate(root / "operator/pki/ca.crt"), certificate(root / "operator/pki/customercloud-ca.crt")
    assert ours != theirs
    cloud = certificate(root / "customercloud/pki/customercloud.crt")
    assert is_signed_by(cloud, theirs)
    assert not is_signed_by(cloud, ours)
    for name, service in SERVICES.items():
        leaf = certificate(root / name / "pki" / f"{service.value}.crt")
        assert is_signed_by(leaf, ours)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [f"{service.value}.keylake", name]


def test_clients_find_the_proxy_by_every_name_that_it_has(root: Path) -> None:
    leaf = certificate(root / "proxy/pki/postgres.crt")
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "proxy"} <= set(names.get_values_for_type(x509.DNSName))


def test_signing_keys_may_claim_what_their_service_needs_and_no_more(root: Path) -> None:
    trust = TrustBundle.load(root / "keymanager/keys/trust.json")
    for kind, scopes in SERVICE_SCOPES.items():
        bundle = "operator" if kind == "admin" else "safekeeper-2" if kind == "safekeeper" else kind
        issuer = TokenIssuer.load(root / bundle / "keys" / f"{'admin' if kind == 'admin' else bundle}.json")
        verifier = TokenVerifier(trust, Service.KEYMANAGER)
        assert verifier.verify(issuer.issue(Service.KEYMANAGER, scopes)).scopes == scopes
        more = next(scope for other in SERVICE_SCOPES.values() for scope in other if scope not in scopes)
        with pytest.raises(PermissionDeniedError):
            verifier.verify(issuer.issue(Service.KEYMANAGER, [more]))


def test_secrets_are_for_their_owner_only(root: Path) -> None:
    public = {"trust.json"}
    for path in root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix != ".crt" and path.name not in public:
            assert mode == 0o600, path


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    assert make_secrets(tmp_path)
    before = files(tmp_path)
    assert not make_secrets(tmp_path)
    assert files(tmp_path) == before


def test_an_interrupted_run_is_started_over(tmp_path: Path) -> None:
    assert make_secrets(tmp_path)
    before = files(tmp_path)
    Layout(tmp_path / "operator").trust_bundle.unlink()
    (tmp_path / "proxy" / "keys" / "left-over").write_text("x")
    assert make_secrets(tmp_path)
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert after["proxy/keys/proxy.json"] != before["proxy/keys/proxy.json"]
    assert after["keymanager/pki/ca.crt"] == after["proxy/pki/ca.crt"]


def test_certificates_are_renewed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def provision(step: str) -> int:
        monkeypatch.setattr(sys, "argv", ["provision", step, "--directory", str(tmp_path)])
        return main()

    assert provision("certificates") == 1
    assert "make up" in capsys.readouterr().err
    monkeypatch.setattr(tls, "_VALIDITY", tls.RENEWED_BEFORE_END - timedelta(days=1))
    assert provision("secrets") == 0
    assert "make renew" in capsys.readouterr().out
    monkeypatch.undo()
    before = files(tmp_path)
    assert provision("certificates") == 0
    after = files(tmp_path)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name in before if "/pki/" in name}
    test_the_customers_cloud_cannot_pass_for_a_service(tmp_path)
    test_the_key_of_no_ca_is_kept(tmp_path)
    test_secrets_are_for_their_owner_only(tmp_path)
    capsys.readouterr()
    assert provision("secrets") == 0
    assert "make renew" not in capsys.readouterr().out
    assert files(tmp_path) == after


def test_a_renewal_that_was_interrupted_is_done_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_secrets(tmp_path)
    before = files(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shared.tls.CertificateAuthority.issue_files", killed)
        with pytest.raises(KeyboardInterrupt):
            renew_certificates(tmp_path)
    assert files(tmp_path).keys() != before.keys()
    assert not make_secrets(tmp_path)
    assert files(tmp_path).keys() == before.keys()
    test_the_customers_cloud_cannot_pass_for_a_service(tmp_path)


def test_mount_points_stay(tmp_path: Path) -> None:
    """A directory that a volume is mounted over cannot be removed, only emptied."""
    (tmp_path / "minio" / "junk").mkdir(parents=True)
    inode = (tmp_path / "minio").stat().st_ino
    assert make_secrets(tmp_path)
    assert (tmp_path / "minio").stat().st_ino == inode
    assert not (tmp_path / "minio" / "junk").exists()


def test_secrets_do_not_show_themselves() -> None:
    made = Secrets.generate()
    assert made.objects_password not in repr(made)
    assert Secrets.generate().objects_password != made.objects_password


@pytest.mark.parametrize("name", ["console", "operator"])
async def test_the_owners_get_a_client(root: Path, name: str) -> None:
    async with client(root / name) as keylake:
        assert keylake.addresses.keymanager == tuple(Address(host=name, port=8443) for name in KEYMANAGER_NAMES)
    with pytest.raises(UnavailableError, match="make up"):
        client(root / "nothing-here")


def test_commands_in_the_operators_container_are_about_the_containers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of which is here."""
    monkeypatch.setenv(STACK_VARIABLE, str(root / "operator"))
    place = find_place(tmp_path)
    assert place.home == tmp_path
    health = {each.name: each.health.value for each in asyncio.run(place.health())}
    assert health == dict.fromkeys(("customercloud", *SERVICES), "down")
    environment = {STACK_VARIABLE: str(root / "operator"), "KEYLAKE_HOME": str(tmp_path)}
    refused = CliRunner().invoke(app, ["link", "cut", "pageserver"], env=environment)
    assert refused.exit_code == ExitCode.FAILED
    assert "docker network disconnect" in refused.stderr
    for command in (["project", "list"], ["psql", "shop"]):
        absent = CliRunner().invoke(app, command, env={STACK_VARIABLE: str(tmp_path)})
        assert "make up" in absent.stderr, command
    monkeypatch.delenv(STACK_VARIABLE)
    outside = CliRunner().invoke(app, ["status"], env={"KEYLAKE_HOME": str(tmp_path)})
    assert outside.exit_code == ExitCode.NOT_RUNNING
