"""Routing of one token on Hopper GPUs in one kernel: softmax, top-k, weights, and the experts of this device.

XLA makes about ten kernels of it. One warp group computes with the few numbers as scalars.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

from dbrx_jax.ops.experts import ActiveExperts

MAX_EXPERTS = 32  # the kernel's code grows with their number


def supports(num_experts: int, norm: float | None) -> bool:
    """Returns whether the kernel routes to so many experts, and divides their weights by this p-norm."""
    return num_experts <= MAX_EXPERTS and norm in (None, 1)


def route_token(
    logits: Float[Array, "P E"],
    valid: Bool[Array, ""],
    first_expert: Int[Array, ""] | int,
    num_local: int,
    top_k: int,
    norm: float | None,
    interpret: Any = None,
) -> ActiveExperts:
    """Selects the experts of the first row as :func:`dbrx_jax.ops.routing.route` does; returns those of this device.

    Args:
      logits: float32, of all experts; other rows are ignored.
      valid: False for padding, which goes to no expert.
      first_expert, num_local: this device has the experts from `first_expert` on, so many.
    """
    num_experts = logits.shape[1]

    def body(logits_ref, scalars_ref, active_ref, num_ref, weights_ref):
        scores = [logits_ref[0, e] for e in range(num_experts)]
        largest = scores[0]
        for score in scores[1:]:
            largest = jnp.maximum(largest, score)
        probs = [jnp.exp(score - largest) for score in scores]
        total = sum(probs[1:], probs[0])
        probs = [p / total for p in probs]
        best = []
        for _ in range(top_k):
            prob, expert = probs[0], jnp.int32(0)
            for e, p in enumerate(probs[1:], 1):
                is_greater = p > prob  # a tie goes to the lower index
                prob, expert = jnp.where(is_greater, p, prob), jnp.where(is_greater, jnp.int32(e), expert)
            best.append((prob, expert))
            probs = [jnp.where(expert == e, -1.0, p) for e, p in enumerate(probs)]
        if norm is not None:
            total = sum((prob for prob, _ in best[1:]), best[0][0])
            best = [(prob / total, expert) for prob, expert in best]
        count = jnp.int32(0)
        slots = [(jnp.int32(0), jnp.float32(0))] * top_k
        for k, (prob, expert) in enumerate(best):
            local = expert - scalars_ref[1]
            is_local = (scalars_ref[0] > 0) & (local >= 0) & (local < num_local)
            for c in range(k + 1):
                is_here = is_local & (count == c)
                slots[c] = jnp.where(is_here, local, slots[c][0]), jnp.where(is_here, prob, slots[c][1])
            count += is_local.astype(jnp.int32)
        num_ref[0] = count
        for c, (expert, prob) in enumerate(slots):
            active_ref[c], weights_ref[c, 0] = expert, prob

    slots = min(top_k, num_local)
    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((top_k,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((top_k, 1), jnp.float32),
        ],
        grid=(1,),
        grid_names=("token",),
        interpret=interpret,
    )
    with jax.named_scope("route_token"):
        scalars = jnp.stack([valid.astype(jnp.int32), jnp.int32(first_expert)])
        active, num_active, weights = run(logits, scalars)
    return ActiveExperts(active[:slots], num_active[0], weights[:slots])
