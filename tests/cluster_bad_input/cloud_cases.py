"""Attacks on the administrative side of the customer's cloud, whose routes its own application names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx

from customercloud.admin import ADMIN_PREFIX
from customercloud.app import create_app
from customercloud.config import CustomerCloudSettings
from shared.auth import Scope, Service
from shared.tls import client_context
from tests.cluster_bad_input.http_cases import Attempt
from tests.cluster_bad_input.place import CANARY, Place
from tests.cluster_bad_input.routes import check


def attempts(place: Place, scratch: Path) -> Iterator[Attempt]:
    """`scratch`: state of an application that is only asked what it would serve."""
    paths = create_app(CustomerCloudSettings(state_dir=scratch)).openapi()["paths"]
    routes = [(m.upper(), path) for path, methods in paths.items() if path.startswith(ADMIN_PREFIX) for m in methods]
    assert routes
    admin = place.cluster.layout.customer_admin_token.read_text().strip()
    wrong = {
        "none": None,
        "another": CANARY,
        "no ASCII": "Bearer ä",
        "half of it": admin[: len(admin) // 2],
        "more than it": f"{admin}x",
        "Keylake's admin's": place.token(Service.KEYMANAGER, Scope.ACCOUNT_ADMIN),
    }
    for method, template in routes:
        path = re.sub(r"\{\w+\}", "x", template)
        for about, token in wrong.items():
            yield _attempt(place, about, method, path, token, b"{}", {401})
        if method in ("POST", "PUT"):
            yield _attempt(place, "malformed", method, path, admin, b"no JSON " + CANARY.encode(), {400, 404})


async def _attempt(
    place: Place, about: str, method: str, path: str, token: str | None, body: bytes, wanted: set[int]
) -> None:
    base_url = f"https://127.0.0.1:{place.cluster.ports.customercloud}"
    headers = {b"Content-Type": b"application/json"}
    if token is not None:
        headers[b"Authorization"] = f"Bearer {token}".encode()
    context = client_context(place.ca_certificate)
    async with httpx.AsyncClient(base_url=base_url, verify=context, trust_env=False) as http:
        content = body if method in ("POST", "PUT") else None
        response = await http.request(
            method, path, content=content, headers={**headers, b"Content-Type": b"application/json"}
        )
    check(response, wanted, f"customer's cloud, {about}")
