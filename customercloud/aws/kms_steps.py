"""Steps that KMS's management operations share: the key of a request, a change of it, pages of a listing, tags."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError
from customercloud.aws.keys import Key
from customercloud.aws.params import Params
from customercloud.aws.state import AwsState

_DEFAULT_PAGE: Final = 100
_MAX_TAGS: Final = 50


class KeySteps:
    """`delay` is asked at every change: how long cryptographic calls will still see what was before."""

    def __init__(self, state: AwsState, access: KeyAccess, delay: Callable[[], dt.timedelta]) -> None:
        self.delay = delay
        self._state = state
        self._access = access

    def key(
        self,
        call: Call,
        params: Params,
        logged: dict[str, Any] | None = None,
        *,
        read_only: bool = False,
        alias: bool = False,
        conditions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Key:
        """The key that the request names, with the caller authorised for this action on it.

        `alias`: whether the operation takes aliases as well; most of those that change a key do not.
        """
        key_id = params.string("KeyId")
        call.audit.read_only = read_only
        call.audit.request_parameters = {"keyId": key_id} | (logged or {})
        key = self._access.resolve(call, key_id, alias=alias)
        tokens = params.strings("GrantTokens")
        self._access.authorize(call, key, grant_tokens=tokens, more=conditions or {})
        return key

    def keep(self, key: Key) -> None:
        """What an operation leaves behind that changes nothing."""
        self._state.put_key(key)

    def change(self, call: Call, key: Key) -> None:
        self._state.put_key(key)
        if call.audit.request_parameters is not None:
            call.audit.request_parameters["keyId"] = key.arn
        call.audit.response_elements = {"keyId": key.arn}


def page(names: list[str], call: Call, params: Params) -> tuple[list[str], dict[str, Any]]:
    """One page of sorted names: Limit (1 … 1000); Marker has the last name of the page before.

    A name that is removed between two pages moves nothing: the next page starts after where it was. Raises
    InvalidMarkerException for a marker that this operation did not give.
    """
    limit = params.integer("Limit", 1, 1000) or _DEFAULT_PAGE
    marker = params.optional_string("Marker", 1, 1024)
    last = None if marker is None else _last_name(marker, call.action)
    rest = names if last is None else [name for name in names if name > last]
    taken = rest[:limit]
    if len(rest) <= limit:
        return taken, {"Truncated": False}
    next_marker = base64.urlsafe_b64encode(json.dumps([call.action, taken[-1]]).encode()).decode("ascii")
    return taken, {"Truncated": True, "NextMarker": next_marker}


def _last_name(marker: str, action: str) -> str:
    try:
        match json.loads(base64.urlsafe_b64decode(marker.encode("ascii"))):
            case [str(given), str(last)] if given == action:
                return last
    except (ValueError, RecursionError):
        pass
    raise AwsError("InvalidMarkerException", "The marker is invalid, or was used with another operation.")


def new_tags(old: Mapping[str, str], params: Params) -> dict[str, str]:
    """`old` with the request's Tags. Raises TagException."""
    given = [(str(tag["TagKey"]), str(tag["TagValue"])) for tag in params.objects("Tags")]
    if len({name for name, _ in given}) != len(given):
        raise AwsError("TagException", "Duplicate tag keys")
    if any(name.lower().startswith("aws:") for name, _ in given):
        raise AwsError("TagException", "Tags beginning with aws: are reserved")
    tags = {**old, **dict(given)}
    if len(tags) > _MAX_TAGS:
        raise AwsError("TagException", "Too many tags")
    return tags


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """As CloudTrail shows them."""
    return [{"tagKey": name, "tagValue": value} for name, value in tags.items()]


def tag_conditions(tags: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The condition keys of a request that sets these tags."""
    values = {f"aws:requesttag/{name.lower()}": (value,) for name, value in tags.items()}
    return values | ({"aws:tagkeys": tuple(tags)} if tags else {})
