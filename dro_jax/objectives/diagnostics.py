"""What one watches in an alignment run, from a batch's per-example numbers."""

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


def alignment_diagnostics(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    value: jax.Array | None = None,
) -> Metrics:
    """Returns the scalars that tell how a run is going, all of them finite.

    With h = log pi(y|x) - log pi_ref(y|x), over the real examples:

      kl/log_ratio_mean, kl/log_ratio_std   of h, nats (off-policy, so not the KL itself)
      reward/mean
      reward/log_ratio_correlation          Pearson's, of r and h
      value/mean                            of V
      value/explained_variance              1 - Var(r - tau h - V) / Var(r - tau h): 1 where
                                            eq. 3 of arXiv 2405.19107 holds, 0 for a constant V

    The last two only when `value` is given. Correlation and explained variance are 0 where a
    variance they divide by is 0, as with one example. Unlike the losses' metrics these do not add up over
    microbatches: give the arrays of the whole batch.

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats. All arrays share one shape, e.g. [B, N].
      reference_log_prob: log pi_ref(y|x), nats.
      reward: r(x, y).
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN.
      tau: strength of the regularisation, units of reward per nat, > 0.
      value: V(x), in units of reward; for a single value, that value in each entry.

    Raises:
      ValueError: shapes differ, or tau <= 0.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> metrics = alignment_diagnostics(
    ...     policy_log_prob=jnp.array([-2.0, -4.0]), reference_log_prob=jnp.array([-3.0, -3.0]),
    ...     reward=jnp.array([1.0, 0.0]), weights=jnp.ones(2), tau=1.0, value=jnp.array([0.0, 1.0]))
    >>> for name in sorted(metrics):
    ...     print(name, round(float(metrics[name]), 4))
    kl/log_ratio_mean 0.0
    kl/log_ratio_std 1.0
    reward/log_ratio_correlation 1.0
    reward/mean 0.5
    value/explained_variance 1.0
    value/mean 0.5
    """
    check_arrays(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
        value=value,
    )
    check_scalars(tau=tau)
    policy_log_prob, reference_log_prob, reward = zero_padding(
        weights, policy_log_prob, reference_log_prob, reward
    )
    log_ratio = policy_log_prob - reference_log_prob
    reward_deviation = _deviation(reward, weights)
    log_ratio_deviation = _deviation(log_ratio, weights)
    reward_std = jnp.sqrt(weighted_mean(reward_deviation**2, weights))
    log_ratio_std = jnp.sqrt(weighted_mean(log_ratio_deviation**2, weights))
    covariance = weighted_mean(reward_deviation * log_ratio_deviation, weights)
    metrics = {
        "kl/log_ratio_mean": weighted_mean(log_ratio, weights),
        "kl/log_ratio_std": log_ratio_std,
        "reward/mean": weighted_mean(reward, weights),
        "reward/log_ratio_correlation": _ratio(covariance, reward_std * log_ratio_std),
    }
    if value is not None:
        (value,) = zero_padding(weights, value)
        target = reward - tau * log_ratio
        explained = _deviation(target, weights)
        unexplained = _deviation(target - value, weights)
        variance = weighted_mean(explained**2, weights)
        metrics["value/mean"] = weighted_mean(value, weights)
        metrics["value/explained_variance"] = _ratio(
            variance - weighted_mean(unexplained**2, weights), variance
        )
    return metrics


def _deviation(array: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the array minus its weighted mean, exactly 0 where that is rounding."""
    deviation = array - weighted_mean(array, weights)
    (magnitude,) = zero_padding(weights, jnp.abs(array))
    rounding = 10 * jnp.finfo(array.dtype).eps * jnp.max(magnitude, initial=0)
    (size,) = zero_padding(weights, jnp.abs(deviation))
    return jnp.where(jnp.max(size, initial=0) > rounding, deviation, 0)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Returns the quotient, 0 where the denominator is next to 0 (rewards have size 1)."""
    can_divide = denominator > 1e-12
    return jnp.where(can_divide, numerator / jnp.where(can_divide, denominator, 1), 0)
