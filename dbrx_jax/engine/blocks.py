"""Blocks of the paged cache: free ones, those in use, and those whose contents later requests may share."""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

SPARE = 0  # the block that is never handed out: it stands where a table has no entry


def block_hashes(tokens: np.ndarray, block: int, salt: str, known: Sequence[bytes] = ()) -> list[bytes]:
    """Returns a hash for each full block of a sequence, of its tokens and all before it.

    Args:
      tokens: int32.
      block: positions of a block.
      salt: sequences with different salts have different hashes.
      known: hashes of the first blocks, which are not computed again.
    """
    hashes = list(known)
    previous = hashes[-1] if hashes else hashlib.sha256(salt.encode()).digest()
    data = np.ascontiguousarray(tokens, np.int32)
    for i in range(len(hashes), len(tokens) // block):
        previous = hashlib.sha256(previous + data[i * block : (i + 1) * block].tobytes()).digest()
        hashes.append(previous)
    return hashes


class BlockPool:
    """Hands out blocks 1 … num_blocks - 1 of a cache, and finds those that hold known tokens.

    A block in use has a number of users. A block that no one uses keeps its contents until it is handed out again, so
    that a later sequence with the same beginning can use it: the least recently used goes first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks - 1
        self._empty = deque(range(1, num_blocks))
        self._users = np.zeros(num_blocks, np.int64)
        self._by_hash: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = (
            OrderedDict()
        )  # blocks with a hash and no user, least recently used first

    @property
    def num_free(self) -> int:
        """Number of blocks that can be handed out."""
        return len(self._empty) + len(self._unused)

    @property
    def num_cached(self) -> int:
        """Number of blocks without a user whose contents can be shared."""
        return len(self._unused)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Returns the blocks with these hashes, up to the first that is not there; it does not use them yet."""
        blocks = []
        for value in hashes:
            if (block := self._by_hash.get(value)) is None:
                break
            blocks.append(block)
        return blocks

    def num_unused(self, blocks: Iterable[int]) -> int:
        """Returns how many of these blocks have no user, so that using them leaves fewer to hand out."""
        return sum(1 for block in blocks if not self._users[block])

    def of_one_user(self, blocks: Iterable[int]) -> list[int]:
        """Returns those of these blocks that have one user."""
        return [block for block in blocks if self._users[block] == 1]

    def use(self, blocks: Iterable[int]) -> None:
        """Adds a user to each of these blocks."""
        for block in blocks:
            self._users[block] += 1
            self._unused.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Returns blocks that have one user each; their contents are arbitrary. There must be as many free ones."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.popleft()
            else:
                block, _ = self._unused.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Removes a user of each of these blocks of one sequence; of blocks to hand out its last ones go first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0
            if self._users[block]:
                continue
            if block in self._hashes:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def record(self, block: int, value: bytes) -> None:
        """Makes a full block known by its hash, unless another block has the same contents."""
        if value not in self._by_hash and block not in self._hashes:
            self._by_hash[value] = block
            self._hashes[block] = value

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes blocks unknown, because their contents cannot be relied on."""
        for block in blocks:
            self._forget(block)
            if block in self._unused:
                del self._unused[block]
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        if (value := self._hashes.pop(block, None)) is not None:
            del self._by_hash[value]
