"""Tests of random models and the demo against transformers, in the separate Python named by DBRX_ORACLE_PYTHON."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.demo import source_folder

pytestmark = pytest.mark.slow
FOLDERS = [f"random{i}" for i in range(6)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The folder of make_answers.py's outputs, for random models, the demo, and two copies that we export."""
    out = tmp_path_factory.mktemp("oracle")
    run_oracle("make_answers.py", out, source_folder())
    copies = []
    for name in FOLDERS[:2]:
        copies.append(out / "copies" / name)
        to_orbax(out / name, out / "orbax" / name)
        to_hf(out / "orbax" / name, copies[-1], max_shard_size=100_000)
    run_oracle("make_answers.py", out, *copies)
    return out


def run_oracle(script, *arguments):
    python = os.environ["DBRX_ORACLE_PYTHON"]  # .ci/run makes it: torch 2.13.0 and transformers 4.57.6
    subprocess.run([python, Path(__file__).parent / script, *arguments], check=True, timeout=600)


def check(model, expected):
    logits = np.asarray(model(expected["ids"], expected["mask"]))
    valid = expected["mask"] == 1
    np.testing.assert_allclose(logits[valid], expected["logits"][valid], rtol=0, atol=1e-4)
    options = {"max_new_tokens": expected["greedy"].shape[1], "eos_token_id": None}
    greedy = model.generate(expected["ids"], expected["mask"], **options)
    np.testing.assert_array_equal(greedy[:, 30:], expected["greedy"])
    penalised = model.generate(expected["ids"][:1], repetition_penalty=1.3, **options)
    np.testing.assert_array_equal(penalised[:, 30:], expected["penalised"])


@pytest.mark.parametrize("name", FOLDERS)
def test_random_model_matches_oracle(answers, name):
    check(DbrxForCausalLM.from_pretrained(answers / name), dict(np.load(answers / name / "answers.npz")))


def test_demo_matches_oracle(answers):
    check(DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32"), dict(np.load(answers / "checkpoint.npz")))


@pytest.mark.parametrize("name", FOLDERS[:2])
def test_exported_model_matches_in_transformers(answers, name):
    theirs, copy = (np.load(answers / path) for path in (f"{name}/answers.npz", f"{name}.npz"))
    check(DbrxForCausalLM.from_pretrained(answers / name), dict(copy))
    assert theirs["logits"].shape == copy["logits"].shape


def test_long_prompt_matches_oracle_at_every_position(tmp_path):
    """The whole sequence's logits, and the tokens that follow it by way of the cache, at up to 32,000 positions."""
    run_oracle("make_long_answers.py", tmp_path)
    model, expected = DbrxForCausalLM.from_pretrained(tmp_path), np.load(tmp_path / "answers.npz")
    logits, ids = np.asarray(model(expected["ids"])), expected["ids"]
    error = np.abs(logits - expected["logits"]).max(axis=(0, 2))
    for position in (2_000, 16_000, 32_000):
        assert error[:position].max() < 1e-4, position
        assert np.abs(expected["logits"][0, position - 1]).max() > 1
    options = {"max_new_tokens": expected["greedy"].shape[1], "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, eos_token_id=None, **options)
    np.testing.assert_array_equal(out.sequences[:, ids.shape[1] :], expected["greedy"])
    np.testing.assert_allclose(out.logits[0], expected["logits"][:, -1], rtol=0, atol=1e-4)  # of the prompt's chunks
