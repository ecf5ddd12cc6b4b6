"""Typed reading of a JSON 1.1 request body, with AWS's validation messages."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection
from typing import Any, Final

from customercloud.aws.errors import AwsError, constraint_error, missing_error, validation_error

MAX_PLAINTEXT_SIZE_BYTES: Final = 4096
MAX_CIPHERTEXT_SIZE_BYTES: Final = 6144
MAX_CONTEXT_SIZE_CHARACTERS: Final = 8192
_YEAR_3000_S: Final = 32_503_680_000


def member_name(name: str) -> str:
    """`KeyId` → `keyId`: how validation messages and CloudTrail spell a member."""
    return name[:1].lower() + name[1:]


class Params:
    """One request's members. Unknown members are ignored, as AWS does; a wrong type is a SerializationException."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = members

    @property
    def members(self) -> dict[str, Any]:
        return self._members

    @classmethod
    def from_body(cls, body: bytes) -> Params:
        try:
            members = json.loads(body) if body else {}
            if b"\\u" in body:
                json.dumps(members, ensure_ascii=False).encode()  # a lone surrogate is no text
        except (ValueError, RecursionError):
            raise AwsError("SerializationException") from None
        if not isinstance(members, dict):
            raise AwsError("SerializationException", "Start of structure or map expected")
        return cls(members)

    def has(self, name: str) -> bool:
        """Given, and neither null nor an empty list."""
        return self._members.get(name) not in (None, [])

    def _get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self._members.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise AwsError("SerializationException", f"{member_name(name)} has the wrong type")
        return value

    def optional_string(self, name: str, minimum: int = 1, maximum: int = 2048) -> str | None:
        value = self._get(name, str)
        if value is None:
            return None
        if len(value) < minimum:
            raise constraint_error(
                value, member_name(name), f"Member must have length greater than or equal to {minimum}"
            )
        if len(value) > maximum:
            raise constraint_error(value, member_name(name), f"Member must have length less than or equal to {maximum}")
        text: str = value
        return text

    def string(self, name: str, minimum: int = 1, maximum: int = 2048) -> str:
        value = self.optional_string(name, minimum, maximum)
        if value is None:
            raise missing_error(member_name(name))
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        value = self._get(name, str)
        if value is not None and value not in choices:
            raise constraint_error(
                value, member_name(name), f"Member must satisfy enum value set: [{', '.join(choices)}]"
            )
        text: str | None = value
        return text

    def integer(self, name: str, minimum: int, maximum: int) -> int | None:
        value = self._get(name, int)
        if value is None:
            return None
        if value < minimum:
            raise constraint_error(
                str(value), member_name(name), f"Member must have value greater than or equal to {minimum}"
            )
        if value > maximum:
            raise constraint_error(
                str(value), member_name(name), f"Member must have value less than or equal to {maximum}"
            )
        number: int = value
        return number

    def optional_integer(self, name: str) -> int | None:
        """Whose range the service's model has checked."""
        value: int | None = self._get(name, int)
        return value

    def boolean(self, name: str) -> bool:
        return bool(self._get(name, bool))

    def timestamp(self, name: str) -> float | None:
        """Seconds since the epoch, as JSON 1.1 sends dates."""
        value = self._get(name, (int, float))
        if value is not None and not 0 <= value < _YEAR_3000_S:
            raise AwsError("SerializationException", f"{member_name(name)} is not a timestamp")
        return None if value is None else float(value)

    def strings(self, name: str) -> list[str]:
        """Empty when not given."""
        value = self._get(name, list) or []
        if not all(isinstance(item, str) for item in value):
            raise AwsError("SerializationException", f"{member_name(name)} has the wrong type")
        items: list[str] = value
        return items

    def structure(self, name: str) -> Params | None:
        value = self._get(name, dict)
        return None if value is None else Params(value)

    def objects(self, name: str) -> list[dict[str, Any]]:
        value = self._get(name, list) or []
        if not all(isinstance(item, dict) for item in value):
            raise AwsError("SerializationException", f"{member_name(name)} has the wrong type")
        items: list[dict[str, Any]] = value
        return items

    def blob(self, name: str, maximum: int) -> bytes:
        value = self._get(name, str)
        if value is None:
            raise missing_error(member_name(name))
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise AwsError("SerializationException") from None
        if not data:
            raise constraint_error(None, member_name(name), "Member must have length greater than or equal to 1")
        if len(data) > maximum:
            raise constraint_error(None, member_name(name), f"Member must have length less than or equal to {maximum}")
        return data

    def encryption_context(self, name: str = "EncryptionContext") -> dict[str, str]:
        """Names that differ only in case are two names. For policies they are one, with two values (`access`)."""
        value = self._get(name, dict) or {}
        if not all(isinstance(v, str) for v in value.values()):
            raise AwsError("SerializationException", f"{member_name(name)} has the wrong type")
        if any(not key for key in value):
            raise validation_error("Encryption context keys must not be empty")
        if sum(len(k) + len(v) for k, v in value.items()) > MAX_CONTEXT_SIZE_CHARACTERS:
            raise validation_error(f"Encryption context is longer than {MAX_CONTEXT_SIZE_CHARACTERS} characters")
        context: dict[str, str] = value
        return context
