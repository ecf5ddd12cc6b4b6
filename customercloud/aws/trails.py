"""What CloudTrail has besides its event history: trails, event data stores, channels, dashboards. There are none here:
listings are empty, what names one is refused as AWS refuses an unknown one, and none can be made."""

from __future__ import annotations

from typing import Any, Final

from customercloud.aws.access import KeyAccess
from customercloud.aws.arn import Arn
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, unsupported
from customercloud.aws.kms import Operation
from customercloud.aws.params import Params
from customercloud.aws.validation import ServiceModel

_LISTS: Final = {
    "DescribeTrails": "trailList",
    "ListTrails": "Trails",
    "ListPublicKeys": "PublicKeyList",
    "ListEventDataStores": "EventDataStores",
    "ListChannels": "Channels",
    "ListDashboards": "Dashboards",
    "ListImports": "Imports",
    "SearchSampleQueries": "SearchResults",
}
_NAMES: Final = {
    "TrailNotFoundException": ("Name", "TrailName"),
    "EventDataStoreNotFoundException": ("EventDataStore",),
    "ChannelNotFoundException": ("Channel",),
    "ImportNotFoundException": ("ImportId",),
    "QueryIdNotFoundException": ("QueryId",),
    "ResourceNotFoundException": ("ResourceArn", "ResourceId", "ResourceIdList", "DashboardId"),
    "AccountNotFoundException": ("DelegatedAdminAccountId", "MemberAccountId"),
}
"""Error that an operation may declare → members that name what there is none of."""


class Trails:
    def __init__(self, model: ServiceModel, access: KeyAccess) -> None:
        self._model = model
        self._access = access

    @property
    def operations(self) -> dict[str, Operation]:
        """Everything of the service's model but LookupEvents."""
        absent = self._model.operations - _LISTS.keys() - {"LookupEvents"}
        return {**dict.fromkeys(_LISTS, self.empty), **dict.fromkeys(absent, self.unknown)}

    def empty(self, call: Call, params: Params) -> dict[str, Any]:
        self._access.authorize_account(call)
        return {_LISTS[call.action]: []}

    def unknown(self, call: Call, params: Params) -> dict[str, Any]:
        call.audit.read_only = call.action.startswith(("Get", "List", "Describe"))
        self._access.authorize_account(call)
        declared = self._model.errors_of(call.action)
        for code, members in _NAMES.items():
            named = next((params.members[member] for member in members if params.has(member)), None)
            if code in declared and named is not None:
                name = str(named[0] if isinstance(named, list) else named)
                raise AwsError(code, self._sentence(call, code, name))
        raise unsupported(f"{call.action} does not exist here: there are no trails, event data stores or channels.")

    @staticmethod
    def _sentence(call: Call, code: str, name: str) -> str:
        if code != "TrailNotFoundException":
            return f"{name[:256]} does not exist."
        account_id = call.caller.caller.account_id
        arn = name if Arn.parse(name) else f"arn:aws:cloudtrail:{call.region}:{account_id}:trail/{name}"
        return f"Unknown trail: {arn[:512]} for the user: {account_id}"
