"""Tests of the iterator over a request's chunks, without an engine."""

import asyncio

from dbrx_jax.engine.generation import Generation, Wakes
from dbrx_jax.engine.request import Chunk


def test_chunk_for_a_loop_that_closes_meanwhile_does_not_fail_the_engine():
    """The loop may close between the engine's look at it and its call, so that it seems to be open."""
    wakes = Wakes()
    generation = Generation(1, wakes)

    async def begin():
        task = asyncio.create_task(anext(generation))
        await asyncio.sleep(0)
        task.cancel()
        return asyncio.get_running_loop()

    loop = asyncio.run(begin())
    loop.is_closed = lambda: False
    try:
        generation.put(None)
        wakes.send()
    finally:
        del loop.is_closed
    assert list(generation) == []


def test_event_loop_is_woken_once_for_all_requests():
    wakes = Wakes()
    generations = [Generation(1, wakes) for _ in range(3)]

    async def run():
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(anext(generation)) for generation in generations]
        await asyncio.sleep(0)
        for i, generation in enumerate(generations):
            generation.put(Chunk(0, (i,), "", (), None))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        calls, call = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *arguments: calls.append(arguments) or call(*arguments)
        wakes.send()
        wakes.send()
        assert [(await task).tokens for task in tasks] == [(0,), (1,), (2,)]
        assert len(calls) == 1

    asyncio.run(run())
