"""A customer's log, from a file as the vendors' tools write it.

    AWS      `aws cloudtrail lookup-events --output json`: {"Events": […]}; the files of a trail: {"Records": […]}
    Azure    the blobs of insights-logs-auditevent: one JSON object a line; {"records": […]}
    Google   `gcloud logging read … --format=json`: […]

Any of these is also taken as JSON lines, and a file may hold several documents after each other.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

from keylake.reconcile import aws, azure, google
from keylake.reconcile.core import LoggedCall
from keylake.reconcile.parsing import MalformedLogError
from shared.errors import InvalidInputError

MAX_LOG_SIZE_BYTES: Final = 1 << 30
_LISTS: Final = ("Events", "Records", "records", "value")
_SPACE: Final = " \t\r\n\ufeff"


class Cloud(enum.StrEnum):
    """As the provider is called in a key configuration."""

    AWS = "aws"
    AZURE = "azure"
    GOOGLE = "google"


_READERS: Final[dict[Cloud, Callable[[Iterator[dict[str, Any]]], Iterator[LoggedCall]]]] = {
    Cloud.AWS: aws.calls,
    Cloud.AZURE: azure.calls,
    Cloud.GOOGLE: google.calls,
}
_TESTS: Final = {Cloud.AWS: aws.is_record, Cloud.AZURE: azure.is_record, Cloud.GOOGLE: google.is_record}


def calls_of(records: Iterable[dict[str, Any]], cloud: Cloud) -> Iterator[LoggedCall]:
    """Raises MalformedLogError."""
    return _READERS[cloud](iter(records))


def read_log(path: Path) -> tuple[Cloud, list[LoggedCall]]:
    """Raises MalformedLogError, InvalidInputError when the file cannot be read."""
    try:
        if path.stat().st_size > MAX_LOG_SIZE_BYTES:
            raise MalformedLogError(f"{path} is larger than {MAX_LOG_SIZE_BYTES} bytes: give it in parts")
        content = path.read_text("utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MalformedLogError(f"{path} is not UTF-8") from None
    return parse_log(content)


def parse_log(content: str) -> tuple[Cloud, list[LoggedCall]]:
    """Raises MalformedLogError."""
    records = _records(content)
    first = next(records, None)
    if first is None:
        raise MalformedLogError("the cloud's log holds no record")
    for cloud, fits in _TESTS.items():
        if fits(first):
            return cloud, list(calls_of(chain([first], records), cloud))
    raise MalformedLogError("this is no log of AWS CloudTrail, Azure Monitor or Google Cloud Audit Logs")


def _records(content: str) -> Iterator[dict[str, Any]]:
    decoder, position = json.JSONDecoder(), 0
    while True:
        while position < len(content) and content[position] in _SPACE:
            position += 1
        if position == len(content):
            return
        try:
            document, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError):
            raise MalformedLogError("the cloud's log is not JSON") from None
        if isinstance(document, dict):
            inner = next((document[name] for name in _LISTS if isinstance(document.get(name), list)), [document])
        else:
            inner = document
        if not isinstance(inner, list) or not all(isinstance(record, dict) for record in inner):
            raise MalformedLogError("the cloud's log is not a list of records")
        yield from inner
