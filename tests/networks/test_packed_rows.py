"""Packed rows compute what each example computes alone: log-probabilities, values and gradients.

The relative bias reads positions in the row: inside a segment their differences are the example's own.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.networks import T5, T5Config, ValueNetwork, sum_by_example, token_log_probs

CONFIG = T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=3,
    head_dim=4,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
    relative_buckets=8,
    relative_max_distance=12,
    dtype="float32",
)
POLICY, VALUE = T5(CONFIG), ValueNetwork(CONFIG)

# (prompt length, completion length) of each example; the last fills a row.
LENGTHS = [(5, 4), (1, 1), (3, 7), (6, 2), (14, 12)]
PROMPT_LENGTH, COMPLETION_LENGTH = 14, 12  # of a packed row
SLOTS = 4
GARBAGE = 39  # a token of no example, for places that must not be read
ROWS = [
    [0, 1, 2],  # the last slot absent
    [2, None, 0],  # another order, a slot missing in the middle
    [4],  # one example fills the row
    [1, 1, 3, 1],  # one example three times, and of length 1
    [],  # no example at all
]


def examples() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(1, 39, m), rng.integers(1, 39, n)) for m, n in LENGTHS]


def unpacked_batch(padding: int = 3, filler: int = 0) -> dict[str, jax.Array]:
    """One example a row; `filler` stands in the padding of the decoder, behind the completion."""
    rows = len(LENGTHS)
    batch = {
        "encoder_tokens": np.zeros((rows, PROMPT_LENGTH + padding)),
        "decoder_tokens": np.full((rows, COMPLETION_LENGTH + padding), filler),
        "targets": np.full((rows, COMPLETION_LENGTH + padding), filler),
        "weights": np.zeros((rows, COMPLETION_LENGTH + padding)),
    }
    for row, (prompt, completion) in enumerate(examples()):
        length = len(completion)
        batch["encoder_tokens"][row, : len(prompt)] = prompt
        batch["decoder_tokens"][row, :length] = [0, *completion[:-1]]
        batch["targets"][row, :length] = completion
        batch["weights"][row, :length] = 1
    return {key: jnp.asarray(array, jnp.int32) for key, array in batch.items()}


def packed_batch(filler: int = 0) -> dict[str, jax.Array]:
    """The rows of ROWS; `filler` stands in every place that belongs to no segment."""
    names = {
        "encoder_tokens": PROMPT_LENGTH,
        "encoder_segments": PROMPT_LENGTH,
        "decoder_tokens": COMPLETION_LENGTH,
        "decoder_segments": COMPLETION_LENGTH,
        "targets": COMPLETION_LENGTH,
        "weights": COMPLETION_LENGTH,
    }
    tokens = ("encoder_tokens", "decoder_tokens", "targets")
    batch = {
        name: np.full((len(ROWS), length), filler if name in tokens else 0)
        for name, length in names.items()
    }
    for row, contents in enumerate(ROWS):
        at, to = 0, 0
        for slot, example in enumerate(contents):
            if example is None:
                continue
            prompt, completion = examples()[example]
            encoder, decoder = slice(at, at + len(prompt)), slice(to, to + len(completion))
            batch["encoder_tokens"][row, encoder] = prompt
            batch["encoder_segments"][row, encoder] = slot + 1
            batch["decoder_tokens"][row, decoder] = [0, *completion[:-1]]
            batch["targets"][row, decoder] = completion
            batch["decoder_segments"][row, decoder] = slot + 1
            batch["weights"][row, decoder] = 1
            at, to = encoder.stop, decoder.stop
    return {key: jnp.asarray(array, jnp.int32) for key, array in batch.items()}


def placed(per_example: np.ndarray) -> np.ndarray:
    """What each example [K] has, put where ROWS puts the example: [B, N], 0 where absent."""
    result = np.zeros((len(ROWS), SLOTS), np.float32)
    for row, contents in enumerate(ROWS):
        for slot, example in enumerate(contents):
            if example is not None:
                result[row, slot] = per_example[example]
    return result


PRESENT = placed(np.ones(len(LENGTHS))) > 0
# How much each slot counts in the loss: different everywhere, nothing where absent.
COEFFICIENTS = PRESENT * np.random.default_rng(5).uniform(0.5, 1.5, PRESENT.shape).astype("f4") / 10


def coefficients_of_examples() -> np.ndarray:
    """The same loss over single examples [K, 1]: the sum of the coefficients of its places."""
    total = np.zeros((len(LENGTHS), 1), np.float32)
    for row, contents in enumerate(ROWS):
        for slot, example in enumerate(contents):
            if example is not None:
                total[example, 0] += COEFFICIENTS[row, slot]
    return total


@jax.jit
def policy_results(params: Any, batch: dict[str, jax.Array], coefficients: jax.Array) -> Any:
    """Logits, log-probabilities [B, N], and the gradient of their weighted sum."""

    def loss(params: Any) -> Any:
        logits = POLICY.apply(
            {"params": params},
            batch["encoder_tokens"],
            batch["decoder_tokens"],
            batch.get("encoder_segments"),
            batch.get("decoder_segments"),
        )
        per_token = token_log_probs(logits, batch["targets"])
        segments = batch.get("decoder_segments")
        sums = sum_by_example(per_token, batch["weights"], segments, coefficients.shape[1])
        return jnp.sum(coefficients * sums), (logits, sums)

    gradient, (logits, sums) = jax.grad(loss, has_aux=True)(params)
    return logits, sums, gradient


@jax.jit
def value_results(params: Any, batch: dict[str, jax.Array], coefficients: jax.Array) -> Any:
    """Values [B, N], and the gradient of their weighted sum."""

    def loss(params: Any) -> Any:
        values = VALUE.apply(
            {"params": params},
            batch["encoder_tokens"],
            batch.get("encoder_segments"),
            coefficients.shape[1],
        )
        return jnp.sum(coefficients * values), values

    gradient, values = jax.grad(loss, has_aux=True)(params)
    return values, gradient


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Six gradients of tiny networks: compiling them with all optimisations takes twice as long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def policy_params(random_params):
    tokens = jnp.ones((1, 4), jnp.int32)
    return random_params(POLICY, tokens, tokens)


@pytest.fixture(scope="module")
def value_params(random_params):
    return random_params(VALUE, jnp.ones((1, 4), jnp.int32), seed=1)


def assert_close(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Bounds the largest difference and the mean one, in units of the largest value where that exceeds 1."""
    difference = np.asarray(ours, np.float64) - np.asarray(expected, np.float64)
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(difference).max() <= tolerance * scale
    assert abs(difference.mean()) <= tolerance * scale / 5


