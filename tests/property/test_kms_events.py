"""A cloud's event is bytes from outside, chosen by whoever has a notifier's token: read or refused, nothing else."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keymanager.kms_events import Handshake, parse
from shared.errors import InvalidInputError
from tests.fixtures.cloud_events import cloud_event, cloudtrail, deletion, entry, grid, push, record

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=10,
)
GOOD: list[Any] = [
    *(cloudtrail(), deletion(), [grid()], grid("Microsoft.EventGrid.SubscriptionValidationEvent")),
    *([cloud_event(), grid()], record("KeyUpdate"), record("VaultPut"), push(entry())),
]


def survives(body: bytes) -> None:
    try:
        found = parse(body)
    except InvalidInputError:
        return
    if isinstance(found, Handshake):
        assert found.validation_code.isascii()
        return
    for event in found:
        assert event.kind.isascii()
        assert event.kind.isprintable()
        for name in event.names:
            assert len(name.place) < 400
            assert name.key is None or 0 < len(name.key) < 128


@given(st.binary(max_size=300) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_events_or_refused(body: bytes) -> None:
    survives(body)


def _spoiled(data: st.DataObject, value: Any) -> Any:
    """With one part of it replaced, or taken away."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 4)) == 0:
        return data.draw(JSON_VALUES)
    changed = copy.copy(value)
    where: Any = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    if data.draw(st.integers(0, 4)) == 0:
        del changed[where]
    else:
        changed[where] = _spoiled(data, value[where])
    return changed


@given(st.data())
def test_an_event_with_any_part_of_it_replaced_is_an_event_or_refused(data: st.DataObject) -> None:
    survives(json.dumps(_spoiled(data, data.draw(st.sampled_from(GOOD)))).encode())


@given(st.data())
def test_so_is_a_log_entry_inside_of_a_push(data: st.DataObject) -> None:
    survives(json.dumps(push(_spoiled(data, entry()))).encode())


@given(st.binary(max_size=100))
def test_so_are_any_bytes_inside_of_a_push(inner: bytes) -> None:
    survives(json.dumps({"message": {"data": base64.b64encode(inner).decode()}}).encode())
