"""What every KMS adapter does against every cloud: one suite, run over all `CUSTOMERS`.

The vendors' unmodified SDKs talk to real processes. Each test has a customer, a principal and a CMK of its own.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import pytest

from customercloud.faults import Outage
from keymanager.kms.base import DenialReason, KeyState, KmsCall, KmsError, KmsProvider, Verdict
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import KeyWipedError, SecretKey
from tests.fixtures.kms_adapter import failure
from tests.fixtures.kms_clouds import CAN, CUSTOMERS, KmsClouds
from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration

T = TypeVar("T")
TestFunction = TypeVar("TestFunction", bound=Callable[..., Awaitable[None]])

CONTEXT = EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-1"})
WRONG_CONTEXTS = {
    "none": EncryptionContext({}),
    "less": EncryptionContext({"keylake:account": "acc-1"}),
    "more": CONTEXT.with_pairs(more="1"),
    "another value": EncryptionContext({"keylake:account": "acc-1", "keylake:project": "prj-2"}),
    "another name": EncryptionContext({"keylake:account": "acc-1", "keylake:workspace": "prj-1"}),
    "swapped": EncryptionContext({"keylake:account": "prj-1", "keylake:project": "acc-1"}),
    "another case": EncryptionContext({"keylake:account": "acc-1", "keylake:project": "PRJ-1"}),
}
PATIENCE_S = 30.0


NEEDS: Final[dict[str, frozenset[str]]] = {}
"""Test → what the customer must be able to do, for those that are not over all providers."""


def over(*operations: str) -> Callable[[TestFunction], TestFunction]:
    """Only the providers that have all of these."""
    able = [name for name in sorted(CUSTOMERS) if CAN[name].issuperset(operations)]

    def mark(test: TestFunction) -> TestFunction:
        NEEDS[test.__name__] = frozenset(operations)
        marked: TestFunction = pytest.mark.parametrize("customer", able, indirect=True)(test)
        return marked

    return mark


@pytest.fixture(params=sorted(CUSTOMERS))
def customer(request: pytest.FixtureRequest, kms_clouds: KmsClouds) -> Iterator[KmsCustomer]:
    with CUSTOMERS[request.param](kms_clouds) as made:
        assert made.name == request.param
        yield made


@pytest.fixture
async def kms(customer: KmsCustomer) -> AsyncIterator[KmsProvider]:
    async with closing(customer.provider()) as provider:
        yield provider


@asynccontextmanager
async def closing(provider: KmsProvider) -> AsyncIterator[KmsProvider]:
    try:
        yield provider
    finally:
        await provider.aclose()


async def outcome(call: Awaitable[T]) -> T | KmsError:
    try:
        return await call
    except KmsError as error:
        return error


def uses(kms: KmsProvider, wrapped: bytes) -> dict[str, Callable[[], Awaitable[object]]]:
    """Everything for which the CMK must be usable."""
    return {
        "generate": lambda: kms.generate_kek(CONTEXT),
        "wrap": lambda: kms.wrap(SecretKey.generate(), CONTEXT),
        "unwrap": lambda: kms.unwrap(wrapped, CONTEXT),
        "rewrap": lambda: kms.rewrap(wrapped, CONTEXT),
    }


async def every_use_is_denied(
    kms: KmsProvider, wrapped: bytes, reasons: frozenset[DenialReason], *, but: frozenset[str] = frozenset()
) -> None:
    for name, use in uses(kms, wrapped).items():
        if name not in but:
            error = await failure(use())
            assert error.verdict is Verdict.DENIED, name
            assert error.reason in reasons, name


async def every_use_works(kms: KmsProvider, wrapped: bytes, secret: SecretKey) -> None:
    for use in uses(kms, wrapped).values():
        await use()
    assert (await kms.unwrap(wrapped, CONTEXT)).matches(secret)


# ── work ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_generated_kek_opens_by_another_instance(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    assert bytes(kek.plaintext.reveal()) not in kek.wrapped
    assert kek.key_version == (await kms.describe()).key_version
    async with closing(customer.provider()) as another:
        assert (await another.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    second = await kms.generate_kek(CONTEXT)
    assert not second.plaintext.matches(kek.plaintext)
    assert second.wrapped != kek.wrapped


async def test_an_existing_secret_is_wrapped_and_stays_the_callers(kms: KmsProvider) -> None:
    secret = SecretKey.generate()
    first = await kms.wrap(secret, CONTEXT)
    again = await kms.wrap(secret, CONTEXT)
    assert not secret.wiped
    assert first.wrapped != again.wrapped
    for wrapped in (first, again):
        assert wrapped.key_version == (await kms.describe()).key_version
        assert (await kms.unwrap(wrapped.wrapped, CONTEXT)).matches(secret)


async def test_a_kek_is_wrapped_anew(kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    moved = await kms.rewrap(kek.wrapped, CONTEXT)
    assert moved.wrapped != kek.wrapped
    for blob in (kek.wrapped, moved.wrapped):
        assert (await kms.unwrap(blob, CONTEXT)).matches(kek.plaintext)


async def test_a_kek_that_is_open_while_it_is_wrapped_anew_can_be_wiped(
    customer: KmsCustomer, kms: KmsProvider
) -> None:
    kek = await kms.generate_kek(CONTEXT)
    opened: list[SecretKey] = []

    def keep(secret: SecretKey) -> SecretKey:
        opened.append(secret)
        return secret

    def wipe(secret: SecretKey) -> SecretKey:
        assert secret.matches(kek.plaintext)
        secret.wipe()
        return secret

    await kms.rewrap(kek.wrapped, CONTEXT, keep)
    assert all(secret.wiped for secret in opened)
    assert bool(opened) == (customer.name != "aws"), "whose KMS has a call for it"
    if opened:
        with pytest.raises(KeyWipedError):
            await kms.rewrap(kek.wrapped, CONTEXT, wipe)


async def test_an_empty_context_is_a_context(kms: KmsProvider) -> None:
    kek = await kms.generate_kek(EncryptionContext({}))
    assert (await kms.unwrap(kek.wrapped, EncryptionContext({}))).matches(kek.plaintext)
    assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.CORRUPT


async def test_contexts_with_any_text(kms: KmsProvider) -> None:
    context = EncryptionContext({"name with = & , ; ü 漢": "value\n\t\x00 “quoted” 🔑", "empty": ""})
    kek = await kms.generate_kek(context)
    assert (await kms.unwrap(kek.wrapped, context)).matches(kek.plaintext)


async def test_calls_at_once_do_not_disturb_each_other(kms: KmsProvider) -> None:
    keks = await asyncio.gather(*(kms.generate_kek(CONTEXT.with_pairs(n=str(n))) for n in range(12)))
    opened = await asyncio.gather(
        *(kms.unwrap(kek.wrapped, CONTEXT.with_pairs(n=str(n))) for n, kek in enumerate(keks))
    )
    assert all(key.matches(kek.plaintext) for key, kek in zip(opened, keks, strict=True))


# ── what does not open is corrupt, not denied ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", WRONG_CONTEXTS.values(), ids=WRONG_CONTEXTS.keys())
async def test_a_wrong_context(kms: KmsProvider, wrong: EncryptionContext) -> None:
    kek = await kms.generate_kek(CONTEXT)
    wrapped = (await kms.wrap(kek.plaintext, CONTEXT)).wrapped
    for blob in (kek.wrapped, wrapped):
        for call in (kms.unwrap(blob, wrong), kms.rewrap(blob, wrong)):
            error = await failure(call)
            assert (error.verdict, error.reason) == (Verdict.CORRUPT, None)


async def test_a_blob_of_another_key(customer: KmsCustomer, kms: KmsProvider) -> None:
    async with closing(customer.other_key_provider()) as other:
        foreign = (await other.generate_kek(CONTEXT)).wrapped
        assert (await other.unwrap(foreign, CONTEXT)) is not None
        for call in (kms.unwrap(foreign, CONTEXT), kms.rewrap(foreign, CONTEXT)):
            assert (await failure(call)).verdict is Verdict.CORRUPT


@over("disable")
async def test_a_blob_of_a_live_key_does_not_stand_in_for_a_disabled_one(
    customer: KmsCustomer, kms: KmsProvider
) -> None:
    async with closing(customer.other_key_provider()) as other:
        swapped = (await other.generate_kek(CONTEXT)).wrapped
    customer.disable()
    assert (await failure(kms.unwrap(swapped, CONTEXT))).verdict in (Verdict.CORRUPT, Verdict.DENIED)


async def test_a_flipped_bit_anywhere(kms: KmsProvider) -> None:
    wrapped = (await kms.generate_kek(CONTEXT)).wrapped
    rng = random.Random(len(wrapped))
    positions = {0, 1, len(wrapped) // 2, len(wrapped) - 1, *rng.sample(range(len(wrapped)), k=24)}
    for position in sorted(positions):
        damaged = bytearray(wrapped)
        damaged[position] ^= 1 << rng.randrange(8)
        error = await failure(kms.unwrap(bytes(damaged), CONTEXT))
        assert error.verdict is Verdict.CORRUPT, position
    # The lowest bit of the last byte: where a text encoding would hide spare bits.
    damaged = bytearray(wrapped)
    damaged[-1] ^= 1
    assert (await failure(kms.unwrap(bytes(damaged), CONTEXT))).verdict is Verdict.CORRUPT


async def test_blobs_that_are_too_short_too_long_or_nothing_at_all(kms: KmsProvider) -> None:
    wrapped = (await kms.generate_kek(CONTEXT)).wrapped
    half = len(wrapped) // 2
    blobs = [b"", b"x", wrapped[:1], wrapped[:half], wrapped[:-1], wrapped[1:], wrapped + b"\0", wrapped + wrapped]
    for blob in (*blobs, bytes(len(wrapped)), b"\xff" * len(wrapped), bytes(100_000), wrapped + bytes(100_000)):
        for call in (kms.unwrap(blob, CONTEXT), kms.rewrap(blob, CONTEXT)):
            error = await failure(call)
            assert (error.verdict, error.reason) == (Verdict.CORRUPT, None), len(blob)


# ── the customer says no, and yes again ────────────────────────────────────────────────────────────────────────────


@over("disable", "enable")
async def test_disabled_and_enabled_again(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    assert (await kms.describe()).state is KeyState.ENABLED
    customer.disable()
    await every_use_is_denied(kms, kek.wrapped, customer.denial_reasons["disable"])
    async with closing(customer.provider()) as another:
        await every_use_is_denied(another, kek.wrapped, customer.denial_reasons["disable"])
    assert (await kms.describe()).state is KeyState.DISABLED
    customer.enable()
    await every_use_works(kms, kek.wrapped, kek.plaintext)
    assert (await kms.describe()).state is KeyState.ENABLED


@over("schedule_deletion", "cancel_deletion")
async def test_deletion_scheduled_and_cancelled(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    customer.schedule_deletion()
    await every_use_is_denied(kms, kek.wrapped, customer.denial_reasons["schedule_deletion"])
    match await outcome(kms.describe()):
        case KmsError() as hidden:  # a vendor may hide a deleted key altogether
            assert hidden.verdict is Verdict.DENIED
        case description:
            assert description.state is KeyState.PENDING_DELETION
    customer.cancel_deletion()
    await every_use_works(kms, kek.wrapped, kek.plaintext)


@over("destroy")
async def test_destroyed_for_good(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    assert not (await kms.destruction()).destroyed
    if "schedule_deletion" in customer.can:
        customer.schedule_deletion()
        waiting = await kms.destruction()
        assert not waiting.destroyed, "what can still be recovered is not destroyed"
        assert waiting.evidence
        customer.cancel_deletion()
    customer.destroy()
    gone = await kms.destruction()
    assert gone.destroyed, gone
    await every_use_is_denied(kms, kek.wrapped, customer.denial_reasons["destroy"])
    # Nothing that was tried meanwhile has brought anything back.
    assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).reason in customer.denial_reasons["destroy"]


@over("deny", "allow")
async def test_denied_and_allowed_again(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    customer.deny()
    await every_use_is_denied(kms, kek.wrapped, customer.denial_reasons["deny"])
    async with closing(customer.provider()) as another:
        await every_use_is_denied(another, kek.wrapped, customer.denial_reasons["deny"])
    customer.allow()
    await every_use_works(kms, kek.wrapped, kek.plaintext)


@over("deny", "allow", "disable", "enable")
async def test_who_may_not_use_the_key_does_not_learn_its_state(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    customer.disable()
    customer.deny()
    error = await failure(kms.unwrap(kek.wrapped, CONTEXT))
    assert (error.verdict, error.reason in customer.denial_reasons["deny"]) == (Verdict.DENIED, True)


# ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@over("rotate")
async def test_rotated_with_an_old_blob(customer: KmsCustomer, kms: KmsProvider) -> None:
    old = await kms.generate_kek(CONTEXT)
    for _ in range(2):
        before = (await kms.describe()).key_version
        customer.rotate()
        version = (await kms.describe()).key_version
        assert version != before
        assert (await kms.generate_kek(CONTEXT)).key_version == version
        assert (await kms.wrap(SecretKey.generate(), CONTEXT)).key_version == version
        moved = await kms.rewrap(old.wrapped, CONTEXT)
        assert moved.key_version == version != old.key_version
        for blob in (old.wrapped, moved.wrapped):
            assert (await kms.unwrap(blob, CONTEXT)).matches(old.plaintext)


@over("rotate")
async def test_a_call_says_which_version_opened_or_nothing(customer: KmsCustomer) -> None:
    calls: list[KmsCall] = []
    async with closing(customer.provider(calls.append)) as kms:
        old = await kms.generate_kek(CONTEXT)
        customer.rotate()
        calls.clear()
        await kms.unwrap(old.wrapped, CONTEXT)
        # Google's Decrypt says only whether it was the primary.
        assert calls[-1].key_version in (None, old.key_version)


# ── a cloud in trouble is never a denial ───────────────────────────────────────────────────────────────────────────


@over("outage")
@pytest.mark.parametrize("kind", [Outage.REFUSE, Outage.HANG])
async def test_an_outage(customer: KmsCustomer, kms: KmsProvider, kind: Outage) -> None:
    """The key is disabled besides: whoever is not reached proves nothing about it."""
    kek = await kms.generate_kek(CONTEXT)
    if "disable" in customer.can:
        customer.disable()
    customer.outage(kind)
    async with closing(customer.provider()) as newcomer:
        for call in (kms.unwrap(kek.wrapped, CONTEXT), newcomer.unwrap(kek.wrapped, CONTEXT)):
            started_s = time.monotonic()
            error = await failure(call)
            assert (error.verdict, error.reason) == (Verdict.UNREACHABLE, None)
            assert time.monotonic() - started_s < 10
    customer.outage(Outage.NONE)
    if "disable" in customer.can:
        assert (await failure(kms.unwrap(kek.wrapped, CONTEXT))).verdict is Verdict.DENIED
        customer.enable()
    await every_use_works(kms, kek.wrapped, kek.plaintext)


@over("throttle")
async def test_throttling(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    customer.throttle(1.0)
    for use in uses(kms, kek.wrapped).values():
        error = await failure(use())
        assert (error.verdict, error.reason) == (Verdict.THROTTLED, None)
    customer.throttle(0.0)
    await every_use_works(kms, kek.wrapped, kek.plaintext)


@over("clock_skew")
@pytest.mark.parametrize("seconds", [7200, -600])
async def test_a_wrong_clock(customer: KmsCustomer, kms: KmsProvider, seconds: float) -> None:
    """A signature or a token is refused as too old or not valid yet: the customer has not said a word."""
    kek = await kms.generate_kek(CONTEXT)
    customer.clock_skew(seconds)
    async with closing(customer.provider()) as newcomer:
        error = await failure(newcomer.unwrap(kek.wrapped, CONTEXT))
        assert (error.verdict, error.reason) == (Verdict.AMBIGUOUS, None)
        customer.clock_skew(0)
        await every_use_works(newcomer, kek.wrapped, kek.plaintext)
    await every_use_works(kms, kek.wrapped, kek.plaintext)


@over("restart_cloud")
async def test_a_killed_cloud_comes_back_with_everything(customer: KmsCustomer, kms: KmsProvider) -> None:
    old = await kms.generate_kek(CONTEXT)
    if "rotate" in customer.can:
        customer.rotate()
    kek = await kms.generate_kek(CONTEXT)
    if "disable" in customer.can:
        customer.disable()
    await asyncio.to_thread(customer.restart_cloud, kill=True)
    if "disable" in customer.can:
        await every_use_is_denied(kms, kek.wrapped, customer.denial_reasons["disable"])
        customer.enable()
    for made in (old, kek):
        assert (await kms.unwrap(made.wrapped, CONTEXT)).matches(made.plaintext)
    assert (await kms.describe()).key_version == kek.key_version


@over("propagation_delay", "disable")
async def test_a_change_is_in_force_only_after_its_propagation(customer: KmsCustomer, kms: KmsProvider) -> None:
    kek = await kms.generate_kek(CONTEXT)
    delay_s = 2.0
    customer.propagation_delay(delay_s)
    started_s = time.monotonic()
    customer.disable()
    changed_s = time.monotonic()
    answers = 0
    while not isinstance(answer := await outcome(kms.unwrap(kek.wrapped, CONTEXT)), KmsError):
        assert answer.matches(kek.plaintext)
        answers += 1
        assert time.monotonic() - changed_s < delay_s + PATIENCE_S
    assert answer.verdict is Verdict.DENIED
    assert answer.reason in customer.denial_reasons["disable"]
    assert answers > 0
    assert time.monotonic() - started_s >= delay_s
    customer.propagation_delay(0.0)
    customer.enable()


@over("propagation_delay", "deny")
async def test_a_denial_is_in_force_only_after_its_propagation(customer: KmsCustomer, kms: KmsProvider) -> None:
    """The delay is far longer than the test: what must not be seen yet cannot be."""
    kek = await kms.generate_kek(CONTEXT)
    customer.propagation_delay(600.0)
    customer.deny()
    assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    customer.propagation_delay(0.0)
    customer.allow()


@over("propagation_delay", "rotate")
async def test_a_rotation_is_in_force_only_after_its_propagation(customer: KmsCustomer, kms: KmsProvider) -> None:
    """Nothing of before is lost meanwhile, and nothing of after can be made that could not be opened."""
    old = await kms.generate_kek(CONTEXT)
    customer.propagation_delay(600.0)
    customer.rotate()
    new = await kms.generate_kek(CONTEXT)
    for kek in (old, new):
        assert (await kms.unwrap(kek.wrapped, CONTEXT)).matches(kek.plaintext)
    customer.propagation_delay(0.0)


# ── both sides of the trust boundary ───────────────────────────────────────────────────────────────────────────────


async def test_every_call_is_in_the_customers_own_log(customer: KmsCustomer) -> None:
    calls: list[KmsCall] = []
    async with closing(customer.provider(calls.append)) as kms:
        kek = await kms.generate_kek(CONTEXT)
        for use in uses(kms, kek.wrapped).values():
            await use()
        await kms.describe()
        await failure(kms.unwrap(kek.wrapped, EncryptionContext({})))
        for change, back in (("disable", "enable"), ("deny", "allow")):
            if {change, back} <= customer.can:
                getattr(customer, change)()
                error = await failure(kms.unwrap(kek.wrapped, CONTEXT))
                assert error.request_id is not None
                getattr(customer, back)()
    assert len(calls) >= 9
    ids = [call.request_id for call in calls]
    assert all(ids), "every one of them was answered"
    assert len(set(ids)) == len(ids)
    assert set(ids) - customer.audit_request_ids() == set()
    assert all(call.duration_s > 0 for call in calls)


@over("outage")
async def test_an_unanswered_call_is_reported_without_an_id(customer: KmsCustomer) -> None:
    calls: list[KmsCall] = []
    async with closing(customer.provider(calls.append)) as kms:
        wrapped = (await kms.generate_kek(CONTEXT)).wrapped
        calls.clear()
        customer.outage(Outage.HANG)
        error = await failure(kms.unwrap(wrapped, CONTEXT))
        customer.outage(Outage.NONE)
        assert calls
        assert {call.request_id for call in calls} == {None}
        assert calls[-1].error is error


async def test_no_key_is_in_a_repr_an_error_or_a_log(
    customer: KmsCustomer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the lowest log level, which some SDKs use for whole request and answer bodies."""
    caplog.set_level(logging.DEBUG)
    calls: list[KmsCall] = []
    seen: list[object] = []
    async with closing(customer.provider(calls.append)) as kms:
        secret = SecretKey.generate()
        kek = await kms.generate_kek(CONTEXT)
        wrapped = await kms.wrap(secret, CONTEXT)
        opened = await kms.unwrap(wrapped.wrapped, CONTEXT)
        await kms.rewrap(wrapped.wrapped, CONTEXT)
        errors = [
            await failure(kms.unwrap(kek.wrapped, EncryptionContext({}))),
            await failure(kms.unwrap(kek.wrapped[:-1], CONTEXT)),
        ]
        seen += [kms, kek, wrapped, opened, await kms.describe(), *calls, *errors]
        seen += [error.__cause__ for error in errors] + [error.__dict__ for error in errors]
        text = "\n".join([*map(repr, seen), *map(str, errors), caplog.text, *capfd.readouterr()])
        for key in (secret, kek.plaintext):
            raw = bytes(key.reveal())
            for form in (raw.hex(), repr(raw), repr(raw)[2:-1], base64.b64encode(raw).decode()):
                assert form not in text
                assert form.upper() not in text
