"""Forward pass over whole sequences, as one compiled program."""

from functools import partial
from typing import NamedTuple

import jax
from jax import Array
from jaxtyping import Float

from dbrx_jax.sharding.partition import BATCH_AXES, VOCAB_AXES


class CausalLMOutput(NamedTuple):
    """Logits, and hidden states and router probabilities where requested."""

    logits: Float[Array, "B T V"]
    hidden_states: list[Float[Array, "B T D"]] | None  # embeddings, then after each block; the last is after norm_f
    router_probs: list[Float[Array, "B T E"]] | None  # float32, per layer, over all experts


@partial(jax.jit, static_argnums=(4, 5))
def forward(model_state, ids, mask, positions, output_hidden_states, output_router_probs):
    model = model_state.merge()
    partition = model.partition.with_tokens_split(ids.shape[1])

    def run(model_state, ids, mask, positions):
        model = model_state.merge()
        states, routings = model.hidden(ids, mask, positions)
        logits = model.logits(partition.gather_tokens(states[-1]))
        probs = [r.probs.reshape(*ids.shape, -1) for r in routings]
        return CausalLMOutput(logits, states if output_hidden_states else None, probs if output_router_probs else None)

    rows = partition.array_spec(BATCH_AXES, None)
    tokens = partition.array_spec(BATCH_AXES, "expert" if partition.tokens_split else None, None)
    out_specs = CausalLMOutput(
        partition.array_spec(BATCH_AXES, None, VOCAB_AXES),
        [tokens] * (model.config.n_layers + 1) if output_hidden_states else None,
        [partition.array_spec(BATCH_AXES, None, None)] * model.config.n_layers if output_router_probs else None,
    )
    in_specs = (model_state.specs(), rows, rows, rows)
    return partition.shard_map(run, in_specs, out_specs)(model_state, ids, mask, positions)
