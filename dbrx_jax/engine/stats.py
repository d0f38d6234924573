"""Numbers of an engine, for its users and the metrics of the server."""

from typing import NamedTuple


class EngineStats(NamedTuple):
    """Numbers of an engine, now and since its start."""

    running: int  # rows
    waiting: int  # requests
    blocks: int
    free_blocks: int  # with those whose contents can be shared
    cached_blocks: int  # free, with contents that can be shared
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int  # prompt tokens that were looked for in the cache
    prefix_hits: int  # and found
    preemptions: int
    compilations_after_warmup: int
    proposed_tokens: int  # by speculation
    accepted_tokens: int  # of these
