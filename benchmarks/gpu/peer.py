"""Measures transformers 4.57.6 on this GPU with random weights in bfloat16; prints a JSON line for each batch.

    python peer.py '{"layers": 4, "prompt": 960, "tokens": 64, "batches": [1, 8]}'

Needs torch with CUDA and transformers, not dbrx_jax: `python -m benchmarks.gpu` runs it in the Python that
DBRX_TRANSFORMERS_PYTHON names. transformers from 5.0 on computes DBRX wrongly.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers


def model(layers: int) -> Any:
    """Returns a DBRX of full width with random weights on the GPU."""
    config = transformers.DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=layers,
        max_seq_len=32768,
        vocab_size=100352,
        attn_config={"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000, "model_type": ""},
        ffn_config={
            "ffn_hidden_size": 10752,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
            "model_type": "",
        },
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return transformers.DbrxForCausalLM(config).eval()


def main(layers: int, prompt: int, tokens: int, batches: list[int]) -> None:
    if not transformers.__version__.startswith("4."):
        sys.exit(f"transformers {transformers.__version__} computes DBRX wrongly: install 4.57.6")
    dbrx = model(layers)

    def seconds(ids: torch.Tensor, new: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            dbrx.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for batch in batches:
        ids = torch.randint(0, 100_000, (batch, prompt), device="cuda")
        seconds(ids, 2)
        first = min(seconds(ids, 1) for _ in range(2))
        whole = min(seconds(ids, tokens + 1) for _ in range(2))
        row = {
            "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "layers": layers,
            "batch": batch,
            "context": prompt + tokens,
            "tokens_per_second": round(batch * tokens / (whole - first), 2),
            "prefill_tokens_per_second": round(batch * prompt / first, 1),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
