"""Texts of policies: wildcards, and variables that the request fills in.

Source: IAM User Guide, "IAM policy elements: Variables and tags". Every pattern here is in the form of policy version
2012-10-17: `*` and `?` are wildcards, `${key}` and `${key, 'default'}` are variables, `${*}`, `${?}` and `${$}` are
those characters themselves. In the older version `$` is a character like any other: `without_variables`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Final

Context = Mapping[str, tuple[str, ...]]
"""Condition keys in lower case → their values. A key that is not there was not in the request."""

_TOKEN: Final = re.compile(r"\$\{([*?$])\}|(.)", re.DOTALL)
_VARIABLE: Final = re.compile(r"\$\{([^{}]*)\}")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9]+:[^,'\s]+)\s*(?:,\s*'([^']*)'\s*)?")


class MalformedPolicyError(ValueError):
    """The document is not a policy of this language; the message says why."""


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    wildcards = {"*": ".*", "?": "."}
    parts = (
        re.escape(itself) if itself else wildcards.get(character, re.escape(character))
        for itself, character in _TOKEN.findall(pattern)
    )
    return re.compile("".join(parts), re.DOTALL)


def glob_matches(pattern: str, text: str) -> bool:
    """`*` is any run of characters, `?` is exactly one; everything else is itself."""
    return _glob(pattern).fullmatch(text) is not None


def plain(pattern: str) -> str:
    """What a pattern says where `*` and `?` are no wildcards."""
    return _TOKEN.sub(lambda token: token[1] or token[2], pattern)


def without_variables(text: str) -> str:
    """A text of a policy of version 2008-10-17."""
    return text.replace("$", "${$}")


def variables(pattern: str) -> tuple[str, ...]:
    """Condition keys that `pattern` names, in lower case. Raises MalformedPolicyError for what is no variable."""
    names = []
    for body in _VARIABLE.findall(pattern):
        if body in ("*", "?", "$"):
            continue
        parsed = _KEY.fullmatch(body)
        if parsed is None:
            raise MalformedPolicyError(f"the policy variable ${{{body[:64]}}} is not valid")
        names.append(parsed[1].lower())
    if "${" in _VARIABLE.sub("", pattern):
        raise MalformedPolicyError("a policy variable is not closed")
    return tuple(names)


def expand(pattern: str, context: Context) -> str | None:
    """With the request's values in place of the variables, each as itself: a `*` that a caller put into a tag is no
    wildcard. None when the request has not exactly one value for a variable without a default."""
    missing = False

    def value(match: re.Match[str]) -> str:
        nonlocal missing
        if match[1] in ("*", "?", "$"):
            return match[0]
        parsed = _KEY.fullmatch(match[1])
        values = () if parsed is None else context.get(parsed[1].lower(), ())
        text = values[0] if len(values) == 1 else None if parsed is None else parsed[2]
        if text is None:
            missing = True
            return ""
        return re.sub(r"[*?$]", lambda character: f"${{{character[0]}}}", text)

    expanded = _VARIABLE.sub(value, pattern) if "${" in pattern else pattern
    return None if missing else expanded
