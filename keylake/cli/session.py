"""The other end of a command: Keylake's client, or the customer's side, for the time of one command."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from keylake.cli.common import home_dir
from keylake.client import KeylakeClient
from keylake.place import Place, find_place
from shared.errors import (
    ConflictError,
    InvalidInputError,
    KeylakeError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from shared.roles import TOKEN_VARIABLE
from shared.tracing import Kind, span

if TYPE_CHECKING:
    from keylake.cluster import Customer

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


def ask(home: Path | None, job: Callable[[KeylakeClient], Awaitable[T]]) -> T:
    """Run one job against the cluster in `home`. Raises NotRunningError, and what the services raise."""
    there = place(home)

    async def run() -> T:
        # One trace for all that the command asks for.
        with span("keylake", Kind.CLIENT, None):
            async with client_of(there) as client:
                return await job(client)

    return asyncio.run(run())


def place(home: Path | None) -> Place:
    """The cluster that a command is about. Raises NotRunningError."""
    return find_place(home_dir(home))


def client_of(there: Place) -> KeylakeClient:
    """As whoever the environment says: with a token in it as that person, else as the owner."""
    return there.client(os.environ.get(TOKEN_VARIABLE) or None)


@contextlib.contextmanager
def customer(home: Path | None) -> Iterator[Customer]:
    """The customer's side of the cluster in `home`. Its cloud's refusals become our errors."""
    side = place(home).customer()
    from botocore.exceptions import BotoCoreError, ClientError  # it is imported by now

    try:
        yield side
    except ClientError as error:
        raise cloud_error(error.response.get("Error", {})) from None
    except BotoCoreError as error:
        raise UnavailableError(f"the customer's cloud cannot be reached: {type(error).__name__}") from None
    finally:
        side.close()


def cloud_error(body: Any) -> KeylakeError:
    """What AWS's exceptions mean for the caller (KMS API Reference, errors of each action)."""
    code, message = str(body.get("Code", "")), str(body.get("Message", ""))
    text = f"the customer's cloud says {code}: {message}" if message else f"the customer's cloud says {code}"
    match code:
        case "AccessDeniedException" | "AccessDenied" | "UnrecognizedClientException":
            return PermissionDeniedError(text)
        case "NotFoundException":
            return NotFoundError(text)
        case "ValidationException" | "InvalidArnException" | "MalformedPolicyDocumentException":
            return InvalidInputError(text)
        case "KMSInvalidStateException" | "DisabledException" | "ConflictException" | "LimitExceededException":
            return ConflictError(text)
        case _:
            return UnavailableError(text)


def build(model: type[Model], **values: Any) -> Model:
    """A request from what the user typed. Raises InvalidInputError that names what is wrong with which value."""
    try:
        return model(**values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise InvalidInputError("; ".join(problems)) from None
