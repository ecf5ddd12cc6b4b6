"""What a service remembers of the keymanager's word about people: which tokens are good, which project is where.

A confirmation is a lease on a token: it is asked for by name, lasts some seconds, counted from when the question was
sent, and a push ends it before that. When the session ends, all of them end.

This file is a core: no I/O and no clock of its own.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from shared.auth import PersonToken
from shared.ids import ProjectId, TokenId, WorkspaceId

CAPACITY: Final = 4096
"""Tokens, and projects, at most; whoever was asked for longest ago is forgotten and asked for again."""


class Confirmed:
    """Bounded. Times are seconds of one monotonic clock."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._tokens: OrderedDict[TokenId, tuple[bytes, float]] = OrderedDict()
        self._workspaces: OrderedDict[ProjectId, WorkspaceId] = OrderedDict()

    def confirm(self, token_id: TokenId, digest: bytes, until_s: float) -> None:
        self._tokens[token_id] = digest, until_s
        self._tokens.move_to_end(token_id)
        while len(self._tokens) > self._capacity:
            self._tokens.popitem(last=False)

    def revoke(self, token_id: TokenId) -> None:
        self._tokens.pop(token_id, None)

    def forget_tokens(self) -> None:
        """Nobody will say any more when one is revoked."""
        self._tokens.clear()

    def holds(self, person: PersonToken, now_s: float) -> bool:
        """Exactly this token was confirmed, and that is still worth something."""
        digest, until_s = self._tokens.get(person.token_id, (b"", float("-inf")))
        return now_s < until_s and hmac.compare_digest(digest, person.digest)

    def locate(self, workspaces: Mapping[ProjectId, WorkspaceId]) -> None:
        """For good: a project never leaves its workspace."""
        self._workspaces.update(workspaces)
        while len(self._workspaces) > self._capacity:
            self._workspaces.popitem(last=False)

    def workspaces(self, project_ids: Iterable[ProjectId]) -> dict[ProjectId, WorkspaceId]:
        """Those that are known."""
        return {each: self._workspaces[each] for each in project_ids if each in self._workspaces}
