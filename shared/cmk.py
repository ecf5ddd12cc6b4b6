"""A customer's key, in whichever kind of KMS it is: how a key configuration names it.

Which kinds there are is not said here: a subclass of `CustomerKey` is one, from when it is defined. The three clouds'
are in `shared.api.keymanager`; the others come with the module that can use them (`keymanager.providers`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from shared.api.common import ApiModel


class CustomerKey(ApiModel, ABC):
    """The vendor's identifier of a key, checked as the vendor defines it, and as whom Keylake uses it. No secret.

    A subclass says `provider: Literal["name"] = "name"`, and is the only one of that name.
    """

    kinds: ClassVar[dict[str, type[CustomerKey]]] = {}
    provider: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name = cls.model_fields["provider"].default
        known = cls.kinds.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"there are two kinds of keys {name!r}: {known.__module__} and {cls.__module__}")

    @property
    @abstractmethod
    def identifier(self) -> str:
        """The key's full name where it is."""

    @property
    @abstractmethod
    def principal(self) -> str:
        """As whom we use it."""


class _OfItsKind:
    """`provider` says which class reads the rest: a tagged union of the kinds that there are when it is read."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _read,
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda key, serialize: serialize(key), schema=core_schema.any_schema()
            ),
        )

    def __get_pydantic_json_schema__(self, _: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        choices = {name: _named(kind) for name, kind in sorted(CustomerKey.kinds.items())}
        return handler(core_schema.tagged_union_schema(choices, discriminator="provider"))


def _named(kind: type[CustomerKey]) -> core_schema.CoreSchema:
    """Its schema as one that others refer to: pydantic takes the name off a schema that is used once."""
    schema: Any = {**kind.__pydantic_core_schema__, "ref": f"{kind.__module__}.{kind.__qualname__}:{id(kind)}"}
    found: core_schema.CoreSchema = schema
    return found


def _read(value: Any) -> CustomerKey:
    """Raises ValidationError, whose places pydantic puts into its own; nothing of it repeats what it read."""
    if isinstance(value, CustomerKey):
        return value
    name = value.get("provider") if isinstance(value, Mapping) else None
    kind = CustomerKey.kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise PydanticCustomError("provider", "a key names its provider, one of {known}", {"known": _known()})
    return kind.model_validate(value)


def _known() -> str:
    return ", ".join(sorted(CustomerKey.kinds))


CmkKey = Annotated[CustomerKey, _OfItsKind()]
"""Read and written as the kind that its `provider` names."""
CMK_KEY: Final[TypeAdapter[CustomerKey]] = TypeAdapter(CmkKey)
