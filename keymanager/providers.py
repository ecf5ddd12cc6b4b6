"""From a key configuration's CMK to the adapter that speaks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from keymanager.config import KeymanagerSettings
from keymanager.kms.aws import AwsKms, AwsKmsConfig
from keymanager.kms.azure import AzureKms, AzureKmsConfig
from keymanager.kms.base import KmsCallObserver, KmsProvider
from keymanager.kms.gcp import GoogleKms, GoogleKmsConfig
from keymanager.kms.openbao import AppRole, OpenBaoConfig, OpenBaoKms
from shared.api.keymanager import AwsKey, AzureKey, CmkKey, GoogleKey, OpenBaoKey
from shared.clock import Clock
from shared.errors import InvalidInputError

ProviderFactory = Callable[[CmkKey, KmsCallObserver], KmsProvider]
"""Raises InvalidInputError when the settings have nothing to use the key with."""


def provider_factory(settings: KeymanagerSettings, clock: Clock) -> ProviderFactory:
    """Adapters for all clouds, as the settings say how each is reached."""
    aws, azure = aws_factory(settings, clock), azure_factory(settings, clock)
    google, openbao = google_factory(settings, clock), openbao_factory(settings, clock)

    def make(key: CmkKey, observer: KmsCallObserver) -> KmsProvider:
        match key:
            case AwsKey():
                return aws(key, observer)
            case AzureKey():
                return azure(key, observer)
            case GoogleKey():
                return google(key, observer)
            case OpenBaoKey():
                return openbao(key, observer)
            case _:
                assert_never(key)

    return make


def aws_factory(settings: KeymanagerSettings, clock: Clock) -> Callable[[AwsKey, KmsCallObserver], KmsProvider]:
    """Providers for AWS keys, as the settings say how AWS is reached."""

    def make(key: AwsKey, observer: KmsCallObserver) -> KmsProvider:
        secret = settings.aws.secret_access_key
        config = AwsKmsConfig(
            key_id=key.key_arn,
            region=key.key_arn.split(":")[3],
            role_arn=key.role_arn,
            external_id=key.external_id,
            session_name="keylake",
            session_duration_s=settings.aws.session_duration_s,
            access_key_id=settings.aws.access_key_id,
            secret_access_key=None if secret is None else secret.get_secret_value(),
            kms_endpoint_url=settings.aws.kms_endpoint_url,
            sts_endpoint_url=settings.aws.sts_endpoint_url,
            ca_bundle=settings.aws.ca_bundle,
            connect_timeout_s=settings.kms_connect_timeout_s,
            read_timeout_s=settings.kms_read_timeout_s,
            deadline_s=settings.kms_deadline_s,
        )
        return AwsKms(config, observer=observer, clock=clock)

    return make


def azure_factory(settings: KeymanagerSettings, clock: Clock) -> Callable[[AzureKey, KmsCallObserver], KmsProvider]:
    """Providers for keys in Azure Key Vault, as the settings say how Azure is reached.

    An application whose secret we do not have gets a provider all the same, every call of which says so (AMBIGUOUS):
    one missing secret must not keep the others' keys from being used.
    """

    def make(key: AzureKey, observer: KmsCallObserver) -> KmsProvider:
        secret = settings.azure.client_secrets.get(key.client_id)
        config = AzureKmsConfig(
            vault_url=key.vault_url,
            key_name=key.key_name,
            tenant_id=key.tenant_id,
            client_id=key.client_id,
            client_secret=None if secret is None else secret.get_secret_value(),
            federated_token_file=settings.azure.federated_token_file,
            authority=settings.azure.authority,
            disable_instance_discovery=settings.azure.disable_instance_discovery,
            verify_challenge_resource=settings.azure.verify_challenge_resource,
            token_max_age_s=settings.azure.token_max_age_s,
            ca_bundle=settings.azure.ca_bundle,
            connect_timeout_s=settings.kms_connect_timeout_s,
            read_timeout_s=settings.kms_read_timeout_s,
            deadline_s=settings.kms_deadline_s,
        )
        return AzureKms(config, observer=observer, clock=clock)

    return make


def google_factory(settings: KeymanagerSettings, clock: Clock) -> Callable[[GoogleKey, KmsCallObserver], KmsProvider]:
    """Providers for Google keys, as the settings say how Google Cloud is reached."""

    def make(key: GoogleKey, observer: KmsCallObserver) -> KmsProvider:
        config = GoogleKmsConfig(
            key_name=key.key_name,
            service_account=key.service_account,
            session_duration_s=settings.google.session_duration_s,
            credentials_file=settings.google.credentials_file,
            kms_endpoint_url=settings.google.kms_endpoint_url,
            iam_endpoint_url=settings.google.iam_endpoint_url,
            ca_bundle=settings.google.ca_bundle,
            connect_timeout_s=settings.kms_connect_timeout_s,
            read_timeout_s=settings.kms_read_timeout_s,
            deadline_s=settings.kms_deadline_s,
        )
        return GoogleKms(config, observer=observer, clock=clock)

    return make


def openbao_factory(settings: KeymanagerSettings, clock: Clock) -> Callable[[OpenBaoKey, KmsCallObserver], KmsProvider]:
    """Providers for OpenBao. Raises InvalidInputError for a server or role that the settings do not know."""

    def make(key: OpenBaoKey, observer: KmsCallObserver) -> KmsProvider:
        server = settings.openbao.servers.get(key.address)
        secret_id = None if server is None else server.secret_ids.get(key.role_id)
        if server is None or secret_id is None:
            raise InvalidInputError("no credentials are set up for this role at this OpenBao server")
        config = OpenBaoConfig(
            address=key.address,
            key_name=key.key_name,
            auth=AppRole(key.role_id, secret_id.get_secret_value(), server.approle_mount),
            mount=key.mount,
            namespace=key.namespace,
            ca_bundle=server.ca_bundle,
            connect_timeout_s=settings.kms_connect_timeout_s,
            read_timeout_s=settings.kms_read_timeout_s,
            deadline_s=settings.kms_deadline_s,
        )
        return OpenBaoKms(config, observer=observer, clock=clock)

    return make


def session_life_s(key: CmkKey, settings: KeymanagerSettings) -> float | None:
    """How long a session with the key's cloud may outlive the trust in us that it was opened on.

    None for OpenBao: the server says how long its tokens live, and whether it ends them with their role.
    """
    match key:
        case AwsKey():
            return settings.aws.session_duration_s
        case AzureKey():
            return settings.azure.token_max_age_s
        case GoogleKey():
            return settings.google.session_duration_s
        case OpenBaoKey():
            return None
        case _:
            assert_never(key)
