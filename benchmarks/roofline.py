"""Roofline bounds of decoding and prefill: bytes over bandwidth or FLOP over FLOP/s, whichever is longer."""

import dataclasses

from benchmarks.machine import Machine
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning.plan import Setting, decode_roofline, prefill_roofline
from dbrx_jax.planning.targets import TARGETS, Target

# Load of DBRX's announcement: a user each second in 16 bits, on a node that is assumed to have eight H100.
ANNOUNCED_MODEL, ANNOUNCED_DEVICE, ANNOUNCED_DEVICES = "132b-instruct", "h100", 8
ANNOUNCED_PROMPT, ANNOUNCED_TOKENS, ANNOUNCED_SECONDS = 2000, 256, 1.0


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound of the time of a step."""

    tokens: int  # generated or prefilled
    read: int  # bytes
    flops: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def matmul_rate(machine: Machine, dtype: str) -> float:
    """Returns FLOP/s for weights of a dtype; int8 and int4 are computed in bfloat16."""
    return machine["float32"] if dtype == "float32" else max(machine["bfloat16"], machine["float32"])


def decode_bound(config: DbrxConfig, machine: Machine, dtype: str, batch: int, positions: int) -> Bound:
    """Returns the bound of a decode step of `batch` rows at `positions` positions.

    It reads once: the experts that are expected to be active under uniform routing, attention, head and live cache.
    """
    read = decode_roofline(_setting(config, dtype, batch, positions)).read
    flops = batch * (_flops(config) + 2 * config.vocab_size * config.d_model)
    return _bound(batch, read, flops, machine, dtype)


def prefill_bound(config: DbrxConfig, machine: Machine, dtype: str, prompt: int) -> Bound:
    """Returns the bound of a prompt of `prompt` tokens; the head computes one token's logits."""
    read = prefill_roofline(_setting(config, dtype, 1, prompt), prompt).read
    attention = 2 * prompt * prompt * config.n_layers * config.n_heads * config.head_dim  # half of the square
    head = 2 * config.vocab_size * config.d_model
    return _bound(prompt, read, prompt * _flops(config) + attention + head, machine, dtype)


def user_seconds(config: DbrxConfig, machine: Machine, dtype: str, prompt: int, tokens: int) -> float:
    """Returns a lower bound of the seconds of one request that is served alone."""
    decode = decode_bound(config, machine, dtype, 1, prompt + tokens // 2)
    return prefill_bound(config, machine, dtype, prompt).seconds + tokens * decode.seconds


def announced_share() -> float:
    """Returns the least share of the time that the announcement's node is busy if it serves users one by one."""
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
    """Returns the seconds between users that load this machine as the announcement's node was loaded."""
    return user_seconds(config, machine, dtype, prompt, tokens) / announced_share()


def _flops(config: DbrxConfig) -> int:
    """Returns the FLOP of one token through all layers, without embedding and head."""
    return 2 * (config.active_parameters - 2 * config.vocab_size * config.d_model)


def _setting(config: DbrxConfig, dtype: str, batch: int, positions: int) -> Setting:
    # Only the plan's bytes are used, which do not depend on the device's figures.
    device = Target("this", "cuda", 0, 1.0, 1.0, None, 1.0)
    return Setting(config, device, {"expert": 1}, dtype, batch, positions)


def _bound(tokens: int, read: int, flops: float, machine: Machine, dtype: str) -> Bound:
    return Bound(tokens, read, flops, max(read / machine["bandwidth"], flops / matmul_rate(machine, dtype)))
