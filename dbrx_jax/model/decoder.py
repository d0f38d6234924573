"""One block of the decoder, and the norm that it is made with."""

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.attention import Attention
from dbrx_jax.model.moe import MoE
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.routing import Routing
from dbrx_jax.sharding import Partition


class Norm(nnx.Module):
    """Layer normalisation with a scale only."""

    def __init__(self, config: DbrxConfig, init: Init):
        self.scale = init.ones((config.d_model,), ("whole",))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return layer_norm(x, self.scale[...])


class Block(nnx.Module):
    """x + attention(norm_1(x)), then x + moe(norm_2(x)).

    The attention is called by whoever runs the block, over a whole sequence or with a cache.
    """

    def __init__(self, config: DbrxConfig, init: Init):
        self.norm_1 = Norm(config, init)
        self.attention = Attention(config, init)
        self.norm_2 = Norm(config, init)
        self.moe = MoE(config, init)

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        partition: Partition,
        valid: Bool[Array, "B T"] | None = None,
        jitter_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The second half of the block; the routing is over all B * T tokens in order."""
        y, routing = self.moe(self.norm_2(x), partition, valid, jitter_key)
        return x + y, routing
