"""Worker of llama.cpp, through llama-cpp-python's low-level interface; its `folder` is a GGUF file."""

import ctypes
import os
import platform
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.workers.serve import Engine, Generated, run

_F32, _F16 = 0, 1  # ggml's types, for the cache


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Discards llama.cpp's log."""


def _options(structure: ctypes.Structure, **values: int) -> ctypes.Structure:
    """Sets fields of a C structure; raises AttributeError for a field that this version lacks."""
    known = {field[0] for field in structure._fields_}
    for name, value in values.items():
        if name not in known:
            raise AttributeError(f"this llama-cpp-python has no {name} in {type(structure).__name__}")
        setattr(structure, name, value)
    return structure


class LlamaCpp(Engine):
    def load(self, folder: str, dtype: str) -> dict[str, str]:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        # Reads the file rather than mapping it, as the other engines do.
        options = _options(llama_cpp.llama_model_default_params(), load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)
        self.model = llama_cpp.llama_model_load_from_file(folder.encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {folder}")
        # Its default, flash attention, is not exact in float32: it changes the demo's logits by 2 percent.
        self.options = {"type_k": _F16, "type_v": _F16}
        if dtype == "float32":
            self.options = {"type_k": _F32, "type_v": _F32, "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch: Any = None
        self.shape = (0, 0)  # rows and positions of the context
        return {"python": platform.python_version(), "llama-cpp-python": llama_cpp.__version__}

    def logits(self, prompt: list[int]) -> list[float]:
        self._reset(1, len(prompt))
        return self._step([prompt], 0)[0].tolist()

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        length = len(prompts[0])
        self._reset(len(prompts), length + tokens)
        sampled = [self._step(prompts, 0).argmax(-1)]
        first = time.perf_counter()
        for step in range(tokens - 1):
            sampled.append(self._step(sampled[-1][:, None], length + step).argmax(-1))
        end = time.perf_counter()
        return Generated(np.stack(sampled, 1).tolist(), first, end)

    def _reset(self, rows: int, positions: int) -> None:
        """Clears the cache; makes a new context only for another shape."""
        positions = -(-positions // 256) * 256  # of a row
        if self.shape != (rows, positions):
            if self.context is not None:
                llama_cpp.llama_batch_free(self.batch)
                llama_cpp.llama_free(self.context)
            threads = len(os.sched_getaffinity(0))
            options = _options(
                llama_cpp.llama_context_default_params(),
                n_ctx=rows * positions,
                n_batch=rows * positions,
                n_seq_max=rows,
                n_threads=threads,
                n_threads_batch=threads,
                **self.options,
            )
            self.context = llama_cpp.llama_init_from_model(self.model, options)
            if not self.context:
                raise RuntimeError(f"llama.cpp cannot make a context of {rows} rows of {positions} positions")
            self.batch = llama_cpp.llama_batch_init(rows * positions, 0, 1)
            self.shape = (rows, positions)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _step(self, tokens: "list[list[int]] | np.ndarray", start: int) -> np.ndarray:
        """Computes tokens (B, T) at positions from `start` on; returns logits (B, V) after each row."""
        batch, n = self.batch, 0
        last = []
        for row, ids in enumerate(tokens):
            for i, token in enumerate(ids):
                batch.token[n], batch.pos[n] = int(token), start + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = i == len(ids) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if (code := llama_cpp.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in last]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])


if __name__ == "__main__":
    run(LlamaCpp())
