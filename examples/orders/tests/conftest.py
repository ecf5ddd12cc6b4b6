"""The order service on a database whose key the customer holds. `keylake_dsn` comes with Keylake's pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from app import Base, create_app
from fastapi.testclient import TestClient


@pytest.fixture
def shop(keylake_dsn: str) -> Iterator[TestClient]:
    app = create_app(keylake_dsn)
    Base.metadata.create_all(app.state.engine)
    with TestClient(app) as client:
        yield client
    app.state.engine.dispose()
