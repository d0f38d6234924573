"""Converts a DBRX checkpoint in the published layout to a GGUF file, as llama.cpp's own converter does.

    python -m benchmarks.gguf_file FOLDER OUT --dtype bfloat16

Runs in llama-cpp-python's environment: needs numpy and the package gguf, and not dbrx_jax. The vocabulary is made up,
because engines exchange token ids; llama-server wants one. int8 becomes Q8_0; int4 becomes Q4_0 for the experts and
Q8_0 for the rest. Rows that their blocks of 32 do not divide stay bfloat16.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

_BLOCK = "transformer.blocks.{i}"
_EXPERTS = f"{_BLOCK}.ffn.experts.mlp"
# GGUF tensor -> published tensor; {i} stands for every block.
TENSORS = {
    "token_embd": "transformer.wte.weight",
    "output_norm": "transformer.norm_f.weight",
    "output": "lm_head.weight",
    "blk.{i}.attn_norm": f"{_BLOCK}.norm_attn_norm.norm_1.weight",
    "blk.{i}.attn_qkv": f"{_BLOCK}.norm_attn_norm.attn.Wqkv.weight",
    "blk.{i}.attn_output": f"{_BLOCK}.norm_attn_norm.attn.out_proj.weight",
    "blk.{i}.attn_output_norm": f"{_BLOCK}.norm_attn_norm.norm_2.weight",
    "blk.{i}.ffn_gate_inp": f"{_BLOCK}.ffn.router.layer.weight",
    "blk.{i}.ffn_gate_exps": f"{_EXPERTS}.w1",
    "blk.{i}.ffn_up_exps": f"{_EXPERTS}.v1",
    "blk.{i}.ffn_down_exps": f"{_EXPERTS}.w2",
}
MATRICES = {
    "float32": (Type.F32, Type.F32),  # types of the experts, of other matrices
    "bfloat16": (Type.BF16, Type.BF16),
    "int8": (Type.Q8_0, Type.Q8_0),
    "int4": (Type.Q4_0, Type.Q8_0),
}


def convert(folder: Path, out: Path, dtype: str) -> None:
    """Writes the GGUF file, with one tensor at a time in memory; renames it when it is complete."""
    config = json.loads((folder / "config.json").read_text())
    ffn = config["ffn_config"]
    partial = out.with_name(out.name + ".incomplete")
    writer = gguf.GGUFWriter(partial, "dbrx")
    _write_metadata(writer, config)
    stored = dict(_tensors(folder))
    planned = []
    for name, source in TENSORS.items():
        for i in range(config["n_layers"]) if "{i}" in name else (0,):
            array = stored[source.format(i=i)]
            if name.endswith("_exps"):
                array = array.reshape(ffn["moe_num_experts"], ffn["ffn_hidden_size"], config["d_model"])
            if name.endswith("down_exps"):
                array = array.swapaxes(1, 2)  # llama.cpp contracts the last dimension; DBRX stores w2 transposed
            kind = _type(name, array, dtype)
            shape = gguf.quant_shape_to_byte_shape(array.shape, kind)
            size = int(np.prod(shape)) if kind != Type.F32 else array.size * 4
            dtype_on_disk = np.dtype(np.float32 if kind == Type.F32 else np.uint8)
            shape_on_disk = array.shape if kind == Type.F32 else shape
            writer.add_tensor_info(f"{name.format(i=i)}.weight", shape_on_disk, dtype_on_disk, size, kind)
            planned.append((array, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array, kind in planned:
        writer.write_tensor_data(gguf.quantize(_float32(array), kind))
    writer.close()
    partial.replace(out)


def _write_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    attention, ffn = config["attn_config"], config["ffn_config"]
    if attention.get("clip_qkv") is None or ffn.get("moe_normalize_expert_weights") != 1:
        sys.exit("llama.cpp needs clip_qkv and moe_normalize_expert_weights = 1")
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(ffn["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(ffn["moe_num_experts"])
    writer.add_expert_used_count(ffn["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")
    writer.add_token_list([f"t{i}," for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 1"])  # llama.cpp wants one
    writer.add_eos_token_id(config["vocab_size"] - 1)
    writer.add_add_bos_token(False)


def _type(name: str, array: np.ndarray, dtype: str) -> Type:
    """Returns a tensor's GGUF type; norms and routers are float32, as in llama.cpp's converter."""
    if array.ndim == 1 or name.endswith("gate_inp"):
        return Type.F32
    experts, rest = MATRICES[dtype]
    kind = experts if name.endswith("_exps") else rest
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if array.shape[-1] % block == 0 else Type.BF16


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and memory-mapped array of every tensor in a folder of safetensors; bfloat16 as uint16 bits."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(file, np.uint8, "r", 8 + length)
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            yield name, data[start:stop].view(dtypes[tensor["dtype"]]).reshape(tensor["shape"])


def _float32(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=MATRICES, default="bfloat16")
    args = parser.parse_args()
    convert(args.folder, args.out, args.dtype)
