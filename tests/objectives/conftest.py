"""Batches and double precision for the tests of the objectives."""

import jax
import numpy as np
import pytest


@pytest.fixture
def double_precision():
    """float64 within the test only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def random_batch():
    """Makes per-example NumPy float64 arrays of one shape, about a third of them padding."""

    def make(seed, shape, names=("policy_log_prob", "reference_log_prob", "value", "reward")):
        rng = np.random.default_rng(seed)
        batch = {}
        for name in names:
            offset = -20.0 if name.endswith("log_prob") else 0.0
            batch[name] = offset + rng.normal(size=shape)
        weights = (rng.random(shape) < 0.65).astype(np.float64)
        weights.flat[0] = 1.0
        return batch | {"weights": weights}

    return make
