"""From logits, or from the states that they are made of, to the log-probability of each example, pi(y|x)."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dro_jax.networks.sharding import constrain, row_parts

Array = jax.Array

MASKED_LOGIT = -1e9
"""Of an entry that is no token: its probability is exactly 0, and nothing is infinite."""


@jax.custom_vjp
def token_log_probs(logits: Array, targets: Array) -> Array:
    """log softmax of the logits at the targets, in nats.

    The forward pass is one computation whether or not it is being differentiated, so that policy and reference
    give the same number while they are the same weights. Differentiable once, in the logits.

    Args:
      logits: float32 [B, T, V].
      targets: int32 [B, T].

    Returns:
      float32 [B, T]: the label's logit minus the log-sum-exp.
    """
    # Relative to the largest logit first: logits of a large common offset would lose digits.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - largest
    # A sum over the vocabulary and not a look-up, which would bring a vocabulary that is cut over devices together.
    is_label = targets[..., None] == jnp.arange(logits.shape[-1]).reshape(
        (1,) * targets.ndim + (-1,)
    )
    label = jnp.sum(jnp.where(is_label, shifted, 0), axis=-1)
    return label - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def _forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    # Saving the log-sum-exp would let the compiler sum it in another order than without a gradient.
    return token_log_probs(logits, targets), (logits, targets)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    logits, targets = saved
    label = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return cotangent[..., None] * (label - jax.nn.softmax(logits, axis=-1)), None


token_log_probs.defvjp(_forward, _backward)


def mask_entries(logits: Array, num_tokens: int) -> Array:
    """The logits [..., V] with those of the entries from `num_tokens` on masked, which are no tokens."""
    if num_tokens == logits.shape[-1]:
        return logits
    is_token = jnp.arange(logits.shape[-1]) < num_tokens
    return jnp.where(is_token.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, MASKED_LOGIT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def vocabulary_logits(states: Array, weights: Array, axes: Literal["ev", "ve"]) -> Array:
    """States times the output layer's weights, added up in float32.

    The logits' gradient has the type of the states where it is a factor of a product: accelerators multiply
    bfloat16 several times as fast as float32. Differentiable once.

    Args:
      states: [..., E], float32 or bfloat16.
      weights: of the same type, [E, V] or [V, E].
      axes: the weights' axes: "ev" or "ve".

    Returns:
      float32 [..., V].
    """
    return jnp.einsum(f"...e,{axes}->...v", states, weights, preferred_element_type=jnp.float32)


def _logits_forward(
    states: Array, weights: Array, axes: Literal["ev", "ve"]
) -> tuple[Array, tuple[Array, Array]]:
    return vocabulary_logits(states, weights, axes), (states, weights)


def _logits_backward(
    axes: str, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    states, weights = saved
    slopes = cotangent.astype(states.dtype)
    positions = tuple(range(states.ndim - 1))
    factors = (states, slopes) if axes == "ev" else (slopes, states)
    return (
        jnp.einsum(f"...v,{axes}->...e", slopes, weights),
        jnp.tensordot(*factors, axes=(positions, positions)),
    )


vocabulary_logits.defvjp(_logits_forward, _logits_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_log_probs_in_chunks(
    states: Array,
    weights: Array,
    targets: Array,
    counted: Array,
    axes: Literal["ev", "ve"],
    num_tokens: int,
    chunk: int,
) -> Array:
    """`token_log_probs` of states times weights, of which a device has a few positions' logits in memory at a time.

    A device goes through the positions that count, as many turns as the device with the most of them needs; padding
    behind them costs nothing. The backward pass multiplies the logits out again. Their gradient has the type of the
    states where it is a factor of a product; products are added up in float32. Differentiable once, in states and
    weights.

    Args:
      states: [B, T, E], float32 or bfloat16.
      weights: of the same type, [E, V] or [V, E].
      targets: int32 [B, T].
      counted: bool [B, T], whether the position has a target.
      axes: the weights' axes: "ev" or "ve".
      num_tokens: entries of the vocabulary that are tokens, the first ones; the others are masked.
      chunk: positions whose logits a device has in memory at a time; the last chunk is filled up.

    Returns:
      float32 [B, T], nats; 0 where nothing is counted.
    """
    order = _counted_first(counted)
    inputs = tuple(_split(x, order, chunk) for x in (states, targets))

    def of_chunk(turn: Array, found: Array) -> Array:
        states, targets = (x[turn] for x in inputs)
        logits = mask_entries(_chunk_logits(states, weights, axes), num_tokens)
        return found.at[turn].set(token_log_probs(logits, targets))

    turns, _, size = inputs[1].shape
    found = jnp.zeros(inputs[1].shape, jnp.float32)
    found = _for_each_chunk(of_chunk, found, turns, _chunks_needed(counted, size))
    return jnp.where(counted, _merge(found, order, targets.shape), 0)


def _chunk_logits(states: Array, weights: Array, axes: Literal["ev", "ve"]) -> Array:
    """float32 [D, C, V]."""
    return constrain(vocabulary_logits(states, weights, axes), "batch", None, "vocab")


def _forward_in_chunks(
    states: Array,
    weights: Array,
    targets: Array,
    counted: Array,
    axes: Literal["ev", "ve"],
    *sizes: int,
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    log_probs = token_log_probs_in_chunks(states, weights, targets, counted, axes, *sizes)
    return log_probs, (states, weights, targets, counted)


def _backward_in_chunks(
    axes: Literal["ev", "ve"],
    num_tokens: int,
    chunk: int,
    saved: tuple[Array, Array, Array, Array],
    cotangent: Array,
) -> tuple[Array, Array, None, None]:
    states, weights, targets, counted = saved
    order = _counted_first(counted)
    cotangent = jnp.where(counted, cotangent, 0)
    inputs = tuple(_split(x, order, chunk) for x in (states, targets, cotangent))

    def of_chunk(turn: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        of_weights, of_states = totals
        states, targets, cotangent = (x[turn] for x in inputs)
        _, pull = jax.vjp(
            lambda logits: token_log_probs(mask_entries(logits, num_tokens), targets),
            _chunk_logits(states, weights, axes),
        )
        slopes = pull(cotangent)[0].astype(states.dtype)
        of_weights += jnp.einsum(
            f"dce,dcv->d{axes}", states, slopes, preferred_element_type=jnp.float32
        )
        return of_weights, of_states.at[turn].set(jnp.einsum(f"dcv,{axes}->dce", slopes, weights))

    # Every device adds up the gradient of its own rows, and once at the end they all do: were the rows one axis, they
    # would in every turn of the loop.
    zeros = jnp.zeros((row_parts(states.shape[0]), *weights.shape), jnp.float32)
    over = {"e": None, "v": "vocab"}
    zeros = constrain(zeros, "batch", *(over[axis] for axis in axes))
    totals = zeros, jnp.zeros_like(inputs[0])
    turns, _, size = inputs[1].shape
    of_weights, of_states = _for_each_chunk(of_chunk, totals, turns, _chunks_needed(counted, size))
    of_states = _merge(of_states, order, states.shape)
    return of_states, of_weights.sum(axis=0).astype(weights.dtype), None, None


token_log_probs_in_chunks.defvjp(_forward_in_chunks, _backward_in_chunks)


def _for_each_chunk(
    body: Callable[[Array, Any], Any], found: Any, chunks: int, needed: Array
) -> Any:
    """Calls `found = body(turn, found)` for the first of the chunks, as many as are needed."""

    def goes_on(carry: tuple[Array, Any]) -> Array:
        # The first bound is for who reads the program: `dro_jax plan` counts what a loop sends.
        return (carry[0] < chunks) & (carry[0] < needed)

    def turn(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return carry[0] + 1, body(*carry)

    return jax.lax.while_loop(goes_on, turn, (jnp.int32(0), found))[1]


def _by_part(counted: Array) -> Array:
    """[B, T] as the positions [D, B * T / D] of each part that the mesh cuts the rows into."""
    return constrain(counted.reshape(row_parts(counted.shape[0]), -1), "batch", None)


def _counted_first(counted: Array) -> Array:
    """The positions of each part [D, B * T / D], those that count first."""
    return jnp.argsort(~_by_part(counted), axis=1, stable=True)


def _chunks_needed(counted: Array, chunk: int) -> Array:
    """How many chunks of so many positions hold those that count of the part with the most of them."""
    return -(-jnp.max(jnp.sum(_by_part(counted), axis=1)) // chunk)


def _split(x: Array, order: Array, chunk: int) -> Array:
    """[B, T, ...] in this order as chunks [M, D, C, ...] of positions, filled up with zeros."""
    parts, positions = order.shape
    x = _in_order(x.reshape(parts, positions, *x.shape[2:]), order)
    chunks = -(-positions // chunk)
    chunk = -(-positions // chunks)
    x = jnp.pad(x, [(0, 0), (0, chunks * chunk - positions), *[(0, 0)] * (x.ndim - 2)])
    x = jnp.moveaxis(x.reshape(parts, chunks, chunk, *x.shape[2:]), 1, 0)
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _merge(chunks: Array, order: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_split`: an array [B, T, ...] of this shape."""
    parts, positions = order.shape
    x = jnp.moveaxis(chunks, 0, 1).reshape(parts, -1, *shape[2:])[:, :positions]
    return _in_order(x, jnp.argsort(order, axis=1)).reshape(shape)


def _in_order(x: Array, order: Array) -> Array:
    """[D, P, ...] with the positions of each part in the order [D, P]."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def sum_by_example(
    per_token: Array, loss_weights: Array, segment_ids: Array | None, num_examples: int
) -> Array:
    """Sums a quantity of the tokens over each example of a row.

    Args:
      per_token: float32 [B, T].
      loss_weights: [B, T], 1 where the target is real (end-of-sequence included) and 0 for padding.
      segment_ids: int32 [B, T] when packed, k + 1 for the k-th example; None for one example a row.
      num_examples: N, the most examples a row holds.

    Returns:
      float32 [B, N], 0 for absent examples.
    """
    weighted = per_token * loss_weights.astype(per_token.dtype)
    if segment_ids is None:
        return jnp.sum(weighted, axis=1, keepdims=True)
    slots = jnp.arange(1, num_examples + 1)[None, None, :]
    # A sum, not a product with a membership matrix: accelerators round the factors of float32 products.
    return jnp.sum(jnp.where(segment_ids[:, :, None] == slots, weighted[:, :, None], 0), axis=1)
