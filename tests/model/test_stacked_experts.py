"""Tests of models whose experts are stacked in one array for kernels: loading, sharding, quantisation, generation."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from dbrx_jax import DbrxConfig, DbrxForCausalLM, backend
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs, parameters_of
from dbrx_jax.kernels import dispatch
from dbrx_jax.kernels.gpu import cache_attention as gpu_cache_attention
from dbrx_jax.kernels.tpu import cache_attention as tpu_cache_attention
from dbrx_jax.kernels.tpu import decode_experts as tpu_decode_experts
from dbrx_jax.kernels.tpu import sequence_attention as tpu_sequence_attention
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import make_mesh, parse_axes
from tests.conftest import GOLDEN

# Sizes that the kernels support.
SMALL = DbrxConfig(
    d_model=512,
    n_heads=4,
    kv_n_heads=2,
    n_layers=2,
    max_seq_len=512,
    vocab_size=300,
    clip_qkv=8.0,
    rope_theta=5e5,
    ffn_hidden_size=384,
    moe_num_experts=4,
    moe_top_k=2,
)


def clear_caches():
    for cached in (array_layouts, parameter_specs):
        cached.cache_clear()
    jax.clear_caches()


@pytest.fixture
def use_kernels_of(monkeypatch):
    """A function that makes the CPU use the kernels of a TPU or GPU."""

    def use(kind="tpu"):
        monkeypatch.setitem(backend.KERNEL_BACKENDS, "cpu", kind)
        clear_caches()

    yield use
    clear_caches()


def interpret_as_xla(monkeypatch):
    """Runs the TPU kernels as XLA operations.

    The TPU interpreter synchronises devices in callbacks at the end of a kernel. With several devices this deadlocks
    when one waits in a collective and no thread is left. The tests in tests/kernels use that interpreter.
    """
    call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *a, **b: call(*a, **b | {"interpret": True}))
    for module in (tpu_decode_experts, tpu_cache_attention):
        monkeypatch.setattr(module, "in_hbm", lambda x: x)  # it works only in compiled programs


def mesh_of(axes):
    sizes = parse_axes(axes)
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize("axes", [None, "expert=2,tensor=2", "fsdp=2,expert=4"])
def test_stacked_checkpoint_loads_and_matches_oracle(use_kernels_of, expected, axes):
    e = expected["fused"]
    want = parameters_of(DbrxForCausalLM.from_pretrained(GOLDEN / "fused", dtype="float32"))
    use_kernels_of()
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", None if axes is None else mesh_of(axes), dtype="float32")
    (experts,) = model.blocks[0].moe.experts
    assert experts.w1.shape == (model.config.moe_num_experts, model.config.ffn_hidden_size, model.config.d_model)
    logits = np.asarray(model(e["tokens"], e["mask"]))
    valid = e["mask"].astype(bool)
    np.testing.assert_allclose(logits[valid], e["logits"][valid], rtol=0, atol=1e-4)
    restored = parameters_of(model)
    assert list(restored) == list(want)
    for name, array in want.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)


CASES = [
    pytest.param("tpu", "expert=4", "int4", marks=pytest.mark.slow),
    pytest.param("tpu", None, None, marks=pytest.mark.slow),
    pytest.param("tpu", "expert=2,tensor=2", "int8", marks=pytest.mark.slow),
]
if jax.__version_info__ >= backend.MIN_JAX_FOR_GPU_KERNELS:
    # Not quantised: GPU scales are bfloat16, and tokens could differ. One device: the GPU interpreter has one
    # state per process, which does not support several devices.
    CASES += [("gpu", None, None)]


@pytest.mark.parametrize(("kind", "axes", "quantization"), CASES)
def test_kernels_match_plain_experts(use_kernels_of, kind, axes, quantization, monkeypatch):
    """The prompt is long enough for the grouped matmul; then tokens are decoded one by one."""
    q = Quantization.parse(quantization)
    parameters = parameters_of(DbrxForCausalLM(SMALL, rngs=nnx.Rngs(0), dtype="float32", quantization=q))
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 500))  # one chunk of 512
    plain = DbrxForCausalLM.from_parameters(SMALL, parameters, quantization=q)
    want, tokens = np.asarray(plain(ids)), plain.generate(ids, max_new_tokens=3, eos_token_id=None)
    use_kernels_of(kind)
    kernels, traced = dispatch.expert_kernels("cpu"), []
    for module, name in ((kernels.decode, "decode_experts"), (kernels.grouped, "grouped_matmul")):
        assert f".kernels.{kind}." in module.__name__
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **b: (traced.append(n), f(*a, **b))[1])
    cache = tpu_cache_attention if kind == "tpu" else gpu_cache_attention
    attention = cache.cache_attention
    # Tested separately: this interpreter does not support its batches.
    monkeypatch.setattr(tpu_sequence_attention, "supports", lambda *a: False)
    monkeypatch.setattr(cache, "cache_attention", lambda *a, **b: (traced.append("attention"), attention(*a, **b))[1])
    if kind == "tpu":
        interpret_as_xla(monkeypatch)
    model = DbrxForCausalLM.from_parameters(SMALL, parameters, axes and mesh_of(axes), quantization=q)
    logits = np.asarray(model(ids))
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=3, eos_token_id=None), tokens)
    # Traced once for both layers: three grouped matmuls each of the sequence and the prompt, and one decode step.
    assert traced.count("decode_experts") == 1
    assert traced.count("grouped_matmul") == 2 * 3
    # One in the chunk and one in the step. The GPU kernel supports only bfloat16.
    assert traced.count("attention") == (2 if kind == "tpu" else 0)
