"""The reserved vocabulary entry of a single net: a value, and never a token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dro_jax.evaluation.sampling import Decoding, make_sampler
from dro_jax.networks import T5, token_log_probs

PROMPTS = jnp.asarray([[7, 3, 30, 2, 1], [5, 1, 0, 0, 0]], jnp.int32)
INPUTS = jnp.asarray([[0, 4, 9, 3], [0, 8, 1, 0]], jnp.int32)
TARGETS = jnp.asarray([[4, 9, 3, 1], [8, 1, 0, 0]], jnp.int32)


@pytest.fixture(scope="module")
def reserved(config):
    return dataclasses.replace(config, reserved_entry=True)


@pytest.fixture(scope="module")
def params(config, random_params):
    return random_params(T5(config), PROMPTS, INPUTS)


@pytest.fixture(scope="module")
def outputs(config, reserved, params):
    """Logits of the plain network; logits and values of the one with a reserved entry."""
    plain = jax.jit(T5(config).apply)({"params": params}, PROMPTS, INPUTS)
    both = jax.jit(T5(reserved).apply, static_argnames="method")
    return plain, *both({"params": params}, PROMPTS, INPUTS, method="logits_and_values")


def test_its_probability_is_exactly_0_and_the_others_are_those_of_a_smaller_vocabulary(outputs):
    plain, logits, _ = outputs
    probabilities = jax.nn.softmax(logits, axis=-1)
    assert np.all(probabilities[..., -1] == 0)
    assert np.all(jax.nn.softmax(plain, axis=-1)[..., -1] > 0)
    smaller = np.asarray(plain, np.float64)[..., :-1]
    smaller -= np.log(np.exp(smaller).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(smaller, np.asarray(TARGETS)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_log_probs(logits, TARGETS), expected, atol=1e-5)


def test_its_value_is_the_raw_logit(outputs):
    plain, _, values = outputs
    np.testing.assert_array_equal(values, plain[..., -1])
    assert np.ptp(values) > 0.1


def test_no_log_probability_has_a_gradient_at_its_output_column(reserved, params):
    def log_prob(params):
        logits = T5(reserved).apply({"params": params}, PROMPTS, INPUTS)
        return token_log_probs(logits, TARGETS).sum()

    gradient = flatten_dict(jax.jit(jax.grad(log_prob))(params), sep="/")
    if reserved.logits_via_embedding:
        column, others = np.split(gradient["token_embedder/embedding"], [39])[::-1]
    else:
        others, column = np.split(gradient["decoder/logits_dense/kernel"], [39], axis=1)
    assert column.size == reserved.emb_dim
    assert np.all(column == 0)
    assert np.abs(others).max() > 0


def test_a_sampler_never_draws_it(reserved, params):
    sampler = make_sampler(reserved, Decoding(max_tokens=8), eos_id=1)
    unmasked = make_sampler(dataclasses.replace(reserved, reserved_entry=False), Decoding(8), 1)
    prompts, places = np.repeat(PROMPTS, 32, axis=0), np.arange(64)
    drawn = np.asarray(sampler(params, prompts, 0, places))
    assert np.count_nonzero(unmasked(params, prompts, 0, places) == 39) > 0
    assert np.count_nonzero(drawn) > 100
    assert not np.any(drawn == 39)


def test_it_is_no_part_of_the_architecture(config, reserved):
    assert config.architecture() == reserved.architecture()
