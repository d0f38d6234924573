"""Tests of generation: padding, end of sequence, log-probabilities, seeds, streaming, compilation and errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.errors import ConfigError, GenerationError
from dbrx_jax.generation.stream import BURST, TokenStream
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model import cache as cache_module
from dbrx_jax.model.cache import prefill_chunks
from dbrx_jax.sharding.partition import ONE_DEVICE
from dbrx_jax.text.tokenizer import DbrxTokenizer
from tests.conftest import GOLDEN

T, N = 20, 10


def new_tokens(model, ids, mask=None, **options):
    options = {"max_new_tokens": N, "eos_token_id": None, **options}
    return np.asarray(model.generate(ids, mask, **options))[:, ids.shape[1] :]


def test_greedy_tokens_do_not_depend_on_padding(model, prompts):
    ids, mask, greedy = prompts
    right_ids, right_mask = ids.copy(), np.zeros_like(mask)
    for row in range(len(ids)):
        tokens = ids[row][mask[row] == 1]
        right_ids[row, : len(tokens)], right_mask[row, : len(tokens)] = tokens, 1
    np.testing.assert_array_equal(new_tokens(model, right_ids, right_mask), greedy)
    sparse_ids, sparse_mask = np.zeros((3, 2 * T), int), np.zeros((3, 2 * T), int)
    sparse_ids[:, ::2], sparse_mask[:, ::2] = ids, mask
    np.testing.assert_array_equal(new_tokens(model, sparse_ids, sparse_mask), greedy)


def test_chunks_are_the_cheapest_that_hold_a_prompt():
    assert prefill_chunks(7, ONE_DEVICE) == [(0, 16)]
    assert prefill_chunks(17, ONE_DEVICE) == [(0, 32)]
    assert prefill_chunks(33, ONE_DEVICE) == [(0, 64)]
    assert prefill_chunks(65, ONE_DEVICE) == [(0, 128)]  # 64 tokens and 16 take as long
    assert prefill_chunks(144, ONE_DEVICE) == [(0, 128), (128, 16)]
    assert prefill_chunks(145, ONE_DEVICE) == [(0, 128), (128, 32)]
    assert prefill_chunks(200, ONE_DEVICE) == [(0, 128), (128, 128)]
    assert prefill_chunks(448, ONE_DEVICE) == [(0, 128), (128, 128), (256, 128), (384, 64)]
    assert prefill_chunks(449, ONE_DEVICE) == [(0, 512)]
    assert prefill_chunks(1300, ONE_DEVICE) == [(0, 512), (512, 512), (1024, 128), (1152, 128), (1280, 32)]
    for tokens in range(1, 1200):
        chunks = prefill_chunks(tokens, ONE_DEVICE)
        ends = [start + length for start, length in chunks]
        assert [start for start, _ in chunks] == [0, *ends[:-1]]
        assert chunks[-1][0] < tokens <= ends[-1] <= 512 * -(-tokens // 512)


def test_chunks_on_accelerators_read_the_weights_seldom(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lengths = {tokens: [n for _, n in prefill_chunks(tokens, ONE_DEVICE)] for tokens in (7, 33, 130, 700, 1100, 4100)}
    assert lengths == {
        7: [32], 33: [128], 130: [512], 700: [512, 512], 1100: [512, 512, 128], 4100: [2048, 2048, 32]
    }  # fmt: skip


@pytest.mark.slow
def test_chunked_prefill_matches_full_forward(models, monkeypatch):
    """Greedy tokens match the full forward pass; prefill takes chunks of every length."""
    monkeypatch.setattr(cache_module, "CPU_CHUNKS", (16, 32, 64))
    monkeypatch.setattr(cache_module, "CPU_LEAST_COST", 16)
    assert prefill_chunks(123, ONE_DEVICE) == [(0, 64), (64, 64)]
    assert prefill_chunks(107, ONE_DEVICE) == [(0, 64), (64, 32), (96, 16)]
    model = models("fused")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 107))
    mask = np.ones_like(ids)
    mask[1, :20] = 0  # 87 tokens: 64 and 32
    out = model.generate(ids, mask, max_new_tokens=4, eos_token_id=None)
    want = np.argmax(model(out, np.pad(mask, ((0, 0), (0, 4)), constant_values=1)), axis=-1)
    np.testing.assert_array_equal(out[:, -4:], want[:, -5:-1])


class TestEndOfSequence:
    def test_rows_keep_their_eos_and_are_padded_after_it(self, model, prompts):
        ids, mask, greedy = prompts
        eos = [int(greedy[0, 3]), int(greedy[1, 6])]
        out = new_tokens(model, ids, mask, eos_token_id=eos, pad_token_id=259)
        ends = [next((i for i, t in enumerate(row) if t in eos), N - 1) + 1 for row in greedy]
        assert out.shape[1] == max(ends)
        for row, end in enumerate(ends):
            np.testing.assert_array_equal(out[row, :end], greedy[row, :end])
            assert (out[row, end:] == 259).all()

    def test_output_ends_with_the_last_row(self, model, prompts):
        ids, mask, greedy = prompts
        eos = [int(t) for t in greedy[:, 2]]
        assert new_tokens(model, ids, mask, eos_token_id=eos).shape[1] <= 3

    def test_eos_and_pad_default_to_the_generation_config(self, model, prompts, monkeypatch):
        ids, mask, greedy = prompts
        monkeypatch.setattr(
            model, "generation_config", GenerationConfig(eos_token_id=(int(greedy[0, 0]),), pad_token_id=7)
        )
        out = np.asarray(model.generate(ids[:1], mask[:1], max_new_tokens=5))
        np.testing.assert_array_equal(out[:, T:], greedy[:1, :1])
        without_eos = model.generate(ids[:1], mask[:1], max_new_tokens=5, eos_token_id=None)
        np.testing.assert_array_equal(without_eos[:, T:], greedy[:1, :5])
        two_rows = model.generate(ids[:2], mask[:2], max_new_tokens=5)
        assert (two_rows[0, T + 1 :] == 7).all()

    def test_pad_defaults_to_first_eos_or_zero(self, model, prompts):
        ids, mask, greedy = prompts
        out = new_tokens(model, ids, mask, eos_token_id=int(greedy[0, 0]))
        assert (out[0] == greedy[0, 0]).all()
        assert TokenStream(model, ids, mask, max_new_tokens=1, eos_token_id=None).pad_token_id == 0


class TestLogprobs:
    def test_logprobs_are_computed_from_unprocessed_logits(self, model, prompts):
        ids, mask, _ = prompts
        options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "seed": 1}
        out = model.generate(
            ids,
            mask,
            max_new_tokens=N,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logprobs=True,
            **options,
        )
        assert out.logprobs.dtype == np.float32
        full_mask = np.concatenate([mask, np.ones((3, N), int)], axis=1)
        logits = np.asarray(model(out.sequences, full_mask), np.float64)[:, T - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(expected, out.sequences[:, T:, None], axis=2)[..., 0]
        np.testing.assert_allclose(out.logprobs, expected, atol=1e-5)

    def test_logprobs_are_nan_after_eos_and_none_by_default(self, model, prompts):
        ids, mask, greedy = prompts
        options = {"max_new_tokens": N, "eos_token_id": int(greedy[0, 2]), "return_dict_in_generate": True}
        out = model.generate(ids, mask, output_logprobs=True, **options)
        end = list(greedy[0]).index(greedy[0, 2]) + 1
        assert np.isfinite(out.logprobs[0, :end]).all()
        assert np.isnan(out.logprobs[0, end:]).all()
        assert model.generate(ids, mask, **options).logprobs is None


SAMPLING_OPTIONS = {"do_sample": True, "temperature": 1.5}


class TestSeeds:
    def test_same_seed_gives_same_tokens(self, model, prompts):
        ids, mask, _ = prompts
        a, b, c = (new_tokens(model, ids, mask, seed=s, **SAMPLING_OPTIONS) for s in (3, 3, 4))
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()

    def test_unset_seed_gives_different_tokens(self, model, prompts):
        ids, mask, _ = prompts
        a, b = (new_tokens(model, ids, mask, **SAMPLING_OPTIONS) for _ in range(2))
        assert (a != b).any()

    def test_per_row_seeds_do_not_depend_on_row_order(self, model, prompts):
        ids, mask, _ = prompts
        a = new_tokens(model, ids, mask, seed=[8, 9, 10], **SAMPLING_OPTIONS)
        b = new_tokens(model, ids[::-1], mask[::-1], seed=[10, 9, 8], **SAMPLING_OPTIONS)
        np.testing.assert_array_equal(a, b[::-1])

    def test_equal_prompts_with_one_seed_differ(self, model, prompts):
        out = new_tokens(model, prompts[0][[0, 0]], seed=1, **SAMPLING_OPTIONS)
        assert (out[0] != out[1]).any()


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(0, 2), st.booleans())
def test_row_result_does_not_depend_on_other_rows(model, prompts, seed, row, sample):
    """Tokens and log-probabilities are bitwise equal at a fixed batch size while the other rows vary."""
    ids, mask, _ = prompts
    rng = np.random.default_rng(seed)
    other, other_mask = rng.integers(0, 260, ids.shape), (np.arange(T) >= rng.integers(0, T, (3, 1))).astype(int)
    other[row], other_mask[row] = ids[row], mask[row]
    options = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True, "output_logprobs": True}
    options |= {"do_sample": True, "seed": [1, 2, 3], "top_p": 0.9} if sample else {}
    a, b = model.generate(ids, mask, **options), model.generate(other, other_mask, **options)
    np.testing.assert_array_equal(a.sequences[row, T:], b.sequences[row, T:])
    np.testing.assert_array_equal(a.logprobs[row], b.logprobs[row])


class TestStreaming:
    def test_streamed_pieces_concatenate_to_the_output(self, model, prompts):
        ids, mask, greedy = prompts
        pieces = []
        out = new_tokens(model, ids, mask, streamer=pieces.append)
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), greedy)
        np.testing.assert_array_equal(out, greedy)
        assert [p.shape[1] for p in pieces] == [1, BURST, 1]

    def test_token_stream_iterates_and_reports_its_state(self, model, prompts):
        ids, mask, greedy = prompts
        stream = TokenStream(model, ids, mask, max_new_tokens=N, eos_token_id=int(greedy[1, 4]), burst=3)
        first = next(stream)
        np.testing.assert_array_equal(first, greedy[:, :1])
        np.testing.assert_array_equal(stream.prompt_lengths, mask.sum(axis=1))
        rest = list(stream)
        assert all(1 <= p.shape[1] <= 3 for p in rest)
        assert stream.lengths[1] == list(greedy[1]).index(greedy[1, 4]) + 1
        assert stream.ended[1]
        np.testing.assert_array_equal(np.concatenate([ids, first, *rest], axis=1), stream.sequences)

    def test_transformers_streamer_receives_prompt_tokens_and_end(self, model, prompts):
        class Streamer:
            def __init__(self):
                self.values, self.ended = [], False

            def put(self, value):
                self.values.append(np.array(value))

            def end(self):
                self.ended = True

        ids, mask, greedy = prompts
        streamer = Streamer()
        new_tokens(model, ids[:1], mask[:1], streamer=streamer)
        np.testing.assert_array_equal(streamer.values[0], ids[:1])
        np.testing.assert_array_equal(np.concatenate(streamer.values[1:], axis=1), greedy[:1])
        assert streamer.ended


def byte_tokenizer():
    """Returns a tokenizer with one token per byte and one merged pair."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    return DbrxTokenizer(ranks, {"<|endoftext|>": 258, "<|pad|>": 259})


