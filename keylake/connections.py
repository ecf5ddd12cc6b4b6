"""Connections that `keylake psql` may use: `connections/<endpoint id>.json` in the home, mode 0600.

An endpoint's password is told once, when the endpoint is made; Keylake itself keeps only a SCRAM verifier. So whoever
makes an endpoint with the command line gets it saved here, beside the administrator's key, which is worth more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from keylake.client import Connection
from keylake.layout import write_secret
from shared.errors import CorruptedError
from shared.ids import EndpointId, ProjectId

_MAX_SIZE_BYTES: Final = 16 * 1024


class SavedConnection(BaseModel):
    """All but the proxy's address, which is the running cluster's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    endpoint_id: EndpointId
    endpoint_name: str = Field(max_length=100)
    project_id: ProjectId
    project_name: str = Field(max_length=100)
    user: str = Field(min_length=1, max_length=63)
    database: str = Field(min_length=1, max_length=63)
    password: SecretStr

    def save(self, home: Path) -> Path:
        directory = home / "connections"
        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / f"{self.endpoint_id}.json"
        values = self.model_dump(mode="json") | {"password": self.password.get_secret_value()}
        write_secret(path, json.dumps(values))
        return path

    @classmethod
    def parse(cls, content: bytes) -> SavedConnection:
        """Raises CorruptedError, without the content."""
        try:
            return cls.model_validate_json(content)
        except ValidationError:
            raise CorruptedError("a saved connection is malformed") from None

    def connection(self, host: str, port: int, ca_certificate: Path) -> Connection:
        password = self.password.get_secret_value()
        return Connection(self.endpoint_id, host, port, self.user, password, self.database, ca_certificate)


def forget_connection(home: Path, endpoint_id: EndpointId) -> None:
    """The endpoint is gone."""
    (home / "connections" / f"{endpoint_id}.json").unlink(missing_ok=True)


def load_connections(home: Path) -> list[SavedConnection]:
    """Every saved one. Raises CorruptedError that names the file."""
    found = []
    for path in sorted((home / "connections").glob("*.json")):
        with path.open("rb") as file:
            content = file.read(_MAX_SIZE_BYTES)
        try:
            found.append(SavedConnection.parse(content))
        except CorruptedError:
            raise CorruptedError(f"{path} is malformed: remove it") from None
    return found
