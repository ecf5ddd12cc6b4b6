"""How a session ends: every way in one place, as the ErrorResponse that the client sees. A core.

Severity is always FATAL: the connection closes behind it. SQLSTATEs of class KL are ours (shared/errors.py).
"""

from __future__ import annotations

from typing import Final

from shared.errors import KeyAccessError, KeylakeError
from shared.wire.pgproto import ErrorResponse

_NOT_KNOWN: Final = "Whether a COMMIT that was under way took effect is not known."


def of_error(error: KeylakeError, *, under_way: bool = False) -> bytes:
    """The error as it is; key errors with whose key it is and what to do. `under_way`: the session was not idle.

    The SQLSTATE stands in the text, too: libpq does not tell its users that of a connection that was refused.
    """
    if not isinstance(error, KeyAccessError):
        return _fatal(error.sqlstate, str(error))
    detail = f"SQLSTATE {error.sqlstate}."
    if error.workspace_id is not None:
        detail += f" The key is that of workspace {error.workspace_id}."
    if under_way:
        detail += f" {_NOT_KNOWN}"
    return _fatal(error.sqlstate, str(error), detail=detail, hint=error.hint)


def tls_required() -> bytes:
    return _fatal("28000", "this server only takes TLS connections", hint="Connect with sslmode=require or stronger.")


def too_many_connections() -> bytes:
    return _fatal("53300", "too many connections to this proxy")


def too_many_connections_of_endpoint() -> bytes:
    return _fatal("53300", "too many connections to this endpoint", hint="Close some, or use a connection pool.")


def compute_stopped() -> bytes:
    """The compute went away without a word of its own."""
    return _fatal(
        "57P01",
        "terminating connection: the compute has stopped",
        detail=_NOT_KNOWN,
        hint="Reconnect: the compute is started again, with everything that was committed.",
    )


def compute_stopped_at_login() -> bytes:
    """The same, of a client that had begun with SCRAM: another Postgres would have to begin anew."""
    return _fatal("57P03", "the compute has stopped during log-in", hint="Reconnect: the compute is started again.")


def proxy_stops() -> bytes:
    return _fatal(
        "57P01",
        "terminating connection: the proxy is shutting down",
        detail=_NOT_KNOWN,
        hint="Reconnect.",
    )


def proxy_stops_idle() -> bytes:
    """To a session in which nothing was under way."""
    return _fatal("57P01", "terminating connection: the proxy is shutting down", hint="Reconnect.")


def proxy_takes_no_more() -> bytes:
    return _fatal("57P03", "the proxy is shutting down", hint="Reconnect in a few seconds, or to another proxy.")


def unreachable() -> bytes:
    return _fatal("57P03", "the compute cannot be reached", hint="Try again in a few seconds.")


def took_too_long(what: str) -> bytes:
    return _fatal("57P03", f"{what} took too long", hint="Try again.")


def commit_in_doubt() -> bytes:
    """The wait for the quorum was cancelled."""
    return _fatal(
        "08007",
        "transaction resolution unknown: the wait for a quorum of safekeepers was cancelled",
        detail="The transaction takes effect, and can be seen, when a quorum holds it; "
        "it does not if the compute is lost before.",
        hint="Reconnect and look before you repeat it. While commits wait, one that cannot be seen may still take "
        "effect; it keeps its locks until then.",
    )


def broken_backend() -> bytes:
    return _fatal("08P01", "the compute sent something that is not the Postgres protocol")


def _fatal(sqlstate: str, text: str, *, detail: str = "", hint: str = "") -> bytes:
    return ErrorResponse.of("FATAL", sqlstate, text, detail=detail, hint=hint).serialize()
