"""Clients that nobody here wrote, unmodified, against the simulated AWS: AWS's encryption SDK, Tink, the AWS CLI.

They are told where AWS is by the environment, as they are told of any other endpoint.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aws_encryption_sdk
import boto3
import pytest
import tink
from aws_encryption_sdk.exceptions import AWSEncryptionSDKClientError
from aws_encryption_sdk.key_providers.kms import DiscoveryFilter
from tink import aead
from tink.integration import awskms

from tests.fixtures.customercloud import REGION

if TYPE_CHECKING:
    from customercloud.aws.admin import Credentials
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration

CONTEXT = {"tenant": "t1", "purpose": "invoice"}
SECRET = b"nobody else's business " * 100


def _environment(aws: AwsTenant, credentials: Credentials | dict[str, str]) -> dict[str, str]:
    if isinstance(credentials, dict):
        keys = {
            "AWS_ACCESS_KEY_ID": credentials["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": credentials["SecretAccessKey"],
            "AWS_SESSION_TOKEN": credentials["SessionToken"],
        }
    else:
        keys = {
            "AWS_ACCESS_KEY_ID": credentials.access_key_id,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key,
        }
    return keys | {
        "AWS_ENDPOINT_URL": aws.cloud.url,
        "AWS_CA_BUNDLE": str(aws.cloud.ca_bundle),
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_PAGER": "",
    }


@pytest.fixture
def key(aws: AwsTenant) -> str:
    return aws.customer.create_key("vendors", role_arn=aws.role_arn)


@pytest.fixture
def as_vendor(aws: AwsTenant, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process speaks to the cloud as the role, wherever a library makes its own boto3 clients."""
    for name, value in _environment(aws, aws.assume_role()["Credentials"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    yield
    if boto3.DEFAULT_SESSION is not None:
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def _refusals(aws: AwsTenant) -> list[str]:
    """Error codes of the refused calls in the customer's log, newest first."""
    return [record["errorCode"] for record in aws.customer.events() if "errorCode" in record]


# ── the AWS Encryption SDK ─────────────────────────────────────────────────────────────────────────────────────────


def _master_keys(*key_ids: str, **more: Any) -> Any:
    return aws_encryption_sdk.StrictAwsKmsMasterKeyProvider(key_ids=list(key_ids), **more)


def _client() -> Any:
    return aws_encryption_sdk.EncryptionSDKClient()


@pytest.mark.usefixtures("as_vendor")
def test_the_encryption_sdk_encrypts_and_decrypts_with_its_context(aws: AwsTenant, key: str) -> None:
    sealed, header = _client().encrypt(source=SECRET, key_provider=_master_keys(key), encryption_context=CONTEXT)
    assert SECRET not in sealed
    assert header.encryption_context.items() >= CONTEXT.items()
    opened, header = _client().decrypt(source=sealed, key_provider=_master_keys(key))
    assert opened == SECRET
    assert header.encryption_context.items() >= CONTEXT.items()
    # KMS has seen the same context, with the SDK's own member for the signature key.
    for name in ("GenerateDataKey", "Decrypt"):
        (record,) = aws.customer.events(EventName=name)
        assert record["requestParameters"]["encryptionContext"].items() >= CONTEXT.items()
        assert "AwsEncryptionSdkPython" in record["userAgent"]


@pytest.mark.usefixtures("as_vendor")
def test_a_changed_context_in_the_header_is_refused_by_kms(aws: AwsTenant, key: str) -> None:
    sealed, _ = _client().encrypt(source=SECRET, key_provider=_master_keys(key), encryption_context=CONTEXT)
    assert sealed.count(b"invoice") == 1
    with pytest.raises(AWSEncryptionSDKClientError):
        _client().decrypt(source=sealed.replace(b"invoice", b"receipt"), key_provider=_master_keys(key))
    assert _refusals(aws) == ["InvalidCiphertextException"]


@pytest.mark.usefixtures("as_vendor")
def test_the_encryption_sdk_after_revocation(aws: AwsTenant, key: str) -> None:
    sealed, _ = _client().encrypt(source=SECRET, key_provider=_master_keys(key), encryption_context=CONTEXT)
    aws.customer.disable(key)
    with pytest.raises(AWSEncryptionSDKClientError):
        _client().decrypt(source=sealed, key_provider=_master_keys(key))
    aws.customer.enable(key)
    aws.customer.deny_role(key, aws.role_arn)
    with pytest.raises(AWSEncryptionSDKClientError):
        _client().decrypt(source=sealed, key_provider=_master_keys(key))
    aws.customer.allow_role(key, aws.role_arn)
    assert _client().decrypt(source=sealed, key_provider=_master_keys(key))[0] == SECRET
    assert _refusals(aws) == ["AccessDenied", "DisabledException"]


@pytest.mark.usefixtures("as_vendor")
def test_two_master_keys_of_which_one_is_gone(aws: AwsTenant, key: str) -> None:
    other = aws.customer.create_key(role_arn=aws.role_arn)
    sealed, header = _client().encrypt(source=SECRET, key_provider=_master_keys(key, other))
    assert len(header.encrypted_data_keys) == 2
    aws.customer.schedule_deletion(key)
    aws.admin.complete_deletion(key)
    accounts = DiscoveryFilter(account_ids=[aws.account_id], partition="aws")
    discovery = aws_encryption_sdk.DiscoveryAwsKmsMasterKeyProvider(discovery_filter=accounts)
    for provider in (_master_keys(other), _master_keys(key, other), discovery):
        assert _client().decrypt(source=sealed, key_provider=provider)[0] == SECRET
    with pytest.raises(AWSEncryptionSDKClientError):
        _client().decrypt(source=sealed, key_provider=_master_keys(key))


@pytest.mark.usefixtures("as_vendor")
def test_the_encryption_sdk_by_alias_and_with_a_grant_token(aws: AwsTenant) -> None:
    key = aws.customer.create_key()
    alias = f"{key.rpartition(':')[0]}:alias/sdk"
    aws.customer.kms.create_alias(AliasName="alias/sdk", TargetKeyId=key)
    token = aws.customer.kms.create_grant(
        KeyId=key,
        GranteePrincipal=aws.role_arn,
        Operations=["GenerateDataKey", "Encrypt", "Decrypt"],
        Constraints={"EncryptionContextSubset": CONTEXT},
    )["GrantToken"]
    provider = _master_keys(alias, grant_tokens=(token,))
    sealed, _ = _client().encrypt(source=SECRET, key_provider=provider, encryption_context=CONTEXT)
    assert _client().decrypt(source=sealed, key_provider=_master_keys(key))[0] == SECRET
    with pytest.raises(AWSEncryptionSDKClientError):
        _client().encrypt(source=SECRET, key_provider=provider, encryption_context={"tenant": "t2"})


# ── Tink ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tink_client(aws: AwsTenant, key: str) -> Any:
    aead.register()
    return awskms.new_client(boto3_client=aws.role_client(), key_uri=f"aws-kms://{key}")


def test_tinks_aead(aws: AwsTenant, key: str, tink_client: Any) -> None:
    remote = tink_client.get_aead(f"aws-kms://{key}")
    sealed = remote.encrypt(b"secret", b"associated")
    assert remote.decrypt(sealed, b"associated") == b"secret"
    assert remote.decrypt(remote.encrypt(b"secret", b""), b"") == b"secret"
    for blob, associated in ((sealed, b"other"), (sealed, b""), (sealed[:-1], b"associated"), (b"x", b"associated")):
        with pytest.raises(tink.TinkError):
            remote.decrypt(blob, associated)
    aws.customer.disable(key)
    with pytest.raises(tink.TinkError, match="DisabledException"):
        remote.decrypt(sealed, b"associated")


def test_tinks_envelope_aead(aws: AwsTenant, key: str, tink_client: Any) -> None:
    template = aead.aead_key_templates.AES256_GCM
    envelope = aead.KmsEnvelopeAead(template, tink_client.get_aead(f"aws-kms://{key}"))
    sealed = envelope.encrypt(SECRET, b"associated")
    assert envelope.decrypt(sealed, b"associated") == SECRET
    with pytest.raises(tink.TinkError):
        envelope.decrypt(sealed, b"other")
    aws.customer.deny_role(key, aws.role_arn)
    with pytest.raises(tink.TinkError):
        envelope.decrypt(sealed, b"associated")


@pytest.mark.usefixtures("as_vendor")
def test_tinks_own_client_and_an_encrypted_keyset(key: str) -> None:
    aead.register()
    uri = f"aws-kms://{key}"
    master = awskms.AwsKmsClient(uri, None).get_aead(uri)
    handle = tink.new_keyset_handle(aead.aead_key_templates.AES256_GCM)
    text = tink.json_proto_keyset_format.serialize_encrypted(handle, master, b"keyset")
    again = tink.json_proto_keyset_format.parse_encrypted(text, master, b"keyset")
    sealed = handle.primitive(aead.Aead).encrypt(b"secret", b"")
    assert again.primitive(aead.Aead).decrypt(sealed, b"") == b"secret"
    with pytest.raises(tink.TinkError):
        tink.json_proto_keyset_format.parse_encrypted(text, master, b"another")


# ── the AWS CLI ────────────────────────────────────────────────────────────────────────────────────────────────────


class Cli:
    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {"PATH": os.environ["PATH"], "HOME": os.devnull, **environment}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "aws"), *arguments, "--output", "json"]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=120, check=False)

    def __call__(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else None

    def refusal(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode != 0, done.stdout
        return done.stderr.strip()


@pytest.fixture
def cli(aws: AwsTenant) -> Cli:
    return Cli(_environment(aws, aws.names.customer))


def test_the_clis_life_of_a_key(aws: AwsTenant, cli: Cli, tmp_path: Path) -> None:
    arn = cli("kms", "create-key", "--description", "by the CLI", "--tags", "TagKey=team,TagValue=a")["KeyMetadata"][
        "Arn"
    ]
    cli("kms", "create-alias", "--alias-name", "alias/cli", "--target-key-id", arn)
    assert cli("kms", "describe-key", "--key-id", "alias/cli")["KeyMetadata"]["Description"] == "by the CLI"
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_bytes(secrets.token_bytes(100))
    context = ("--encryption-context", "tenant=t1,branch=b1")
    answer = cli("kms", "encrypt", "--key-id", "alias/cli", "--plaintext", f"fileb://{plain}", *context)
    sealed.write_bytes(base64.b64decode(answer["CiphertextBlob"]))
    opened = cli("kms", "decrypt", "--ciphertext-blob", f"fileb://{sealed}", *context)
    assert base64.b64decode(opened["Plaintext"]) == plain.read_bytes()
    assert opened["KeyId"] == arn
    assert "(InvalidCiphertextException) when calling the Decrypt operation" in cli.refusal(
        "kms", "decrypt", "--ciphertext-blob", f"fileb://{sealed}", "--encryption-context", "tenant=t2,branch=b1"
    )
    cli("kms", "disable-key", "--key-id", arn)
    refusal = cli.refusal("kms", "decrypt", "--ciphertext-blob", f"fileb://{sealed}", *context)
    assert refusal.endswith(
        f"An error occurred (DisabledException) when calling the Decrypt operation: {arn} is disabled."
    )
    scheduled = cli("kms", "schedule-key-deletion", "--key-id", arn, "--pending-window-in-days", "7")
    assert (scheduled["KeyState"], scheduled["PendingWindowInDays"]) == ("PendingDeletion", 7)
    assert cli("kms", "cancel-key-deletion", "--key-id", arn) == {"KeyId": arn}


def test_the_clis_listings_grants_and_rotation(aws: AwsTenant, cli: Cli, key: str) -> None:
    for _ in range(2):
        aws.customer.create_key()
    # The CLI follows the markers itself.
    assert len(cli("kms", "list-keys", "--page-size", "2")["Keys"]) == 3
    grant = cli(
        "kms", "create-grant", "--key-id", key, "--grantee-principal", aws.role_arn,
        "--operations", "Decrypt", "Encrypt", "--constraints", "EncryptionContextSubset={tenant=t1}",
    )  # fmt: skip
    (listed,) = cli("kms", "list-grants", "--key-id", key)["Grants"]
    assert (listed["GrantId"], listed["Constraints"]) == (
        grant["GrantId"],
        {"EncryptionContextSubset": {"tenant": "t1"}},
    )
    cli("kms", "enable-key-rotation", "--key-id", key, "--rotation-period-in-days", "90")
    assert cli("kms", "get-key-rotation-status", "--key-id", key)["RotationPeriodInDays"] == 90
    assert cli("kms", "rotate-key-on-demand", "--key-id", key) == {"KeyId": key}
    (rotation,) = cli("kms", "list-key-rotations", "--key-id", key)["Rotations"]
    assert rotation["RotationType"] == "ON_DEMAND"
    policy = json.loads(cli("kms", "get-key-policy", "--key-id", key, "--policy-name", "default")["Policy"])
    assert policy["Version"] == "2012-10-17"


def test_the_clis_roles_and_trail(aws: AwsTenant, key: str) -> None:
    vendor = Cli(_environment(aws, aws.names.vendor))
    assert vendor("sts", "get-caller-identity")["Arn"] == aws.names.vendor.arn
    assume = ("sts", "assume-role", "--role-arn", aws.role_arn, "--role-session-name", "cli", "--external-id")
    refusal = vendor.refusal(*assume, "wrong")
    assert "An error occurred (AccessDenied) when calling the AssumeRole operation" in refusal
    role = Cli(_environment(aws, vendor(*assume, aws.names.external_id)["Credentials"]))
    data_key = role("kms", "generate-data-key", "--key-id", key, "--key-spec", "AES_256")
    assert len(base64.b64decode(data_key["Plaintext"])) == 32
    customer = Cli(_environment(aws, aws.names.customer))
    attribute = "AttributeKey=EventName,AttributeValue=GenerateDataKey"
    (event,) = customer("cloudtrail", "lookup-events", "--lookup-attributes", attribute)["Events"]
    record = json.loads(event["CloudTrailEvent"])
    assert record["userIdentity"]["arn"].endswith("/cli")
    assert "aws-cli" in record["userAgent"]
