"""What the client holds for one project, when the other end is not to be trusted or things come in a bad order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.api.keymanager import Grant, KeyItem, Keys, KeyState
from shared.clock import ManualClock
from shared.crypto.aead import AeadKey
from shared.crypto.context import KeyScope
from shared.crypto.envelope import Envelope, wrap_dek
from shared.crypto.secret import SecretKey
from shared.crypto.transport import KeyTransport
from shared.errors import CorruptedError, IntegrityError, LeaseExpiredError, RevokedError
from shared.ids import AccountId, KekId, ProjectId, WorkspaceId
from shared.keyholding import HeldProject, Missing
from shared.lease import KeyLoss
from tests.fixtures.key_source_contract import Losses, named

SCOPE = KeyScope(AccountId.new(), WorkspaceId.new(), ProjectId.new())
GRANT = Grant(
    project_id=SCOPE.project_id,
    state=KeyState.ACTIVE,
    ttl_s=5,
    account_id=SCOPE.account_id,
    workspace_id=SCOPE.workspace_id,
)
REVOKED = KeyLoss(SCOPE.project_id, KeyState.REVOKED, "why", "rev-1")
THING = named()


class Held:
    """A held project with a live lease, and both ends of a key transport."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.project = HeldProject(SCOPE.project_id, Losses(), self.clock, 10)
        self.project.grant(GRANT, 0.0, 1)
        self.client, self.server = KeyTransport(), KeyTransport()
        self.client.agree(self.client.public, self.server.public)
        self.server.agree(self.client.public, self.server.public)

    def item(self, dek: SecretKey, envelope: Envelope) -> KeyItem:
        wire = envelope.serialize()
        return KeyItem(envelope=wire, sealed_dek=self.server.seal_key(dek, wire))


def wrapped(dek: SecretKey) -> Envelope:
    context = SCOPE.object_context(THING.timeline_id, THING.object_name, THING.kind)
    return wrap_dek(AeadKey(SecretKey.generate()), KekId.new(), 1, dek, context)


def test_a_keymanager_that_answers_with_another_dek_is_not_believed() -> None:
    held, dek = Held(), SecretKey.generate()
    envelope = wrapped(dek)
    assert held.project.open(held.client, THING, envelope, held.item(dek, envelope)).key.matches(dek)
    with pytest.raises(IntegrityError, match="commitment"):
        held.project.open(held.client, THING, envelope, held.item(SecretKey.generate(), envelope))
    with pytest.raises(IntegrityError, match="commitment"):
        held.project.open(held.client, named("another"), envelope, held.item(dek, envelope))


async def test_an_answer_for_another_envelope_is_not_believed() -> None:
    held, dek = Held(), SecretKey.generate()
    asked, other = wrapped(dek), wrapped(dek)
    with pytest.raises(IntegrityError, match="another envelope"):
        Missing(THING, asked).resolve(held.project, held.client, held.item(dek, other))


def test_a_generated_key_with_a_malformed_envelope_is_refused() -> None:
    held, dek = Held(), SecretKey.generate()
    item = KeyItem(envelope=b"x", sealed_dek=held.server.seal_key(dek, b"x"))
    with pytest.raises(CorruptedError):
        held.project.accept(held.client, [THING], Keys(request_id=1, items=[item]))
    broken = replace(wrapped(dek), commitment=bytes(32))
    with pytest.raises(IntegrityError):
        held.project.accept(held.client, [THING], Keys(request_id=1, items=[held.item(dek, broken)]))


def test_a_loss_ends_the_epoch_of_what_is_on_its_way() -> None:
    held = Held()
    epoch = held.project.epoch
    held.project.check(epoch)
    assert held.project.lose(REVOKED)
    with pytest.raises(RevokedError):
        held.project.check(epoch)
    held.project.grant(GRANT, held.clock.monotonic_s(), 2)
    with pytest.raises(LeaseExpiredError, match="on their way"):
        held.project.check(epoch)  # live again, but these keys belong to the lease before
    held.project.check(held.project.epoch)


def test_no_grant_while_plaintext_is_being_dropped_nor_after_closing() -> None:
    held = Held()
    held.project.lose(REVOKED)
    held.project.handle()
    held.project.grant(GRANT, 0.0, 2)
    assert not held.project.lease.live
    assert not held.project.handled.is_set()
    held.project.was_handled()
    assert held.project.handled.is_set()
    held.project.grant(GRANT, 0.0, 2)
    assert held.project.lease.live
    held.project.close("released")
    held.project.grant(GRANT, 0.0, 3)
    assert not held.project.lease.live


def test_an_overdue_lease_is_noticed_once() -> None:
    held = Held()
    assert not held.project.overdue
    held.clock.advance(5)
    assert held.project.overdue
    assert held.project.lose(KeyLoss(SCOPE.project_id, KeyState.ACTIVE, "the lease ran out", None))
    assert not held.project.overdue
    assert not held.project.lose(REVOKED)  # known: but its state is now the better word
    assert held.project.lease.state is KeyState.REVOKED
    stale = held.clock.monotonic_s() - 5
    held.project.grant(GRANT, stale, 2)  # an answer that took a whole ttl
    assert held.project.lost


async def test_the_same_envelope_is_asked_for_once_and_everybody_is_told() -> None:
    held, dek = Held(), SecretKey.generate()
    envelope = wrapped(dek)
    first, second = held.project.find(THING, envelope), held.project.find(THING, envelope)
    assert first is second
    assert isinstance(first, Missing)
    assert held.project.take_missing(10, 10**6) == [first]
    held.project.lose(REVOKED)
    with pytest.raises(LeaseExpiredError):
        await first.wait()
    assert held.project.take_missing(10, 10**6) == []


async def test_batches_are_bounded_in_number_and_size() -> None:
    held = Held()
    for number in range(10):
        held.project.find(named(f"{number}" * 100), wrapped(SecretKey.generate()))
    assert len(held.project.take_missing(3, 10**9)) == 3
    assert len(held.project.take_missing(100, 2500)) == 2
    assert len(held.project.take_missing(100, 1)) == 1  # never none
