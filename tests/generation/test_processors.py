"""Tests of logits processors: worked examples, and the vocabulary split over a mesh.

tests/oracle/test_processors.py compares all of them with transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.processors import Rows, apply_functions, process_logits, processor_specs
from dbrx_jax.generation.settings import make_settings
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, Partition, make_mesh

V, WIDTH, NEW = 6, 3, 8  # vocabulary, tokens of the prompt, limit of new ones
LOGITS = np.array([[2.0, -1.0, 0.5, 1.5, -2.0, 0.25]], np.float32)
INF = -np.inf


def processed(options, ids, partition=ONE_DEVICE):
    """Returns LOGITS, padded as the partition needs, after the processors of a row with these tokens."""
    config = GenerationConfig.from_dict({"eos_token_id": 5, **options})
    settings = make_settings(config, V, WIDTH, NEW, None, partition)
    size = partition.pad_vocabulary(V)
    counts, seen = np.zeros((1, size), np.int32), np.zeros((1, size), bool)
    np.add.at(counts[0], ids[WIDTH:], 1)
    seen[0, ids] = True
    # What lies behind a row's tokens must not count.
    lengths, step, tokens = jnp.array([len(ids)]), jnp.array([len(ids) - WIDTH]), jnp.array([[*ids, 0, 0, 1, 2]])
    rows = Rows(jnp.array([0]), lengths, step, tokens, jnp.asarray(seen), jnp.asarray(counts))
    logits = jnp.pad(LOGITS, ((0, 0), (0, size - V)), constant_values=np.finfo(np.float32).min)

    def run(logits, processors, rows):
        return process_logits(logits, processors, rows, jnp.asarray(settings.eos), partition)

    vocabulary, replicated = partition.array_spec(None, VOCAB_AXES), PartitionSpec()
    specs = (processor_specs(settings.processors, partition), Rows(*[replicated] * 4, *[vocabulary] * 2))
    run = partition.shard_map(run, (vocabulary, *specs), vocabulary)
    return np.asarray(jax.jit(run)(logits, settings.processors, rows))[0, :V]


CASES = [
    ({"repetition_penalty": 2.0}, [0, 1, 1, 4], [1.0, -2.0, 0.5, 1.5, -4.0, 0.25]),
    # Of the new tokens 2, 2 and 3 alone.
    ({"frequency_penalty": 0.5}, [0, 0, 0, 2, 2, 3], [2.0, -1.0, -0.5, 1.0, -2.0, 0.25]),
    ({"presence_penalty": 0.5}, [0, 0, 0, 2, 2, 3], [2.0, -1.0, 0.0, 1.0, -2.0, 0.25]),
    ({"frequency_penalty": -1.0, "presence_penalty": 0.5}, [0, 0, 0, 2, 2], [2.0, -1.0, 2.0, 1.5, -2.0, 0.25]),
    ({"logit_bias": {"1": 5.0, 3: -1.0}}, [0, 1, 2], [2.0, 4.0, 0.5, 0.5, -2.0, 0.25]),
    ({"sequence_bias": {(1, 2): 3.0, (4,): 1.0, (0, 1, 3): 9.0}}, [0, 4, 1], [2.0, -1.0, 3.5, 1.5, -1.0, 0.25]),
    ({"sequence_bias": [[[0, 1, 3], 9.0]]}, [4, 0, 1], [2.0, -1.0, 0.5, 10.5, -2.0, 0.25]),
    ({"bad_words_ids": [[1], [2, 3], [5]]}, [0, 1, 2], [2.0, INF, 0.5, INF, -2.0, 0.25]),  # 5 ends, and may
    ({"no_repeat_ngram_size": 2}, [1, 2, 1, 3, 1], [2.0, -1.0, INF, INF, -2.0, 0.25]),
    ({"no_repeat_ngram_size": 3}, [1, 2, 3, 1, 2], [2.0, -1.0, 0.5, INF, -2.0, 0.25]),
    ({"no_repeat_ngram_size": 1}, [1, 2, 1], [2.0, INF, INF, 1.5, -2.0, 0.25]),
    ({"no_repeat_ngram_size": 7}, [1, 1, 1], LOGITS[0]),
    ({"min_new_tokens": 2}, [0, 1, 2, 3], [2.0, -1.0, 0.5, 1.5, -2.0, INF]),
    ({"min_new_tokens": 2}, [0, 1, 2, 3, 3], LOGITS[0]),
    ({"min_length": 5}, [0, 1, 2, 3], [2.0, -1.0, 0.5, 1.5, -2.0, INF]),
    ({"min_length": 4}, [0, 1, 2, 3], LOGITS[0]),
    ({"min_length": 9, "min_new_tokens": 1}, [0, 1, 2, 3], LOGITS[0]),  # min_new_tokens goes first
    ({"forced_eos_token_id": 5}, [0] * (WIDTH + NEW - 1), [INF, INF, INF, INF, INF, 0.0]),
    ({"forced_eos_token_id": [4, 5]}, [0] * (WIDTH + NEW - 1), [INF, INF, INF, INF, 0.0, 0.0]),
    ({"forced_eos_token_id": 5}, [0] * (WIDTH + NEW - 2), LOGITS[0]),
    ({"exponential_decay_length_penalty": (1, 2.0)}, [0] * (WIDTH + 3), [2.0, -1.0, 0.5, 1.5, -2.0, 1.0]),
    ({"exponential_decay_length_penalty": (1, 2.0)}, [0] * (WIDTH + 1), LOGITS[0]),
    ({"suppress_tokens": [0, 3]}, [0, 1, 2, 3], [INF, -1.0, 0.5, INF, -2.0, 0.25]),
    ({"begin_suppress_tokens": [0]}, [0, 1, 2], [INF, -1.0, 0.5, 1.5, -2.0, 0.25]),
    ({"begin_suppress_tokens": [0]}, [0, 1, 2, 3], LOGITS[0]),
    # A ban is no reason for a NaN, and comes before the penalty of the length.
    ({"min_new_tokens": 9, "exponential_decay_length_penalty": (0, 2.0)}, [0] * 5, [2.0, -1.0, 0.5, 1.5, -2.0, INF]),
    ({}, [0, 1, 2], LOGITS[0]),
]


@pytest.mark.parametrize(("options", "ids", "want"), CASES)
def test_processor_gives_the_expected_logits(options, ids, want):
    np.testing.assert_allclose(processed(options, ids), want, rtol=1e-6)


def test_split_vocabulary_gives_the_same_logits():
    partition = Partition(make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4]))
    for options, ids, want in CASES[::3]:
        np.testing.assert_allclose(processed(options, ids, partition), want, rtol=1e-6, err_msg=f"{options}")


def test_ids_that_pad_the_vocabulary_never_end_a_row():
    """On a mesh the vocabulary is padded with the least float, of which a growing penalty would make the largest."""
    partition = Partition(make_mesh({"expert": 2}, jax.devices()[:2]))
    config = GenerationConfig(eos_token_id=(5, V + 1), exponential_decay_length_penalty=(0, 3.0))
    assert partition.pad_vocabulary(V) > V + 1
    assert make_settings(config, V, WIDTH, NEW, None, partition).eos.tolist() == [[5, *[-1] * 7]]


def test_functions_see_the_whole_vocabulary_without_padding():
    partition = Partition(make_mesh({"expert": 2}, jax.devices()[:2]))
    shapes = []

    def double(ids, lengths, logits):
        shapes.append((ids.shape, lengths.shape, logits.shape))
        return logits * 2 + ids[:, :1] + lengths[:, None]

    rows = Rows(jnp.array([0]), jnp.array([1]), jnp.array([0]), jnp.array([[7, 0]]), None, None)
    logits = jnp.pad(LOGITS, ((0, 0), (0, 58)))
    spec = partition.array_spec(None, VOCAB_AXES)
    run = partition.shard_map(lambda x: apply_functions(x, (double, double), rows, V, partition), spec, spec)
    got = np.asarray(jax.jit(run)(logits))
    assert shapes[0] == ((1, 2), (1,), (1, V))
    np.testing.assert_array_equal(got[0, :V], (LOGITS[0] * 2 + 8) * 2 + 8)
    assert not got[0, V:].any()


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"])
def test_ids_outside_the_vocabulary_are_refused(name):
    with pytest.raises(GenerationError, match=f"{name}: expected ids below 6"):
        processed({name: [2, 6]}, [0, 1, 2])
