"""How often a key may be used, and why.

NIST SP 800-38D §8.3: with random 96-bit nonces at most 2^32 seals under one key keep the collision probability below
2^-32. We stop far below, because a KEK is rotated at no cost: 2^24 wraps bound it by 2^(2·24 - 1 - 96) = 2^-49.

With counter nonces there are no collisions; what is left is the bound on blocks under one key. AES-GCM's distinguishing
advantage is about (total blocks)^2 / 2^129. A DEK seals one object; 2^36 bytes (64 GiB) are 2^32 blocks: 2^-65.
"""

from __future__ import annotations

from typing import Final

MAX_WRAPS_PER_KEK: Final = 1 << 24
MAX_BYTES_PER_DEK: Final = 1 << 36
MAX_CHUNKS_PER_DEK: Final = 1 << 32
