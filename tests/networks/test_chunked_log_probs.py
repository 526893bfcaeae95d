"""Log-probabilities whose logits are computed a few positions at a time: the plain numbers, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dro_jax.networks import T5, token_log_probs, token_log_probs_in_chunks
from dro_jax.networks.log_probs import mask_entries
from dro_jax.networks.sharding import laid_over
from dro_jax.training.collectives import read_collectives
from dro_jax.training.partitioning import DEFAULT_RULES, MESH_AXES

ROWS, LENGTH, WIDTH, ENTRIES = 3, 7, 5, 11
ALL = ENTRIES
LAST_IS_NO_TOKEN = ENTRIES - 1


def arrays(axes, *, length=LENGTH, tokens=ENTRIES):
    """States, weights, targets, which of them count, and the loss's slope in each log-probability."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((ROWS, length, WIDTH)).astype(np.float32)
    weights = 2 * rng.standard_normal((WIDTH, ENTRIES)).astype(np.float32)
    targets = rng.integers(0, tokens, (ROWS, length)).astype(np.int32)
    counted = rng.random((ROWS, length)) < 0.6
    slopes = rng.standard_normal((ROWS, length)).astype(np.float32)
    weights = weights if axes == "ev" else np.ascontiguousarray(weights.T)
    return states, weights, targets, counted, slopes


def exact(states, weights, targets, counted, slopes, axes, tokens=ENTRIES):
    """Log-probabilities and the gradients of their weighted sum, in float64."""
    slopes = counted * slopes
    states, weights = (np.asarray(x, np.float64) for x in (states, weights))
    weights = weights if axes == "ev" else weights.T
    logits = states @ weights
    logits[..., tokens:] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    log_probs = counted * np.take_along_axis(log_softmax, targets[..., None], axis=-1)[..., 0]
    of_logits = slopes[..., None] * (np.eye(ENTRIES)[targets] - np.exp(log_softmax))
    of_weights = np.einsum("bte,btv->ev", states, of_logits)
    of_states = of_logits @ weights.T
    return log_probs, of_states, of_weights if axes == "ev" else of_weights.T


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def in_chunks(states, weights, targets, counted, slopes, axes, tokens, chunk):
    """The same three of the chunked function."""
    log_probs, pull = jax.vjp(
        lambda *x: token_log_probs_in_chunks(*x, targets, counted, axes, tokens, chunk),
        states,
        weights,
    )
    return log_probs, *pull(slopes)


@pytest.mark.parametrize(
    ("chunk", "axes", "tokens"),
    [(1, "ev", ALL), (5, "ev", LAST_IS_NO_TOKEN), (8, "ve", ALL), (100, "ve", LAST_IS_NO_TOKEN)],
)
def test_values_and_gradients_agree_with_float64(chunk, axes, tokens):
    inputs = arrays(axes, tokens=tokens)
    got = in_chunks(*map(jnp.asarray, inputs), axes, tokens, chunk)
    for ours, oracle in zip(got, exact(*inputs, axes, tokens), strict=True):
        assert ours.dtype == jnp.float32
        assert ours.shape == oracle.shape
        assert np.abs(ours - oracle).max() <= 1e-5
        assert abs((ours - oracle).mean()) <= 2e-6


def test_a_masked_target_has_the_plain_gradient_too():
    states, weights, targets, counted, slopes = map(jnp.asarray, arrays("ev"))
    assert np.any(counted & (targets == LAST_IS_NO_TOKEN))

    @jax.jit
    def plain(states, weights):
        def log_probs(*x):
            logits = mask_entries(jnp.matmul(*x), LAST_IS_NO_TOKEN)
            return counted * token_log_probs(logits, targets)

        return jax.vjp(log_probs, states, weights)[1](slopes)

    want = plain(states, weights)
    got = in_chunks(states, weights, targets, counted, slopes, "ev", LAST_IS_NO_TOKEN, 8)[1:]
    for ours, of_plain in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, of_plain, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 8, 12])
def test_padding_is_not_multiplied(count):
    """Were a chunk of nothing but padding computed, what is not a number in it would come out."""
    states, weights, targets, _, slopes = arrays("ev")
    first, last = np.split(np.random.default_rng(1).permutation(ROWS * LENGTH), [count])
    counted = np.zeros(ROWS * LENGTH, bool)
    counted[first] = True
    counted = counted.reshape(ROWS, LENGTH)
    # Chunks of 4; the first padding fills the last of them.
    poisoned = states.copy()
    poisoned.reshape(-1, WIDTH)[np.sort(last)[-count % 4 :]] = np.nan
    got = in_chunks(poisoned, weights, targets, counted, slopes, "ev", ALL, 4)
    oracle = exact(states, weights, targets, counted, slopes, "ev")
    for ours, of_exact in zip(got, oracle, strict=True):
        assert np.abs(ours - of_exact).max() <= 1e-5


