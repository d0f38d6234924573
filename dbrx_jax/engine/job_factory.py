"""Checks requests, and makes the rows of their completions."""

from collections.abc import Callable

import numpy as np

from dbrx_jax.config import DbrxConfig
from dbrx_jax.engine.request import Chunk, Request
from dbrx_jax.engine.rows import Job, Row, RowText
from dbrx_jax.engine.scheduler import Limits
from dbrx_jax.engine.seeds import completion_keys
from dbrx_jax.engine.slots import make_row
from dbrx_jax.engine.speculation import Speculation
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.prompts import new_token_limit
from dbrx_jax.model.inputs import check_ids
from dbrx_jax.sharding.partition import Partition
from dbrx_jax.text.tokenizer import DbrxTokenizer


class JobFactory:
    """Makes jobs of requests.

    Args:
      num_blocks: of the cache, without the spare one.
      top_logprobs: most probable tokens that a request may ask for with each new one.
    """

    def __init__(
        self,
        config: DbrxConfig,
        partition: Partition,
        tokenizer: DbrxTokenizer | None,
        limits: Limits,
        num_blocks: int,
        top_logprobs: int,
        speculation: Speculation,
    ):
        self._config, self._partition, self._tokenizer, self._limits = config, partition, tokenizer, limits
        self._num_blocks, self._top_logprobs, self._speculation = num_blocks, top_logprobs, speculation

    def make_job(self, request: Request, put: Callable[[Chunk | BaseException | None], None]) -> Job:
        """Checks a request, and makes the rows of its completions.

        Args:
          put: takes their chunks, and at last an exception or None.

        Raises:
          GenerationError: its prompt or options cannot be used, or it would never fit.
        """
        config, vocab_size = request.config, self._config.vocab_size
        prompt = np.asarray(check_ids([request.prompt], vocab_size), np.int32)[0]
        length, copies = len(prompt), config.num_return_sequences or 1
        limit = new_token_limit(config, {"max_new_tokens": 1, "max_length": 1}, length, length, self._limits.positions)
        self._check_size(length, limit, copies)
        for name in ("top_logprobs", "prompt_logprobs"):
            if (getattr(request, name) or 0) > self._top_logprobs:
                message = f"expected at most {self._top_logprobs}, got {getattr(request, name)}"
                raise GenerationError(f"{name}: {message}")
        if config.stop_strings and self._tokenizer is None:
            raise GenerationError("stop_strings: needs a tokenizer, to know the text of the tokens")
        keys = completion_keys(request.seed, copies, config.do_sample)
        job = Job(request, prompt, limit, put)
        job.rows = [self._make_row(job, index, keys[index]) for index in range(copies)]
        return job

    def _check_size(self, length: int, limit: int, copies: int) -> None:
        """Checks that completions of `limit` new tokens can ever run."""
        if copies > self._limits.max_rows:
            raise GenerationError(f"num_return_sequences: expected at most {self._limits.max_rows}, got {copies}")
        block = self._limits.block
        if -(-(length + limit) // block) * copies > self._num_blocks:
            available = self._num_blocks // copies * block
            raise GenerationError(
                f"max_new_tokens: {limit} with a prompt of {length} tokens is beyond the cache of {available} "
                f"positions for each completion; ask for at most {max(0, available - length)} new tokens"
            )

    def _make_row(self, job: Job, index: int, key: np.ndarray) -> Row:
        request, config = job.request, job.request.config
        is_constrained = request.constraint is not None
        sizes = self._config.vocab_size, len(job.prompt), job.limit
        settings = make_row(config, *sizes, key, bool(request.top_logprobs), is_constrained, self._partition)
        text = RowText(self._tokenizer, config.stop_strings, config.eos_token_id)
        matcher = request.constraint.matcher() if is_constrained else None
        if matcher is not None:
            matcher.follow([])
        drafter = self._speculation.drafter(job.prompt, job.limit, is_constrained)
        return Row(job, index, settings, text, matcher, drafter, sequence=job.prompt)
