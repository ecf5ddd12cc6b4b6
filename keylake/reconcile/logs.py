"""A customer's log, from a file as the vendors' tools write it.

    AWS      `aws cloudtrail lookup-events --output json`: {"Events": […]}; the files of a trail: {"Records": […]}
    Azure    the blobs of insights-logs-auditevent: one JSON object a line; {"records": […]}
    Google   `gcloud logging read … --format=json`: […]
    OpenBao  the file of an audit device: one JSON object a line

Any of these is also taken as JSON lines, and a file may hold several documents after each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

from keymanager.providers import KINDS
from shared.errors import InvalidInputError
from shared.kms_log import LoggedCall, MalformedLogError, Recorded

MAX_LOG_SIZE_BYTES: Final = 1 << 30
_LISTS: Final = ("Events", "Records", "records", "value")
_SPACE: Final = " \t\r\n\ufeff"


READERS: Final = {name: kind.log for name, kind in KINDS.items() if kind.log is not None}
"""By the `provider` of a key configuration's key."""
SIGN_INS: Final = frozenset[str]().union(*(reader.sign_ins for reader in READERS.values()))


def calls_of(records: Iterable[dict[str, Any]], cloud: str, recorded: Recorded) -> Iterator[LoggedCall]:
    """Raises MalformedLogError."""
    return READERS[cloud].calls(iter(records), recorded)


def read_log(path: Path, recorded: Recorded) -> tuple[str, list[LoggedCall]]:
    """Raises MalformedLogError, InvalidInputError when the file cannot be read."""
    try:
        if path.stat().st_size > MAX_LOG_SIZE_BYTES:
            raise MalformedLogError(f"{path} is larger than {MAX_LOG_SIZE_BYTES} bytes: give it in parts")
        content = path.read_text("utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MalformedLogError(f"{path} is not UTF-8") from None
    return parse_log(content, recorded)


def parse_log(content: str, recorded: Recorded) -> tuple[str, list[LoggedCall]]:
    """Raises MalformedLogError."""
    records = _records(content)
    first = next(records, None)
    if first is None:
        raise MalformedLogError("the cloud's log holds no record")
    for cloud, reader in READERS.items():
        if reader.is_record(first):
            return cloud, list(calls_of(chain([first], records), cloud, recorded))
    raise MalformedLogError(f"this is no log of {', '.join(reader.title for reader in READERS.values())}")


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
