"""Tests of quantised arrays (bits, error bounds, shapes) and of quantised models on one device and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs, parameters_of
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import MeshError, QuantizationError
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model
from dbrx_jax.quantization import Format, Quantization, QuantizedArray, quantize
from dbrx_jax.quantization.array import abstract, group_count, pack, unpack
from dbrx_jax.quantization.formats import FORMATS, PRESETS, part_of
from dbrx_jax.quantization.quantize import MAX_VALUE
from dbrx_jax.sharding.partition import AXES
from tests.sharding.test_mesh import SMALL, mesh_of

DBRX = DbrxConfig.from_name("132b-instruct")
TINY = dataclasses.replace(SMALL, n_layers=1, moe_num_experts=4, moe_top_k=2)
MIXED = "experts=int4-32,attention=int8,embedding=int8,head=fp8"
SHAPES = [((104, 192), (-1,)), ((104, 192), (-2,)), ((6, 32, 192), (-1,)), ((192, 6, 32), (-2, -1))]


def random_weights(shape, dtype=np.float32, seed=0):
    """Returns random weights of many magnitudes, with one row of zeros and one of negligible numbers."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * rng.lognormal(0, 3, shape)).astype(dtype)
    w[0], w[1] = 0, 1e-35
    return w


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


class TestParse:
    @pytest.mark.parametrize("text", PRESETS)
    def test_preset_parses_and_prints(self, text):
        q = Quantization.parse(text)
        assert None not in dataclasses.astuple(q)
        assert Quantization.parse(str(q)) == q
        assert q.experts == Format.parse("int4-128" if text == "int4" else text)

    @given(st.tuples(*[st.sampled_from([None, *FORMATS])] * 4).filter(any))
    def test_parts_round_trip_through_text(self, parts):
        q = Quantization(*(f and Format.parse(f) for f in parts))
        assert Quantization.parse(str(q)) == q

    @pytest.mark.parametrize(
        "text", ["", "int3", "int4-16", "experts", "experts=int5", "experts=int8,experts=int8", "norms=int8", "x" * 900]
    )
    def test_invalid_text_is_rejected_with_the_choices(self, text):
        with pytest.raises(QuantizationError, match="expected int8, int4, int4-32, int4-64, int4-128 or fp8") as error:
            Quantization.parse(text)
        assert len(str(error.value)) < 400

    def test_parse_accepts_none_and_quantization(self):
        assert Quantization.parse(None) is None
        assert Quantization.parse(Quantization.parse("int8")) == Quantization.parse("int8")

    def test_part_of_matches_parameter_metadata(self):
        state = nnx.state(CausalLM(SMALL, rngs=None), nnx.Param)
        for path, leaf in nnx.to_flat_state(state):
            assert part_of(".".join(map(str, path))) == leaf.get_metadata().get("part"), path


class TestPacking:
    def test_every_byte_round_trips(self):
        all_bytes = np.arange(256, dtype=np.uint8)
        for packed in (all_bytes, jnp.asarray(all_bytes)):
            assert np.array_equal(pack(unpack(packed, 0), 0), all_bytes)
        assert unpack(all_bytes, 0)[2 * 0xF8 : 2 * 0xF8 + 2].tolist() == [-8, -1]  # low four bits first

    @pytest.mark.parametrize("dimension", [0, 1, -1, -2])
    def test_pack_and_unpack_along_any_dimension(self, dimension):
        values = np.random.default_rng(0).integers(-8, 8, (6, 10, 4)).astype(np.int8)
        packed = pack(values, dimension)
        assert packed.size == values.size // 2
        assert np.array_equal(unpack(packed, dimension), values)


