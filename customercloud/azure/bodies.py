"""Request bodies of Key Vault: JSON members taken one by one, each with the service's own refusal. Pure."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from customercloud.azure import errors

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*={0,2}")
MAX_TAGS: Final = 15
MAX_TAG_SIZE_CHARACTERS: Final = 256
_MAX_TIMESTAMP: Final = 253402300799  # 9999-12-31T23:59:59Z


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unbase64url(text: str) -> bytes | None:
    """None for what is not base64url. Padding may be there or not, as with the service."""
    if _BASE64URL.fullmatch(text) is None or len(text.rstrip("=")) % 4 == 1:
        return None
    stripped = text.rstrip("=")
    try:
        return base64.urlsafe_b64decode(stripped + "=" * (-len(stripped) % 4))
    except (ValueError, binascii.Error):
        return None


class Body:
    """The members of a JSON object. Every reader raises AzureError; members that nobody asks for are ignored."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = members

    @classmethod
    def parse(cls, data: bytes) -> Body:
        """An empty body has no members."""
        if not data:
            return cls({})
        try:
            members = json.loads(data)
        except (ValueError, RecursionError):
            raise errors.invalid_value() from None
        if not isinstance(members, dict):
            raise errors.invalid_value()
        return cls(members)

    def with_member(self, name: str, other: Body) -> Body:
        """With the member that `other` has of this name, if it has it."""
        return Body({**self._members, name: other._members.get(name)})

    def has(self, name: str) -> bool:
        return self._members.get(name) is not None

    def text(self, name: str) -> str:
        value = self.optional_text(name)
        if value is None:
            raise errors.required(name)
        return value

    def optional_text(self, name: str) -> str | None:
        value = self._members.get(name)
        if value is not None and not isinstance(value, str):
            raise errors.invalid_value()
        return value

    def binary(self, name: str, max_size_bytes: int) -> bytes:
        data = unbase64url(self.text(name))
        if data is None:
            raise errors.not_base64url(name)
        if not data:
            raise errors.required(name)
        if len(data) > max_size_bytes:
            raise errors.incorrect_parameter()
        return data

    def integer(self, name: str) -> int | None:
        value = self._members.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise errors.invalid_value()
        return value

    def boolean(self, name: str) -> bool | None:
        value = self._members.get(name)
        if value is not None and not isinstance(value, bool):
            raise errors.invalid_value()
        return value

    def timestamp(self, name: str) -> dt.datetime | None:
        """Whole seconds since 1970."""
        seconds = self.integer(name)
        if seconds is None:
            return None
        if not 0 <= seconds <= _MAX_TIMESTAMP:
            raise errors.invalid_value()
        return dt.datetime.fromtimestamp(seconds, dt.UTC)

    def object(self, name: str) -> Body | None:
        value = self._members.get(name)
        if value is not None and not isinstance(value, dict):
            raise errors.invalid_value()
        return None if value is None else Body(value)

    def objects(self, name: str) -> list[Body]:
        values = self._members.get(name) or []
        if not isinstance(values, list) or any(not isinstance(value, dict) for value in values):
            raise errors.invalid_value()
        return [Body(value) for value in values]

    def words(self, name: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list of strings out of `known`, each kept once."""
        values = self._members.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or any(not isinstance(v, str) or v not in known for v in values):
            raise errors.invalid_value()
        return tuple(dict.fromkeys(values))

    def tags(self, name: str) -> dict[str, str] | None:
        values = self._members.get(name)
        if values is None:
            return None
        if (
            not isinstance(values, dict)
            or len(values) > MAX_TAGS
            or any(not isinstance(v, str) or max(len(k), len(v)) > MAX_TAG_SIZE_CHARACTERS for k, v in values.items())
        ):
            raise errors.invalid_value()
        return dict(values)
