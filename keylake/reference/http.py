"""docs/reference/http.md, out of the OpenAPI that each service makes of its routes."""

from __future__ import annotations

import json
from typing import Any, Final

from keylake.reference.text import one_line, schema_type, table
from keylake.roles_table import apps, http_operations
from shared.auth import Service
from shared.authorize import Operation

_HEAD: Final = """\
# HTTP APIs

Generated from each service's OpenAPI by `make docs-reference`; a test keeps it current. The same, for programs, is at
`/openapi.json` of each service.

All of it is TLS 1.3, and a service is known by its certificate's name. Each request has a bearer token; what it must be
allowed is named with each operation ([who has it](../roles.md)). `/healthz` (alive) and `/readyz` (may work; 503 until
then) answer without one. A body is JSON with no field that is not listed here; an answer that is not 2xx is an
[error body](#keymanager-errorbody), with the codes of [Errors](../errors.md). Requests may carry a
`traceparent` ([metrics and traces](../how-to/observe.md)).

What is not HTTP (pages, WAL, key sessions) is in `shared/wire` and `shared/api/keymanager.py`; Postgres's own protocol
is the proxy's port.
"""


def page() -> str:
    """The whole document."""
    return "\n".join([_HEAD, *(_service(service, app.openapi()) for service, app in apps().items())])


def _service(service: Service, document: dict[str, Any]) -> str:
    link = f"#{service.value}-{{}}"
    parts = [f"## {service.value}\n"]
    for each in http_operations()[service]:
        about = document["paths"].get(each.path, {}).get(each.method.lower())
        if about is not None:
            parts.append(_operation(each, about, link))
    models, whole = document["components"]["schemas"], json.dumps(document)
    # A class that others are made from stands there, too, and is nobody's body.
    used = [name for name in sorted(models) if f'"#/components/schemas/{name}"' in whole]
    # Two services may have different models of one name.
    parts += [_model(f"{service.value}: {name}", models[name], link) for name in used]
    return "\n".join(parts)


def _operation(operation: Operation, about: dict[str, Any], link: str) -> str:
    parts = [
        f"### `{operation.method} {operation.path}`\n",
        one_line(about.get("description")) or about["summary"] + ".",
    ]
    needs = " or ".join(f"`{scope}`" for scope in sorted(operation.any_of))
    parts[-1] += f" Needs {needs}."
    asked = [each for each in about.get("parameters", ()) if each["in"] != "path"]
    if asked:
        rows = [
            (
                f"`{each['name']}`",
                each["in"],
                schema_type(each["schema"], link) + (", required" if each.get("required") else ""),
                one_line(each.get("description")),
            )
            for each in asked
        ]
        parts.append("\n" + table(("parameter", "in", "type", "meaning"), rows).rstrip())
    told = []
    if body := about.get("requestBody"):
        told.append(f"Takes {_content(body, link)}.")
    for status, answer in about["responses"].items():
        if status.startswith("2"):
            told.append(f"Answers {status}{_answer(answer, link)}.")
    return "\n".join([*parts, "", " ".join(told), ""])


def _answer(answer: dict[str, Any], link: str) -> str:
    content = _content(answer, link)
    return f" with {content}" if content else ""


def _content(holder: dict[str, Any], link: str) -> str:
    for kind, content in holder.get("content", {}).items():
        return schema_type(content.get("schema", {}), link) if kind == "application/json" else f"`{kind}`"
    return ""


def _model(name: str, schema: dict[str, Any], link: str) -> str:
    parts = [f"### {name}\n"]
    if text := one_line(schema.get("description")):
        parts.append(f"{text}\n")
    if "properties" not in schema:
        return "\n".join([*parts, f"{schema_type(schema, link) or 'Anything.'}\n"])
    required = set(schema.get("required", ()))
    rows = [
        (
            f"`{field}`" + ("" if field in required else " (optional)"),
            schema_type(each, link),
            one_line(each.get("description")),
        )
        for field, each in schema["properties"].items()
    ]
    return "\n".join([*parts, table(("field", "type", "meaning"), rows)])
