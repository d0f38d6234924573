"""Tests of the scheduler: the chunks of the prompts, without a model."""

import dataclasses

import numpy as np
import pytest

from dbrx_jax.engine.request import Request
from dbrx_jax.engine.rows import Job, Row
from dbrx_jax.engine.scheduler import Limits, Scheduler
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.cache import CPU_CHUNKS, prefill_chunks
from dbrx_jax.sharding.partition import Partition

LIMITS = Limits(
    max_rows=9, max_waiting=5, positions=1920, block=128, chunk_lengths=CPU_CHUNKS, prefill_budget=512, steps=8
)


def make_scheduler(num_blocks=100, **changes):
    limits = dataclasses.replace(LIMITS, **changes)
    longest = limits.chunk_shapes[-1][1]
    return Scheduler(limits, num_blocks, lambda tokens: prefill_chunks(tokens, Partition(), longest))


def add(scheduler, length, limit=20, copies=1):
    prompt = np.random.default_rng(length).integers(0, 99, length).astype(np.int32)
    job = Job(Request(prompt.tolist(), GenerationConfig()), prompt, limit, lambda chunk: None)
    job.rows = [Row(job, i, None, None, sequence=prompt) for i in range(copies)]
    scheduler.add(job)
    return job.rows


def chunks(scheduler, num_steps=100):
    """Runs steps until no prompt is left; returns the first position, tokens and shape of each chunk."""
    seen = []
    for _ in range(num_steps):
        step = scheduler.next_step(1, True)
        if step.prefill is None:
            return seen
        seen.append((step.prefill.starts, step.prefill.counts, step.prefill.shape))
        for row in (*step.decode, *(row for row, _ in step.started)):
            row.pending = 0
    raise AssertionError("prompts are left")


def test_prompts_take_the_longest_chunks_while_no_row_runs():
    scheduler = make_scheduler(budgets=(16, 128))
    add(scheduler, 1100)
    assert chunks(scheduler) == [([0], [512], (1, 512)), ([512], [512], (1, 512)), ([1024], [76], (1, 128))]


@pytest.mark.parametrize(("num_running", "length"), [(1, 16), (2, 128), (8, 128)])
def test_chunks_beside_rows_keep_within_their_budget(num_running, length):
    scheduler = make_scheduler(budgets=(16, 128, 512))
    add(scheduler, 9, limit=1000, copies=num_running)
    scheduler.next_step(1, True)
    assert len(scheduler.running) == num_running
    add(scheduler, 300)
    seen = chunks(scheduler)
    assert [(starts, counts) for starts, counts, _ in seen] == [
        ([start], [min(length, 300 - start)]) for start in range(0, 300, length)
    ]
    assert [shape for _, _, shape in seen[:-1]] == [(1, length)] * (len(seen) - 1)
    assert seen[-1][2] == (1, min(length, 64))  # 44 tokens are left


def test_long_chunk_begins_at_a_block_after_short_ones():
    """A prompt is cut in 16s while one row runs; when none does, chunks get longer as they may."""
    scheduler = make_scheduler(budgets=(16, 512, 512))
    (running,) = add(scheduler, 9, limit=1000)
    scheduler.next_step(1, True)
    add(scheduler, 600)
    first = [scheduler.next_step(1, True).prefill.starts for _ in range(3)]
    assert first == [[0], [16], [32]]
    scheduler.finish(running)
    lengths = [(starts[0], shape[1]) for starts, _, shape in chunks(scheduler)]
    assert lengths == [(48, 16), (64, 64), (128, 512)]


def test_prompt_with_least_left_is_next_and_each_fourth_chunk_is_of_the_one_that_waits_longest():
    scheduler = make_scheduler(prefill_budget=16)
    (long,) = add(scheduler, 400)
    middle, short = add(scheduler, 47)[0], add(scheduler, 31)[0]
    taken = []
    for _ in range(10):
        rows = scheduler.next_step(1, True).prefill.rows
        taken += [{long: "long", middle: "middle", short: "short"}[row] for row in rows]
    assert taken == ["short", "short", "middle", "long", "middle", "middle", *["long"] * 4]