class TestStopStrings:
    def test_row_ends_with_the_token_that_completes_a_stop_string(self, model, prompts):
        ids, mask, greedy = prompts
        tokenizer = byte_tokenizer()
        string = tokenizer.decode(greedy[0, 3:5])
        if "�" in string:  # bytes that are not valid UTF-8
            tokenizer._bytes = {i: b"<%d>" % i for i in range(260)}
            string = tokenizer.decode(greedy[0, 3:5])
        out = new_tokens(model, ids, mask, stop_strings=[string, "never"], tokenizer=tokenizer, pad_token_id=259)
        np.testing.assert_array_equal(out[0, :5], greedy[0, :5])
        assert (out[0, 5:] == 259).all()
        single_row = new_tokens(model, ids[:1], mask[:1], stop_strings=string, tokenizer=tokenizer)
        np.testing.assert_array_equal(single_row, greedy[:1, :5])

    def test_stop_strings_require_a_tokenizer(self, model, prompts):
        with pytest.raises(GenerationError, match="stop_strings: needs tokenizer="):
            model.generate(prompts[0], stop_strings="x", max_new_tokens=1)


def count_compilations(action):
    """Returns the number of programs that `action` compiles."""
    events = []

    def listener(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        action()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(events)


class TestCompilation:
    @pytest.mark.slow
    def test_second_call_compiles_nothing(self, models, expected):
        model, e = models("dense"), expected["dense"]
        options = {"eos_token_id": None, "do_sample": True, "top_k": 5, "seed": 0}

        def generate(num_rows=2, num_new=5, **changes):
            model.generate(e["tokens"][:num_rows], e["mask"][:num_rows], max_new_tokens=num_new, **(options | changes))

        assert count_compilations(generate) > 0
        assert count_compilations(generate) == 0
        # Other option values and lengths within the same cache reuse the programs.
        assert count_compilations(lambda: generate(num_new=9, temperature=0.3, top_k=3, seed=4)) == 0
        shorter = e["tokens"][:2, 7:], e["mask"][:2, 7:]
        assert count_compilations(lambda: model.generate(*shorter, max_new_tokens=3, **options)) == 0
        assert count_compilations(lambda: generate(streamer=lambda tokens: None)) == 0
        assert count_compilations(lambda: generate(num_rows=3)) > 0

    def test_changed_eos_ids_compile_nothing(self, models, expected, monkeypatch):
        model, e = models("dense"), expected["dense"]
        model.generate(e["tokens"], max_new_tokens=3)
        monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=(5,), pad_token_id=6))
        assert count_compilations(lambda: model.generate(e["tokens"], max_new_tokens=3)) == 0
        assert count_compilations(lambda: model.generate(e["tokens"], max_new_tokens=3, eos_token_id=[1, 2])) == 0

    @pytest.mark.slow
    def test_a_session_of_random_calls_compiles_few_programs(self, models):
        """Batches of 1 to 8 rows, prompts of 1 to 300 tokens: few sizes of chunks, caches and batches."""
        config = dataclasses.replace(models("fused").config, n_layers=1)
        model = DbrxForCausalLM(config, rngs=nnx.Rngs(0))

        def session():
            rng = np.random.default_rng(0)
            for _ in range(20):
                rows, length, new = rng.integers(1, 9), rng.integers(1, 300), rng.integers(1, 5)
                ids = rng.integers(0, model.config.vocab_size, (rows, min(length, model.config.max_seq_len - 5)))
                model.generate(ids, max_new_tokens=int(new), eos_token_id=None)

        # For each of 6 batch sizes a decode step, a first token, a cache and logits; chunks of 16 and 128 tokens, which
        # are inserted into each; the cache of one row; and what moves arrays.
        assert 20 < count_compilations(session) <= 6 * 4 + 2 + 6 * 2 + 1 + 4
        assert count_compilations(session) == 0

    def test_compile_compiles_every_program_ahead(self, models, expected):
        model, e = models("dense"), expected["dense"]
        stream = TokenStream(model, e["tokens"][:1], max_new_tokens=5, eos_token_id=None)
        assert count_compilations(stream.compile) > 0
        assert stream.timings.compile > 0
        assert count_compilations(lambda: list(stream)) == 0
        assert stream.timings.prefill > 0
        assert stream.timings.decode > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_new_tokens": 109},
            "max_new_tokens: 109 with a prompt of 20 tokens is beyond the model's 128 positions; ask for at most 108",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number above 0, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number"),
        ({"temperature": 0.0, "do_sample": True}, "temperature: expected a number above 0, got 0; use do_sample=False"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0"),
        ({"top_k": -1}, "top_k: expected a whole number of at least 0"),
        ({"top_p": 1.1}, "top_p: expected a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1"),
        ({"repetition_penalty": -1}, "repetition_penalty: expected a number above 0"),
        ({"temperature": 1e-9}, "temperature: expected at least 0.001"),
        ({"top_p": "x"}, "top_p: expected a number from 0 to 1"),
        ({"eos_token_id": "x"}, "eos_token_id: expected a token id"),
        ({"eos_token_id": True}, "eos_token_id: expected a token id as a whole number, got True"),
        ({"pad_token_id": 1 << 40}, "pad_token_id: expected a token id"),
        ({"seed": [1, 2]}, "seed: expected one for each of 3 rows, got 2"),
        ({"seed": -1}, "seed: expected whole numbers from 0"),
        ({"attention_mask": np.ones((1, 2))}, "attention_mask: expected the shape of input_ids"),
        ({"attention_mask": np.repeat([[1], [0], [1]], 20, axis=1)}, "attention_mask: row 1 has no token"),
    ],
)
def test_generate_rejects_invalid_options(model, prompts, options, message):
    with pytest.raises(GenerationError) as error:
        model.generate(prompts[0], **{"max_new_tokens": 2, **options})
    assert message in str(error.value)


