"""Quantised arrays: bits, bounds and shapes; models of them on one device and on meshes."""

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


def weights(shape, dtype=np.float32, seed=0):
    """Random weights of many magnitudes, with rows of zeros and of numbers too small to matter."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * rng.lognormal(0, 3, shape)).astype(dtype)
    w[0], w[1] = 0, 1e-35
    return w


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


class TestText:
    @pytest.mark.parametrize("text", PRESETS)
    def test_presets(self, text):
        q = Quantization.parse(text)
        assert None not in dataclasses.astuple(q)
        assert Quantization.parse(str(q)) == q
        assert q.experts == Format.parse("int4-128" if text == "int4" else text)

    @given(st.tuples(*[st.sampled_from([None, *FORMATS])] * 4).filter(any))
    def test_parts_are_read_back(self, parts):
        q = Quantization(*(f and Format.parse(f) for f in parts))
        assert Quantization.parse(str(q)) == q

    @pytest.mark.parametrize(
        "text", ["", "int3", "int4-16", "experts", "experts=int5", "experts=int8,experts=int8", "norms=int8", "x" * 900]
    )
    def test_mistakes_name_the_choices(self, text):
        with pytest.raises(QuantizationError, match="expected int8, int4, int4-32, int4-64, int4-128 or fp8") as error:
            Quantization.parse(text)
        assert len(str(error.value)) < 400

    def test_what_is_no_text_stays(self):
        assert Quantization.parse(None) is None
        assert Quantization.parse(Quantization.parse("int8")) == Quantization.parse("int8")

    def test_parts_are_those_that_the_model_says(self):
        state = nnx.state(CausalLM(SMALL, rngs=None), nnx.Param)
        for path, leaf in nnx.to_flat_state(state):
            assert part_of(".".join(map(str, path))) == leaf.get_metadata().get("part"), path


class TestPacking:
    def test_every_byte_there_and_back(self):
        every = np.arange(256, dtype=np.uint8)
        for packed in (every, jnp.asarray(every)):
            assert np.array_equal(pack(unpack(packed, 0), 0), every)
        assert unpack(every, 0)[2 * 0xF8 : 2 * 0xF8 + 2].tolist() == [-8, -1]  # low four bits first

    @pytest.mark.parametrize("dimension", [0, 1, -1, -2])
    def test_along_any_dimension(self, dimension):
        values = np.random.default_rng(0).integers(-8, 8, (6, 10, 4)).astype(np.int8)
        packed = pack(values, dimension)
        assert packed.size == values.size // 2
        assert np.array_equal(unpack(packed, dimension), values)


class TestQuantize:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(("shape", "contracted"), SHAPES)
    def test_numpy_and_jax_give_the_same_bits(self, form, shape, contracted):
        dtype = "bfloat16" if contracted[-1] == -1 else "float32"
        w = weights(shape, ml_dtypes.bfloat16)
        a = quantize(w, Format.parse(form), contracted, dtype)
        assert isinstance(a.values, np.ndarray)
        compiled = jax.jit(lambda w: quantize(w, Format.parse(form), contracted, dtype))(jnp.asarray(w))
        same_bits(a, compiled)
        assert (a.shape, a.dtype, a.size) == (shape, np.dtype(dtype), w.size)
        assert a.nbytes == sum(x.nbytes for x in jax.tree.leaves(a))
        expected = abstract(shape, Format.parse(form), contracted, dtype)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(expected)
        ]
        same_bits(a.dequantize("float32"), jax.jit(lambda a: a.dequantize("float32"))(compiled))
        assert not a.dequantize()[0].any()

    def test_jax_arrays_outside_of_jit(self):
        w = weights((16, 64))
        same_bits(
            quantize(w, Format.parse("int4-32"), (-1,), "float32"),
            quantize(jnp.asarray(w), Format.parse("int4-32"), (-1,), "float32"),
        )

    @settings(max_examples=60)
    @given(st.integers(0, 99), st.sampled_from(FORMATS), st.sampled_from(SHAPES))
    def test_errors_are_bounded(self, seed, form, where):
        shape, contracted = where
        w = weights(shape, seed=seed)
        a = quantize(w, Format.parse(form), contracted, "float32")
        error = np.abs(a.dequantize() - w)
        scale = np.repeat(a.scale, a.group, contracted[-1]) if a.group else a.scale
        if a.kind == "int8":
            assert (error <= scale * 0.5001).all()
        elif a.kind == "fp8":
            assert (error <= np.maximum(np.abs(w) / 16, scale / 1024) * 1.0001).all()
        else:  # clipped by 32 percent at most, but no group is worse for it
            assert np.abs(a.integers()).max() <= MAX_VALUE["int4"]
            assert (error <= scale * 0.5001 + np.abs(w) * 0.33).all()

    def test_int4_clips_where_that_is_better(self):
        w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
        a = quantize(w, Format.parse("int4"), (-1,), "float32")
        largest = np.abs(w).max(1, keepdims=True) / 7
        plain = np.clip(np.rint(w / largest), -7, 7) * largest
        assert (np.square(a.dequantize() - w).sum(1) <= np.square(plain - w).sum(1) * 1.0001).all()
        assert np.square(a.dequantize() - w).sum() < 0.85 * np.square(plain - w).sum()

    def test_hardest_numbers(self):
        for w in (np.full((4, 32), 3e38, np.float32), np.full((4, 32), -1e-40, np.float32)):
            for form in FORMATS:
                a = quantize(w, Format.parse(form), (-1,), "bfloat16")
                assert np.isfinite(a.dequantize("float32")).all()
                same_bits(a, jax.jit(lambda w, f=form: quantize(w, Format.parse(f), (-1,), "bfloat16"))(w))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_infinities_are_refused(self, bad):
        w = np.ones((4, 32), np.float32)
        w[2, 3] = bad
        for array in (w, jnp.asarray(w)):
            with pytest.raises(QuantizationError, match="infinite or NaN"):
                quantize(array, Format.parse("int8"), (-1,), "float32")

    @pytest.mark.parametrize(
        ("n", "group", "groups"),
        [(104, 32, 4), (192, 128, 2), (10752, 128, 84), (6144, 64, 96), (48, 128, 1), (64, 32, 2)],
    )
    def test_groups(self, n, group, groups):
        assert group_count(n, group) == groups

    def test_what_has_no_groups(self):
        with pytest.raises(QuantizationError, match="not cut into equal even groups"):
            group_count(2 * 131, 128)
        with pytest.raises(QuantizationError, match="even number"):
            abstract((4, 33), Format.parse("int4"), (-1,), "float32")
        with pytest.raises(QuantizationError, match="bfloat16 or float32"):
            abstract((4, 32), Format.parse("int8"), (-1,), "float16")


class TestArray:
    def test_index(self):
        w = weights((3, 16, 64))
        a = quantize(w, Format.parse("int4-32"), (-1,), "float32")
        assert a[...] is a
        same_bits(a[1].dequantize(), a.dequantize()[1])
        same_bits(a[:2].dequantize(), a.dequantize()[:2])
        ids = np.array([[2, 0], [1, 1]])
        same_bits(a[ids].dequantize(), a.dequantize()[ids])
        with pytest.raises(IndexError):
            quantize(w[0], Format.parse("int8"), (-2,), "float32")[0]
        with pytest.raises(IndexError):
            a[0, 1]

    def test_a_stack_of_experts_is_quantised_as_each_is(self):
        w = weights((3, 104, 64))
        for contracted in ((-1,), (-2,)):
            stack = quantize(jnp.asarray(w), Format.parse("int4-32"), contracted, "float32")
            same_bits(stack[1], quantize(w[1], Format.parse("int4-32"), contracted, "float32"))


class TestModel:
    @pytest.mark.parametrize("text", [MIXED, "experts=int4"])
    def test_parameters_are_quantised_and_split_and_merge(self, text):
        q = Quantization.parse(text)
        model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q)
        merged = jax.jit(lambda parts: parts)(split_model(model)).merge()
        assert (merged.quantization, merged.dtype) == (q, np.float32)
        plain = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0)))
        specs = parameter_specs(TINY)
        for name, value in parameters_of(merged).items():
            form = q.format_of(name)
            assert isinstance(value, QuantizedArray) == (form is not None)
            assert tuple(value.shape) == specs[name].shape
            if form is not None:  # what would have been drawn, quantised
                same_bits(value, quantize(np.asarray(plain[name]), form, specs[name].contracted, "float32"))

    def test_on_a_mesh(self):
        q, mesh = Quantization.parse(MIXED), mesh_of("fsdp=2,expert=2,tensor=2")
        given = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q))
        model = DbrxForCausalLM.from_parameters(TINY, given, mesh, quantization=q)
        same_bits(given, parameters_of(model))
        parts, partition = split_model(model), model.partition
        same_bits(parts.arrays, partition.shard_map(lambda p: p, (parts.specs(),), parts.specs())(parts).arrays)
        leaf = model.blocks[0].moe.experts[0].w2
        value, spec = leaf.get_value(), partition.specs_of(leaf.get_value(), leaf.get_metadata("axes"))
        assert value.values.addressable_shards[0].data.size * len(value.values.sharding.device_set) == (
            value.values.size * partition.size("data")
        )

        def gathered(value):
            return partition.gather_fsdp(_Holder(value, leaf)).dequantize()

        places = PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec.values))
        whole = partition.shard_map(gathered, (spec,), places)(value)
        same_bits(whole, value.dequantize())

    def test_a_group_is_not_cut_by_a_mesh(self):
        mesh = AbstractMesh((1, 1, 1, 8), AXES)
        with pytest.raises(
            MeshError, match="tensor=8 does not divide ffn 10752 in its 84 groups of 128; int4-32, int4-64"
        ):
            array_layouts(DBRX, mesh, Quantization.parse("int4"))
        arrays = array_layouts(DBRX, mesh, Quantization.parse("int4-64"))
        assert arrays["blocks.0.moe.experts.0.w2"].value.scale.shape == (168, 6144)

    def test_bytes_of_132b(self):
        def nbytes(text):
            arrays = array_layouts(DBRX, None, Quantization.parse(text), jnp.bfloat16)
            return sum(leaf.size * leaf.dtype.itemsize for a in arrays.values() for _, leaf, _ in a.leaves())

        assert nbytes(None) == 2 * DBRX.total_parameters
        experts = 40 * 16 * 3 * 10752 * 6144
        rest = DBRX.total_parameters - experts
        assert nbytes("int8") == pytest.approx(DBRX.total_parameters, rel=0.001)
        assert nbytes("int4") == pytest.approx(experts * (0.5 + 2 / 128) + rest, rel=0.001)


@dataclasses.dataclass
class _Holder:
    """A parameter with another value."""

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
    """Token ids, and what the demo in float32 says of them."""
    ids = DbrxTokenizer.from_pretrained(source_folder()).encode(TEXT)
    return ids, log_softmax(DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32")([ids])[0])


class TestPredictions:
    @pytest.mark.parametrize(("text", "most"), [("int8", 0.01), ("int4", 0.05)])
    def test_the_demo_predicts_nearly_the_same(self, text, most, reference):
        ids, p = reference
        model = DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32", quantization=text)
        q = log_softmax(model([ids])[0])
        assert 0 < (np.exp(p) * (p - q)).sum(-1).mean() < most

    @pytest.mark.slow
    def test_what_is_computed_is_what_the_dequantised_model_computes(self):
        """By the forward pass, by generate, and on a mesh."""
        q, ids = Quantization.parse(MIXED), np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))
        model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(0), quantization=q)
        given = parameters_of(model)
        plain = {name: v.dequantize() if isinstance(v, QuantizedArray) else v for name, v in given.items()}
        options = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True, "output_logprobs": True}
        out = model.generate(ids, **options)
        want = np.asarray(DbrxForCausalLM.from_parameters(TINY, plain)(out.sequences))
        assert np.abs(want).max() > 0.01
        split = DbrxForCausalLM.from_parameters(TINY, given, mesh_of("expert=4,tensor=2"), quantization=q)
        for found in (model, split):
            np.testing.assert_allclose(found(out.sequences), want, rtol=0, atol=2e-5 * np.abs(want).max())
        new, follows = out.sequences[:, 9:], log_softmax(want)[:, 8:-1]
        np.testing.assert_array_equal(new, follows.argmax(-1))
        np.testing.assert_allclose(out.logprobs, np.take_along_axis(follows, new[..., None], -1)[..., 0], atol=1e-5)


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