class TestQuantize:
    @pytest.mark.parametrize("fmt", FORMATS)
    @pytest.mark.parametrize(("shape", "contracted"), SHAPES)
    def test_numpy_and_jax_agree_bitwise(self, fmt, shape, contracted):
        dtype = "bfloat16" if contracted[-1] == -1 else "float32"
        w = random_weights(shape, ml_dtypes.bfloat16)
        a = quantize(w, Format.parse(fmt), contracted, dtype)
        assert isinstance(a.values, np.ndarray)
        compiled = jax.jit(lambda w: quantize(w, Format.parse(fmt), contracted, dtype))(jnp.asarray(w))
        assert_same_bits(a, compiled)
        assert (a.shape, a.dtype, a.size) == (shape, np.dtype(dtype), w.size)
        assert a.nbytes == sum(x.nbytes for x in jax.tree.leaves(a))
        expected = abstract(shape, Format.parse(fmt), contracted, dtype)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(expected)
        ]
        assert_same_bits(a.dequantize("float32"), jax.jit(lambda a: a.dequantize("float32"))(compiled))
        assert not a.dequantize()[0].any()

    def test_eager_jax_agrees_with_numpy_bitwise(self):
        w = random_weights((16, 64))
        assert_same_bits(
            quantize(w, Format.parse("int4-32"), (-1,), "float32"),
            quantize(jnp.asarray(w), Format.parse("int4-32"), (-1,), "float32"),
        )

    @settings(max_examples=60)
    @given(st.integers(0, 99), st.sampled_from(FORMATS), st.sampled_from(SHAPES))
    def test_quantization_error_is_bounded(self, seed, fmt, case):
        shape, contracted = case
        w = random_weights(shape, seed=seed)
        a = quantize(w, Format.parse(fmt), contracted, "float32")
        error = np.abs(a.dequantize() - w)
        scale = np.repeat(a.scale, a.group, contracted[-1]) if a.group else a.scale
        if a.kind == "int8":
            assert (error <= scale * 0.5001).all()
        elif a.kind == "fp8":
            assert (error <= np.maximum(np.abs(w) / 16, scale / 1024) * 1.0001).all()
        else:  # clipping loses up to 32 percent of a value
            assert np.abs(a.integers()).max() <= MAX_VALUE["int4"]
            assert (error <= scale * 0.5001 + np.abs(w) * 0.33).all()

    def test_int4_clipping_reduces_squared_error(self):
        w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
        a = quantize(w, Format.parse("int4"), (-1,), "float32")
        scale = np.abs(w).max(1, keepdims=True) / 7
        unclipped = np.clip(np.rint(w / scale), -7, 7) * scale
        assert (np.square(a.dequantize() - w).sum(1) <= np.square(unclipped - w).sum(1) * 1.0001).all()
        assert np.square(a.dequantize() - w).sum() < 0.85 * np.square(unclipped - w).sum()

    def test_extreme_numbers_stay_finite(self):
        for w in (np.full((4, 32), 3e38, np.float32), np.full((4, 32), -1e-40, np.float32)):
            for fmt in FORMATS:
                a = quantize(w, Format.parse(fmt), (-1,), "bfloat16")
                assert np.isfinite(a.dequantize("float32")).all()
                assert_same_bits(a, jax.jit(lambda w, f=fmt: quantize(w, Format.parse(f), (-1,), "bfloat16"))(w))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_infinite_and_nan_weights_are_rejected(self, bad):
        w = np.ones((4, 32), np.float32)
        w[2, 3] = bad
        for array in (w, jnp.asarray(w)):
            with pytest.raises(QuantizationError, match="infinite or NaN"):
                quantize(array, Format.parse("int8"), (-1,), "float32")

    @pytest.mark.parametrize(
        ("size", "group", "groups"),
        [(104, 32, 4), (192, 128, 2), (10752, 128, 84), (6144, 64, 96), (48, 128, 1), (64, 32, 2)],
    )
    def test_group_count_is_as_listed(self, size, group, groups):
        assert group_count(size, group) == groups

    def test_unsupported_shapes_and_dtypes_are_rejected(self):
        with pytest.raises(QuantizationError, match="not cut into equal even groups"):
            group_count(2 * 131, 128)
        with pytest.raises(QuantizationError, match="even number"):
            abstract((4, 33), Format.parse("int4"), (-1,), "float32")
        with pytest.raises(QuantizationError, match="bfloat16 or float32"):
            abstract((4, 32), Format.parse("int8"), (-1,), "float16")


class TestArray:
    def test_indexing_matches_dequantised_indexing(self):
        w = random_weights((3, 16, 64))
        a = quantize(w, Format.parse("int4-32"), (-1,), "float32")
        assert a[...] is a
        assert_same_bits(a[1].dequantize(), a.dequantize()[1])
        assert_same_bits(a[:2].dequantize(), a.dequantize()[:2])
        ids = np.array([[2, 0], [1, 1]])
        assert_same_bits(a[ids].dequantize(), a.dequantize()[ids])
        with pytest.raises(IndexError):
            quantize(w[0], Format.parse("int8"), (-2,), "float32")[0]
        with pytest.raises(IndexError):
            a[0, 1]

    def test_stacked_experts_are_quantised_individually(self):
        w = random_weights((3, 104, 64))
        for contracted in ((-1,), (-2,)):
            stack = quantize(jnp.asarray(w), Format.parse("int4-32"), contracted, "float32")
            assert_same_bits(stack[1], quantize(w[1], Format.parse("int4-32"), contracted, "float32"))


