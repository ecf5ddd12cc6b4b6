"""Amazon resource names of this partition (`aws`), as far as KMS, IAM and STS use them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ACCOUNT = re.compile(r"[0-9]{12}")
_KEY_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")
_ALIAS = re.compile(r"alias/[a-zA-Z0-9/_-]{1,250}")

ALIAS_PREFIX: Final = "alias/"


def is_account_id(text: str) -> bool:
    return _ACCOUNT.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """A bare key id: a UUID in lower case, or the id of a multi-Region key, of which none exists here."""
    return _KEY_ID.fullmatch(text) is not None


def is_alias_name(text: str) -> bool:
    return _ALIAS.fullmatch(text) is not None


def key_arn(region: str, account_id: str, key_id: str) -> str:
    return f"arn:aws:kms:{region}:{account_id}:key/{key_id}"


def alias_arn(region: str, account_id: str, alias_name: str) -> str:
    return f"arn:aws:kms:{region}:{account_id}:{alias_name}"


def root_arn(account_id: str) -> str:
    return f"arn:aws:iam::{account_id}:root"


def user_arn(account_id: str, name: str, path: str = "/") -> str:
    return f"arn:aws:iam::{account_id}:user{path}{name}"


def role_arn(account_id: str, name: str, path: str = "/") -> str:
    return f"arn:aws:iam::{account_id}:role{path}{name}"


def federated_arn(account_id: str, name: str) -> str:
    return f"arn:aws:sts::{account_id}:federated-user/{name}"


def session_arn(account_id: str, role_name: str, session_name: str) -> str:
    return f"arn:aws:sts::{account_id}:assumed-role/{role_name}/{session_name}"


@dataclass(frozen=True, slots=True)
class Arn:
    """`arn:aws:service:region:account:resource`, split; nothing about the parts is checked but their number."""

    service: str
    region: str
    account_id: str
    resource: str

    @classmethod
    def parse(cls, text: str) -> Arn | None:
        parts = text.split(":", 5)
        if len(parts) != 6 or parts[0] != "arn" or parts[1] != "aws" or not parts[5]:
            return None
        return cls(parts[2], parts[3], parts[4], parts[5])
