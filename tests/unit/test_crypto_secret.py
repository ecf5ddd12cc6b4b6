"""Plaintext keys do not show, copy, pickle or survive their wiping."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys

import pytest

from shared.api.keymanager import KeyItem
from shared.crypto.aead import AeadKey, Suite, check_suite
from shared.crypto.secret import KEY_SIZE_BYTES, KeyWipedError, SecretKey
from shared.crypto.transport import KeyTransport
from shared.errors import CorruptedError, IntegrityError, LeaseExpiredError

KEY = bytes(range(65, 97))


def test_a_key_shows_in_no_text() -> None:
    secret = SecretKey(KEY)
    cipher = AeadKey(secret)
    for thing in (secret, cipher, [secret], {"key": cipher}):
        for text in (str(thing), repr(thing), f"{thing}", "%s" % (thing,)):  # noqa: UP031 - what logging does
            assert "ABC" not in text
            assert KEY.hex() not in text
            assert str(KEY[0]) not in text
    with pytest.raises(TypeError):
        json.dumps({"key": secret})
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%r", (secret,), None)
    assert "ABC" not in record.getMessage()


def test_a_key_is_not_copied_or_pickled() -> None:
    secret = SecretKey(KEY)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(secret)
        with pytest.raises(TypeError):
            attempt(AeadKey(SecretKey(KEY)))


def test_a_key_takes_its_source_away() -> None:
    source = bytearray(KEY)
    secret = SecretKey(source)
    assert source == bytes(KEY_SIZE_BYTES)
    assert secret.reveal() == KEY
    assert secret.reveal().readonly


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_only_32_bytes_are_a_key(size: int) -> None:
    with pytest.raises(ValueError, match="32"):
        SecretKey(bytes(size))


def test_wiping_overwrites_and_ends_every_use() -> None:
    secret = SecretKey(KEY)
    memory = secret.reveal()
    cipher = AeadKey(secret)
    sealed = cipher.seal(bytes(12), b"row", b"")
    cipher.wipe()
    cipher.wipe()
    assert memory == bytes(KEY_SIZE_BYTES)
    assert secret.wiped
    assert cipher.wiped
    for use in (
        lambda: cipher.seal(bytes(12), b"", b""),
        lambda: cipher.open(bytes(12), sealed, b""),
        lambda: cipher.open_key(bytes(12), bytes(48), b""),
        secret.reveal,
        lambda: secret.matches(SecretKey(KEY)),
    ):
        with pytest.raises(KeyWipedError):
            use()
    assert issubclass(KeyWipedError, LeaseExpiredError)


def test_garbage_collection_wipes() -> None:
    secret = SecretKey(KEY)
    memory = secret.reveal()
    del secret
    assert memory == bytes(KEY_SIZE_BYTES)


def test_a_forked_child_does_not_see_keys() -> None:
    """In a process of its own: pytest's is not one to fork."""
    program = """
import os, sys
from shared.crypto.secret import SecretKey
secret = SecretKey(bytes(range(65, 97)))
memory = secret.reveal()
child = os.fork()
if child == 0:
    os._exit(0 if bytes(memory) == bytes(32) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status if bytes(memory) == bytes(range(65, 97)) else 2)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False, env={**os.environ})
    assert done.returncode == 0


def test_hardening_switches_core_dumps_off() -> None:
    program = """
import resource
from shared.hardening import harden_process
achieved = harden_process()
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert achieved["core_dumps_off"] and achieved["undumpable"]
import ctypes
assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0  # PR_GET_DUMPABLE
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


def test_generated_keys_differ() -> None:
    keys = [SecretKey.generate() for _ in range(100)]
    assert len({bytes(key.reveal()) for key in keys}) == 100


def test_open_key_refuses_what_is_no_wrapped_key() -> None:
    cipher, key = AeadKey(SecretKey(KEY)), SecretKey.generate()
    wrapped = cipher.seal(bytes(12), key.reveal(), b"context")
    assert cipher.open_key(bytes(12), wrapped, b"context").matches(key)
    for nonce, sealed, aad in (
        (bytes(12), wrapped[:-1], b"context"),
        (bytes(12), wrapped + b"\0", b"context"),
        (bytes(12), bytes(48), b"context"),
        (b"\1" * 12, wrapped, b"context"),
        (bytes(12), wrapped, b"another"),
    ):
        with pytest.raises(IntegrityError):
            cipher.open_key(nonce, sealed, aad)


def test_null_suite_is_refused_outside_of_its_test_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYLAKE_UNSAFE_NULL_CIPHER", raising=False)
    with pytest.raises(IntegrityError):
        check_suite(Suite.NULL)
    with pytest.raises(IntegrityError):
        check_suite(7)
    monkeypatch.setenv("KEYLAKE_UNSAFE_NULL_CIPHER", "1")
    assert check_suite(Suite.NULL) is Suite.NULL


# --- key transport ---


def agreed() -> tuple[KeyTransport, KeyTransport]:
    client, server = KeyTransport(), KeyTransport()
    client.agree(client.public, server.public)
    server.agree(client.public, server.public)
    return client, server


def test_transport_carries_keys_and_hides_them() -> None:
    client, server = agreed()
    key = SecretKey(KEY)
    first, second = server.seal_key(key, b"envelope"), server.seal_key(key, b"envelope")
    assert first != second
    assert KEY not in first
    item = KeyItem(envelope=b"envelope", sealed_dek=first)
    assert KEY.hex() not in item.model_dump_json()
    assert client.open_key(first, b"envelope").matches(key)
    assert client.open_key(second, b"envelope").matches(key)


def test_transport_refuses_other_sessions_contexts_and_altered_bytes() -> None:
    client, server = agreed()
    other, _ = agreed()
    sealed = server.seal_key(SecretKey(KEY), b"envelope")
    with pytest.raises(IntegrityError):
        client.open_key(sealed, b"another envelope")
    with pytest.raises(IntegrityError):
        other.open_key(sealed, b"envelope")
    for position in range(len(sealed)):
        twin = bytearray(sealed)
        twin[position] ^= 1
        with pytest.raises(IntegrityError):
            client.open_key(bytes(twin), b"envelope")
    for size in range(len(sealed)):
        with pytest.raises(IntegrityError):
            client.open_key(sealed[:size], b"envelope")


def test_transport_refuses_low_order_and_malformed_peers() -> None:
    for peer in (bytes(32), b"\1" + bytes(31), b"short"):
        transport = KeyTransport()
        with pytest.raises(CorruptedError):
            transport.agree(transport.public, peer)


def test_transport_is_of_no_use_before_and_after() -> None:
    early = KeyTransport()
    with pytest.raises(RuntimeError):
        early.seal_key(SecretKey(KEY), b"")
    client, server = agreed()
    sealed = server.seal_key(SecretKey(KEY), b"")
    client.wipe()
    with pytest.raises(KeyWipedError):
        client.open_key(sealed, b"")