def test_bfloat16_factors_are_added_up_in_float32():
    """In bfloat16 a sum of 2,000 would have lost the addends of its second half."""
    *factors, targets, counted, slopes = arrays("ev", length=2000)
    states, weights = (jnp.asarray(x, jnp.bfloat16) for x in factors)
    slopes = np.abs(slopes)
    rest = targets, counted, slopes, "ev"
    got = in_chunks(states, weights, *rest, ALL, ROWS)
    oracle = exact(states.astype(np.float32), weights.astype(np.float32), *rest)
    assert [x.dtype for x in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    # A bfloat16 is right to one part in 256, a sum of many rounded ones to less.
    for ours, x, close in zip(got, oracle, (1e-6, 4e-3, 2e-3), strict=True):
        error = np.asarray(ours, np.float64) - x
        assert np.linalg.norm(error) <= close * np.linalg.norm(x)


def test_a_network_in_chunks_has_the_plain_one_s_numbers_and_gradients(config, random_params):
    plain = dataclasses.replace(config, reserved_entry=True)
    rng = np.random.default_rng(2)
    prompts, inputs, targets = (jnp.asarray(rng.integers(1, 39, (4, n))) for n in (6, 9, 9))
    segments = jnp.asarray([[1] * 3 + [2] * 3] * 4), jnp.asarray([[1] * 5 + [2] * 4] * 4)
    loss_weights = jnp.asarray(rng.integers(0, 2, targets.shape))
    params = random_params(T5(config), prompts, inputs)
    slopes = jnp.asarray(rng.standard_normal((2, 4, 9)), jnp.float32)

    # Compiled quickly.
    options = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    def run(config, params):
        def outputs(params):
            method = "log_probs_and_values"
            tokens = targets, loss_weights, prompts, inputs, *segments
            return T5(config).apply({"params": params}, *tokens, method=method)

        found, pull = jax.vjp(outputs, params)
        return found, pull((slopes[0], slopes[1]))

    want = run(plain, params)
    got = run(dataclasses.replace(plain, logits_chunk=10), params)
    for ours, of_plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = max(1, np.abs(of_plain).max())
        assert np.abs(ours - of_plain).max() <= 1e-5 * largest


@pytest.mark.parametrize("axes", ["ev", "ve"])
def test_a_tenth_of_the_logits_memory_is_enough(axes):
    rows, length, width, entries = 8, 128, 16, 2048
    logits = 4 * rows * length * entries

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    weights = shape(width, entries) if axes == "ev" else shape(entries, width)
    targets = shape(rows, length, dtype=jnp.int32)

    counted = shape(rows, length, dtype=jnp.bool)

    def temporaries(log_probs):
        def gradients(states, weights, targets, counted, slopes):
            found, pull = jax.vjp(lambda *x: log_probs(*x, targets, counted), states, weights)
            return found, pull(slopes)

        lowered = jax.jit(gradients).lower(
            shape(rows, length, width), weights, targets, counted, shape(rows, length)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    chunked = temporaries(
        lambda states, weights, targets, counted: token_log_probs_in_chunks(
            states, weights, targets, counted, axes, entries, 16
        )
    )
    plain = temporaries(
        lambda states, weights, targets, counted: (
            counted * token_log_probs(jnp.einsum(f"bte,{axes}->btv", states, weights), targets)
        )
    )
    assert chunked < 0.1 * logits < 2 * logits < plain


def test_devices_send_each_other_as_much_as_without_chunks():
    """Every device adds up the weights' gradient of its own rows through all chunks."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 1, 2), MESH_AXES)

    def sent(chunk):
        def gradients(*inputs):
            return in_chunks(*inputs, "ev", 32, chunk)[1:]

        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        lies = rows, jax.NamedSharding(mesh, jax.P(None, "model")), rows, rows, rows
        shapes = (8, 16, 24), (24, 32), (8, 16), (8, 16), (8, 16)
        dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.bool, jnp.float32]
        inputs = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=at)
            for shape, dtype, at in zip(shapes, dtypes, lies, strict=True)
        ]
        with laid_over(mesh, DEFAULT_RULES):
            compiled = jax.jit(gradients, out_shardings=lies[:2]).lower(*inputs).compile()
        return sum(collective.sent for collective in read_collectives(compiled.as_text()))

    assert 0 < sent(4) <= sent(32)
