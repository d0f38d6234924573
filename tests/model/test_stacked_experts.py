"""Tests of models whose experts are stacked in one array for kernels: loading, sharding, quantisation, generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax import DbrxConfig, DbrxForCausalLM, backend
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs, parameters_of
from dbrx_jax.kernels import dispatch
from dbrx_jax.kernels.gpu import cache_attention as gpu_cache_attention
from dbrx_jax.kernels.tpu import cache_attention as tpu_cache_attention
from dbrx_jax.kernels.tpu import decode_experts as tpu_decode_experts
from dbrx_jax.kernels.tpu import sequence_attention as tpu_sequence_attention
from dbrx_jax.model.attention import Attention
from dbrx_jax.model.cache import CACHE_BLOCK, LayerCache
from dbrx_jax.model.parameter import Init
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import ONE_DEVICE, make_mesh, parse_axes
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
    # A part of F that is no multiple of the lanes is too small for the kernel of all three matmuls.
    is_fused = kind == "tpu" and "tensor" not in (axes or "")
    grouped = (kernels.fused, "grouped_experts") if is_fused else (kernels.grouped, "grouped_matmul")
    for module, name in ((kernels.decode, "decode_experts"), grouped):
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
    # Traced once for both layers: the experts of the sequence and of the prompt, and one decode step.
    assert traced.count("decode_experts") == 1
    assert traced.count(grouped[1]) == 2 * (1 if is_fused else 3)
    # One in the chunk and one in the step. The GPU kernel supports only bfloat16.
    assert traced.count("attention") == (2 if kind == "tpu" else 0)


needs_gpu_kernels = pytest.mark.skipif(
    jax.__version_info__ < backend.MIN_JAX_FOR_GPU_KERNELS, reason="this JAX cannot interpret GPU kernels"
)


@needs_gpu_kernels
@pytest.mark.parametrize("quantization", [None, pytest.param("attention=int8", marks=pytest.mark.slow)])
def test_one_row_decodes_with_the_kernel_of_norm_and_routing(use_kernels_of, quantization, monkeypatch):
    config, q = dataclasses.replace(SMALL, n_layers=1), Quantization.parse(quantization)
    parameters = parameters_of(DbrxForCausalLM(config, rngs=nnx.Rngs(1), dtype="float32", quantization=q))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 8))
    plain = DbrxForCausalLM.from_parameters(config, parameters, quantization=q)
    tokens = plain.generate(ids, max_new_tokens=3, eos_token_id=None)
    use_kernels_of("gpu")
    module, calls = dispatch.expert_kernels("cpu").norm_route, []
    function = module.norm_route
    monkeypatch.setattr(module, "norm_route", lambda *a, **b: (calls.append(a), function(*a, **b))[1])
    model = DbrxForCausalLM.from_parameters(config, parameters, quantization=q)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=3, eos_token_id=None), tokens)
    assert len(calls) == 1


@needs_gpu_kernels
def test_decode_attention_by_kernels_writes_the_same_cache(use_kernels_of, monkeypatch):
    """Two rows and one of padding, in bfloat16; on a CPU such a cache has another dtype, so it is made here."""
    attention = Attention(SMALL, Init(jax.random.key(0), jnp.bfloat16, ONE_DEVICE, None))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(4, 1, SMALL.d_model)), jnp.bfloat16)  # the fourth row only fills up
    shape = 6, SMALL.kv_n_heads, CACHE_BLOCK, SMALL.head_dim
    cache = LayerCache(*(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2)))
    table = np.array([[3, 1], [5, 2], [4, 0]])
    arguments = x, np.array([[True], [True], [False]]), np.array([[130], [0], [50]]), cache, table, ONE_DEVICE
    want, want_cache = attention.attend(*arguments)
    use_kernels_of("gpu")
    run = functools.partial(gpu_cache_attention.write_and_attend, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(gpu_cache_attention, "write_and_attend", run)
    monkeypatch.setattr(gpu_cache_attention, "WARP_GROUPS", 6)
    y, cache = attention.attend(*arguments)
    assert y.shape == want.shape == (4, 1, SMALL.n_heads, SMALL.head_dim)
    y, want = (np.asarray(a, np.float32)[:2] for a in (y, want))
    assert np.abs(y - want).max() < 1e-2 * np.abs(want).max()
    for pool, want_pool in zip(cache[:2], want_cache[:2], strict=True):
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (pool, want_pool)))
