"""The table of states and events: every event in every standing, and the page that is made of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from keylake.lifecycle_page import page
from keymanager.lifecycle import KMS_STATE, LIFECYCLE, STATE_OF, KeyEvent, KmsAccess, Standing, kms_step
from keymanager.state import KeyAccess
from shared.api.keymanager import KeyState
from shared.errors import ConflictError

KMS_EVENTS = {
    KeyEvent.KMS_ALLOWED: KmsAccess.ALLOWED,
    KeyEvent.KMS_OUTAGE: KmsAccess.OUTAGE,
    KeyEvent.KMS_DENIED: KmsAccess.DENIED,
}


def test_the_table_is_total() -> None:
    assert set(LIFECYCLE) == set(product(Standing, KeyEvent))
    assert set(STATE_OF) == set(Standing)
    assert set(STATE_OF.values()) == set(KeyState)


def expected(kms: KmsAccess, event: KeyEvent, *, held: bool) -> KeyAccess | None:
    """What three independent switches would do; None: refused. The table is written out, this is computed."""
    match event:
        case KeyEvent.OPERATOR_REVOKED:
            return KeyAccess.of(kms, held=True)
        case KeyEvent.OPERATOR_RESTORED:
            return KeyAccess.of(kms) if held else None
        case KeyEvent.SHREDDED:
            return KeyAccess.of(kms, held=held, shredded=True)
        case KeyEvent.ERASED:
            return None
        case _:
            # No answer is not a yes: what was denied stays denied.
            stays = kms is KmsAccess.DENIED and event is KeyEvent.KMS_OUTAGE
            return KeyAccess.of(kms if stays else KMS_EVENTS[event], held=held)


@pytest.mark.parametrize(("kms", "held", "event"), list(product(KmsAccess, (False, True), KeyEvent)))
def test_every_event_in_every_standing_with_keks(kms: KmsAccess, held: bool, event: KeyEvent) -> None:
    before = KeyAccess.of(kms, held=held)
    assert (before.kms, before.held, before.shredded) == (kms, held, False)
    assert before.state is (KeyState.REVOKED if held else KMS_STATE[kms])
    wanted = expected(kms, event, held=held)
    if wanted is None:
        with pytest.raises(ConflictError):
            before.step(event)
        return
    after = before.step(event)
    assert after == wanted
    if after.state is KeyState.ACTIVE:
        assert after == KeyAccess()


@pytest.mark.parametrize(("erased", "event"), list(product((False, True), KeyEvent)))
def test_every_event_after_the_keks_are_gone(erased: bool, event: KeyEvent) -> None:
    before = KeyAccess.of(KmsAccess.ALLOWED, shredded=True, erased=erased)
    assert before.state.final
    assert before.shredded
    assert before.kms is None
    if event in (KeyEvent.OPERATOR_REVOKED, KeyEvent.OPERATOR_RESTORED):
        with pytest.raises(ConflictError):
            before.step(event)
        return
    after = before.step(event)
    if event is KeyEvent.ERASED or erased:
        assert after.state is KeyState.ERASED
    else:
        assert after == before


@pytest.mark.parametrize(("access", "event"), list(product(KmsAccess, KMS_EVENTS)))
def test_a_key_configuration_moves_as_a_project_that_nobody_holds(access: KmsAccess, event: KeyEvent) -> None:
    assert KeyAccess.of(access).step(event) == KeyAccess.of(kms_step(access, event))


def test_the_page_is_of_this_table() -> None:
    written = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()
    assert written == page(), "docs/lifecycle.md is old: make docs-lifecycle"
    assert written.count("\n| **") == len(Standing)
