"""Tests of the block pool: random use against a plain record of who uses what."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.engine.blocks import SPARE, BlockPool, block_hashes


def test_hashes_depend_on_all_tokens_before_and_on_the_salt():
    a, b = np.arange(13, dtype=np.int32), np.arange(13, dtype=np.int32)
    b[0] = 99
    assert len(block_hashes(a, 4, "")) == 3
    assert block_hashes(a, 4, "") == block_hashes(a.copy(), 4, "")
    assert not set(block_hashes(a, 4, "")) & set(block_hashes(b, 4, ""))
    assert not set(block_hashes(a, 4, "")) & set(block_hashes(a, 4, "key"))
    b = a.copy()
    b[5] = 99
    assert [x == y for x, y in zip(block_hashes(a, 4, ""), block_hashes(b, 4, ""), strict=True)] == [True, False, False]
    assert block_hashes(a, 4, "", block_hashes(a[:8], 4, "")) == block_hashes(a, 4, "")


def test_least_recently_used_contents_go_first_and_a_row_s_last_blocks_before_its_first():
    pool = BlockPool(7)
    for names in (b"ab", b"cd", b"ef"):
        blocks = pool.allocate(2)
        for block, name in zip(blocks, names, strict=True):
            pool.record(block, bytes([name]))
        pool.release(blocks)
    assert pool.num_free == pool.num_cached == 6
    pool.use(pool.find([b"a"]))
    pool.release(pool.find([b"a"]))  # used again, so last to go
    for expected in (b"b", b"d", b"c", b"f", b"e", b"a"):
        assert pool.find([expected])
        (block,) = pool.allocate(1)
        assert not pool.find([expected])
        assert block != SPARE
    assert pool.num_free == 0


@settings(max_examples=60)
@given(st.integers(2, 9), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(1, 4)), max_size=60))
def test_random_use_loses_and_shares_no_block_wrongly(num_blocks, actions):
    """Rows begin with one of few prompts, so that they share blocks; a model of the pool is kept beside it."""
    pool, rows, contents = BlockPool(num_blocks), [], {}
    for kind, which, size in actions:
        if kind <= 2:  # a row arrives, with blocks named by its prompt
            names = [f"{which % 3}-{i}".encode() for i in range(size)]
            shared = pool.find(names)
            assert all(contents[block] == name for block, name in zip(shared, names, strict=False))
            if size - len(shared) > pool.num_free - pool.num_unused(shared):
                continue
            pool.use(shared)
            new = pool.allocate(size - len(shared))
            used = {block for row in rows for block in row}
            assert not used & set(new)
            assert SPARE not in new
            for block, name in zip(new, names[len(shared) :], strict=True):
                contents[block] = name
                pool.record(block, name)
            rows.append(shared + new)
        elif rows:
            row = rows.pop(which % len(rows))
            if kind == 4:
                pool.forget(pool.of_one_user(row))
            pool.release(row)
        used = {block for row in rows for block in row}
        assert pool.num_free == pool.num_blocks - len(used)
        assert set(pool.of_one_user(used)) == {b for b in used if sum(b in row for row in rows) == 1}
    for row in rows:
        pool.release(row)
    assert pool.num_free == pool.num_blocks
    assert sorted(pool.allocate(pool.num_blocks)) == list(range(1, num_blocks))
