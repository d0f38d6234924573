"""Residual connection, layer norm, router and choice of experts of one token on Hopper GPUs, in one kernel.

XLA makes a dozen kernels of it, each of which does next to nothing. Here one warp group copies the router's weights to
shared memory while it computes the norm. It chooses experts with the few numbers as scalars.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

from dbrx_jax.kernels.gpu.fixed_point import MIN_ROWS, FixedPoint
from dbrx_jax.kernels.gpu.fixed_point_rows import fixed_point_shapes, row_layout, store_fixed_point
from dbrx_jax.kernels.gpu.integer_weights import IntegerWeights
from dbrx_jax.ops.experts import ActiveExperts
from dbrx_jax.ops.norm import EPSILON

MAX_EXPERTS = 32  # the kernel's code grows with their number
COLUMNS = 128  # elements of a vector that are copied at a time
_MAX_COPIES = 256  # of a vector; a limit of the copies
_SHARED_BYTES = 220 * 1024


def supports(x: Any, router: Any, norm: float | None, interpret: bool = False) -> bool:
    """Returns whether the kernel supports hidden states (P, D), a router (E, D) and the p-norm of the weights."""
    (num_experts, D), is_dtype = router.shape, x.dtype == router.dtype and (x.dtype == jnp.bfloat16 or interpret)
    fits = num_experts * D * router.dtype.itemsize <= _SHARED_BYTES and D <= COLUMNS * _MAX_COPIES
    return is_dtype and D % COLUMNS == 0 and fits and num_experts <= MAX_EXPERTS and norm in (None, 1)


def norm_route(
    x: Float[Array, "P D"],
    y: Float[Array, "P D"],
    norm_scale: Float[Array, "D"],
    router: Float[Array, "E D"],
    valid: Bool[Array, ""],
    first_expert: Int[Array, ""] | int,
    num_local: int,
    top_k: int,
    norm: float | None,
    weight: IntegerWeights | None,
    interpret: Any = None,
) -> tuple[Float[Array, "1 D"], Float[Array, "1 D"], FixedPoint | None, ActiveExperts]:
    """Adds the first row of y to that of x, normalises the sum, and selects its experts.

    As :func:`dbrx_jax.ops.norm.layer_norm` and :func:`dbrx_jax.ops.routing.route` do.

    Args:
      x, y: rows behind the first are ignored.
      valid: False for padding, which goes to no expert.
      first_expert, num_local: this device has so many experts, from `first_expert` on.

      weight: rows are rounded to fixed point for it; None: they are not.

    Returns:
      The sum, the normalised sum, its fixed point or None, with undefined rows behind it, and this device's experts.
    """
    (num_experts, D), dtype = router.shape, x.dtype
    shape, slots = (D // COLUMNS, COLUMNS), min(top_k, num_local)
    vectors = [a.reshape(-1, *shape) for a in (x, y, norm_scale, router)]

    def body(scalars_ref, x_ref, y_ref, norm_ref, router_ref, *refs):
        sum_ref, normed_ref, active_ref, num_ref, weights_ref, *fixed_refs, weights, barriers = refs
        for e in range(num_experts):
            plgpu.copy_gmem_to_smem(router_ref.at[e], weights.at[e], barriers.at[e])
        total = (_row(x_ref) + _row(y_ref).astype(dtype).astype(jnp.float32)).astype(dtype)
        sum_ref[0] = total
        centred = total.astype(jnp.float32)
        centred = centred - jnp.sum(centred) / D
        normed = centred * lax.rsqrt(jnp.sum(centred * centred) / D + EPSILON)
        normed = (normed * _row(norm_ref)).astype(dtype)
        normed_ref[0] = normed
        if weight is not None:
            digits_ref, largest_ref = fixed_refs
            value = normed.astype(jnp.float32)
            store_fixed_point(digits_ref.at[0], largest_ref.at[0], 0, value, weight, bool(interpret))
        logits = []
        for e in range(num_experts):
            plgpu.barrier_wait(barriers.at[e])
            expert = plgpu.load(weights.at[e], layout=row_layout(shape))
            logit = jnp.sum(normed.astype(jnp.float32) * expert.astype(jnp.float32))
            logits.append(logit.astype(dtype).astype(jnp.float32))
        chosen, count = _local(_top_k(logits, top_k, norm), scalars_ref[0] > 0, scalars_ref[1], num_local, slots)
        num_ref[0] = count
        for c, (share, expert) in enumerate(chosen):
            active_ref[c], weights_ref[c, 0] = expert, share

    run = plgpu.kernel(
        body,
        out_type=[
            *[jax.ShapeDtypeStruct((1, *shape), dtype)] * 2,
            jax.ShapeDtypeStruct((slots,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((slots, 1), jnp.float32),
            *([] if weight is None else fixed_point_shapes(1, MIN_ROWS, weight)),
        ],
        scratch_types=[plgpu.SMEM((num_experts, *shape), dtype), plgpu.Barrier(num_barriers=num_experts)],
        grid=(1,),
        grid_names=("token",),
        interpret=interpret,
    )
    scalars = jnp.stack([valid.astype(jnp.int32), jnp.int32(first_expert)])
    with jax.named_scope("norm_route"):
        total, normed, active, num_active, weights, *fixed = run(scalars, *vectors)
    experts = ActiveExperts(active, num_active[0], weights)
    return total.reshape(1, D), normed.reshape(1, D), FixedPoint(*fixed) if fixed else None, experts


def _row(ref: Any) -> Array:
    """Returns the first row in float32."""
    shape = ref.shape[1:]
    load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run this kernel
    return load(ref.at[0], layout=row_layout(shape)).astype(jnp.float32)


def _top_k(logits: list[Array], top_k: int, norm: float | None) -> list[tuple[Array, Array]]:
    """Returns the weights and numbers of the most probable experts; of equal ones, that with the lower number first."""
    largest = logits[0]
    for logit in logits[1:]:
        largest = jnp.maximum(largest, logit)
    probs = [jnp.exp(logit - largest) for logit in logits]
    total = sum(probs[1:], probs[0])
    probs = [p / total for p in probs]
    best = []
    for _ in range(top_k):
        prob, expert = probs[0], jnp.int32(0)
        for e, p in enumerate(probs[1:], 1):
            is_greater = p > prob
            prob, expert = jnp.where(is_greater, p, prob), jnp.where(is_greater, jnp.int32(e), expert)
        best.append((prob, expert))
        probs = [jnp.where(expert == e, jnp.float32(-1), p) for e, p in enumerate(probs)]
    if norm is not None:
        total = sum((prob for prob, _ in best[1:]), best[0][0])
        best = [(prob / total, expert) for prob, expert in best]
    return best


def _local(
    best: list[tuple[Array, Array]], is_valid: Array, first_expert: Array, num_local: int, slots: int
) -> tuple[list[tuple[Array, Array]], Array]:
    """Returns the weights and numbers of this device's experts in the first slots, 0 in the others, and their count."""
    count, chosen = jnp.int32(0), [(jnp.float32(0), jnp.int32(0))] * slots
    for weight, expert in best:
        local = expert - first_expert
        is_local = is_valid & (local >= 0) & (local < num_local)
        for c, (old_weight, old) in enumerate(chosen):
            is_here = is_local & (count == c)
            chosen[c] = jnp.where(is_here, weight, old_weight), jnp.where(is_here, local, old)
        count += is_local.astype(jnp.int32)
    return chosen, count
