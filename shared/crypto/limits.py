"""How often a key may be used, and why.

NIST SP 800-38D §8.3: with random 96-bit nonces at most 2^32 seals under one key keep the collision probability below
2^-32. We stop far below, because a KEK is rotated at no cost: 2^24 wraps bound it by 2^(2·24 - 1 - 96) = 2^-49.

With counter nonces there are no collisions; what is left is the bound on blocks under one key. AES-GCM's distinguishing
advantage is about (total blocks)^2 / 2^129. A DEK seals one object; 2^36 bytes (64 GiB) are 2^32 blocks: 2^-65. Every
chunk takes one block more, for its tag, however small it is: with at most 2^32 of them that is 2^33 blocks: 2^-63.

Enforced: wraps, by the keymanager, which counts them before it makes them; bytes and chunks, by `seal_object`, and of a
compute's volume, which takes another key in time (2^23 blocks of 8 KiB). A piece of WAL is one segment at most: 2^24
bytes, in no more frames than that.
"""

from __future__ import annotations

from typing import Final

MAX_WRAPS_PER_KEK: Final = 1 << 24
MAX_BYTES_PER_DEK: Final = 1 << 36
MAX_CHUNKS_PER_DEK: Final = 1 << 32