def assert_same_gradient(ours: Any, expected: Any) -> None:
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.1  # or the comparison would hold for want of anything to compare
    jax.tree.map(assert_close, ours, expected)


def test_packed_logits_are_those_of_each_example_alone(policy_params):
    packed, *_ = policy_results(policy_params, packed_batch(), COEFFICIENTS)
    single, *_ = policy_results(policy_params, unpacked_batch(), coefficients_of_examples())
    compared = 0
    for row, contents in enumerate(ROWS):
        start = 0
        for example in contents:
            if example is not None:
                length = LENGTHS[example][1]
                assert_close(packed[row, start : start + length], single[example, :length])
                start += length
                compared += 1
    assert compared == PRESENT.sum()
    assert np.all(np.isfinite(packed))


def test_packed_log_probs_and_gradients_are_those_of_each_example_alone(policy_params):
    _, packed, gradient = policy_results(policy_params, packed_batch(), COEFFICIENTS)
    _, single, expected = policy_results(
        policy_params, unpacked_batch(), coefficients_of_examples()
    )
    assert_close(packed, placed(single[:, 0]))
    assert np.all(np.asarray(packed)[~PRESENT] == 0)
    assert_same_gradient(gradient, expected)


def test_packed_values_and_gradients_are_those_of_each_example_alone(value_params):
    packed, gradient = value_results(value_params, packed_batch(), COEFFICIENTS)
    single, expected = value_results(value_params, unpacked_batch(), coefficients_of_examples())
    assert_close(np.asarray(packed)[PRESENT], placed(single[:, 0])[PRESENT])
    assert len(np.unique(np.round(single, 3))) == len(LENGTHS)  # V does depend on x
    assert_same_gradient(gradient, expected)


