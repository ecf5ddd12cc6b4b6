"""The life cycle of a key: every state under every transition, visibility, rotation, and the JSON it is stored as."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.errors import AwsError
from customercloud.aws.identity import AccessKey, Rights, Role, account_of_access_key
from customercloud.aws.keys import Key, KeyOrigin, KeyPolicy, KeyState
from customercloud.aws.state import Alias

NOW = dt.datetime(2026, 11, 22, 2, 0, tzinfo=dt.UTC)
NO_DELAY = dt.timedelta(0)
POLICY = KeyPolicy(document="{}", binding={})


def new_key() -> Key:
    return Key.new("111122223333", "eu-central-1", "", POLICY, NOW)


def in_state(state: KeyState) -> Key:
    match state:
        case KeyState.ENABLED:
            return new_key()
        case KeyState.DISABLED:
            return new_key().disable(NOW, NO_DELAY)
        case KeyState.PENDING_DELETION:
            return new_key().schedule_deletion(7, NOW, NO_DELAY)
        case KeyState.PENDING_IMPORT:
            return Key.new("111122223333", "eu-central-1", "", POLICY, NOW, origin=KeyOrigin.EXTERNAL)


TRANSITIONS = ("enable", "disable", "schedule", "cancel", "policy", "rotate", "enable rotation")


def move(key: Key, transition: str, now: dt.datetime = NOW, delay: dt.timedelta = NO_DELAY) -> Key:
    match transition:
        case "enable":
            return key.enable(now, delay)
        case "disable":
            return key.disable(now, delay)
        case "schedule":
            return key.schedule_deletion(7, now, delay)
        case "cancel":
            return key.cancel_deletion(now, delay)
        case "policy":
            return key.put_policy(POLICY, now, delay)
        case "rotate":
            return key.rotate_on_demand(now, delay)
        case "enable rotation":
            return key.enable_rotation(90, now)
    raise ValueError(transition)


E, D, P, W = KeyState.ENABLED, KeyState.DISABLED, KeyState.PENDING_DELETION, KeyState.PENDING_IMPORT
INVALID, UNSUPPORTED = "KMSInvalidStateException", "UnsupportedOperationException"
# Key states of AWS KMS keys, KMS Developer Guide: transition → (from enabled, disabled, pending deletion, and from
# waiting for an import).
TABLE: dict[str, tuple[KeyState | str, ...]] = {
    "enable": (E, E, INVALID, INVALID),
    "disable": (D, D, INVALID, INVALID),
    "schedule": (P, P, INVALID, P),
    "cancel": (INVALID, INVALID, D, INVALID),
    "policy": (E, D, P, W),
    "rotate": (E, "DisabledException", INVALID, UNSUPPORTED),
    "enable rotation": (E, "DisabledException", INVALID, UNSUPPORTED),
}


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize(("column", "state"), list(enumerate((E, D, P, W))))
def test_every_state_under_every_transition(transition: str, column: int, state: KeyState) -> None:
    expected = TABLE[transition][column]
    key = in_state(state)
    if isinstance(expected, KeyState):
        changed = move(key, transition)
        assert changed.state is expected
        assert changed.effective(NOW).state is expected
        assert (changed.deletion_date is not None) == (expected is P)
    else:
        with pytest.raises(AwsError) as caught:
            move(key, transition)
        assert caught.value.code == expected


def test_changes_become_visible_after_their_delay_and_in_order() -> None:
    slow = new_key().disable(NOW, dt.timedelta(seconds=60))
    both = slow.enable(NOW + dt.timedelta(seconds=1), NO_DELAY)
    assert slow.state is D
    for second, state in ((0, E), (59, E), (60, D)):
        assert slow.effective(NOW + dt.timedelta(seconds=second)).state is state
    # A later change never overtakes an earlier one: the disabling is not seen after the enabling.
    assert [both.effective(NOW + dt.timedelta(seconds=s)).state for s in (0, 59, 60, 61)] == [E, E, E, E]


def test_rotation_is_seen_with_its_material() -> None:
    key = new_key()
    rotated = key.rotate_on_demand(NOW, dt.timedelta(seconds=5))
    assert rotated.effective(NOW).material_id == key.current_material.material_id
    later = rotated.effective(NOW + dt.timedelta(seconds=5))
    assert later.material_id == rotated.current_material.material_id != key.current_material.material_id
    assert rotated.material(key.current_material.material_id) == key.current_material


def test_automatic_rotation_when_it_is_due_and_enabled() -> None:
    key = new_key().enable_rotation(90, NOW)
    due = NOW + dt.timedelta(days=90)
    assert key.automatic_rotation(due - dt.timedelta(seconds=1), NO_DELAY) is None
    assert key.disable(NOW, NO_DELAY).automatic_rotation(due, NO_DELAY) is None
    rotated = key.automatic_rotation(due, NO_DELAY)
    assert rotated is not None
    assert rotated.current_material.rotation_type == "AUTOMATIC"
    assert rotated.next_rotation == due + dt.timedelta(days=90)
    assert rotated.automatic_rotation(due, NO_DELAY) is None


def test_an_automatic_rotation_and_tags_are_seen_after_the_delay() -> None:
    delay, due = dt.timedelta(seconds=5), NOW + dt.timedelta(days=90)
    key = new_key().enable_rotation(90, NOW)
    rotated = key.automatic_rotation(due, delay)
    assert rotated is not None
    assert rotated.effective(due).material_id == key.current_material.material_id
    assert rotated.effective(due + delay).material_id == rotated.current_material.material_id
    tagged = key.with_tags({"a": "b"}, NOW, delay)
    assert tagged.tags == {"a": "b"}
    assert (tagged.effective_tags(NOW), tagged.effective_tags(NOW + delay)) == ({}, {"a": "b"})


def test_an_alias_leads_elsewhere_after_the_delay() -> None:
    delay = dt.timedelta(seconds=5)
    alias = Alias.new("alias/a", "111122223333", "k1", NOW, delay)
    assert [alias.target(NOW + n * delay) for n in (0, 1)] == [None, "k1"]
    moved = alias.pointed_at("k2", NOW + delay, delay)
    assert (moved.key_id, moved.target(NOW + delay), moved.target(NOW + 2 * delay)) == ("k2", "k1", "k2")
    ended = moved.ended(NOW + 2 * delay, delay)
    assert (ended.target(NOW + 2 * delay), ended.target(NOW + 3 * delay)) == ("k2", None)
    older = Alias(name="alias/a", account_id="111122223333", key_id="k1", created_at=NOW)
    assert older.target(NOW) == "k1"


def test_identities_of_an_earlier_version_are_read() -> None:
    older = {
        "account_id": "111122223333", "name": "r", "role_id": "AROA1", "trust_policy": "t", "trust_binding": {"a": "b"},
        "policies": {"p": "q"},
    }  # fmt: skip
    role = Role.model_validate(older)
    assert role.rights.at(NOW) == Rights(policies={"p": "q"}, trust_policy="t", trust_binding={"a": "b"})
    assert Role.model_validate_json(role.model_dump_json()) == role


@given(st.integers(0, 10**12 - 1), st.sampled_from(["AKIA", "ASIA"]))
def test_an_access_key_id_says_its_account(number: int, prefix: str) -> None:
    account_id = f"{number:012}"
    key = AccessKey.new(account_id, prefix)
    assert key.access_key_id[:4] == prefix
    assert len(key.access_key_id) == 20
    assert account_of_access_key(key.access_key_id) == account_id


def test_destruction_is_due_at_the_deletion_date_and_only_then() -> None:
    key = new_key().schedule_deletion(7, NOW, NO_DELAY)
    week = NOW + dt.timedelta(days=7)
    assert not key.is_due_for_destruction(week - dt.timedelta(seconds=1))
    assert key.is_due_for_destruction(week)
    assert not key.cancel_deletion(NOW, NO_DELAY).is_due_for_destruction(week)


_steps = st.lists(st.tuples(st.sampled_from(TRANSITIONS), st.integers(0, 100), st.integers(0, 50)), max_size=12)


@given(_steps)
def test_any_history_keeps_its_promises(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens: views stay in order, end in the present state, and the stored form is the whole key."""
    key, now = new_key(), NOW
    for name, wait_s, delay_s in steps:
        now += dt.timedelta(seconds=wait_s)
        try:
            key = move(key, name, now, dt.timedelta(seconds=delay_s))
        except AwsError as error:
            assert error.code in ("DisabledException", "KMSInvalidStateException")  # noqa: PT017 - either is right
    times = [view.visible_at for view in key.views]
    assert times == sorted(times)
    settled = key.effective(now + dt.timedelta(days=1))
    assert (settled.state, settled.material_id) == (key.state, key.current_material.material_id)
    assert Key.model_validate_json(key.model_dump_json()) == key


def test_key_material_stays_out_of_reprs() -> None:
    key = new_key()
    secret = key.current_material.secret
    assert repr(secret) not in repr(key)
    assert secret.hex() not in repr(key)
    assert "secret" not in repr(key)
