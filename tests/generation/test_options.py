"""Tests of options of generate: limits, several continuations, ragged prompts, scores, criteria, and configurations."""

import json
import shutil
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.errors import ConfigError, GenerationError, NotFiniteError
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.generation_config import GenerationConfig
from tests.conftest import GOLDEN

T, N = 20, 8


def generate(model, prompts, rows=3, **options):
    """Returns the new tokens of the first rows."""
    ids, mask, _ = prompts
    options = {"max_new_tokens": N, "eos_token_id": None, **options}
    return np.asarray(model.generate(ids[:rows], mask[:rows], **options))[:, T:]


class TestLimits:
    def test_max_length_counts_the_padded_prompt(self, model, prompts):
        np.testing.assert_array_equal(
            generate(model, prompts, max_new_tokens=None, max_length=T + 3), prompts[2][:, :3]
        )
        with pytest.raises(GenerationError, match="max_length: 20 leaves no room behind prompts of 20 tokens"):
            generate(model, prompts, max_new_tokens=None, max_length=T)

    def test_minima_postpone_the_end(self, model, prompts):
        eos = int(prompts[2][0, 1])
        assert generate(model, prompts, 1, eos_token_id=eos).shape[1] == 2
        for options in ({"min_new_tokens": 5}, {"min_length": T + 5}):
            out = generate(model, prompts, 1, eos_token_id=eos, **options)
            assert out.shape[1] > 4
            assert eos not in out[0, :5]

    def test_default_is_cut_to_what_fits(self, model, prompts):
        stream = TokenStream(model, prompts[0][:1], eos_token_id=None)
        assert stream.max_new_tokens == model.config.max_seq_len - T < 256
        with pytest.raises(GenerationError, match="a prompt of 128 tokens fills the model's 128 positions; shorten it"):
            TokenStream(model, np.zeros((1, 128), int))

    def test_forced_end_is_the_last_token(self, model, prompts):
        out = generate(model, prompts, forced_eos_token_id=9)
        np.testing.assert_array_equal(out[:, :-1], prompts[2][:, : N - 1])
        assert (out[:, -1] == 9).all()

    def test_time_limit_ends_all_rows(self, model, prompts):
        stream = TokenStream(model, *prompts[:2], max_new_tokens=100, eos_token_id=None, max_time=1e-6)
        assert [tokens.shape for tokens in stream] == [(3, 1)]
        assert stream.sequences.shape[1] == T + 1
        assert not stream.ended.any()


class TestSeveralContinuations:
    def test_rows_of_a_prompt_follow_each_other(self, model, prompts):
        options = {"do_sample": True, "temperature": 1.5, "seed": 4}
        out = generate(model, prompts, 2, num_return_sequences=3, **options)
        assert len(out) == 6
        repeated = prompts[0][:2].repeat(3, axis=0), prompts[1][:2].repeat(3, axis=0), None
        np.testing.assert_array_equal(out, generate(model, repeated, 6, **options))
        assert len({tuple(row) for row in out}) == 6

    def test_greedy_copies_are_refused(self, model, prompts):
        with pytest.raises(GenerationError, match="num_return_sequences: greedy decoding gives the same tokens"):
            generate(model, prompts, num_return_sequences=2)


