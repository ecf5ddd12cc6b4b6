"""Keylake: a serverless Postgres whose every layer is sealed under a key that the customer holds.

`Cluster` runs all of it on this machine; `KeylakeClient` speaks to one that runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keylake.client import KeylakeClient
    from keylake.cluster import Cluster, RunningProject

__all__ = ["Cluster", "KeylakeClient", "RunningProject"]

_HOMES = {"Cluster": "cluster", "RunningProject": "cluster", "KeylakeClient": "client"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for, so that the command line starts quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'keylake' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"keylake.{_HOMES[name]}"), name)
