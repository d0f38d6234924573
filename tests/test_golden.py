"""Tests of parity with the PyTorch oracle in float32."""

import numpy as np
import pytest

from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.ops.routing import Routing, load_balancing_loss
from tests.conftest import CASES, GOLDEN

LOGITS_ATOL = 2e-5  # required: 1e-4; measured: up to 1e-5


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    for case in CASES:
        to_orbax(GOLDEN / case, folder / case)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_padded_batch_logits_match_oracle(case, models, expected):
    e = expected[case]
    logits = models(case)(e["tokens"], e["mask"])
    assert logits.dtype == np.float32
    valid = e["mask"] == 1
    np.testing.assert_allclose(logits[valid], e["logits"][valid], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_orbax_and_hugging_face_models_are_equal(case, orbax, models, expected):
    e = expected[case]
    model = DbrxForCausalLM.from_pretrained(orbax / case, dtype="float32")
    assert model.config == models(case).config
    np.testing.assert_array_equal(model(e["tokens"], e["mask"]), models(case)(e["tokens"], e["mask"]))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_router_match_oracle(case, models, expected):
    e = expected[case]
    out = models(case)(e["tokens"][:1], output_hidden_states=True, output_router_probs=True)
    assert len(out.hidden_states) == len(e["hidden"])
    assert len(out.router_probs) == len(e["router_probs"])
    for layer, (ours, theirs) in enumerate(zip(out.router_probs, e["router_probs"], strict=True)):
        np.testing.assert_allclose(
            out.hidden_states[layer][0], e["hidden"][layer], rtol=0, atol=LOGITS_ATOL, err_msg=f"input of layer {layer}"
        )
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=1e-5, err_msg=f"router of layer {layer}")
    np.testing.assert_allclose(out.hidden_states[-1][0], e["hidden"][-1], rtol=0, atol=LOGITS_ATOL, err_msg="norm_f")
    np.testing.assert_allclose(out.logits[0], e["logits"][0], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_padded_batch_greedy_tokens_match_oracle(case, models, expected):
    e = expected[case]
    num_new = e["greedy"].shape[1]
    out = models(case).generate(e["tokens"], e["mask"], max_new_tokens=num_new, eos_token_id=None)
    np.testing.assert_array_equal(out[:, :-num_new], e["tokens"])
    np.testing.assert_array_equal(out[:, -num_new:], e["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_loss_matches_oracle(case, models, expected):
    e = expected[case]
    logits = np.asarray(models(case)(e["tokens"][:1]))[0, :-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -logprobs[np.arange(len(logits)), e["tokens"][0, 1:]].mean()
    np.testing.assert_allclose(loss, e["loss"], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_load_balancing_loss_matches_oracle(case, models, expected):
    e, top_k = expected[case], models(case).config.moe_top_k
    # The oracle's experts: the highest probabilities, ties to the lower index.
    layers = [Routing(p, None, np.argsort(-p, axis=-1, kind="stable")[:, :top_k]) for p in e["router_probs"]]
    np.testing.assert_allclose(load_balancing_loss(layers), e["aux_per_layer"], rtol=1e-5)
    np.testing.assert_allclose(load_balancing_loss(layers, pooled=True), e["aux_pooled"], rtol=1e-5)
