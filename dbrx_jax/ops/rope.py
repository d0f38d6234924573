"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the rotate-half form."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Rotates element i of each head together with element i + K/2 by the angle position * theta^(-2i/K).

    Angles are float32: rounding the frequencies to bfloat16 changes logits by 3. Cosines and sines are of x's dtype.
    """
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # (B, T, 1, K/2)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
