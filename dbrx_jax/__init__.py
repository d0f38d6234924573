"""DBRX, the 132B mixture-of-experts language model of Databricks, in JAX and Flax for TPU, GPU and CPU."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM as DbrxForCausalLM
    from dbrx_jax.config import DbrxConfig as DbrxConfig
    from dbrx_jax.engine.engine import Engine as Engine
    from dbrx_jax.engine.request import Request as Request
    from dbrx_jax.runtime import enable_compilation_cache as enable_compilation_cache
    from dbrx_jax.text.tokenizer import DbrxTokenizer as DbrxTokenizer

# The module of each public name. It is imported with the first use of the name: the commands' --help needs no JAX.
_MODULES = {
    "DbrxConfig": "dbrx_jax.config",
    "DbrxForCausalLM": "dbrx_jax.api",
    "DbrxTokenizer": "dbrx_jax.text.tokenizer",
    "Engine": "dbrx_jax.engine.engine",
    "Request": "dbrx_jax.engine.request",
    "enable_compilation_cache": "dbrx_jax.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
