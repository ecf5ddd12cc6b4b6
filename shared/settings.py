"""Settings: one frozen model per service, read from a JSON file and the environment, unknown keys refused.

`python -m <service> --config FILE`; environment variables `KEYLAKE_<SERVICE>_<FIELD>` win over the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.config import Address, Identity
from shared.errors import InvalidInputError


class ServiceSettings(BaseSettings):
    """Common to every service. Subclasses set `env_prefix`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_nested_delimiter="__")

    listen: Address = Field(description="HTTP API; loopback unless told otherwise")
    identity: Identity
    node_id: str = Field(
        min_length=1, max_length=64, pattern=r"^[a-z0-9-]+$", description="stable name of this node, e.g. safekeeper-1"
    )
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#@]+(/[^?#]*)?$",
        description="where spans go: base URL of an OTLP/HTTP receiver; None: what OTEL_EXPORTER_OTLP_ENDPOINT says, "
        "and without it nothing is sent",
    )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises InvalidInputError that names the offending key and never its value."""
        try:
            values: Any = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"cannot read settings from {path.name}: {type(error).__name__}") from None
        try:
            return cls(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"
                for e in error.errors(include_input=False, include_url=False)
            )
            raise InvalidInputError(f"settings in {path.name} are not valid: {problems}") from None


S = TypeVar("S", bound=ServiceSettings)


def settings_from_arguments(settings: type[S], program: str, description: str) -> S:
    """What every `__main__` starts with: `--config FILE`, and exit code 2 with one clear line when it is not usable."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        epilog=f"example: python -m {program} --config /etc/keylake/{program}.json",
    )
    parser.add_argument("--config", type=Path, required=True, help="JSON file with this service's settings")
    arguments = parser.parse_args()
    try:
        return settings.load(arguments.config)
    except InvalidInputError as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - logging is not configured yet
        raise SystemExit(2) from None