def test_absent_slots_have_finite_values_and_a_gradient_of_exactly_zero(value_params):
    nothing = np.zeros_like(COEFFICIENTS)
    values, gradient = value_results(value_params, packed_batch(), nothing)
    assert np.all(np.isfinite(values))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    no_examples = jax.tree.map(jnp.zeros_like, packed_batch())
    values, gradient = value_results(value_params, no_examples, nothing)
    assert np.all(np.isfinite(values))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_what_stands_in_the_padding_of_packed_rows_changes_nothing(policy_params, value_params):
    clean, dirty = packed_batch(), packed_batch(filler=GARBAGE)
    assert np.any(clean["encoder_tokens"] != dirty["encoder_tokens"])
    _, sums, gradient = policy_results(policy_params, clean, COEFFICIENTS)
    _, dirty_sums, dirty_gradient = policy_results(policy_params, dirty, COEFFICIENTS)
    assert np.array_equal(sums, dirty_sums)
    assert np.all(dirty_gradient["token_embedder"]["embedding"][GARBAGE] == 0)
    assert_same_gradient(dirty_gradient, gradient)
    values, gradient = value_results(value_params, clean, COEFFICIENTS)
    dirty_values, dirty_gradient = value_results(value_params, dirty, COEFFICIENTS)
    assert np.array_equal(np.asarray(values)[PRESENT], np.asarray(dirty_values)[PRESENT])
    assert np.all(dirty_gradient["token_embedder"]["embedding"][GARBAGE] == 0)
    assert_same_gradient(dirty_gradient, gradient)


def test_what_stands_in_the_padding_of_unpacked_rows_changes_nothing(policy_params):
    coefficients = coefficients_of_examples()
    _, sums, gradient = policy_results(policy_params, unpacked_batch(), coefficients)
    dirty = unpacked_batch(filler=GARBAGE)
    _, dirty_sums, dirty_gradient = policy_results(policy_params, dirty, coefficients)
    assert np.array_equal(sums, dirty_sums)
    assert np.all(dirty_gradient["token_embedder"]["embedding"][GARBAGE] == 0)
    assert_same_gradient(dirty_gradient, gradient)


def test_longer_padding_changes_nothing(policy_params, value_params):
    @jax.jit
    def results(batch: dict[str, jax.Array]) -> Any:
        prompts = batch["encoder_tokens"]
        logits = POLICY.apply({"params": policy_params}, prompts, batch["decoder_tokens"])
        per_token = token_log_probs(logits, batch["targets"])
        values = VALUE.apply({"params": value_params}, prompts)
        return sum_by_example(per_token, batch["weights"], None, 1), values

    log_probs, values = results(unpacked_batch(padding=20))
    _, expected, _ = policy_results(policy_params, unpacked_batch(), coefficients_of_examples())
    assert_close(log_probs, expected)
    expected, _ = value_results(value_params, unpacked_batch(), coefficients_of_examples())
    assert_close(values, expected)


def test_examples_with_every_key_masked_are_finite_forwards_and_backwards(policy_params):
    batch = packed_batch()
    batch["encoder_segments"] = jnp.zeros_like(batch["encoder_segments"])
    logits, sums, gradient = policy_results(policy_params, batch, COEFFICIENTS)
    assert np.all(np.isfinite(logits))
    assert np.all(np.asarray(sums)[PRESENT] < 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["decoder"]["layers_0"]["mlp"]["wo"]["kernel"] != 0)
