"""The experts of one layer, by the implementation that suits the platform, the shapes and the dtypes.

Dropless: every token is computed by every expert it was routed to, however uneven the routing. A weight is given
as E arrays (F, D), one per expert, each in a buffer of its own; or as one array (E, F, D), which is indexed the
same way and which Pallas kernels take.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.kernels import stacked_experts
from dbrx_jax.kernels.dispatch import ExpertKernels, expert_kernels
from dbrx_jax.kernels.xla import experts as xla
from dbrx_jax.ops.experts import ExpertWeights

# Most tokens of a small batch, in which each active expert runs on all tokens.
SMALL_BATCH = {"cpu": 1}
SMALL_BATCH_ON_ACCELERATOR = 256


def apply_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
    valid: Bool[Array, "N"] | None = None,
    platform: str = "cpu",
    tile: int | None = None,
) -> Float[Array, "N D"]:
    """Applies the routed experts to each token: the sum of :func:`reference_experts`, without the other experts.

    Args:
      experts: numbers below 0 or from E on are experts of other devices, whose outputs are left out.
      valid: False for rows whose output does not matter (padding); they cost nothing and give 0.
      platform: the platform of the devices, which selects the implementation.
      tile: rows of every matrix product, whatever N is, so that no bit of a row's result depends on N;
        None leaves that to the platform.
    """
    weights = weights.astype(x.dtype)
    here = (experts >= 0) & (experts < expert_weights.num_experts)
    if valid is not None:
        here = here & valid[:, None]
    # One past the last expert: such rows sort behind all groups and match no expert.
    experts = jnp.where(here, experts, expert_weights.num_experts)
    dispatch = _dispatch(x, experts, expert_weights, platform, tile)
    return _apply(x, weights, experts, expert_weights, activation, dispatch)


class ExpertDispatch(NamedTuple):
    """The implementation that applies the experts."""

    platform: str
    small_batch: bool  # each active expert runs on all rows; else rows are sorted by expert
    tile: int  # rows of a matmul of sorted tokens
    kernels: ExpertKernels | None  # None: plain XLA


def _dispatch(
    x: Array, experts: Array, expert_weights: ExpertWeights, platform: str, tile: int | None
) -> ExpertDispatch:
    """Selects by platform, shapes and dtype. Kernels are not used where `tile` fixes the rows of a matmul."""
    tokens = x.shape[0]
    kernels = expert_kernels(platform) if tile is None and expert_weights.stacked else None
    if kernels is not None and kernels.supports_decode(x, *expert_weights):
        return ExpertDispatch(platform, True, 0, kernels)
    small_batch = tile is None and tokens <= SMALL_BATCH.get(platform, SMALL_BATCH_ON_ACCELERATOR)
    if kernels is not None and kernels.supports_grouped(x, *expert_weights):
        return ExpertDispatch(platform, False, xla.TILE_ON_ACCELERATOR, kernels)
    if tile is None:
        tile = xla.tile_rows(experts, expert_weights) if platform == "cpu" else xla.TILE_ON_ACCELERATOR
    return ExpertDispatch(platform, small_batch, tile, None)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _apply(x, weights, experts, expert_weights, activation, dispatch):
    if dispatch.kernels is not None:
        return (stacked_experts.decode_experts if dispatch.small_batch else stacked_experts.grouped_experts)(
            x, weights, experts, expert_weights, activation, dispatch.kernels
        )
    if not dispatch.small_batch:
        return xla.grouped_experts(x, weights, experts, expert_weights, activation, dispatch.platform, dispatch.tile)
    if dispatch.platform == "cpu":
        return xla.one_token_experts(x, weights, experts, expert_weights, activation, dispatch.platform)
    return xla.small_batch_experts(x, weights, experts, expert_weights, activation, dispatch.platform)


def _forward(x, weights, experts, expert_weights, activation, dispatch):
    y = _apply(x, weights, experts, expert_weights, activation, dispatch)
    return y, (x, weights, experts, expert_weights)


def _backward(activation, dispatch, saved, dy):
    x, _, experts, expert_weights = saved
    if dispatch.kernels is not None and dispatch.kernels.supports_gradients(x, *expert_weights):
        dx, dweights, by_weight = stacked_experts.grouped_expert_gradients(*saved, dy, activation, dispatch.kernels)
    else:
        tile = dispatch.tile or xla.TILE_ON_ACCELERATOR
        dx, dweights, by_weight = xla.grouped_expert_gradients(*saved, dy, activation, dispatch.platform, tile)
    return dx, dweights, np.zeros(experts.shape, jax.dtypes.float0), by_weight


_apply.defvjp(_forward, _backward)
