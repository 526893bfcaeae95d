"""Supervised fine-tuning."""

import jax
import jax.numpy as jnp

from dro_jax.objectives.per_example import (
    Metrics,
    Scalar,
    check_arrays,
    check_scalars,
    weighted_mean,
    zero_padding,
)


def sft_loss(
    *,
    policy_log_prob: jax.Array,
    target_tokens: jax.Array,
    weights: jax.Array,
    total_tokens: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the negative log-likelihood per token: -sum_i w_i log pi(y_i|x_i) / sum_i w_i n_i.

    The mean is over the batch's tokens, T5X's convention, so a long response counts for more than a
    short one. For reward-filtered SFT the data leave the other examples out
    (`dro_jax.data.feedback.FeedbackFile.top_fraction`).

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats. All arrays share one shape, e.g. [B, N].
      target_tokens: n, the number of target tokens in the sum, end-of-sequence included, as floats.
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN.
      total_tokens: sum of w_i n_i over the global batch; by default of the arrays given.

    Returns:
      The loss in nats per token (0 when no example is real), and metrics that, like the loss, add
      up over microbatches: loss/sft.

    Raises:
      ValueError: shapes differ, or total_tokens is not a scalar.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> loss, _ = sft_loss(policy_log_prob=jnp.array([-6.0, -2.0]),
    ...                    target_tokens=jnp.array([3.0, 1.0]), weights=jnp.ones(2))
    >>> float(loss)
    2.0
    """
    check_arrays(policy_log_prob=policy_log_prob, target_tokens=target_tokens, weights=weights)
    check_scalars(total_tokens=total_tokens)
    (target_tokens,) = zero_padding(weights, target_tokens)
    if total_tokens is None:
        total_tokens = jnp.sum(weights * target_tokens)
    loss = weighted_mean(-policy_log_prob, weights, total_tokens)
    return loss, {"loss/sft": loss}
