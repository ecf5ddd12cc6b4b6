"""A lease as its holder sees it, and the cache that lives and dies with it."""

from __future__ import annotations

import gc

import pytest

from shared.api.keymanager import Grant, KeyState, ObjectName
from shared.clock import ManualClock
from shared.crypto.aead import AeadKey
from shared.crypto.context import EncryptionContext
from shared.crypto.envelope import Envelope, wrap_dek
from shared.crypto.secret import SecretKey
from shared.errors import LeaseExpiredError, RevokedError, ShreddedError, SuspendedError
from shared.ids import AccountId, KekId, ProjectId, TimelineId, WorkspaceId
from shared.keycache import ENTRY_SIZE_BYTES, DekCache, DekRoom
from shared.lease import Lease

PROJECT, ACCOUNT, WORKSPACE = ProjectId.new(), AccountId.new(), WorkspaceId.new()


def granting(ttl_s: float = 5.0) -> Grant:
    return Grant(project_id=PROJECT, state=KeyState.ACTIVE, ttl_s=ttl_s, account_id=ACCOUNT, workspace_id=WORKSPACE)


def test_a_lease_that_was_never_granted_is_dead_and_has_no_scope() -> None:
    lease = Lease(PROJECT, ManualClock())
    assert not lease.live
    assert lease.remaining_s == 0
    with pytest.raises(LeaseExpiredError):
        lease.check()
    with pytest.raises(LeaseExpiredError):
        _ = lease.scope


def test_ttl_counts_from_before_the_request_and_ends_exactly() -> None:
    clock = ManualClock()
    lease = Lease(PROJECT, clock)
    asked = clock.monotonic_s()
    clock.advance(2)  # the answer took its time
    lease.granted(granting(5), asked, 3)
    assert lease.remaining_s == 3
    assert lease.generation == 3
    clock.advance(2.999)
    lease.check()
    clock.advance(0.001)
    with pytest.raises(LeaseExpiredError):
        lease.check()
    assert not lease.live


def test_an_answer_that_took_longer_than_the_ttl_grants_nothing() -> None:
    clock = ManualClock()
    lease = Lease(PROJECT, clock)
    clock.advance(10)
    lease.granted(granting(5), 4.0, 1)
    assert not lease.live


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (KeyState.SUSPENDED, SuspendedError),
        (KeyState.REVOKED, RevokedError),
        (KeyState.SHREDDED, ShreddedError),
        (KeyState.ACTIVE, LeaseExpiredError),
    ],
)
def test_revoked_raises_what_its_state_means(state: KeyState, error: type[Exception]) -> None:
    lease = Lease(PROJECT, ManualClock())
    lease.granted(granting(), 0, 1)
    lease.revoked(state, "why")
    with pytest.raises(error):
        lease.check()
    assert lease.scope.project_id == PROJECT  # contexts are still known, for what is deleted


def test_everything_but_shredded_comes_back() -> None:
    lease = Lease(PROJECT, ManualClock())
    for state in (KeyState.SUSPENDED, KeyState.REVOKED):
        lease.revoked(state, "why")
        lease.granted(granting(), 0, 1)
        lease.check()
        assert lease.reason == ""
    lease.granted(Grant(project_id=PROJECT, state=KeyState.SHREDDED, reason="gone"), 0, 1)
    lease.granted(granting(), 0, 2)
    lease.revoked(KeyState.REVOKED, "later")
    with pytest.raises(ShreddedError):
        lease.check()


def test_a_grant_without_owner_is_no_grant() -> None:
    lease = Lease(PROJECT, ManualClock())
    lease.granted(Grant(project_id=PROJECT, state=KeyState.ACTIVE, ttl_s=5), 0, 1)
    assert not lease.live


# --- cache ---

KEK = AeadKey(SecretKey.generate())


