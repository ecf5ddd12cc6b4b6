"""Fixtures that several test modules share: a customer's clouds, a keymanager, an S3 server. And modules' order."""

from __future__ import annotations

import gc

import pytest

pytest_plugins = [
    "tests.fixtures.crashes",
    "tests.fixtures.s3",
    "tests.fixtures.customercloud",
    "tests.fixtures.azure",
    "tests.fixtures.google",
    "tests.fixtures.keymanager",
    "tests.fixtures.keymanager_replicas",
    "tests.fixtures.kms_clouds",  # last: it imports others, and pytest rewrites what it imports itself
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start whole clusters first, then other long ones, units last: parallel workers that take the next
    module when they are free then end at nearly the same time. Within that, the order stays as pytest-randomly made it.
    """
    weights = ("cluster", "integration", "simulation", "property")

    def weight(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return next((at for at, name in enumerate(weights) if folder.startswith(name)), len(weights))

    items.sort(key=weight)


def pytest_collection_finish() -> None:
    """What was collected is there to the end: no garbage collection shall look at it again."""
    gc.collect()
    gc.freeze()
