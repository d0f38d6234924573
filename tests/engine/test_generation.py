"""Tests of the iterator over a request's chunks, without an engine."""

import asyncio

from dbrx_jax.engine.generation import Generation


def test_chunk_for_a_loop_that_closes_meanwhile_does_not_fail_the_engine():
    """The loop may close between the engine's look at it and its call, so that it seems to be open."""
    generation = Generation(1)

    async def begin():
        task = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        task.cancel()
        return asyncio.get_running_loop()

    loop = asyncio.run(begin())
    loop.is_closed = lambda: False
    try:
        generation.put(None)
    finally:
        del loop.is_closed
    assert list(generation) == []
