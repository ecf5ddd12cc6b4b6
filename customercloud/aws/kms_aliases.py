"""Aliases: names of keys, per account, that can be pointed at another key."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, Final

from customercloud.aws import arn as arns
from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, not_found, validation_error
from customercloud.aws.keys import Key
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import page
from customercloud.aws.params import Params
from customercloud.aws.state import Alias, AwsState

_MAX_ALIASES_OF_A_KEY: Final = 50


class KmsAliases:
    """An alias and its key are authorised each by itself: whoever may do the one may not do the other by that."""

    def __init__(self, state: AwsState, access: KeyAccess, delay: Callable[[], dt.timedelta]) -> None:
        """`delay`: how long requests that name an alias will still be led where it pointed before a change."""
        self._state = state
        self._access = access
        self._delay = delay

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "CreateAlias": self.create_alias,
            "UpdateAlias": self.update_alias,
            "ListAliases": self.list_aliases,
            "DeleteAlias": self.delete_alias,
        }

    def create_alias(self, call: Call, params: Params) -> None:
        name, alias_arn, key = self._named(call, params)
        key.refuse_pending_deletion()
        old = self._state.snapshot.aliases.get(alias_arn)
        if old is not None and old.is_listed:
            raise AwsError("AlreadyExistsException", f"An alias with the name {alias_arn} already exists")
        self._refuse_too_many(key)
        alias = Alias.new(name, key.account_id, key.key_id, call.now, self._delay())
        self._state.put_alias(alias if old is None else old.again(alias, call.now, self._delay()))

    def update_alias(self, call: Call, params: Params) -> None:
        _, alias_arn, key = self._named(call, params)
        alias = self._existing(alias_arn)
        self._access.authorize(call, self._access.resolve(call, alias.key_id))
        key.refuse_pending_deletion()
        if alias.key_id != key.key_id:
            self._refuse_too_many(key)
        self._state.put_alias(alias.pointed_at(key.key_id, call.now, self._delay()))

    def delete_alias(self, call: Call, params: Params) -> None:
        name = _alias_name(params)
        call.audit.read_only = False
        call.audit.request_parameters = {"aliasName": name}
        alias_arn = self._arn(call, name)
        self._access.authorize_account(call, alias_arn)
        alias = self._existing(alias_arn)
        self._access.authorize(call, self._access.resolve(call, alias.key_id))
        delay = self._delay()
        if delay:
            self._state.put_alias(alias.ended(call.now, delay))
        else:
            self._state.remove_alias(alias)

    def list_aliases(self, call: Call, params: Params) -> dict[str, Any]:
        self._access.authorize_account(call)
        only = params.optional_string("KeyId")
        key_id = None if only is None else self._access.resolve(call, only, alias=False).key_id
        account_id = call.caller.caller.account_id
        own = {
            alias.name: alias
            for alias in self._state.snapshot.aliases.values()
            if alias.is_listed and alias.account_id == account_id and key_id in (None, alias.key_id)
        }
        names, paging = page(sorted(own), call, params)
        return {
            "Aliases": [
                {
                    "AliasName": name,
                    "AliasArn": self._arn(call, name),
                    "TargetKeyId": own[name].key_id,
                    "CreationDate": own[name].created_at.timestamp(),
                    "LastUpdatedDate": (own[name].updated_at or own[name].created_at).timestamp(),
                }
                for name in names
            ]
        } | paging

    def _named(self, call: Call, params: Params) -> tuple[str, str, Key]:
        """(alias name, its ARN, the key to point it at), the caller authorised for both."""
        name, target = _alias_name(params), params.string("TargetKeyId")
        call.audit.read_only = False
        call.audit.request_parameters = {"aliasName": name, "targetKeyId": target}
        if arns.ALIAS_PREFIX in target:
            raise validation_error("Aliases must refer to keys. Not aliases")
        key = self._access.resolve(call, target, alias=False)
        alias_arn = self._arn(call, name)
        self._access.authorize_account(call, alias_arn)
        self._access.authorize(call, key)
        if key.account_id != call.caller.caller.account_id:
            raise validation_error("An alias and its key must be in the same account")
        return name, alias_arn, key

    def _existing(self, alias_arn: str) -> Alias:
        alias = self._state.snapshot.aliases.get(alias_arn)
        if alias is None or not alias.is_listed:
            raise not_found(f"Alias {alias_arn} is not found.")
        return alias

    def _refuse_too_many(self, key: Key) -> None:
        if len(self._access.aliases_of(key)) >= _MAX_ALIASES_OF_A_KEY:
            raise AwsError("LimitExceededException", f"{key.arn} has {_MAX_ALIASES_OF_A_KEY} aliases already")

    def _arn(self, call: Call, name: str) -> str:
        return arns.alias_arn(self._state.region, call.caller.caller.account_id, name)


def _alias_name(params: Params) -> str:
    name = params.string("AliasName", 1, 256)
    if not name.startswith(arns.ALIAS_PREFIX):
        raise validation_error(
            'Alias must start with the prefix "alias/". '
            "Please see https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html"
        )
    if name.startswith("alias/aws/"):
        raise AwsError("NotAuthorizedException")
    if ":" in name:
        raise validation_error(f"{name} contains invalid characters for an alias")
    if not arns.is_alias_name(name):
        raise AwsError("InvalidAliasNameException", "the alias name has characters that are not allowed")
    return name
