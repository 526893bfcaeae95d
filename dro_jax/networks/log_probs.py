"""From logits to the log-probability of each example, pi(y|x)."""

import jax
import jax.numpy as jnp

Array = jax.Array


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
