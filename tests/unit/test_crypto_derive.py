"""Keys made of keys."""

from __future__ import annotations

import pytest

from compute.sealed_log import KEY_LABEL as LOG_KEY_LABEL
from compute.volume.key_channel import KEY_LABEL as VOLUME_KEY_LABEL
from compute.volume.sealed_blocks import block_key
from shared.crypto.derive import derive_key
from shared.crypto.secret import KeyWipedError, SecretKey


def test_it_is_hkdf_expand_of_rfc_5869() -> None:
    """Its test case 1: the first of the two blocks that it asks for is the key."""
    key = SecretKey(bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"))
    derived = derive_key(key, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))
    assert derived.reveal().hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    key.wipe()
    assert not derived.wiped
    with pytest.raises(KeyWipedError):
        derive_key(key, b"")


def test_keys_of_one_boot_have_nothing_to_do_with_each_other() -> None:
    boot_key = SecretKey.generate()
    volume_key = derive_key(boot_key, VOLUME_KEY_LABEL)
    derived = [derive_key(boot_key, LOG_KEY_LABEL), volume_key, *(block_key(volume_key, number) for number in range(3))]
    assert len({bytes(key.reveal()) for key in (boot_key, *derived)}) == 1 + len(derived)
    assert block_key(volume_key, 2).matches(derived[-1])
