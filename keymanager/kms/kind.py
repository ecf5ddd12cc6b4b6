"""One kind of KMS: everything that Keylake knows of it.

A kind is one module of `keymanager/providers`, which nothing else names: the key's identifier, settings, the adapter,
the verdicts of its errors, the words for what is missing, and its audit log's form. Or a module of another
distribution, which names its kind as an entry point of the group `keylake.kms`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from keymanager.kms.base import KmsCallObserver, KmsError, KmsProvider
from keymanager.kms.calls import CallLimits
from shared.clock import Clock
from shared.cmk import CustomerKey
from shared.kms_log import LogReader

K = TypeVar("K", bound=CustomerKey)
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every adapter gets, whatever it speaks to."""

    limits: CallLimits
    observer: KmsCallObserver
    """Hears of every request."""
    clock: Clock


class KmsKind(ABC, Generic[K, S]):
    """`key` names the kind (its `provider`), and `settings` are found under that name in the keymanager's.

    All fields of `settings` have defaults: most keymanagers have nothing to do with most kinds.
    """

    key: type[K]
    settings: type[S]
    adapter: str | None = None
    """Module that `connect` imports, with a vendor's SDK that takes seconds to load. Who only reads keys and logs does
    without; a keymanager loads it before it leads, because then it has no seconds to spare."""
    log: LogReader | None = None
    """Reads the customer's own log of key uses, for `keylake audit reconcile`."""

    @property
    def name(self) -> str:
        return str(self.key.model_fields["provider"].default)

    def load(self) -> None:
        """Blocks. Raises ImportError."""
        if self.adapter is not None:
            importlib.import_module(self.adapter)

    @abstractmethod
    def connect(self, key: K, settings: S, around: Surroundings) -> KmsProvider:
        """Makes no call. Raises InvalidInputError when the settings have nothing to use the key with."""

    @abstractmethod
    def permission(self, error: KmsError, key: K) -> str:
        """The one that this refusal is about, by the vendor's name, and in parentheses where it is given."""

    @abstractmethod
    def principal(self, key: K) -> str:
        """Why the principal cannot be used any more, and what to change."""

    def session_life_s(self, settings: S) -> float | None:
        """How long a session may outlive the trust in us that it was opened on. None: not ours to know."""
        return None
