"""Routed experts of one layer, with the implementation selected by platform, shapes and dtypes.

Dropless: every token goes through all experts it was routed to, however uneven the routing. Pallas kernels take
weights as one array (E, F, D). Plain XLA takes that, or E arrays (F, D) in buffers of their own.
"""

from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.kernels import stacked_experts
from dbrx_jax.kernels.dispatch import ExpertKernels, NativeKernels, expert_kernels, native_kernels
from dbrx_jax.kernels.xla import experts as xla
from dbrx_jax.ops.experts import ExpertWeights

# Maximum tokens of a small batch, by platform: each active expert runs on all of them.
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
    row_tile: int | None = None,
) -> Float[Array, "N D"]:
    """Applies each token's routed experts and returns their weighted sum, as :func:`reference_experts` does.

    Args:
      experts: numbers below 0 or from E on are experts of other devices, whose outputs are left out.
      valid: False for padding, which goes to no expert and gives 0.
      row_tile: rows of every matmul in batch-invariant decode, whatever N is; None: the implementation's choice.
    """
    weights = weights.astype(x.dtype)
    is_local = (experts >= 0) & (experts < expert_weights.num_experts)
    if valid is not None:
        is_local = is_local & valid[:, None]
    # E, one past the last expert, sorts behind all local experts and matches none.
    experts = jnp.where(is_local, experts, expert_weights.num_experts)
    dispatch = _dispatch(x, experts, expert_weights, platform, row_tile)
    return _apply(x, weights, experts, expert_weights, activation, dispatch)


class TokenKernels(NamedTuple):
    """Kernels of the steps from attention's output to the experts' for a single token."""

    experts: ExpertKernels
    norm_route: ModuleType


def token_kernels(
    x: Float[Array, "1 D"],
    router: Float[Array, "E D"],
    norm: float | None,
    expert_weights: ExpertWeights,
    platform: str,
) -> TokenKernels | None:
    """Returns the kernels for a token, a router and the p-norm of the experts' weights, or None for plain XLA."""
    kernels = expert_kernels(platform) if expert_weights.stacked else None
    if kernels is None or kernels.norm_route is None or not kernels.supports_decode(x, *expert_weights):
        return None
    supported = kernels.norm_route.supports(x, router, norm, interpret=bool(kernels.interpret))
    return TokenKernels(kernels, kernels.norm_route) if supported else None


def apply_token_experts(
    kernels: TokenKernels,
    x: Float[Array, "P D"],
    y: Float[Array, "P D"],
    norm_scale: Float[Array, "D"],
    router: Float[Array, "E D"],
    valid: Bool[Array, ""],
    first_expert: Int[Array, ""] | int,
    expert_weights: ExpertWeights,
    top_k: int,
    norm: float | None,
    activation: str,
) -> tuple[Float[Array, "1 D"], Float[Array, "1 D"]]:
    """Returns z = x + y for the first row, and its layer norm's weighted sum of experts on this device.

    As :func:`dbrx_jax.ops.norm.layer_norm`, :func:`dbrx_jax.ops.routing.route` and :func:`apply_experts` together.
    """
    weight = kernels.experts.decode.rounded_for(*expert_weights)
    arguments = x, y, norm_scale, router, valid, first_expert, expert_weights.num_experts, top_k, norm, weight
    total, normed, fixed, active = kernels.norm_route.norm_route(*arguments, interpret=kernels.experts.interpret)
    apply = stacked_experts.apply_active_experts
    return total, apply(normed, active, expert_weights, activation, kernels.experts, fixed=fixed)


class ExpertDispatch(NamedTuple):
    """Selected implementation of the experts."""

    platform: str
    small_batch: bool  # each active expert runs on all rows; else rows are sorted by expert
    tile_rows: int  # rows of a matmul of sorted rows in plain XLA
    kernels: ExpertKernels | None  # None: plain XLA
    native: NativeKernels | None = None  # kernels of a CPU, for any number of rows


def _dispatch(
    x: Array, experts: Array, expert_weights: ExpertWeights, platform: str, row_tile: int | None
) -> ExpertDispatch:
    """Selects the implementation. With `row_tile` no kernels are used, because they choose their own tiles."""
    kernels = expert_kernels(platform) if row_tile is None and expert_weights.stacked else None
    if kernels is not None and kernels.supports_decode(x, *expert_weights):
        return ExpertDispatch(platform, True, 0, kernels)
    if kernels is not None and kernels.supports_grouped(x, *expert_weights):
        return ExpertDispatch(platform, False, xla.ACCELERATOR_TILE_ROWS, kernels)
    native = native_kernels(platform)
    if native is not None and not native.experts.supports(x, expert_weights):
        native = None
    if row_tile is not None:
        return ExpertDispatch(platform, False, row_tile, None, native)
    small_batch = x.shape[0] <= SMALL_BATCH.get(platform, SMALL_BATCH_ON_ACCELERATOR)
    tile_rows = xla.cpu_tile_rows(experts, expert_weights) if platform == "cpu" else xla.ACCELERATOR_TILE_ROWS
    return ExpertDispatch(platform, small_batch, tile_rows, None, native)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _apply(x, weights, experts, expert_weights, activation, dispatch):
    if dispatch.kernels is not None:
        apply = stacked_experts.decode_experts if dispatch.small_batch else stacked_experts.grouped_experts
        return apply(x, weights, experts, expert_weights, activation, dispatch.kernels)
    if dispatch.native is not None:
        return dispatch.native.experts.apply_experts(x, weights, experts, expert_weights, activation)
    arguments = x, weights, experts, expert_weights, activation, dispatch.platform
    if not dispatch.small_batch:
        return xla.grouped_experts(*arguments, dispatch.tile_rows)
    return xla.one_token_experts(*arguments) if dispatch.platform == "cpu" else xla.small_batch_experts(*arguments)


def _forward(x, weights, experts, expert_weights, activation, dispatch):
    y = _apply(x, weights, experts, expert_weights, activation, dispatch)
    return y, (x, weights, experts, expert_weights)


def _backward(activation, dispatch, residuals, dy):
    x, _, experts, expert_weights = residuals
    if dispatch.kernels is not None and dispatch.kernels.supports_gradients(x, *expert_weights):
        dx, dweights, by_weight = stacked_experts.grouped_expert_gradients(*residuals, dy, activation, dispatch.kernels)
    else:
        tile_rows = dispatch.tile_rows or xla.ACCELERATOR_TILE_ROWS
        dx, dweights, by_weight = xla.grouped_expert_gradients(*residuals, dy, activation, dispatch.platform, tile_rows)
    return dx, dweights, np.zeros(experts.shape, jax.dtypes.float0), by_weight


_apply.defvjp(_forward, _backward)
