"""Writes outputs of DBRX in transformers 4.57.6, in float32. Needs torch and does not import dbrx_jax.

    python make_answers.py OUT [CHECKPOINT …]

Writes into OUT random models in the published layout, folder by folder, and beside each (and for
each CHECKPOINT given) answers.npz: ids and mask (B, T), logits (B, T, V), greedy (B, N), and
penalised (B, N), which is greedy with a repetition penalty on the unpadded first row.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import DbrxConfig, DbrxForCausalLM

CONFIGS = [  # d_model, heads, kv, layers, vocabulary, ffn, experts, top k, clip, norm, theta, activation
    (40, 4, 2, 2, 203, 72, 5, 2, 1.5, 1.0, 5e5, "silu"),
    (72, 6, 3, 3, 151, 44, 8, 3, None, 2.0, 1e4, "gelu"),
    (56, 2, 1, 1, 97, 100, 3, 3, 0.7, None, 7e4, "silu"),
    (60, 10, 5, 2, 307, 32, 16, 4, 8.0, 1.0, 5e5, "relu"),
    (64, 8, 8, 2, 113, 84, 1, 1, 2.0, 1.0, 1e4, "gelu_pytorch_tanh"),
    (48, 4, 4, 3, 211, 20, 12, 1, 1.0, 3.0, 1e6, "silu"),
]


def write_random_model(folder: Path, seed: int, size: tuple, std: float = 0.15, max_seq_len: int = 256) -> None:
    d, heads, kv, layers, vocabulary, ffn, experts, top_k, clip, norm, theta, activation = size
    torch.manual_seed(seed)
    attention = {"kv_n_heads": kv, "clip_qkv": clip, "rope_theta": theta}
    mlp = {
        "ffn_hidden_size": ffn,
        "moe_num_experts": experts,
        "moe_top_k": top_k,
        "moe_normalize_expert_weights": norm,
        "ffn_act_fn": {"name": activation},
    }
    sizes = {"d_model": d, "n_heads": heads, "n_layers": layers, "vocab_size": vocabulary}
    sizes["max_seq_len"] = max_seq_len
    model = DbrxForCausalLM(DbrxConfig(**sizes, attn_config=dict(attention), ffn_config=dict(mlp))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, std)
    model.save_pretrained(folder, max_shard_size="100KB")
    config = {"model_type": "dbrx", **sizes, "attn_config": attention, "ffn_config": mlp, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))


def write_answers(folder: Path, out: Path, seed: int) -> None:
    model = DbrxForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    generator = np.random.default_rng(seed)
    ids = torch.tensor(generator.integers(0, model.config.vocab_size, (4, 30)))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 17, 29)):
        mask[row, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        greedy = model.generate(ids, attention_mask=mask, **options)[:, 30:]
        penalised = model.generate(ids[:1], attention_mask=mask[:1], repetition_penalty=1.3, **options)[:, 30:]
    arrays = {"ids": ids, "mask": mask, "logits": logits, "greedy": greedy, "penalised": penalised}
    np.savez(out, **{name: array.numpy() for name, array in arrays.items()})


def main(out: Path, checkpoints: list[Path]) -> None:
    for seed, size in enumerate(CONFIGS if not (out / "random0").exists() else []):
        write_random_model(out / f"random{seed}", seed, size)
        write_answers(out / f"random{seed}", out / f"random{seed}" / "answers.npz", seed)
    for checkpoint in checkpoints:
        write_answers(checkpoint, out / f"{checkpoint.name}.npz", 100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(a) for a in sys.argv[2:]])
