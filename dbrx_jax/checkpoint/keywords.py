"""Errors for keywords of from_pretrained that transformers has and this library does not, or that are misspelt."""

import difflib
from collections.abc import Iterable

from dbrx_jax.errors import CheckpointError

OURS = ("mesh", "dtype", "quantization", "all_to_all", "attention_implementation", "verify", "progress")
_MESH = 'mesh="expert=8" splits a model over devices'
_QUANTIZATION = 'quantization="int8", "int4" or "fp8" quantises'
_MEMORY = "each shard is read directly to its device"
_HUB = "the hub's own settings, such as HF_HOME and HF_TOKEN, apply; download another revision by itself"
# What to use in place of transformers' keywords.
_INSTEAD = {
    "torch_dtype": "use dtype",
    "device_map": f"use mesh: {_MESH}",
    "device": f"use mesh: {_MESH}, and jax.default_device chooses one",
    "tp_plan": f"use mesh: {_MESH}",
    "load_in_8bit": f"use quantization: {_QUANTIZATION}",
    "load_in_4bit": f"use quantization: {_QUANTIZATION}",
    "quantization_config": f"use quantization: {_QUANTIZATION}",
    "attn_implementation": "use attention_implementation",
    "trust_remote_code": "leave it out: no code of a checkpoint is run",
    "cache_dir": f"leave it out: {_HUB}",
    "revision": f"leave it out: {_HUB}",
    "token": f"leave it out: {_HUB}",
    "use_auth_token": f"leave it out: {_HUB}",
    "force_download": f"leave it out: {_HUB}",
    "local_files_only": f"leave it out: {_HUB}",
    "subfolder": "give the path of the folder itself",
    "config": "leave it out: config.json of the folder applies",
    "use_safetensors": "leave it out: only safetensors and Orbax are read",
    "low_cpu_mem_usage": f"leave it out: {_MEMORY}",
    "max_memory": f"use mesh: {_MESH}; dbrx-jax plan shows what fits",
    "offload_folder": f"use mesh: {_MESH}; there is no offloading",
    "offload_state_dict": f"leave it out: {_MEMORY}",
}


def refuse_keywords(keywords: Iterable[str]) -> None:
    """Raises CheckpointError for the first keyword, which from_pretrained does not have, saying what does that."""
    for name in keywords:
        close = difflib.get_close_matches(name, [*OURS, *_INSTEAD], 1)
        if name in _INSTEAD:
            advice = _INSTEAD[name]
        elif close:
            advice = f"did you mean {close[0]}? {_INSTEAD.get(close[0], '').capitalize()}".rstrip()
        else:
            advice = f"it has {', '.join(OURS)}"
        raise CheckpointError(f"from_pretrained has no argument {name!s:.40}: {advice}")
