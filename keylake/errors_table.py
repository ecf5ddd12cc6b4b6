"""What clients are told, as the code has it: docs/errors.md.

python -m keylake.errors_table > docs/errors.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Final

from compute.proxy import goodbye
from shared.api.keymanager import KeyState
from shared.errors import ERRORS_BY_CODE, KeyAccessError
from shared.ids import WorkspaceId
from shared.lease import key_access_error
from shared.wire.pgproto import ErrorField, ErrorResponse

_WORKSPACE: Final = WorkspaceId.parse("ws-0123456789abcdef")
_REASON: Final = "*reason*"
_HEADER_BYTES: Final = 5
"""Type and length, before a message's payload."""

_HEAD: Final = """\
# What clients are told

*Generated from the code by `make docs-errors`; a test fails when it is not current.*

## When it is the key

One SQLSTATE, one HTTP status and one code each. The message ends with the reason: what the KMS answered, or what the
operator said. DETAIL says `The key is that of workspace ws-….`, and, to a session that was not idle, `Whether a COMMIT
that was under way took effect is not known.`; HINT says what to do. Over HTTP these are `message`, `workspace_id` and
`hint` of the body. SQLSTATEs of class `KL` are ours. Severity is FATAL: the session ends behind it. A client that has
not read what it was sent so far is cut off without a word: nothing that waits to be sent leaves when the key is gone.

"""

_COMMITS: Final = """
## A commit that was under way

It is acknowledged and durable, or reported as unknown; never acknowledged and lost.

| what the client saw | what it means |
|---|---|
| the answer to COMMIT | a quorum of safekeepers holds it, sealed and flushed: it is there when everything comes back |
| an ending of above or below, or a broken connection, before that answer | unknown: look before you repeat it |
| an error in the transaction, before COMMIT was sent | it did not take effect |

`tests/cluster_faults` compares what clients were told with what is there, after every fault of its matrix.

## How the proxy ends sessions otherwise

| SQLSTATE | message | detail | hint |
|---|---|---|---|
"""

_OTHERS: Final = """
## Every code of the HTTP APIs

The body of every answer that is not 2xx is `{"code", "message", "retryable"}`, with `workspace_id` and `hint` when it
is the key. `retryable` says whether the same call may be repeated later.

| code | HTTP | SQLSTATE | retryable |
|---|---|---|---|
"""


def document() -> str:
    """The whole of docs/errors.md."""
    keys = ["| state | SQLSTATE | HTTP | code | message | hint |", "|---|---|---|---|---|---|"]
    for state, error in key_errors():
        told = ErrorResponse.parse(goodbye.of_error(error)[_HEADER_BYTES:])
        name = "no live lease" if state is KeyState.ACTIVE else state.value
        hint = told.get(ErrorField.HINT) or ""
        keys.append(_row(name, told.sqlstate, str(error.http_status), f"`{error.code}`", told.message, hint))
    endings = [
        _row(each.sqlstate, each.message, each.get(ErrorField.DETAIL) or "", each.get(ErrorField.HINT) or "")
        for each in other_endings()
    ]
    others = [
        _row(f"`{cls.code}`", str(cls.http_status), cls.sqlstate, "yes" if cls.retryable else "no")
        for cls in ERRORS_BY_CODE.values()
    ]
    parts = (_HEAD, "\n".join(keys), "\n", _COMMITS, "\n".join(endings), "\n", _OTHERS, "\n".join(others), "\n")
    return "".join(parts)


def key_errors() -> Iterator[tuple[KeyState, KeyAccessError]]:
    """What each state means to whoever wants the data; ACTIVE stands for a lease that ran out."""
    for state in (KeyState.REVOKED, KeyState.SUSPENDED, KeyState.SHREDDED, KeyState.ERASED, KeyState.ACTIVE):
        yield state, key_access_error(state, _REASON, _WORKSPACE)


def other_endings() -> list[ErrorResponse]:
    """Every other farewell, in the order in which goodbye.py has them."""
    found = []
    for name, farewell in vars(goodbye).items():
        if name.startswith("_") or not inspect.isfunction(farewell) or farewell is goodbye.of_error:
            continue
        arguments = ["*step*"] * len(inspect.signature(farewell).parameters)
        found.append(ErrorResponse.parse(farewell(*arguments)[_HEADER_BYTES:]))
    return found


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    sys.stdout.write(document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
