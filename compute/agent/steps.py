"""The end of a compute, step by step. A core."""

from __future__ import annotations

import time
from collections.abc import Callable


class Steps:
    """What has to be done, in this order, before it may be said that nothing is left."""

    def __init__(self, **steps: Callable[[], str | None]) -> None:
        """A step returns what it has to be called if that is not its name: it did not go as the name says."""
        self._left = steps
        self._done_s: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Returns when all steps are done, by this call or an earlier one: seconds per step.

        One that fails does not keep the others from being done. The next call does again what has failed, and nothing
        else. Raises what the first that failed has raised: then nothing may be said yet.
        """
        failure: Exception | None = None
        for name, step in list(self._left.items()):
            began = time.monotonic()
            try:
                did = step()
            except Exception as error:
                failure = failure or error
                continue
            self._done_s[did or name] = round(time.monotonic() - began, 6)
            del self._left[name]
        if failure is not None:
            raise failure
        return dict(self._done_s)
