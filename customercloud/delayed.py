"""A value whose changes take time to be seen: "eventual consistency" of key state, aliases and IAM.

Management calls see the newest value at once; what decides (cryptography, authorisation) asks `at(now)`.
"""

from __future__ import annotations

import datetime as dt
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class _View(BaseModel, Generic[T]):
    model_config = ConfigDict(frozen=True, extra="forbid")

    visible_at: dt.datetime
    value: T


class Delayed(BaseModel, Generic[T]):
    """Oldest view first; the last one whose time has come is in force."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    views: tuple[_View[T], ...]

    @classmethod
    def of(cls, value: T, now: dt.datetime) -> Delayed[T]:
        """`value`, at once and whatever was on its way before."""
        return cls(views=(_View[T](visible_at=now, value=value),))

    @property
    def newest(self) -> T:
        """What management calls see."""
        return self.views[-1].value

    def at(self, now: dt.datetime) -> T:
        return self.views[self._index(now)].value

    def then(self, value: T, now: dt.datetime, delay: dt.timedelta) -> Delayed[T]:
        """`value` after `delay`, but never before a change that was made earlier under a longer delay."""
        view = _View[T](visible_at=max(now + delay, self.views[-1].visible_at), value=value)
        return Delayed[T](views=(*self.views[self._index(now) :], view))

    def _index(self, now: dt.datetime) -> int:
        seen = (i for i in range(len(self.views) - 1, -1, -1) if self.views[i].visible_at <= now)
        return next(seen, 0)
