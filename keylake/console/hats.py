"""Who looks: the console's user wears one hat at a time, and every call is made with that hat's own credentials.

So the console decides nothing about permissions. A security admin sees keys and no data, because the services say so.
Two hats are no role of Keylake: the customer acts in the customer's cloud, with the customer's access key, and the
operator has the machines and the network between them, and neither keys nor data.
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Final

from keylake.client import KeylakeClient
from keylake.place import Place
from shared.auth import PersonRole
from shared.errors import KeylakeError, PermissionDeniedError
from shared.ids import TokenId

TOKEN_TTL_S: Final = 3600
_RENEW_BEFORE_S: Final = 300


class Hat(enum.StrEnum):
    CUSTOMER = "customer"
    ACCOUNT_ADMIN = "account-admin"
    SECURITY_ADMIN = "security-admin"
    SECOND_SECURITY_ADMIN = "second-security-admin"
    """Another person than the first: shredding takes the word of two."""
    WORKSPACE_ADMIN = "workspace-admin"
    DATA_USER = "data-user"
    AUDITOR = "auditor"
    OPERATOR = "operator"

    @property
    def role(self) -> PersonRole:
        """Raises PermissionDeniedError for those who have none here."""
        if self is Hat.CUSTOMER:
            raise PermissionDeniedError("the customer has no role in Keylake: it acts in its own cloud")
        if self is Hat.OPERATOR:
            raise PermissionDeniedError("who runs the machines has no role in Keylake: no keys, and no data")
        return PersonRole.SECURITY_ADMIN if self is Hat.SECOND_SECURITY_ADMIN else PersonRole(self.value)

    @property
    def subject(self) -> str:
        """Whom its tokens are for, as the audit chain has it."""
        return "console-2" if self is Hat.SECOND_SECURITY_ADMIN else "console"


class Wardrobe:
    """A client per hat, each with a token of its own that is renewed in time and revoked at the end."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._owner = place.client()
        self._worn: dict[Hat, tuple[KeylakeClient, float]] = {}
        self._tokens: list[TokenId] = []
        self.denied: dict[tuple[Hat, str], str] = {}
        """(hat, what it asked for) → why not. Roles do not change, so it is asked for once and not every second: every
        refusal is a record in the audit chain."""
        self._lock = asyncio.Lock()

    async def client(self, hat: Hat) -> KeylakeClient:
        """Raises UnavailableError, PermissionDeniedError."""
        async with self._lock:
            worn = self._worn.get(hat)
            if worn is None or worn[1] < time.monotonic() + _RENEW_BEFORE_S:
                token, issued = await self._owner.create_token(hat.role, subject=hat.subject, ttl_s=TOKEN_TTL_S)
                self._tokens.append(issued.token_id)
                if worn is not None:
                    await worn[0].aclose()
                worn = self._worn[hat] = (self._place.client(token), time.monotonic() + TOKEN_TTL_S)
            return worn[0]

    async def aclose(self) -> None:
        for client, _ in self._worn.values():
            await client.aclose()
        for token_id in self._tokens:
            try:
                await self._owner.revoke_token(token_id)
            except KeylakeError:
                break  # the cluster has stopped; they expire by themselves
        await self._owner.aclose()