def test_generation_config_reads_its_file(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 6], "pad_token_id": 7, "transformers_version": "4"}')
    assert GenerationConfig.from_file(path) == GenerationConfig(eos_token_id=(5, 6), pad_token_id=7)
    path.write_text('{"eos_token_id": 5}')
    assert GenerationConfig.from_file(path) == GenerationConfig(eos_token_id=(5,))
    path.write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match="eos_token_id: expected a token id as a whole number, got 'x'"):
        GenerationConfig.from_file(path)


def test_generation_config_falls_back_to_tokenizer_ids(tmp_path):
    """Token ids come from the tokenizer where generation_config.json is absent or names none."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((GOLDEN / "dense" / file).read_bytes())
    special = {"250": {"content": "<|endoftext|>"}, "251": {"content": "<|im_end|>"}, "252": {"content": "<|pad|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": special}))
    want = GenerationConfig(eos_token_id=(250, 251), pad_token_id=252)
    assert DbrxForCausalLM.from_pretrained(tmp_path).generation_config == want
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true}')
    assert DbrxForCausalLM.from_pretrained(tmp_path).generation_config == want
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert DbrxForCausalLM.from_pretrained(tmp_path).generation_config == GenerationConfig(
        eos_token_id=(9,), pad_token_id=252
    )


def test_int8_cache_is_smaller_with_similar_logprobs(model, prompts):
    ids, mask, _ = prompts
    options = {"max_new_tokens": N, "eos_token_id": None}
    streams = [TokenStream(model, ids, mask, cache_dtype=cache_dtype, **options) for cache_dtype in (None, "int8")]
    logprobs, sizes = [], []
    for stream in streams:
        next(stream)
        assert stream._running is not None
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(stream._running[0])))
        logprobs.append(stream.logprobs)
    K = model.config.head_dim
    assert sizes[1] * 4 * K == sizes[0] * (K + 2)  # float32 against int8 with a two-byte scale
    # Prefill reads the prompt's keys from the cache too.
    assert 0 < np.abs(logprobs[0] - logprobs[1]).max() < 0.1
    with pytest.raises(GenerationError, match="cache_dtype: expected int8 or None, got 'int4'"):
        TokenStream(model, ids, mask, cache_dtype="int4", **options)