class TestRaggedPrompts:
    def test_generate_pads_lists_on_the_left(self, model, prompts):
        ids, mask, greedy = prompts
        lists = [row[m == 1].tolist() for row, m in zip(ids, mask, strict=True)]
        assert len({len(row) for row in lists}) > 1
        out = model.generate(lists, max_new_tokens=N, eos_token_id=None, pad_token_id=3)
        np.testing.assert_array_equal(out[:, -N:], greedy[:, :N])
        assert (out[:, :-N][mask[:, -out.shape[1] + N :] == 0] == 3).all()

    def test_lists_may_have_a_mask_as_the_tokenizer_gives_it(self, model):
        lists, mask = [[0, 1, 2, 3], [4, 5]], [[0, 1, 1, 1], [1, 1]]
        options = {"max_new_tokens": 3, "eos_token_id": None}
        out = model.generate(lists, mask, **options)[:, -3:]
        np.testing.assert_array_equal(out, model.generate([[1, 2, 3], [4, 5]], **options)[:, -3:])
        for bad in ([[1, 1], [1, 1]], [[1, 1, 1, 1]]):
            with pytest.raises(GenerationError, match="attention_mask: "):
                model.generate(lists, bad)

    def test_model_pads_lists_on_the_right(self, model):
        logits = np.asarray(model([[1, 2, 3], [4]]))
        np.testing.assert_allclose(logits[1, 0], np.asarray(model([[4]]))[0, 0], atol=1e-5)
        np.testing.assert_allclose(logits[0], np.asarray(model([[1, 2, 3]]))[0], atol=1e-5)

    @pytest.mark.parametrize("ids", [[[1, 2], []], [[1, 2], [0.5]], [[1, 2], ["x"]]])
    def test_unusable_rows_are_named(self, model, ids):
        with pytest.raises(GenerationError, match="input_ids: row 1"):
            model.generate(ids)


class TestScores:
    def test_logits_and_scores_of_each_step(self, model, prompts):
        ids, mask, greedy = prompts
        out = model.generate(
            ids, mask, max_new_tokens=11, eos_token_id=None, output_scores=True, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[int(greedy[0, 0])], renormalize_logits=True,
        )  # fmt: skip
        full_mask = np.concatenate([mask, np.ones((3, 11), int)], axis=1)
        want = np.array(model(out.sequences, full_mask))[:, T - 1 : -1].swapaxes(0, 1)
        assert len(out.logits) == len(out.scores) == 11
        np.testing.assert_allclose(out.logits, want, atol=1e-4)
        want[:, :, greedy[0, 0]] = -np.inf
        want -= np.log(np.exp(want).sum(-1, keepdims=True))
        np.testing.assert_allclose(out.scores, want, atol=1e-4)
        np.testing.assert_array_equal(np.argmax(out.scores, axis=-1).T, out.sequences[:, T:])

    def test_outputs_that_are_not_returned_warn(self, model, prompts):
        with pytest.warns(UserWarning, match="output_scores: without return_dict_in_generate=True this has no effect"):
            generate(model, prompts, 1, max_new_tokens=1, output_scores=True)

    def test_they_end_with_the_last_row(self, model, prompts):
        eos = int(prompts[2][0, 2])
        options = {"max_new_tokens": N, "eos_token_id": eos, "return_dict_in_generate": True}
        out = model.generate(prompts[0][:1], prompts[1][:1], output_scores=True, **options)
        assert len(out.scores) == out.sequences.shape[1] - T <= 3
        assert out.logits is None


