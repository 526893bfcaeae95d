"""Log-probabilities of tokens and their sums over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.networks import sum_by_example, token_log_probs


def random_logits(scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((3, 7, 11))).astype(np.float32)
    return logits, rng.integers(0, 11, (3, 7)).astype(np.int32)


def exact_log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_token_log_probs_agree_with_float64():
    logits, targets = random_logits(scale=3.0)
    ours = np.asarray(token_log_probs(jnp.asarray(logits), jnp.asarray(targets)))
    exact = np.take_along_axis(exact_log_softmax(logits), targets[..., None], -1)[..., 0]
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).max() <= 2e-6
    assert abs((ours - exact).mean()) <= 5e-7


def test_the_gradient_of_token_log_probs_is_one_hot_minus_softmax():
    logits, targets = random_logits(scale=3.0)
    ours = jax.grad(lambda x: token_log_probs(x, jnp.asarray(targets)).sum())(jnp.asarray(logits))
    exact = np.eye(11)[targets] - np.exp(exact_log_softmax(logits))
    assert np.abs(ours - exact).max() <= 2e-6


@pytest.mark.parametrize("label", [1e4, -1e4, 0.0])
def test_token_log_probs_of_extreme_logits_are_exact_to_rounding_and_have_finite_gradients(label):
    logits = np.full((1, 3, 5), -1e4, np.float32)
    logits[0, 0] = 1e4  # all huge
    logits[0, 1, 2:] = 1e4  # both extremes
    logits[0, :, 1] = label
    targets = jnp.ones((1, 3), jnp.int32)
    ours, pull = jax.vjp(lambda x: token_log_probs(x, targets), jnp.asarray(logits))
    exact = exact_log_softmax(logits)[..., 1]
    # One unit in the last place of 1e4 is 1e-3.
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-3)
    assert np.all(np.isfinite(pull(jnp.ones((1, 3)))[0]))


def segments_with_a_hole() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-token values, loss weights and segments: row 0 lacks example 2, row 1 is one example."""
    segments = np.array([[1, 1, 3, 4, 4, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    weights = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    per_token = np.random.default_rng(1).standard_normal(segments.shape)
    return per_token.astype(np.float32), weights.astype(np.int32), segments.astype(np.int32)


def test_sum_by_example_adds_the_weighted_tokens_of_each_segment():
    per_token, weights, segments = segments_with_a_hole()
    ours = sum_by_example(*map(jnp.asarray, (per_token, weights, segments)), 4)
    expected = np.zeros((3, 4))
    for row, column in np.ndindex(*segments.shape):
        if segments[row, column] > 0:
            slot = segments[row, column] - 1
            expected[row, slot] += per_token[row, column] * weights[row, column]
    assert np.abs(ours - expected).max() <= 1e-6
    assert np.all(np.asarray(ours)[expected == 0] == 0)


def test_sum_by_example_without_segments_is_one_sum_a_row():
    per_token, weights, _ = segments_with_a_hole()
    ours = sum_by_example(jnp.asarray(per_token), jnp.asarray(weights), None, 1)
    assert ours.shape == (3, 1)
    assert np.abs(ours[:, 0] - (per_token.astype("f8") * weights).sum(1)).max() <= 1e-6


def test_sum_by_example_is_no_matrix_product_which_accelerators_would_round():
    arrays = map(jnp.asarray, segments_with_a_hole())
    program = str(jax.make_jaxpr(lambda *x: sum_by_example(*x, 4))(*arrays))
    assert "reduce_sum" in program
    assert "dot_general" not in program
