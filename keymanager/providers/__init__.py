"""The kinds of KMS that there are: from a key configuration's CMK to the adapter that speaks for it.

Every module of this package is one kind, its `KIND`; so is what other distributions that are installed here give as
entry points of the group `keylake.kms`. There is no list of them anywhere. What does not load stops whoever needs it:
a keymanager without one of its kinds would take the keys of that kind for keys that nobody can use.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Final

from keymanager.kms.base import KmsCallObserver, KmsProvider
from keymanager.kms.kind import KmsKind
from shared.cmk import CmkKey

ENTRY_POINTS: Final = "keylake.kms"
Kind = KmsKind[Any, Any]
ProviderFactory = Callable[[CmkKey, KmsCallObserver], KmsProvider]
"""Raises InvalidInputError when the settings have nothing to use the key with."""


def _found() -> Iterator[Kind]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        yield importlib.import_module(module.name).KIND
    for entry in entry_points(group=ENTRY_POINTS):
        yield entry.load()


def _by_name() -> Mapping[str, Kind]:
    kinds: dict[str, Kind] = {}
    for kind in _found():
        if not isinstance(kind, KmsKind) or kinds.setdefault(kind.name, kind) is not kind:
            raise TypeError(f"{kind!r} is no kind of KMS, or there are two of its name")
    return MappingProxyType(kinds)


KINDS: Final = _by_name()
"""By the `provider` of their keys."""


def kind_of(key: CmkKey) -> Kind:
    return KINDS[key.provider]