def item(text: str) -> tuple[ObjectName, Envelope, AeadKey]:
    dek = SecretKey.generate()
    envelope = wrap_dek(KEK, KekId.new(), 1, dek, EncryptionContext({}))
    name = ObjectName(timeline_id=TimelineId("tl-0000000000000000"), object_name=text, kind="x")
    return name, envelope, AeadKey(dek)


def test_cache_finds_by_object_and_envelope_together() -> None:
    cache = DekCache()
    name, envelope, key = item("a")
    cache.put(name, envelope, key)
    assert cache.get(name, envelope) is key
    assert cache.get(item("b")[0], envelope) is None
    assert cache.get(name, item("a")[1]) is None
    assert cache.get(name.model_copy(update={"kind": "y"}), envelope) is None


def test_cache_forgets_the_least_recently_used_which_goes_on_working() -> None:
    cache = DekCache(2)
    a, b, c = item("a"), item("b"), item("c")
    cache.put(*a)
    cache.put(*b)
    assert cache.get(a[0], a[1]) is a[2]
    cache.put(*c)
    assert cache.get(b[0], b[1]) is None
    assert not b[2].wiped
    assert len(cache) == 2


def test_wipe_reaches_forgotten_keys_too() -> None:
    cache = DekCache(1)
    items = [item(str(n)) for n in range(3)]
    for each in items:
        cache.put(*each)
    assert cache.wipe() == 3
    assert all(key.wiped for _, _, key in items)
    assert len(cache) == 0
    assert cache.wipe() == 0


def test_keys_that_nobody_holds_are_not_kept_alive() -> None:
    cache = DekCache(1)
    name, envelope, key = item("a")
    memory = key.key.reveal()
    cache.put(name, envelope, key)
    cache.put(*item("b"))
    del key
    gc.collect()
    assert memory == bytes(32)


def test_a_key_that_its_user_wiped_is_not_found() -> None:
    cache = DekCache()
    name, envelope, key = item("a")
    cache.put(name, envelope, key)
    key.wipe()
    assert cache.get(name, envelope) is None


def test_a_key_is_not_answered_from_the_cache_for_ever() -> None:
    clock = ManualClock()
    cache = DekCache(10, ttl_s=60, now_s=clock.monotonic_s)
    a, b = item("a"), item("b")
    cache.put(*a)
    clock.advance(59.9)
    assert cache.get(a[0], a[1]) is a[2]  # using it does not prolong it
    cache.put(*b)
    clock.advance(0.1)
    assert cache.get(a[0], a[1]) is None
    assert cache.get(b[0], b[1]) is b[2]
    assert len(cache) == 1
    assert not a[2].wiped
    cache.wipe()
    assert a[2].wiped


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        DekCache(0)
    with pytest.raises(ValueError, match="at least one"):
        DekRoom(ENTRY_SIZE_BYTES)


def test_all_projects_share_one_room() -> None:
    room = DekRoom(3 * (ENTRY_SIZE_BYTES + 2))  # names of one character, kinds of one
    one, two = DekCache(room=room), DekCache(room=room)
    a, b, c, d = (item(text) for text in "abcd")
    one.put(*a)
    two.put(*b)
    one.put(*c)
    assert one.get(a[0], a[1]) is a[2]
    one.put(*d)
    assert (len(one), len(two)) == (3, 0)  # the one that nobody has used for longest, whosever it is
    assert two.get(b[0], b[1]) is None
    assert not b[2].wiped
    one.put(*a)  # again: it takes no more room
    assert room.size_bytes == 3 * (ENTRY_SIZE_BYTES + 2)
    # A project that ends takes its keys out of the room; one that it had forgotten is wiped with them.
    assert one.wipe() == 3
    assert room.size_bytes == 0
    assert two.wipe() == 1
    assert b[2].wiped


def test_long_names_take_room_too() -> None:
    room = DekRoom(4 * ENTRY_SIZE_BYTES)
    cache = DekCache(room=room)
    for number in range(50):
        cache.put(*item(f"{number:0512}"))
        assert room.size_bytes <= 4 * ENTRY_SIZE_BYTES
    assert len(cache) == 2