class TestFunctions:
    def test_logits_processor_sees_the_row(self, model, prompts):
        def copy_the_prompt(ids, lengths, logits):
            """The next token is the one of the prompt at the number of tokens so far, less the prompt's length."""
            wanted = jnp.take_along_axis(ids, (lengths - first)[:, None], axis=1)
            return jnp.where(jnp.arange(logits.shape[1]) == wanted, logits, -jnp.inf)

        first = jnp.asarray(prompts[1].sum(axis=1))
        want = [row[m == 1][:3] for row, m in zip(*prompts[:2], strict=True)]
        np.testing.assert_array_equal(
            generate(model, prompts, max_new_tokens=3, logits_processor=copy_the_prompt), want
        )

    def test_criteria_end_rows_after_the_token_that_meets_them(self, model, prompts):
        greedy, seen = prompts[2], []

        def meets(sequences, _):
            seen.append(sequences.shape[1])
            return np.array([(row[T:] == greedy[i, 4]).any() for i, row in enumerate(sequences)])

        out = generate(model, prompts, stopping_criteria=[meets], pad_token_id=1)
        assert seen[:5] == [T + 1, T + 2, T + 3, T + 4, T + 5]
        for row, want in zip(out, greedy, strict=True):
            end = list(want).index(want[4]) + 1
            np.testing.assert_array_equal(row[:end], want[:end])
            assert (row[end:] == 1).all()
        out = generate(model, prompts, stopping_criteria=lambda sequences, _: sequences.shape[1] >= T + 3)
        np.testing.assert_array_equal(out, greedy[:, :3])

    def test_criteria_see_padding_behind_a_row_and_nothing_behind_all_rows(self, model, prompts):
        seen, pad = [], next(i for i in range(260) if i not in prompts[2])

        def meets(sequences, _):
            seen.append(sequences[:, T:].tolist())
            return np.array([sequences.shape[1] >= T + end for end in (2, 6, 4)])

        out = generate(model, prompts, stopping_criteria=meets, pad_token_id=pad)
        assert out.shape[1] == len(seen) == 6
        for count, sequences in enumerate(seen, 1):
            np.testing.assert_array_equal(sequences, out[:, :count])
        np.testing.assert_array_equal((out != pad).sum(axis=1), [2, 6, 4])

    def test_criterion_that_gives_no_truth_is_named(self, model, prompts):
        with pytest.raises(
            GenerationError, match="stopping_criteria: expected True or False, or one for each of 3 rows"
        ):
            generate(model, prompts, stopping_criteria=lambda sequences, _: [True, False])
        with pytest.raises(GenerationError, match=r"logits_processor: expected functions, got \[5\]"):
            generate(model, prompts, logits_processor=[5])

    def test_function_that_returns_another_shape_is_named(self, model, prompts):
        def first_row(ids, lengths, logits):
            return logits[0]

        with pytest.raises(GenerationError, match=r"first_row: expected logits \(3, 260\), got \(260,\)"):
            generate(model, prompts, logits_processor=first_row)


class TestConfigurations:
    def test_given_configuration_and_options_over_it(self, model, prompts, tmp_path):
        greedy = prompts[2]
        config = GenerationConfig(max_new_tokens=3, repetition_penalty=4.0)
        (tmp_path / "generation_config.json").write_text(json.dumps(config.to_dict()))
        want = generate(model, prompts, max_new_tokens=3, repetition_penalty=4.0)
        assert (want != greedy[:, :3]).any()
        for given in (config, config.to_dict(), tmp_path, str(tmp_path / "generation_config.json")):
            out = model.generate(*prompts[:2], generation_config=given, eos_token_id=None)
            np.testing.assert_array_equal(out[:, T:], want)
        out = model.generate(*prompts[:2], generation_config=config, eos_token_id=None, repetition_penalty=None)
        np.testing.assert_array_equal(out[:, T:], greedy[:, :3])
        with pytest.raises(GenerationError, match="generation_config: expected a GenerationConfig, a dict or a path"):
            model.generate(prompts[0], generation_config=7)

    def test_caller_limit_replaces_the_other_kind(self, model, prompts, monkeypatch):
        monkeypatch.setattr(model, "generation_config", GenerationConfig(max_new_tokens=6))
        assert generate(model, prompts, max_new_tokens=None, max_length=T + 2).shape[1] == 2
        monkeypatch.setattr(model, "generation_config", GenerationConfig(max_length=1000))
        assert TokenStream(model, prompts[0]).max_new_tokens == model.config.max_seq_len - T

    def test_configuration_survives_its_file(self, tmp_path):
        config = GenerationConfig(
            do_sample=True, top_k=4, logit_bias={7: 1.5}, sequence_bias={(1, 2): -1.0}, bad_words_ids=[[3]],
            exponential_decay_length_penalty=[2, 1.5], eos_token_id=5, stop_strings="x",
        )  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps(config.to_dict()))
        assert GenerationConfig.from_file(tmp_path) == config
        assert repr(GenerationConfig(top_k=4)) == "GenerationConfig(top_k=4)"

    def test_file_with_what_cannot_be_applied_warns(self, tmp_path):
        path = tmp_path / "generation_config.json"
        path.write_text('{"num_beams": 4, "guidance_scale": 1, "_from_model_config": true, "eos_token_id": [-1, 5]}')
        with pytest.warns(UserWarning, match="num_beams 4 is not applied: beam search is not implemented"):
            assert GenerationConfig.from_file(path) == GenerationConfig(eos_token_id=5)
        path.write_text('{"temperature": -1}')
        with pytest.raises(
            ConfigError, match=r"generation_config.json: temperature: expected a number above 0, got -1"
        ):
            GenerationConfig.from_file(path)


