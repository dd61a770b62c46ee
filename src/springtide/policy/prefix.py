"""Names for the beginnings of token sequences: the hash of a block stands for all tokens up to its end.

A block's K and V depend on every token before it, so its name must too: each hash covers its block's tokens and the
hash of the block before it, and the first one hangs on a root made from a salt. Two sequences have a hash in common
if, and only if, they have the salt and all tokens up to there in common, but for collisions. These don't matter: of
2^40 blocks (a trillion) some two have the same 128 bits with a chance of 1 in 2^49. On purpose, it takes 2^128
attempts to meet the block of somebody else, whose salt moreover the searcher would have to know; and 2^64 to make
two of one's own that meet, which fools nobody but their maker and those with whom he chose to share a salt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_SIZE = 16  # bytes


def root_hash(salt: str) -> bytes:
    """What the first block of a sequence hangs on: 16 bytes. Only sequences of equal salt share anything."""
    return blake2b(salt.encode(), digest_size=_DIGEST_SIZE, person=b"prefix root").digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of the block with these tokens, all of them, after the block (or root) `parent`: 16 bytes."""
    tokens = array("q", token_ids).tobytes()
    # A salt is somebody's free choice: `person` keeps it from imitating a block.
    return blake2b(parent + tokens, digest_size=_DIGEST_SIZE, person=b"prefix block").digest()


def extend_hashes(hashes: list[bytes], salt: str, token_ids: Sequence[int], block_size: int) -> None:
    """Append the hashes of those full blocks of a sequence, whose tokens are `token_ids`, that `hashes` lacks yet."""
    for end in range((len(hashes) + 1) * block_size, len(token_ids) + 1, block_size):
        parent = hashes[-1] if hashes else root_hash(salt)
        hashes.append(next_hash(parent, token_ids[end - block_size : end]))
