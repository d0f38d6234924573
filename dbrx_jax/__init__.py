"""DBRX, the 132B fine-grained mixture-of-experts language model, in JAX and Flax."""

from dbrx_jax.config import DbrxConfig as DbrxConfig
from dbrx_jax.model.causal_lm import DbrxForCausalLM as DbrxForCausalLM
from dbrx_jax.tokenizer import DbrxTokenizer as DbrxTokenizer

__version__ = "0.1.0"
