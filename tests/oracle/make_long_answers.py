"""Writes a small model and a prompt's logits in transformers 4.57.6, in float32. Needs torch, not dbrx_jax.

    python make_long_answers.py OUT

Writes into OUT a model with DBRX's head size and theta, and answers.npz: ids (1, T), logits (1, T, V) of the
prompt, and greedy (1, N), the tokens that follow it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_answers import write_random_model
from transformers import DbrxForCausalLM, DynamicCache

SIZE = (256, 2, 1, 2, 101, 72, 4, 2, 8.0, 1.0, 5e5, "silu")
PROMPT, CHUNK, NEW_TOKENS = 32_000, 500, 8  # tokens


def main(out: Path) -> None:
    write_random_model(out, 0, SIZE, std=0.08, max_seq_len=1 << 15)
    model = DbrxForCausalLM.from_pretrained(out, torch_dtype=torch.float32).eval()
    ids = torch.tensor(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT)))
    cache = DynamicCache()

    @torch.no_grad()
    def forward(tokens: torch.Tensor, start: int) -> torch.Tensor:
        positions = torch.arange(start, start + tokens.shape[1])
        return model(tokens, past_key_values=cache, cache_position=positions).logits

    logits = torch.cat([forward(ids[:, i : i + CHUNK], i) for i in range(0, PROMPT, CHUNK)], dim=1)
    greedy = [logits[:, -1:].argmax(-1)]
    for i in range(NEW_TOKENS - 1):
        greedy.append(forward(greedy[-1], PROMPT + i).argmax(-1))
    np.savez(out / "answers.npz", ids=ids.numpy(), logits=logits.numpy(), greedy=torch.cat(greedy, dim=1).numpy())


main(Path(sys.argv[1]))
