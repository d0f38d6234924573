"""Layer normalisation with a scale and no bias."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

EPSILON = 1e-5


def layer_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"]) -> Float[Array, "*batch D"]:
    """Computes (x - mean) / sqrt(variance + 1e-5) * scale in float32, rounded once to x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)
