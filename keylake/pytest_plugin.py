"""Fixtures for tests of systems that run on Keylake. Loaded by pytest wherever Keylake is installed; docs/testing.md.

    def test_the_shop_closes(keylake_dsn, customer_key, keylake_project, shop):
        customer_key.disable()
        assert_sealed(keylake_project, within=5)     # from keylake.testing
        assert shop.get("/orders").status_code == 503

Nothing is imported or started before a test asks for it. With pytest-xdist every worker has a cluster of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from keylake.testing import CustomerKey, LocalCluster, ProtectedProject


@pytest.fixture(scope="session")
def keylake_settings() -> Mapping[str, Mapping[str, Any]]:
    """Settings of the services that differ from their defaults: none. Override it in your conftest.py:

    return {"keymanager": {"lease_ttl_s": 2, "restore_hold_s": 0}}
    """
    return {}


@pytest.fixture(scope="session")
def keylake_cluster(keylake_settings: Mapping[str, Mapping[str, Any]]) -> Iterator[LocalCluster]:
    """A running Keylake with a customer's cloud, for the whole session: see `keylake.testing.LocalCluster`."""
    from keylake.testing import LocalCluster

    with LocalCluster(settings=keylake_settings) as cluster:
        yield cluster


@pytest.fixture
def keylake_project(keylake_cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[ProtectedProject]:
    """An empty database under a CMK of its own, for one test."""
    project = keylake_cluster.create_project(request.node.name[:100])
    yield project
    project.kill_compute()


@pytest.fixture
def keylake_dsn(keylake_project: ProtectedProject) -> str:
    """`postgresql://…` of `keylake_project`."""
    return keylake_project.dsn


@pytest.fixture
def customer_key(keylake_project: ProtectedProject) -> CustomerKey:
    """The CMK of `keylake_project`, in the customer's hands: disable, enable, deny, rotate, outage …"""
    return keylake_project.key
