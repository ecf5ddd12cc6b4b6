"""The ledger of KMS calls on a real database: nothing is lost while that is away, and what is forgotten is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pytest

from keymanager import kms_ledger
from keymanager.kms.base import Classification, KmsCall, KmsError, Verdict
from keymanager.kms_ledger import KmsLedger
from keymanager.leadership import Term
from keymanager.repository import Repository
from shared.api.keymanager import AwsKey
from shared.audit_kms_calls import ACTION, MAX_CALLS_PER_RECORD, RecordedCall, forgotten_calls, recorded_calls
from shared.clock import ManualClock
from shared.errors import UnavailableError
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration

KEY = AwsKey(
    key_arn="arn:aws:kms:eu-central-1:111122223333:key/a",
    role_arn="arn:aws:iam::111122223333:role/keylake",
    external_id="external",
)


def call(request_id: str | None, error: KmsError | None = None) -> KmsCall:
    return KmsCall("Decrypt", request_id, 0.5, None, error)


@asynccontextmanager
async def led_repository(dsn: str, clock: ManualClock) -> AsyncIterator[Repository]:
    """In the first term of all, which lasts."""
    async with Repository.open(dsn, 2, clock, idle_transaction_timeout_s=60) as repository:
        yield repository.during(Term(0, clock.monotonic_s(), 3600, clock))


async def recorded(repository: Repository) -> list[RecordedCall]:
    return [made for link in await repository.audit_page(0, 1000) for made in recorded_calls(link)]


async def test_calls_are_recorded_in_groups_with_time_and_verdict(metadata_dsn: str) -> None:
    clock = ManualClock()
    async with led_repository(metadata_dsn, clock) as repository:
        ledger = KmsLedger(clock, 3600)
        clock.advance(10)
        ledger.note(KEY, call("1"))
        late = KmsError(Classification(Verdict.UNREACHABLE), operation="Decrypt", provider_code="DeadlineExceeded")
        ledger.note(KEY, call(None, late))
        await ledger.flush(repository)
        await ledger.flush(repository)  # nothing is waiting: no record
        [link] = await repository.audit_page(0, 10)
        assert link.entry.action == ACTION
        first, second = recorded_calls(link)
        assert first.at == clock.now() - timedelta(seconds=0.5)
        assert (first.key, first.principal, first.provider) == (KEY.key_arn, KEY.role_arn, "aws")
        assert (first.request_id, first.verdict) == ("1", "ok")
        assert (second.request_id, second.verdict) == (None, "unreachable")
        # As soon as a record is full it is written, long before the interval ends.
        running = asyncio.create_task(ledger.run(repository))
        for number in range(MAX_CALLS_PER_RECORD):
            ledger.note(KEY, call(f"m{number}"))

        async def written() -> bool:
            return len(await recorded(repository)) == 2 + MAX_CALLS_PER_RECORD

        await wait_until(written)
        running.cancel()


async def test_while_the_database_is_away_calls_wait(
    metadata_dsn: str, metadata_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kms_ledger, "_MAX_WAITING_PER_KEY", 300)
    database, clock = metadata_dsn.rpartition("/")[2], ManualClock()
    async with led_repository(metadata_dsn, clock) as repository:
        ledger = KmsLedger(clock, 3600)
        operator = await asyncpg.connect(f"{metadata_server}/postgres")
        try:
            ledger.note(KEY, call("first"))
            await operator.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            await operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database
            )
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    await ledger.flush(repository)
            ledger.note(KEY, call("second"))
        finally:
            await operator.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
            await operator.close()

        async def back() -> bool:
            try:
                await ledger.flush(repository)
            except UnavailableError:
                return False
            return True

        await wait_until(back)
        assert [made.request_id for made in await recorded(repository)] == ["first", "second"]
        # Longer than there is room for: the oldest are forgotten, and that is said.
        for number in range(310):
            ledger.note(KEY, call(f"n{number}"))
        await ledger.flush(repository)
        links = await repository.audit_page(0, 1000)
        assert sum(forgotten_calls(link) for link in links) == 10
        made = [each.request_id for each in await recorded(repository)][2:]
        assert made == [f"n{number}" for number in range(10, 310)]
