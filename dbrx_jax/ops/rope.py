"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the rotate-half form."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Computes theta^(-2i/K) on the host, (K/2,) float32, radians per position.

    The power is correctly rounded, as PyTorch's is; XLA's differs in the last bit, by which angles at position 16,000
    are off by 0.001 and float32 logits by more than 1e-4.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Rotates element i of each head together with element i + K/2 by the angle position * theta^(-2i/K).

    Angles are float32: rounding the frequencies to bfloat16 changes logits by 3. Cosines and sines are of x's dtype.
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies(x.shape[-1], theta)  # (B, T, 1, K/2)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
