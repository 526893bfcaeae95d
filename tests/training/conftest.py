"""What the training tests share: a tiny T5, batches by step, and compiled DRO-V steps, one a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from benches import QUICK, Bench, make_bench

from dro_jax.training import loop

ROWS, PROMPT, RESPONSE = 16, 7, 5


@pytest.fixture(scope="session")
def bench() -> Callable[..., Bench]:
    """A function that makes a `Bench`; by default DRO-V at tau 0.5 and default rates on one device."""
    return make_bench


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """`jax.jit` that compiles quickly."""
    return functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., loop.HostBatch]:
    """A function from a step to its batch; held-out prompts are those with an odd sum of letters.

    A prompt is a rater (token 2, 3 or 4, whose rewards are 1.2 apart) and up to six letters; a response
    up to four tokens and the end of sequence.
    """

    def make(step: int, *, held_out: bool = False) -> loop.HostBatch:
        rng = np.random.default_rng([step, held_out])
        rater = rng.integers(2, 5, ROWS)
        letters = rng.integers(5, 32, (ROWS, PROMPT - 1))
        letters *= np.arange(PROMPT - 1) < rng.integers(1, PROMPT, ROWS)[:, None]
        odd = letters.sum(axis=1) % 2
        letters[:, 0] += np.where(odd == held_out, 0, np.where(letters[:, 0] < 31, 1, -1))
        length = rng.integers(0, RESPONSE, ROWS)[:, None]
        targets = np.where(
            np.arange(RESPONSE) < length, rng.integers(5, 32, (ROWS, RESPONSE)), 0
        ) + (np.arange(RESPONSE) == length)
        batch = {
            "encoder_input_tokens": np.concatenate([rater[:, None], letters], axis=1),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": targets > 0,
        }
        rewards = 1.2 * (rater - 3) + 0.5 * rng.standard_normal(ROWS)
        return {name: array.astype(np.int32) for name, array in batch.items()} | {
            "rewards": rewards.astype(np.float32)[:, None],
            "reward_weights": np.ones((ROWS, 1), np.float32),
        }

    return make
