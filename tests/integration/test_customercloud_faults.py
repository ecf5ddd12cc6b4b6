"""Bad days on demand, and restarts: what survives and what does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from botocore.parsers import ResponseParserError

from customercloud.faults import ErrorKind, Faults, KeyFaults, Outage, Service

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant, CloudProcess, StartCloud

pytestmark = pytest.mark.integration


@pytest.fixture
def key(aws: AwsTenant) -> str:
    return aws.customer.create_key(role_arn=aws.role_arn)


def error_of(call: Callable[[], object]) -> tuple[str, int]:
    """(code, HTTP status) of the refusal."""
    with pytest.raises(ClientError) as caught:
        call()
    return caught.value.response["Error"]["Code"], caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ErrorKind.INTERNAL, ("KMSInternalException", 500)),
        (ErrorKind.DEPENDENCY_TIMEOUT, ("DependencyTimeoutException", 503)),
        (ErrorKind.KEY_UNAVAILABLE, ("KeyUnavailableException", 500)),
        (ErrorKind.BAD_GATEWAY, ("502", 502)),
    ],
)
def test_server_errors(aws: AwsTenant, key: str, kind: ErrorKind, expected: tuple[str, int]) -> None:
    vendor = aws.role_client()
    with aws.admin.during(Faults(error_rate=1, error_kind=kind)):
        assert error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x")) == expected
        # STS and CloudTrail know nothing of the exceptions of KMS.
        other = ("InternalFailure", 500) if kind is ErrorKind.INTERNAL else ("ServiceUnavailable", 503)
        if kind is not ErrorKind.BAD_GATEWAY:
            assert error_of(aws.assume_role) == other
            assert error_of(aws.client("cloudtrail", aws.names.customer).lookup_events) == other
    vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_throttling(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    with aws.admin.during(Faults(throttle_rate=1)):
        assert error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x")) == ("ThrottlingException", 400)
        assert error_of(aws.assume_role) == ("Throttling", 400)
        trail = aws.client("cloudtrail", aws.names.customer)
        for call in (aws.assume_role, trail.lookup_events, trail.describe_trails):
            with pytest.raises(ClientError, match="Rate exceeded"):
                call()


def test_faults_of_one_key_are_not_those_of_another(aws: AwsTenant, key: str) -> None:
    other = aws.customer.create_key(role_arn=aws.role_arn)
    vendor, key_id = aws.role_client(), key.rpartition("/")[2]

    def encrypt(name: str) -> Callable[[], object]:
        return lambda: vendor.encrypt(KeyId=name, Plaintext=b"x")

    for name in (key, key_id):
        with aws.admin.during(Faults(of_keys={key_id: KeyFaults(throttle_rate=1)})):
            assert error_of(encrypt(name))[0] == "ThrottlingException"
            encrypt(other)()
        with aws.admin.during(Faults(of_keys={key_id: KeyFaults(outage=Outage.REFUSE)})):
            assert error_of(encrypt(name))[1] == 503
            encrypt(other)()
    # Its own faults stand in place of those of everybody, and a spared caller sees neither.
    spared = frozenset({aws.names.customer.access_key_id})
    of_keys = {key_id: KeyFaults()}
    with aws.admin.during(Faults(error_rate=1, of_keys=of_keys, spared_access_key_ids=spared)):
        encrypt(key)()
        assert error_of(encrypt(other))[1] == 500
        aws.customer.disable(other)


def test_a_share_of_errors_is_a_share(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()

    def succeeds() -> bool:
        try:
            vendor.encrypt(KeyId=key, Plaintext=b"x")
        except ClientError:
            return False
        return True

    # Outside these bounds with a probability of 2^-48.
    with aws.admin.during(Faults(error_rate=0.5)):
        assert 5 < sum(succeeds() for _ in range(80)) < 75


def test_latency(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    with aws.admin.during(Faults(latency_s=0.3)):
        started_s = time.monotonic()
        vendor.encrypt(KeyId=key, Plaintext=b"x")
        assert time.monotonic() - started_s >= 0.3


def test_an_outage_with_503(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    with aws.admin.during(Faults(outage=Outage.REFUSE)):
        assert error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x"))[1] == 503
    assert list(aws.customer.events(EventName="Encrypt")) == []


def test_an_outage_that_hangs_and_is_not_carried_out_later(aws: AwsTenant, key: str) -> None:
    vendor = aws.client("kms", aws.assume_role()["Credentials"], read_timeout=0.5)
    with aws.admin.during(Faults(outage=Outage.HANG)), pytest.raises(ReadTimeoutError):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
    vendor.describe_key(KeyId=key)
    assert list(aws.customer.events(EventName="Encrypt")) == []


def test_hanging_requests_are_let_go_with_503(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    with ThreadPoolExecutor(1) as executor:
        with aws.admin.during(Faults(outage=Outage.HANG)):
            hanging = executor.submit(lambda: error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x")))
            with pytest.raises(TimeoutError):
                hanging.result(timeout=0.5)
        assert hanging.result(timeout=10)[1] == 503


def test_a_partition_that_hits_the_vendor_only(aws: AwsTenant, key: str) -> None:
    """The customer can still disable the key while the vendor sees nothing of it: the case that leases are for."""
    vendor = aws.role_client()
    spared = frozenset({aws.names.customer.access_key_id})
    with aws.admin.during(Faults(outage=Outage.REFUSE, spared_access_key_ids=spared)):
        assert error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x"))[1] == 503
        aws.customer.disable(key)
    assert error_of(lambda: vendor.encrypt(KeyId=key, Plaintext=b"x"))[0] == "DisabledException"


def test_faults_of_one_service(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    with aws.admin.during(Faults(outage=Outage.REFUSE, services=frozenset({Service.STS}))):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
        with pytest.raises(ResponseParserError, match="Service Unavailable"):  # boto3 wants XML even in a 503
            aws.assume_role()


def test_faults_are_read_back_and_cleared(aws: AwsTenant) -> None:
    faults = Faults(latency_s=0.01, services=frozenset({Service.KMS}), propagation_delay_s=2)
    aws.admin.set_faults(faults)
    assert aws.admin.faults() == faults
    aws.admin.clear_faults()
    assert aws.admin.faults() == Faults()


# ── restarts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _tenant(cloud: CloudProcess) -> AwsTenant:
    from tests.fixtures.customercloud import new_tenant

    return new_tenant(cloud)


@pytest.mark.parametrize("kill", [False, True])
def test_a_restart_keeps_everything_but_faults(start_cloud: StartCloud, kill: bool) -> None:
    cloud = start_cloud()
    aws = _tenant(cloud)
    try:
        keys = [aws.customer.create_key(str(n), role_arn=aws.role_arn) for n in range(3)]
        vendor = aws.role_client()
        sealed = [vendor.encrypt(KeyId=key, Plaintext=key.encode())["CiphertextBlob"] for key in keys]
        aws.customer.rotate(keys[0])
        aws.customer.kms.create_alias(AliasName="alias/kept", TargetKeyId=keys[0])
        aws.customer.disable(keys[1])
        deletion_date = aws.customer.schedule_deletion(keys[2])
        aws.admin.set_faults(Faults(outage=Outage.REFUSE))
        events = aws.admin.audit_log()

        exit_code = cloud.stop(kill=kill)
        assert exit_code == (-9 if kill else 0)
        with pytest.raises((EndpointConnectionError, ConnectionClosedError)):
            vendor.decrypt(CiphertextBlob=sealed[0])
        cloud.start()

        assert aws.admin.faults() == Faults()
        assert aws.admin.audit_log() == events
        assert vendor.decrypt(CiphertextBlob=sealed[0])["Plaintext"] == keys[0].encode(), "the session lives on"
        assert error_of(lambda: vendor.decrypt(CiphertextBlob=sealed[1]))[0] == "DisabledException"
        assert error_of(lambda: vendor.decrypt(CiphertextBlob=sealed[2]))[0] == "KMSInvalidStateException"
        assert aws.customer.describe("alias/kept")["Arn"] == keys[0]
        assert aws.customer.describe(keys[2])["DeletionDate"] == deletion_date
        aws.customer.enable(keys[1])
        assert vendor.decrypt(CiphertextBlob=sealed[1])["Plaintext"] == keys[1].encode()
        assert (
            aws.admin.bootstrap_aws(
                aws.names.external_id, customer_account_id=aws.account_id, vendor_account_id=aws.names.vendor.account_id
            )
            == aws.names
        )
    finally:
        aws.close()


def test_destroyed_material_is_not_on_the_disk_any_more(start_cloud: StartCloud) -> None:
    from customercloud.aws.state import SEAL_PURPOSE
    from customercloud.durable import SealedFile

    cloud = start_cloud()
    aws = _tenant(cloud)

    def stored() -> bytes:
        host_key = (cloud.state_dir / "host.key").read_bytes()
        state = SealedFile(cloud.state_dir / "aws" / "state.sealed", host_key, SEAL_PURPOSE).read()
        assert state is not None
        return state

    try:
        key = aws.customer.create_key()
        material = aws.customer.describe(key)["CurrentKeyMaterialId"].encode()
        aws.customer.schedule_deletion(key)
        assert material in stored()
        aws.admin.complete_deletion(key)
        assert material not in stored()
    finally:
        aws.close()


@pytest.mark.parametrize("damage", ["state.sealed", "cloudtrail.jsonl", "host.key"])
def test_a_damaged_state_is_refused_at_start(start_cloud: StartCloud, damage: str) -> None:
    cloud = start_cloud()
    aws = _tenant(cloud)
    aws.customer.create_key()
    aws.close()
    cloud.stop()
    path = cloud.state_dir / damage if damage == "host.key" else cloud.state_dir / "aws" / damage
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(pytest.fail.Exception, match="did not start"):
        cloud.start()
    assert cloud.process is not None
    assert cloud.process.wait(10) == 2
    assert "Traceback" not in cloud.log


def test_a_second_process_cannot_take_the_state(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    intruder = replace(cloud, port=0)
    with pytest.raises(pytest.fail.Exception, match="another process uses state"):
        intruder.start()
    assert intruder.process is not None
    assert intruder.process.wait(10) == 2
    _tenant(cloud).close()


def test_it_stops_in_time_while_requests_hang(start_cloud: StartCloud) -> None:
    cloud = start_cloud()
    aws = _tenant(cloud)
    with ThreadPoolExecutor(1) as executor:
        try:
            key = aws.customer.create_key()
            aws.admin.set_faults(Faults(outage=Outage.HANG))
            client = aws.client("kms", aws.names.customer)
            hanging = executor.submit(client.encrypt, KeyId=key, Plaintext=b"x")
            with pytest.raises(TimeoutError):
                hanging.result(timeout=0.3)
            started_s = time.monotonic()
            assert cloud.stop() == 0
            assert time.monotonic() - started_s < 8
            with pytest.raises((ClientError, ConnectionClosedError, EndpointConnectionError)):
                hanging.result(timeout=10)
        finally:
            aws.close()


def test_many_clients_at_once(aws: AwsTenant, key: str) -> None:
    """Group commit and one event loop: every answer is right and every call is in the log exactly once."""
    vendor = aws.client("kms", aws.assume_role()["Credentials"], max_pool_connections=8)

    def round_trip(number: int) -> Any:
        context = {"n": str(number)}
        sealed = vendor.encrypt(KeyId=key, Plaintext=str(number).encode(), EncryptionContext=context)
        return vendor.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context)["Plaintext"]

    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(round_trip, range(100))) == [str(n).encode() for n in range(100)]
    for name in ("Encrypt", "Decrypt"):
        records = list(aws.customer.events(EventName=name))
        assert sorted(int(r["requestParameters"]["encryptionContext"]["n"]) for r in records) == list(range(100))
