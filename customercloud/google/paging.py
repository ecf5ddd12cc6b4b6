"""Pages of a list: ordered by name, with a token that says after which name the next page begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from customercloud.google.errors import bad_request, invalid_argument, unimplemented

T = TypeVar("T")
DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
_TOKEN_PREFIX: Final = b"after:"


class ListRequest(Protocol):
    page_size: int
    page_token: str
    filter: str
    order_by: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: list[T]
    next_token: str
    """Empty on the last page."""


def page_of(items: Iterable[T], name: Callable[[T], str], request: ListRequest) -> Page[T]:
    """Raises INVALID_ARGUMENT for a token that is none; UNIMPLEMENTED for filters, which would be half ones."""
    if request.filter or request.order_by not in ("", "name"):
        raise unimplemented("filter and order_by (other than name) do not exist here.")
    if request.page_size < 0:
        raise bad_request("page_size", "page_size must not be negative.")
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    after = _name_in(request.page_token)
    rest = sorted((item for item in items if name(item) > after), key=name)
    chosen = rest[:size]
    return Page(chosen, _token(name(chosen[-1])) if len(rest) > size else "")


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(_TOKEN_PREFIX + name.encode()).decode("ascii")


def _name_in(token: str) -> str:
    if not token:
        return ""
    try:
        data = base64.b64decode(token, altchars=b"-_", validate=True)
        if not data.startswith(_TOKEN_PREFIX):
            raise ValueError
        return data.removeprefix(_TOKEN_PREFIX).decode()
    except (binascii.Error, ValueError):
        raise invalid_argument("The page token is not valid.") from None
