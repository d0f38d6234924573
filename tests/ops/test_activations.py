"""Tests of the experts' activation functions against stored numbers of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax import config
from dbrx_jax.ops.experts import ACTIVATIONS

X = [-6.0, -2.5, -1.0, -0.3, 0.0, 0.1, 0.75, 2.0, 5.5]
SILU = [-0.014835739, -0.18964545, -0.26894143, -0.12766725, 0.0, 0.05249792, 0.50938404, 1.7615941, 5.4776144]
GELU_TANH = [0.0, -0.015084296, -0.15880799, -0.11462908, 0.0, 0.053982753, 0.57996058, 1.9545977, 5.5]
TRANSFORMERS = {  # ACT2FN[name](X) of transformers 4.57.6, in float32
    "silu": SILU,
    "swish": SILU,
    "gelu": [0.0, -0.015524179, -0.15865526, -0.11462658, 0.0, 0.053982783, 0.58002949, 1.9544997, 5.5],
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.75, 2.0, 5.5],
}


@pytest.mark.parametrize("name", config.ACTIVATIONS)
def test_activation_equals_that_of_transformers(name):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(X, jnp.float32)), TRANSFORMERS[name], rtol=3e-7, atol=3e-7)


def test_every_activation_of_a_configuration_has_a_function():
    assert tuple(ACTIVATIONS) == config.ACTIVATIONS