def test_prompts_of_several_chunks_do_not_take_short_ones_to_join_others():
    """They would begin their next chunks at a position where only short ones may begin."""
    scheduler = make_scheduler(prefill_budget=128)
    short, _, other = [add(scheduler, length)[0] for length in (14, 390, 13)]
    step = scheduler.next_step(1, True)
    assert (step.prefill.rows, step.prefill.shape) == ([other, short], (4, 16))
    assert [scheduler.next_step(1, True).prefill.counts for _ in range(4)] == [[128], [128], [128], [6]]


def test_prompts_share_chunks_of_their_own_length():
    assert make_scheduler().limits.chunk_shapes == (
        (1, 16), (4, 16), (16, 16), (1, 32), (4, 32), (16, 32), (1, 64), (4, 64), (1, 128), (4, 128), (1, 512)
    )  # fmt: skip
    scheduler = make_scheduler()
    for _ in range(8):
        add(scheduler, 20)
    assert chunks(scheduler) == [([0] * 8, [20] * 8, (16, 32))]


def test_two_long_prompts_both_go_on_while_shorter_ones_come():
    scheduler = make_scheduler(prefill_budget=16)
    longs = [add(scheduler, length)[0] for length in (700, 800)]
    for _ in range(30):
        add(scheduler, 14)
        scheduler.next_step(1, True)
        for row in scheduler.running:
            scheduler.finish(row)
    assert [row.computed >= 32 for row in longs] == [True, True]


def test_short_prompts_share_a_chunk_within_the_budget():
    scheduler = make_scheduler(budgets=(16, 128, 512))
    (running,) = add(scheduler, 9, limit=1000)
    scheduler.next_step(1, True)
    for length in (3, 14, 15, 7):
        add(scheduler, length)
    assert scheduler.next_step(1, True).prefill.shape == (1, 16)
    scheduler.finish(running)
    assert scheduler.next_step(1, True).prefill.counts == [7]  # beside the first of them, which runs now
    scheduler.limits = dataclasses.replace(scheduler.limits, budgets=())
    step = scheduler.next_step(1, True)
    assert (step.prefill.counts, step.prefill.shape) == ([14, 15], (4, 16))


def test_batch_invariant_chunks_do_not_depend_on_what_runs():
    scheduler = make_scheduler(batch_invariant=True, budgets=(16, 16))
    add(scheduler, 9, limit=1000)
    scheduler.next_step(1, True)
    add(scheduler, 530)
    assert chunks(scheduler) == [([0], [512], (1, 512)), ([512], [18], (1, 32))]


def test_row_that_was_admitted_last_is_put_back_though_another_has_more_left():
    """The first row needs a block while two prompts are computed, of which the later has less left."""
    scheduler = make_scheduler(num_blocks=9, prefill_budget=16)
    (first,) = add(scheduler, 128, limit=1000)  # it has two blocks, and one is kept for it
    while not scheduler.running:
        scheduler.next_step(1, True)
    (long,), (last,) = add(scheduler, 450), add(scheduler, 44, limit=1000)
    scheduler.next_step(1, True)
    assert (scheduler.prefilling, long.computed, last.computed) == ([long, last], 0, 16)
    assert scheduler.pool.num_free == 1
    first.generated, first.pending = 257, 0
    scheduler.next_step(1, True)
    assert last in scheduler.waiting
    assert long in (*scheduler.prefilling, *scheduler.running)


def test_proposals_take_free_blocks_and_never_those_of_others():
    scheduler = make_scheduler()
    row, other = [rows[0] for rows in (add(scheduler, 126), add(scheduler, 20))]
    while len(scheduler.running) < 2:
        scheduler.next_step(1, True)
    for one in (row, other):
        one.pending, one.generated = 0, 1
    free = scheduler.pool.num_free
    step = scheduler.next_step(5, True, {row: np.arange(4), other: np.arange(3)})  # up to position 131
    assert {one: len(tokens) for one, tokens in step.proposals.items()} == {row: 4, other: 3}
    assert (step.steps, row.pending, other.pending) == (1, 1, 1)
    assert scheduler.pool.num_free == free - 1
    assert len(row.blocks) == 2
    row.pending = other.pending = 0
    row.generated = 129  # of 256 positions one is free
    scheduler.pool.allocate(scheduler.pool.num_free)
    step = scheduler.next_step(1, True, {row: np.arange(4), other: np.arange(3)})
    assert {one: len(tokens) for one, tokens in step.proposals.items()} == {row: 1, other: 3}
    assert scheduler.num_preemptions == 0
