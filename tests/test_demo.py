"""Tests of the embedded demo checkpoint: size, quality and generation."""

import json

import numpy as np
import pytest

from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.demo import source_folder


@pytest.fixture(scope="module")
def demo():
    folder = source_folder()
    return DbrxForCausalLM.from_pretrained(folder, dtype="float32"), DbrxTokenizer.from_pretrained(folder)


def test_demo_has_expected_configuration_and_size():
    config = DbrxConfig.from_file(source_folder())
    assert config == DbrxConfig.from_name("demo")
    assert (config.moe_num_experts, config.moe_top_k, config.clip_qkv, config.dtype) == (16, 4, 8.0, "bfloat16")
    assert 1 < config.kv_n_heads < config.n_heads
    assert sum(f.stat().st_size for f in source_folder().iterdir()) <= 16 << 20


def test_demo_compresses_english_and_python(demo):
    """Bits per byte of a text written for this test; a uniform distribution over the vocabulary has about 4."""
    model, tokenizer = demo
    text = (
        "This function returns a list of all the names in the module. If the argument is not given, the\n"
        "default value is used.\n\n   >>> for item in items:\n   ...     print(item)\n"
    )
    ids = tokenizer.encode(text)
    logits = np.asarray(model([ids]), np.float64)[0, :-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits = -logprobs[np.arange(len(ids) - 1), ids[1:]].sum() / np.log(2)
    assert bits / len(text.encode()) < 1.8


def test_demo_uses_every_expert(demo):
    model, tokenizer = demo
    ids = tokenizer.encode((source_folder() / "README.md").read_text())[:400]
    probs = np.stack(model([ids], output_router_probs=True).router_probs)[:, 0]
    chosen = np.argsort(-probs, axis=-1)[..., :4]
    for layer in chosen:
        assert len(np.unique(layer)) == 16


def test_demo_answers_a_greeting_and_stops(demo):
    model, tokenizer = demo
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True)
    out = model.generate([ids], max_new_tokens=60)[0, len(ids) :]
    assert tokenizer.decode(out, skip_special_tokens=True) == "Hello! Ask me what a word means."
    assert out[-1] in model.generation_config.eos_token_id


def test_model_card_figures_match_training():
    card = (source_folder() / "README.md").read_text()
    figures = json.loads((source_folder() / "training.json").read_text())
    assert f"{figures['steps']:,} steps" in card
    for key in ("held_out_bits_per_byte_documentation", "held_out_bits_per_byte_chat"):
        assert f"{figures[key]:.2f}" in card