def checkpoint(tmp_path, config=None, generation=None):
    """Returns a copy of golden/fused with these entries of config.json and this generation_config.json."""
    shutil.copytree(GOLDEN / "fused", tmp_path / "copy")
    data = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**data, **(config or {})}))
    if generation is not None:
        (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(generation))
    return DbrxForCausalLM.from_pretrained(tmp_path / "copy", dtype="float32")


class TestCheckpointSettings:
    def test_its_file_applies(self, tmp_path, expected):
        e = expected["fused"]
        settings = {"max_new_tokens": 3, "suppress_tokens": [int(e["greedy"][0, 0])], "pad_token_id": -1}
        settings["eos_token_id"] = [*range(200, 209)]
        out = checkpoint(tmp_path, {"eos_token_id": 1}, settings).generate(e["tokens"][:1], e["mask"][:1])
        assert out.shape[1] == e["tokens"].shape[1] + 3
        assert out[0, e["tokens"].shape[1]] != e["greedy"][0, 0]

    @pytest.mark.slow
    def test_sampling_of_its_file_applies_unless_the_caller_decodes_greedily(self, tmp_path, expected):
        e = expected["fused"]
        model = checkpoint(tmp_path, None, {"do_sample": True, "temperature": 50.0})
        width = e["tokens"].shape[1]
        out = [model.generate(e["tokens"], e["mask"], max_new_tokens=4, seed=s)[:, width:] for s in (0, 1)]
        assert (out[0] != out[1]).any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            greedy = model.generate(e["tokens"], e["mask"], max_new_tokens=4, do_sample=False)[:, width:]
        np.testing.assert_array_equal(greedy, e["greedy"][:, :4])

    def test_config_ends_rows_where_there_is_no_generation_config(self, tmp_path, expected):
        e = expected["fused"]
        model = checkpoint(tmp_path, {"eos_token_id": int(e["greedy"][0, 2]), "pad_token_id": 9, "top_k": 7})
        assert model.generation_config == GenerationConfig(eos_token_id=int(e["greedy"][0, 2]), pad_token_id=9)
        assert model.generate(e["tokens"][:1], e["mask"][:1], max_new_tokens=8).shape[1] <= e["tokens"].shape[1] + 3


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_token": 3}, "max_new_token: there is no such option; did you mean max_new_tokens?"),
            ({"batchsize": 3}, "batchsize: there is no such option; did you mean batch_size?"),
            ({"xyzzy": 3}, "xyzzy: there is no such option"),
            ({"assistant_model": "m"}, "assistant_model: assisted generation is not implemented"),
            ({"max_tokens": 3}, "max_tokens: its name here is max_new_tokens"),
            ({"burst": 2}, "burst: an option of TokenStream"),
            ({"cache_length": 10**9}, "cache_length: expected a whole number from 1 to 128, got 1000000000"),
            ({"cache_length": -5}, "cache_length: expected a whole number from 1 to 128, got -5"),
            ({"batch_size": 0}, "batch_size: expected a whole number from 1 to"),
            ({"bad_words_ids": [[]]}, "bad_words_ids: expected lists of at least one token id"),
            ({"bad_words_ids": [5]}, "bad_words_ids: expected lists of token ids, got 5"),
            ({"sequence_bias": {(1, 2): "x"}}, "sequence_bias: expected a number for each token, got 'x'"),
            ({"logit_bias": [1, 2]}, "logit_bias: expected numbers by token id"),
            ({"logit_bias": {1: float("nan")}}, "logit_bias: expected a number for each token, got nan"),
            ({"typical_p": 0}, "typical_p: expected a number above 0 and at most 1"),
            ({"frequency_penalty": 3}, "frequency_penalty: expected a number from -2 to 2"),
            ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty: expected a number of tokens"),
            ({"do_sample": 1}, "do_sample: expected True or False, got 1"),
            ({"stop_strings": [""]}, "stop_strings: expected texts that are not empty"),
            ({"suppress_tokens": [10**6]}, "suppress_tokens: expected ids below"),
            ({"streamer": 5}, "streamer: expected a function, or an object with put and end, got 5"),
            ({"logits_processor": 5}, "logits_processor: expected functions, got 5"),
            ({"max_new_tokens": 10**10}, "max_new_tokens: expected at most 2147483647, got 10000000000"),
        ],
    )
    def test_unusable_option_is_one_line(self, model, prompts, options, message):
        with pytest.raises(GenerationError) as error:
            model.generate(prompts[0], **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("a text", "input_ids: expected integers of shape (batch, tokens), got text; a tokenizer makes ids of it"),
            ({"input_ids": [[1]]}, "got a dictionary; write ** before it"),
            ([1, 2, 3], "got a single row (3,); write [ids]"),
            ([[0.5]], "got float64 (1, 1)"),
            (None, "input_ids: there are no prompts"),
        ],
    )
    def test_prompts_that_are_no_ids_are_one_line(self, model, prompts, message):
        with pytest.raises(GenerationError) as error:
            model.generate(prompts)
        assert message in str(error.value)

    def test_prompts_by_another_name_are_named(self, model):
        with pytest.raises(GenerationError, match="inputs: the prompts' name is input_ids"):
            model.generate(inputs=[[1, 2]])

    @pytest.mark.parametrize("batch_invariant", [False, True])
    @pytest.mark.parametrize("do_sample", [False, True])
    def test_row_without_a_token_left_ends_generation(self, model, prompts, do_sample, batch_invariant):
        options = {"max_new_tokens": 3, "do_sample": do_sample, "batch_invariant": batch_invariant}
        match = r"row 0: the logits of new token 1 are not finite; look for options that ban every token, or"
        with pytest.raises(NotFiniteError, match=match):
            model.generate([[1, 2]], suppress_tokens=range(model.config.vocab_size), **options)

    def test_function_that_returns_nan_ends_generation(self, model):
        def spoil(ids, lengths, logits):
            return logits.at[1, 7].set(jnp.where(lengths[1] == 4, jnp.nan, logits[1, 7]))

        with pytest.raises(NotFiniteError, match="row 1: the logits of new token 3 are not finite"):
            model.generate([[1, 2], [3, 4]], max_new_tokens=4, eos_token_id=None, logits_processor=spoil)

    def test_function_may_force_a_token(self, model):
        def force(ids, lengths, logits):
            return logits.at[:, 7].set(jnp.inf)

        out = model.generate([[1, 2]], max_new_tokens=2, eos_token_id=None, logits_processor=force)
        assert out.tolist() == [[1, 2, 7, 7]]

    def test_ngram_longer_than_the_row_is_off(self, model, prompts):
        stream = TokenStream(model, [[1, 2, 3]], max_new_tokens=4, no_repeat_ngram_size=10**6)
        assert stream._settings.processors.no_repeat_ngram_size is None
        stream = TokenStream(model, [[1, 2, 3]], max_new_tokens=4, no_repeat_ngram_size=6)
        assert stream._settings.processors.no_repeat_ngram_size == 6

    @pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
    def test_option_without_effect_warns(self, model, prompts, name):
        with pytest.warns(UserWarning, match=f"{name}: without do_sample=True this has no effect"):
            TokenStream(model, prompts[0], **{name: 1 if name == "top_k" else 0.5})

    def test_temperature_of_0_is_greedy_unless_sampling_is_asked_for(self, model, prompts, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(
                generate(model, prompts, max_new_tokens=2, temperature=0.0), prompts[2][:, :2]
            )
        (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "do_sample": false}')
        config = GenerationConfig.from_file(tmp_path)
        with pytest.raises(GenerationError, match="temperature: expected a number above 0, got 0; use do_sample=False"):
            generate(model, prompts, generation_config=config, do_sample=True)

    def test_values_that_are_off_do_not_warn(self, model, prompts):
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0}
        TokenStream(model, prompts[0], **off)
        TokenStream(model, prompts[0], do_sample=True, eos_token_id=np.array([1, 2]), **off)