class TestModel:
    @pytest.mark.parametrize("text", [MIXED, "experts=int4"])
    def test_quantised_model_splits_and_merges(self, text):
        q = Quantization.parse(text)
        model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q)
        merged = jax.jit(lambda parts: parts)(split_model(model)).merge()
        assert (merged.quantization, merged.dtype) == (q, np.float32)
        plain = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0)))
        specs = parameter_specs(TINY)
        for name, value in parameters_of(merged).items():
            fmt = q.format_of(name)
            assert isinstance(value, QuantizedArray) == (fmt is not None)
            assert tuple(value.shape) == specs[name].shape
            if fmt is not None:  # the same initial weights, quantised
                assert_same_bits(value, quantize(np.asarray(plain[name]), fmt, specs[name].contracted, "float32"))

    def test_quantised_model_is_sharded_and_gathered_on_a_mesh(self):
        q, mesh = Quantization.parse(MIXED), mesh_of("fsdp=2,expert=2,tensor=2")
        parameters = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q))
        model = DbrxForCausalLM.from_parameters(TINY, parameters, mesh, quantization=q)
        assert_same_bits(parameters, parameters_of(model))
        state, partition = split_model(model), model.partition
        assert_same_bits(state.arrays, partition.shard_map(lambda p: p, (state.specs(),), state.specs())(state).arrays)
        leaf = model.blocks[0].moe.experts[0].w2
        value, spec = leaf.get_value(), partition.specs_of(leaf.get_value(), leaf.get_metadata("axes"))
        assert value.values.addressable_shards[0].data.size * len(value.values.sharding.device_set) == (
            value.values.size * partition.size("data")
        )

        def gather_and_dequantize(value):
            return partition.gather_fsdp(_ReplacedValue(value, leaf)).dequantize()

        gathered_spec = PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec.values))
        gathered = partition.shard_map(gather_and_dequantize, (spec,), gathered_spec)(value)
        assert_same_bits(gathered, value.dequantize())

    def test_mesh_that_splits_a_group_is_rejected(self):
        mesh = AbstractMesh((1, 1, 1, 8), AXES)
        with pytest.raises(
            MeshError, match="tensor=8 does not divide ffn 10752 in its 84 groups of 128; int4-32, int4-64"
        ):
            array_layouts(DBRX, mesh, Quantization.parse("int4"))
        arrays = array_layouts(DBRX, mesh, Quantization.parse("int4-64"))
        assert arrays["blocks.0.moe.experts.0.w2"].value.scale.shape == (168, 6144)

    def test_132b_sizes_match_bits_per_weight(self):
        def nbytes(text):
            arrays = array_layouts(DBRX, None, Quantization.parse(text), jnp.bfloat16)
            return sum(leaf.size * leaf.dtype.itemsize for a in arrays.values() for _, leaf, _ in a.leaves())

        assert nbytes(None) == 2 * DBRX.total_parameters
        experts = 40 * 16 * 3 * 10752 * 6144
        others = DBRX.total_parameters - experts
        assert nbytes("int8") == pytest.approx(DBRX.total_parameters, rel=0.001)
        assert nbytes("int4") == pytest.approx(experts * (0.5 + 2 / 128) + others, rel=0.001)


@dataclasses.dataclass
class _ReplacedValue:
    """A parameter whose value is replaced by another."""

    value: object
    leaf: nnx.Param

    def __getitem__(self, index):
        return self.value[index]

    def get_metadata(self, key):
        return self.leaf.get_metadata(key)


TEXT = (
    "This function returns a list of all the names in the module. If the argument is not given, the\n"
    "default value is used. Raises ValueError if the string cannot be read.\n\n   >>> for item in items:\n"
    "   ...     print(item)\n\nChanged in version 3.4: the keyword argument is optional, and a file may be\n"
    "opened by its path. The objects of this class are not safe to share between threads."
)


@pytest.fixture(scope="module")
def reference():
    """Token ids and the log-probabilities of the demo model in float32."""
    ids = DbrxTokenizer.from_pretrained(source_folder()).encode(TEXT)
    return ids, log_softmax(DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32")([ids])[0])


class TestPredictions:
    @pytest.mark.parametrize(("text", "max_kl"), [pytest.param("int8", 0.01, marks=pytest.mark.slow), ("int4", 0.05)])
    def test_quantised_demo_has_small_kl_divergence(self, text, max_kl, reference):
        ids, p = reference
        model = DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32", quantization=text)
        q = log_softmax(model([ids])[0])
        assert 0 < (np.exp(p) * (p - q)).sum(-1).mean() < max_kl

    @pytest.mark.slow
    def test_quantised_model_matches_dequantised_model(self):
        """Compares the forward pass, generation, and the forward pass on a mesh."""
        q, ids = Quantization.parse(MIXED), np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))
        model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q)
        parameters = parameters_of(model)
        dequantised = {name: v.dequantize() if isinstance(v, QuantizedArray) else v for name, v in parameters.items()}
        options = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True, "output_logprobs": True}
        out = model.generate(ids, **options)
        want = np.asarray(DbrxForCausalLM.from_parameters(TINY, dequantised)(out.sequences))
        assert np.abs(want).max() > 0.01
        sharded = DbrxForCausalLM.from_parameters(TINY, parameters, mesh_of("expert=4,tensor=2"), quantization=q)
        for m in (model, sharded):
            np.testing.assert_allclose(m(out.sequences), want, rtol=0, atol=2e-5 * np.abs(want).max())
        tokens, logprobs = out.sequences[:, 9:], log_softmax(want)[:, 8:-1]
        np.testing.assert_array_equal(tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(out.logprobs, np.take_along_axis(logprobs, tokens[..., None], -1)[..., 0], atol=1e-5)


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
