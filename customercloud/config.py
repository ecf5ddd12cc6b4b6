"""Settings: a JSON file, the environment (`KEYLAKE_CUSTOMERCLOUD_…`), the command line; unknown keys are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import InvalidInputError

ENV_PREFIX: Final = "KEYLAKE_CUSTOMERCLOUD_"


class CustomerCloudSettings(BaseSettings):
    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=ENV_PREFIX)

    host: str = Field(default="127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: int = Field(default=8440, ge=0, le=65535, description="port; 0 takes a free one and logs it")
    google_grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="Google Cloud KMS over gRPC; 0 takes a free port; without it: off"
    )
    tls_cert_path: Path | None = Field(default=None, description="PEM certificate chain; without it: plain HTTP")
    tls_key_path: Path | None = Field(default=None, description="PEM private key of the certificate")
    state_dir: Path = Field(description="keys, identities and the audit log; made if it is missing, mode 0700")
    region: str = Field(default="us-east-1", pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]$", description="the one AWS region")
    admin_token: SecretStr | None = Field(
        default=None,
        min_length=24,
        description="bearer token of /_keylake/; without it one is made in state_dir/admin.token (mode 0600)",
    )
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$", description="of the process log")

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError("tls_cert_path and tls_key_path are given together or not at all")
        return self


def load_settings(path: Path | None, overrides: dict[str, Any] | None = None) -> CustomerCloudSettings:
    """`overrides` (the command line) win over the environment, which wins over the file.

    Raises InvalidInputError that names the offending key and never its value.
    """
    for name in os.environ:
        # pydantic-settings looks only for names that it knows, so a misspelt variable would pass unseen.
        if (
            name.startswith(ENV_PREFIX)
            and name.removeprefix(ENV_PREFIX).lower() not in CustomerCloudSettings.model_fields
        ):
            raise InvalidInputError(f"unknown environment variable {name}")
    try:
        values = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read settings from {path}: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise InvalidInputError("the settings file is not a JSON object")
    from_environment = {
        key: value
        for key in CustomerCloudSettings.model_fields
        if (value := os.environ.get(f"{ENV_PREFIX}{key.upper()}")) is not None
    }
    try:
        return CustomerCloudSettings(**(values | from_environment | (overrides or {})))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'settings'}: {e['msg']}"
            for e in error.errors(include_input=False, include_url=False)
        )
        raise InvalidInputError(f"settings are not valid: {problems}") from None
