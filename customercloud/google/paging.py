"""Pages of a list: filtered, ordered by name, with a token that says after which name the next page begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import proto

from customercloud.google import filters
from customercloud.google.errors import bad_request, invalid_argument

M = TypeVar("M", bound=proto.Message)
DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
_TOKEN_PREFIX: Final = b"after:"
_DESCENDING: Final = {"": False, "name": False, "name asc": False, "name desc": True}


class ListRequest(Protocol):
    page_size: int
    page_token: str
    filter: str
    order_by: str


@dataclass(frozen=True, slots=True)
class Page(Generic[M]):
    items: list[M]
    next_token: str
    """Empty on the last page."""
    total_size: int
    """0 when a filter was applied, as the service has it."""


def page_of(
    kind: type[M], messages: Iterable[M], request: ListRequest, order: Callable[[M], str] | None = None
) -> Page[M]:
    """`order`: what sorts as the name does; the name itself if not given. Raises INVALID_ARGUMENT for a token, a filter
    or an order that is none."""
    name = order or _name
    descending = _DESCENDING.get(" ".join(request.order_by.split()))
    if descending is None:
        raise bad_request("order_by", f"Invalid order_by: '{request.order_by[:64]}'. Results are sorted by name.")
    if request.page_size < 0:
        raise bad_request("page_size", "page_size must not be negative.")
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    after = _name_in(request.page_token)
    everything = list(messages)
    matches = filters.parsed(request.filter, kind.pb().DESCRIPTOR)
    matching = sorted((m for m in everything if matches(kind.pb(m))), key=name, reverse=descending)
    rest = [m for m in matching if after is None or (name(m) < after if descending else name(m) > after)]
    chosen = rest[:size]
    token = _token(name(chosen[-1])) if len(rest) > size else ""
    return Page(chosen, token, 0 if request.filter else len(everything))


def _name(message: Any) -> str:
    return str(message.name)


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(_TOKEN_PREFIX + name.encode()).decode("ascii")


def _name_in(token: str) -> str | None:
    if not token:
        return None
    try:
        data = base64.b64decode(token, altchars=b"-_", validate=True)
        if not data.startswith(_TOKEN_PREFIX):
            raise ValueError
        return data.removeprefix(_TOKEN_PREFIX).decode()
    except (binascii.Error, ValueError):
        raise invalid_argument("The page token is not valid.") from None
