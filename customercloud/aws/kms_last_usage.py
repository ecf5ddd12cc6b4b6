"""GetKeyLastUsage: read off the audit log, which has every use of a key anyway."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

from customercloud.aws.cloudtrail import Call
from customercloud.aws.grants import CRYPTOGRAPHIC
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import KeySteps
from customercloud.aws.params import Params
from customercloud.aws.trail import Trail

_USES: Final = (CRYPTOGRAPHIC - {"ReEncryptFrom", "ReEncryptTo"}) | {"ReEncrypt"}
"""Two permissions, one operation."""


class KmsLastUsage:
    def __init__(self, trail: Trail, steps: KeySteps) -> None:
        self._trail = trail
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {"GetKeyLastUsage": self.get_key_last_usage}

    def get_key_last_usage(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True)
        created_s = key.created_at.timestamp()
        return {
            "KeyId": key.key_id,
            "KeyLastUsage": self._last_usage(key.arn, key.account_id),
            "TrackingStartDate": created_s,
            "KeyCreationDate": created_s,
        }

    def _last_usage(self, key_arn: str, account_id: str) -> dict[str, Any]:
        """Of the last successful cryptographic operation, as the owner's log has it; empty if there was none."""
        name = key_arn.encode()
        for entry in self._trail.newest_first():
            if name not in entry.line:  # most entries are of other keys, and parsing costs more than looking
                continue
            record = entry.record
            if (
                record["eventName"] in _USES
                and "errorCode" not in record
                and record["recipientAccountId"] == account_id
                and any(resource["ARN"] == key_arn for resource in record.get("resources", ()))
            ):
                return {
                    "Operation": record["eventName"],
                    "Timestamp": dt.datetime.fromisoformat(record["eventTime"]).timestamp(),
                    "CloudTrailEventId": record["eventID"],
                    "KmsRequestId": record["requestID"],
                }
        return {}
