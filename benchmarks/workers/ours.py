"""Worker of dbrx_jax."""

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.workers.serve import Engine, Generated, run
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.generation.stream import BURST, TokenStream
from dbrx_jax.runtime import enable_compilation_cache


class Ours(Engine):
    def load(self, folder: str, dtype: str) -> dict[str, str]:
        enable_compilation_cache()
        options: dict[str, Any] = {"dtype": dtype}
        if dtype in ("int8", "int4"):
            options = {"dtype": "bfloat16", "quantization": dtype}
        self.model = DbrxForCausalLM.from_pretrained(folder, **options)
        packages = ("dbrx-jax", "jax", "jaxlib", "flax")
        return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}

    def logits(self, prompt: list[int]) -> list[float]:
        return np.asarray(self.model([prompt]))[0, -1].tolist()

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        # In bursts, as a streaming user receives them.
        stream = TokenStream(self.model, prompts, max_new_tokens=tokens, eos_token_id=None, burst=BURST)
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        end = time.perf_counter()
        return Generated(stream.sequences[:, len(prompts[0]) :].tolist(), first, end)

    def stream(self, prompts: list[list[int]], tokens: int, rows: int, positions: int) -> Iterator[int]:
        options: dict[str, Any] = {"eos_token_id": None, "burst": 1, "batch_size": rows, "cache_length": positions}
        stream = TokenStream(self.model, prompts, max_new_tokens=tokens, **options)
        # The warm-up has compiled all programs; this would trace them again for each set of chunks' lengths.
        stream.compile = lambda: None  # type: ignore[method-assign]
        for new in stream:
            yield new.shape[1]


if __name__ == "__main__":
    run(Ours())
