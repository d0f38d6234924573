"""Tries each row of the table of transformers' options in docs/generation.md."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from flax import nnx

from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import NOT_SUPPORTED, GenerationConfig
from tests.conftest import GOLDEN
from tests.generation.test_text_stream import TOKENIZER

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \| `(.*)` \|$", PAGE.read_text().split("## Options of transformers")[1], re.M)
# Every field of GenerationConfig in transformers 4.57.6, but for those about files and versions.
FIELDS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time",
    "stop_strings", "do_sample", "num_beams", "use_cache", "cache_implementation", "cache_config",
    "return_legacy_cache", "prefill_chunk_size", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "token_healing", "guidance_scale", "watermarking_config", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "eos_token_id", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "compile_config", "disable_compile", "low_memory", "penalty_alpha", "dola_layers",
    "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",
)  # fmt: skip
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_return_sequences",
)


def test_table_has_every_field_once():
    assert sorted(name for name, _, _ in ROWS) == sorted(FIELDS)


@pytest.fixture(scope="module")
def one_layer():
    """A random model that compiles quickly."""
    return DbrxForCausalLM(
        dataclasses.replace(DbrxConfig.from_file(GOLDEN / "dense"), n_layers=1), rngs=nnx.Rngs(0), dtype="float32"
    )


@pytest.mark.parametrize(
    ("name", "here", "example"),
    [pytest.param(*row, marks=() if row[1].startswith("refused") else pytest.mark.slow) for row in ROWS],
)
def test_row_of_the_table_holds(one_layer, expected, name, here, example):
    model, ids = one_layer, expected["dense"]["tokens"][:1]
    options = {name: ast.literal_eval(example)}
    if here.startswith("refused"):
        with pytest.raises(GenerationError) as error:
            model.generate(ids, **options)
        assert str(error.value) == f"{name}: {NOT_SUPPORTED[name][1]}"
        return
    options |= {"do_sample": True, "seed": 0} if name in SAMPLING else {}
    options |= {"tokenizer": TOKENIZER} if name == "stop_strings" else {}
    options |= {"return_dict_in_generate": True} if name.startswith("output_") else {}
    # One decode program for each option would take long: the first token alone shows that it is taken.
    limit = {} if name in ("max_length", "max_new_tokens") else {"max_new_tokens": 1}
    out = model.generate(ids, **limit, **options)
    tokens = out.sequences if "return_dict_in_generate" in options else out
    new = {"max_length": 24 - ids.shape[1], "max_new_tokens": 2}.get(name, 1)
    assert tokens.shape == (options.get("num_return_sequences", 1), ids.shape[1] + new)


def test_values_that_change_nothing_are_taken():
    neutral = {name: values[0] for name, (values, _) in NOT_SUPPORTED.items() if values}
    assert neutral["num_beams"] == 1
    assert GenerationConfig.from_dict(neutral) == GenerationConfig()
    assert GenerationConfig.from_dict(dict.fromkeys(NOT_SUPPORTED)) == GenerationConfig()
