"""Whose password the proxy asks for before a compute is started, and by which verifier (ADR 49). A core.

What was listed at the end of a timeline's last compute holds until the next one is elected. It is that one's if its
term is still the timeline's: a term is reserved before anybody could change a role in it. Otherwise nobody knows, and
the compute asks for the password itself, as one that runs does: who is known to Postgres alone is never locked out.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from compute.repository import EndpointRow, ListedRole
from shared.wire.scram import ScramVerifier


def verifier_of(endpoint: EndpointRow, listed: ListedRole, user: bytes, now: datetime) -> ScramVerifier | None:
    """None: nobody knows who may log in. Of a role that does not exist, or has no password that is valid, a decoy."""
    if endpoint.read_only_lsn is not None:
        return None  # it has the roles of a point in time
    if not endpoint.scram_verifier:
        return None  # the project is shredded: whoever starts it is told
    if listed.term is not None and listed.term == listed.last_term and listed.mock_nonce is not None:
        role, nonce = listed.role, bytes.fromhex(listed.mock_nonce)
        # The start of an endpoint gives the owner its own password, unless that was the last to start (agent/roles.py).
        resets_owner = not endpoint.follows and listed.endpoint_id != str(endpoint.endpoint_id)
    elif listed.last_term == 0 and not listed.is_branch and not endpoint.follows:
        # Nothing has run, so the owner is all there will be. Its verifier is a secret as good as any.
        role, nonce = None, hashlib.sha256(endpoint.scram_verifier.encode()).digest()
        resets_owner = True
    else:
        return None
    if resets_owner and user == endpoint.owner.encode():
        return ScramVerifier.parse(endpoint.scram_verifier)
    if role is None or (role.valid_until is not None and role.valid_until <= now):
        return ScramVerifier.decoy(user, nonce)
    return ScramVerifier.parse(role.verifier)
