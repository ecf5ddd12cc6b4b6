"""Requests to a KMS that nobody waits for any more: they were sent, so they are reported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keymanager.kms.base import Classification, KmsCall, KmsError, Verdict
from keymanager.kms.calls import Answer, CallLimits, KmsCalls
from shared.crypto.secret import KeyWipedError, SecretKey
from shared.errors import InvalidInputError
from tests.fixtures.waiting import wait_until


class RefusedError(Exception):
    pass


def judge(operation: str, error: Exception) -> KmsError | None:
    if isinstance(error, RefusedError):
        return KmsError(Classification(Verdict.CORRUPT), operation=operation, provider_code="No", request_id="refused")
    return None


class Service:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.key = SecretKey.generate()
        self.refuse = False

    def __call__(self) -> Answer[SecretKey]:
        self.asked.set()
        assert self.may_answer.wait(20)
        if self.refuse:
            raise RefusedError
        return Answer(self.key, "request-1", "version-1")


@pytest.fixture
def heard() -> list[KmsCall]:
    return []


@pytest.fixture
async def calls(heard: list[KmsCall]) -> AsyncIterator[KmsCalls]:
    made = KmsCalls("test", judge, CallLimits(max_concurrency=1, deadline_s=20), observer=heard.append)
    yield made
    await made.aclose()


@pytest.mark.parametrize("refuse", [False, True])
async def test_an_abandoned_request_is_reported_when_it_has_ended(
    calls: KmsCalls, heard: list[KmsCall], refuse: bool
) -> None:
    service = Service()
    service.refuse = refuse
    waiting = asyncio.create_task(calls.attempt("Decrypt", service))
    await wait_until(service.asked.is_set)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert heard == []
    service.may_answer.set()
    await wait_until(lambda: heard)
    [call] = heard
    assert (call.operation, call.request_id) == ("Decrypt", "refused" if refuse else "request-1")
    assert (call.error is not None) == refuse
    if not refuse:  # nobody takes the key that it brought
        with pytest.raises(KeyWipedError):
            service.key.reveal()


async def test_what_was_never_sent_is_not_reported(calls: KmsCalls, heard: list[KmsCall]) -> None:
    first, second = Service(), Service()
    busy = asyncio.create_task(calls.attempt("Decrypt", first))
    await wait_until(first.asked.is_set)
    queued = asyncio.create_task(calls.attempt("Encrypt", second))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    first.may_answer.set()
    await busy
    await calls.aclose()
    await asyncio.sleep(0)
    assert [call.operation for call in heard] == ["Decrypt"]
    assert not second.asked.is_set()


@pytest.mark.parametrize("wrong", [{"max_concurrency": 0}, {"connect_timeout_s": 0.0}, {"deadline_s": -1.0}], ids=str)
def test_limits_under_which_no_call_ends_well_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="must be positive"):
        CallLimits(**wrong)