def damaged(path, value):
    """Returns golden/fused with a weight of its head replaced."""
    shutil.copytree(GOLDEN / "fused", path)
    model = DbrxForCausalLM.from_pretrained(path, dtype="float32")
    model.lm_head[...] = model.lm_head[...].at[0, 0].set(value)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_end_generation(tmp_path, expected, value):
    e = expected["fused"]
    with pytest.raises(GenerationError, match="row 0: the logits of new token 1 are not finite"):
        damaged(tmp_path / "model", value).generate(e["tokens"], e["mask"], max_new_tokens=50)


class TestDevice:
    """The state on the device, faults of which the host would hide."""

    def test_loop_ends_when_all_rows_have_ended(self, model, prompts):
        ids, mask, greedy = prompts
        stream = TokenStream(model, ids, mask, max_new_tokens=90, eos_token_id=greedy[:, 3].tolist(), burst=None)
        steps = sum(tokens.shape[1] for tokens in stream)
        _, state = stream._running
        assert np.asarray(state.step).max() == steps == int(stream.lengths.max()) <= 4
        assert np.asarray(state.done).all()

    def test_rows_that_the_host_ends_end_on_the_device(self, model, prompts):
        ids, mask, _ = prompts
        stream = TokenStream(
            model, ids, mask, max_new_tokens=90, eos_token_id=None, burst=4,
            stopping_criteria=lambda sequences, _: sequences.shape[1] >= T + 6,
        )  # fmt: skip
        list(stream)
        _, state = stream._running
        assert (np.asarray(state.step) == 9).all()  # one of the prompt, and two bursts
        assert np.asarray(state.done).all()

    def test_filler_behind_a_prompt_is_not_seen(self, model, prompts):
        """The array of tokens is as long as the cache; its zeros behind a prompt are no token 0 of the row."""
        rows = [[5, 6, 7], [8]]
        stream = TokenStream(model, rows, max_new_tokens=2, eos_token_id=None, repetition_penalty=1.5)
        next(stream)
        seen = np.asarray(stream._running[1].seen)
        for row, prompt, token in zip(seen, rows, stream.sequences[:, -1], strict=True):
            assert set(np.flatnonzero(row)) == {*prompt, token}

    def test_padding_rows_are_done(self, model):
        stream = TokenStream(model, [[1, 2]] * 5, max_new_tokens=3, eos_token_id=None)
        assert stream.cache_size == (6, 512)
        next(stream)
        np.testing.assert_array_equal(stream._running[1].done, [False] * 5 + [True])


def test_deadline_counts_from_the_first_token_not_from_compiling(model, prompts, monkeypatch):
    stream = TokenStream(model, *prompts[:2], max_new_tokens=5, eos_token_id=None, max_time=30.0)
    monkeypatch.setattr(stream, "compile", lambda: time.sleep(0.01))
    list(stream)
    assert stream.sequences.shape[1] == T + 5
