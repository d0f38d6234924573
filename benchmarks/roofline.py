"""The least time that a machine needs for a step: what must be read over its bandwidth, or computed over its rate."""

import dataclasses

from benchmarks.machine import Machine
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning.plan import Setting, decode_roofline, prefill_roofline
from dbrx_jax.planning.targets import TARGETS, Target

# The announcement's load, in 16 bits: a user each second, on a node that is taken to have been of eight H100.
ANNOUNCED_MODEL, ANNOUNCED_DEVICE, ANNOUNCED_DEVICES = "132b-instruct", "h100", 8
ANNOUNCED_PROMPT, ANNOUNCED_TOKENS, ANNOUNCED_SECONDS = 2000, 256, 1.0


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound of the time of a step."""

    tokens: int  # that it makes or reads in
    read: int  # bytes
    flops: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def matmul_rate(machine: Machine, dtype: str) -> float:
    """FLOP/s for weights of this dtype: float32's own; bfloat16, int8 and int4 compute in bfloat16."""
    return machine["float32"] if dtype == "float32" else max(machine["bfloat16"], machine["float32"])


def decode_bound(config: DbrxConfig, machine: Machine, dtype: str, batch: int, positions: int) -> Bound:
    """One token more for each of `batch` rows that have `positions` positions.

    Read once: the experts that uniform routing is expected to touch, attention, the head, the live cache.
    """
    read = decode_roofline(_setting(config, dtype, batch, positions)).read
    flops = batch * (_flops(config) + 2 * config.vocab_size * config.d_model)
    return _bound(batch, read, flops, machine, dtype)


def prefill_bound(config: DbrxConfig, machine: Machine, dtype: str, prompt: int) -> Bound:
    """A prompt of `prompt` tokens, to the logits behind it: of the head's work one token's."""
    read = prefill_roofline(_setting(config, dtype, 1, prompt), prompt).read
    attention = 2 * prompt * prompt * config.n_layers * config.n_heads * config.head_dim  # half of the square
    head = 2 * config.vocab_size * config.d_model
    return _bound(prompt, read, prompt * _flops(config) + attention + head, machine, dtype)


def user_seconds(config: DbrxConfig, machine: Machine, dtype: str, prompt: int, tokens: int) -> float:
    """Lower bound of the seconds of one user who is alone."""
    decode = decode_bound(config, machine, dtype, 1, prompt + tokens // 2)
    return prefill_bound(config, machine, dtype, prompt).seconds + tokens * decode.seconds


def announced_share() -> float:
    """Least share of the time that the announcement's node needed if it served its users one by one."""
    h100 = TARGETS[ANNOUNCED_DEVICE]
    node = Machine(
        device=f"{ANNOUNCED_DEVICES} x {h100.name}",
        bandwidth=ANNOUNCED_DEVICES * h100.hbm_bandwidth,
        float32=0.0,
        bfloat16=ANNOUNCED_DEVICES * h100.bf16_flops,
    )
    config = DbrxConfig.from_name(ANNOUNCED_MODEL)
    return user_seconds(config, node, "bfloat16", ANNOUNCED_PROMPT, ANNOUNCED_TOKENS) / ANNOUNCED_SECONDS


def interval(config: DbrxConfig, machine: Machine, dtype: str, prompt: int, tokens: int) -> float:
    """Seconds between two users that load this machine with this model as the announcement's node was loaded."""
    return user_seconds(config, machine, dtype, prompt, tokens) / announced_share()


def _flops(config: DbrxConfig) -> int:
    """A token's, through all layers: the table is looked up, and the head is counted where it is used."""
    return 2 * (config.active_parameters - 2 * config.vocab_size * config.d_model)


def _setting(config: DbrxConfig, dtype: str, batch: int, positions: int) -> Setting:
    # Of a plan only what is read is used here, which no figure of the device changes.
    device = Target("this", "cuda", 0, 1.0, 1.0, None, 1.0)
    return Setting(config, device, {"expert": 1}, dtype, batch, positions)


def _bound(tokens: int, read: int, flops: float, machine: Machine, dtype: str) -> Bound:
    return Bound(tokens, read, flops, max(read / machine["bandwidth"], flops / matmul_rate(machine, dtype)))
