"""The way of a volume's key, and what each end says when the other one does not do its part."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from compute.volume.key_channel import KEY_LABEL, KeyGiver, KeyTaker
from shared.crypto.derive import derive_key
from shared.crypto.secret import SecretKey
from shared.errors import UnavailableError


@pytest.fixture
def ends() -> Iterator[tuple[KeyGiver, KeyTaker, socket.socket]]:
    giver, theirs = KeyGiver.pair()
    taker = KeyTaker(theirs.detach())
    yield giver, taker, taker._socket
    giver.close()
    taker._socket.close()


def test_the_server_gets_what_the_boot_key_yields(ends: tuple[KeyGiver, KeyTaker, socket.socket]) -> None:
    giver, taker, _ = ends
    boot_key = SecretKey.generate()
    giver.give(boot_key)
    key = taker.take()
    assert key.matches(derive_key(boot_key, KEY_LABEL))
    assert not key.matches(boot_key)
    taker.confirm()
    assert giver.take_back(30)
    assert giver.take_back(30)


def test_without_a_key_nothing_is_opened_and_nothing_is_there_to_wipe(
    ends: tuple[KeyGiver, KeyTaker, socket.socket],
) -> None:
    giver, taker, _ = ends
    with pytest.raises(UnavailableError, match="did not come"):
        taker.take()
    assert giver.take_back(0.01)


def test_only_the_servers_word_counts(ends: tuple[KeyGiver, KeyTaker, socket.socket]) -> None:
    giver, _, theirs = ends
    giver.give(SecretKey.generate())
    assert not giver.take_back(0.01), "it says nothing"
    theirs.close()
    assert not giver.take_back(30), "it is gone"
    with pytest.raises(UnavailableError, match="takes no key"):
        giver.give(SecretKey.generate())


def test_a_server_that_ended_by_itself_may_have_said_so(ends: tuple[KeyGiver, KeyTaker, socket.socket]) -> None:
    giver, taker, theirs = ends
    giver.give(SecretKey.generate())
    taker.take()
    taker.confirm()
    theirs.close()
    assert giver.take_back(30)
