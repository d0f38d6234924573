"""DBRX, the 132B mixture-of-experts language model of Databricks, in JAX and Flax for TPU, GPU and CPU."""

from dbrx_jax.api import DbrxForCausalLM as DbrxForCausalLM
from dbrx_jax.config import DbrxConfig as DbrxConfig
from dbrx_jax.runtime import enable_compilation_cache as enable_compilation_cache
from dbrx_jax.text.tokenizer import DbrxTokenizer as DbrxTokenizer
