"""docs/reference/settings.md, out of the services' own settings models."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic_settings import BaseSettings

from compute.config import ManagerSettings
from compute.proxy.config import ProxySettings
from customercloud.config import CustomerCloudSettings
from keylake.reference.text import one_line, schema_type, table
from keymanager.config import KeymanagerSettings
from pageserver.config import PageserverSettings
from safekeeper.config import SafekeeperSettings

SERVICES: Final[dict[str, type[BaseSettings]]] = {
    "keymanager": KeymanagerSettings,
    "safekeeper": SafekeeperSettings,
    "pageserver": PageserverSettings,
    "compute": ManagerSettings,
    "compute.proxy": ProxySettings,
    "customercloud": CustomerCloudSettings,
}
"""What comes behind `python -m` → its settings."""

_HEAD: Final = """\
# Settings

Generated from the services' settings models by `make docs-reference`; a test keeps it current.

A service is started with `python -m SERVICE --config FILE`, a JSON object. An environment variable wins over the file;
fields of a group are joined with two underscores, `KEYLAKE_KEYMANAGER_AWS__CA_BUNDLE`. An unknown key is an error, in
the file and in groups. Values of secrets are never printed, in no error either. `keylake up` writes all of it by
itself: see `config/` in its home; a Python test gives `Cluster(settings={"keymanager": {"lease_ttl_s": 2}})`.
"""


def page() -> str:
    """The whole document."""
    return "\n".join([_HEAD, *(_service(name, model) for name, model in SERVICES.items()), _models()])


def _service(name: str, model: type[BaseSettings]) -> str:
    schema = model.model_json_schema()
    prefix = model.model_config.get("env_prefix", "")
    about = f"`python -m {name}`, variables `{prefix}…`."
    return f"## {name}\n\n{about}\n\n{_fields(schema)}"


def _models() -> str:
    """Groups of fields; those that several services have only once."""
    found: dict[str, Any] = {}
    for model in SERVICES.values():
        found.update(model.model_json_schema().get("$defs", {}))
    parts = ["## Groups of fields\n"]
    for name in sorted(found):
        about = one_line(found[name].get("description"))
        parts.append(f"### {name}\n\n{about}\n\n{_fields(found[name])}")
    return "\n".join(parts)


def _fields(schema: dict[str, Any]) -> str:
    if "properties" not in schema:
        return f"{schema_type(schema)}\n"
    required = set(schema.get("required", ()))
    rows = [
        (f"`{name}`", schema_type(each, "#{}"), _default(name, each, required), one_line(each.get("description")))
        for name, each in schema["properties"].items()
    ]
    return table(("setting", "type", "default", "meaning"), rows)


def _default(name: str, field: dict[str, Any], required: set[str]) -> str:
    if name in required:
        return "**required**"
    value = field.get("default")
    if value is None or value == {} or isinstance(value, dict):
        return ""
    return f"`{json.dumps(value)}`"
