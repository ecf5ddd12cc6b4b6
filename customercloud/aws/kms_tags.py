"""Tags of keys. Policies can test them (`aws:ResourceTag/…`, `aws:RequestTag/…`, `aws:TagKeys`)."""

from __future__ import annotations

from typing import Any

from customercloud.aws.cloudtrail import Call
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import KeySteps, new_tags, page, tag_conditions, tag_list
from customercloud.aws.params import Params


class KmsTags:
    def __init__(self, steps: KeySteps) -> None:
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "TagResource": self.tag_resource,
            "UntagResource": self.untag_resource,
            "ListResourceTags": self.list_resource_tags,
        }

    def tag_resource(self, call: Call, params: Params) -> None:
        given = new_tags({}, params)
        key = self._steps.key(call, params, {"tags": tag_list(given)}, conditions=tag_conditions(given))
        self._steps.change(call, key.with_tags(new_tags(key.tags, params), call.now, self._steps.delay()))

    def untag_resource(self, call: Call, params: Params) -> None:
        """A key that is not there is no error."""
        names = params.strings("TagKeys")
        key = self._steps.key(call, params, {"tagKeys": names}, conditions={"aws:tagkeys": tuple(names)})
        kept = {name: value for name, value in key.tags.items() if name not in names}
        self._steps.change(call, key.with_tags(kept, call.now, self._steps.delay()))

    def list_resource_tags(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True)
        names, paging = page(sorted(key.tags), call, params)
        return {"Tags": [{"TagKey": name, "TagValue": key.tags[name]} for name in names]} | paging
