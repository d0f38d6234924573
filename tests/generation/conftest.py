"""Fixtures of the tests of generation: one small model, its prompts, and the tokens that the oracle chooses."""

import pytest


@pytest.fixture(scope="package")
def model(models):
    return models("unnormalised_mqa")


@pytest.fixture(scope="package")
def prompts(expected):
    """Ids and mask of three prompts, padded on the left to 20 tokens, and their greedy continuations."""
    e = expected["unnormalised_mqa"]
    return e["tokens"], e["mask"], e["greedy"]
