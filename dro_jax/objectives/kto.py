"""KTO, arXiv 2402.01306, as the DRO paper runs it and as its own paper has it."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from dro_jax.objectives.per_example import (
    Metrics,
    Scalar,
    check_arrays,
    check_scalars,
    weighted_mean,
    zero_padding,
)

# Rewards that differ by less than this are taken as equal.
_EQUAL_REWARDS = 1e-6


def kto_loss(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    mismatched_policy_log_prob: jax.Array | None = None,
    mismatched_reference_log_prob: jax.Array | None = None,
    desirable: jax.Array | None = None,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    dataset_mean_reward: float = 0.0,
    threshold: Scalar | None = None,
    z0: Scalar | None = None,
    total_weight: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns KTO's loss, arXiv 2402.01306, with beta = tau.

    With h = log pi(y|x) - log pi_ref(y|x), the weighted mean over examples of

      desirable:    lambda_desirable   (1 - sigmoid(tau (h - z0)))
      undesirable:  lambda_undesirable (1 - sigmoid(tau (z0 - h)))

    The defaults are the baseline of arXiv 2405.19107: both lambdas 1, and an example is desirable
    iff its reward is GREATER than the threshold, the batch's mean reward (`kto_threshold`). KTO's own
    paper has labels instead: give `desirable`. z0 is KTO's estimate of the KL divergence (`kto_z0`).

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats. All arrays share one shape, e.g. [B, N].
      reference_log_prob: log pi_ref(y|x), nats; receives no gradient.
      reward: r(x, y).
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN.
      tau: KTO's beta, per nat, > 0.
      mismatched_policy_log_prob: log pi(y'|x), y' the response to another prompt, nats; no
        gradient. It and the next are needed only when z0 is not given.
      mismatched_reference_log_prob: log pi_ref(y'|x), nats.
      desirable: booleans that replace the comparison of rewards with the threshold.
      lambda_desirable: weight of desirable examples.
      lambda_undesirable: weight of undesirable examples.
      dataset_mean_reward: threshold where all rewards of the batch are equal; 0 when normalised.
      threshold: kto_threshold of the global batch; by default of the arrays given.
      z0: kto_z0 of the global batch, nats; by default of the arrays given.
      total_weight: sum of the weights over the global batch; by default of the arrays given.

    Returns:
      The loss, and metrics that, like the loss, add up over microbatches: loss/kto, kl/z0,
      reward/desirable_fraction; reward/threshold unless `desirable` is given; kl/batch_of_one unless
      z0 is given (1 where z0 was set to 0 because the batch has a single real example).

    Raises:
      ValueError: shapes differ, a statistic is not a scalar, tau <= 0, or neither z0 nor both
        mismatched log-probabilities are given.
      TypeError: an array is not float32 or float64, or desirable is not boolean.

    >>> import jax.numpy as jnp
    >>> loss, metrics = kto_loss(
    ...     policy_log_prob=jnp.array([-2.0, -3.0]), reference_log_prob=jnp.array([-3.0, -3.0]),
    ...     reward=jnp.array([1.0, -1.0]), weights=jnp.array([1.0, 1.0]), tau=2.0, z0=0.5)
    >>> round(float(loss), 4)  # the mean of 1 - sigmoid(1), twice
    0.2689
    """
    check_arrays(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
        mismatched_policy_log_prob=mismatched_policy_log_prob,
        mismatched_reference_log_prob=mismatched_reference_log_prob,
    )
    check_scalars(tau=tau, threshold=threshold, z0=z0, total_weight=total_weight)

    metrics: Metrics = {}
    if desirable is None:
        if threshold is None:
            threshold = kto_threshold(
                reward=reward, weights=weights, dataset_mean_reward=dataset_mean_reward
            )
        desirable = reward > threshold
        metrics["reward/threshold"] = _batch_constant(threshold, weights, total_weight)
    elif jnp.shape(desirable) != jnp.shape(reward):
        raise ValueError(
            f"desirable has shape {jnp.shape(desirable)} but reward has shape {jnp.shape(reward)}"
        )
    elif jnp.result_type(desirable) != jnp.bool_:
        raise TypeError(f"desirable has dtype {jnp.result_type(desirable)}; expected bool")

    if z0 is None:
        if mismatched_policy_log_prob is None or mismatched_reference_log_prob is None:
            raise ValueError(
                "give z0, or mismatched_policy_log_prob and mismatched_reference_log_prob"
            )
        z0 = kto_z0(
            mismatched_policy_log_prob=mismatched_policy_log_prob,
            mismatched_reference_log_prob=mismatched_reference_log_prob,
            weights=weights,
        )
        metrics["kl/batch_of_one"] = _batch_constant(_is_single(weights), weights, total_weight)

    policy_log_prob, reference_log_prob = zero_padding(weights, policy_log_prob, reference_log_prob)
    log_ratio = policy_log_prob - stop_gradient(reference_log_prob)
    margin = jnp.where(desirable, 1, -1) * tau * (log_ratio - stop_gradient(z0))
    example_lambda = jnp.where(desirable, lambda_desirable, lambda_undesirable)
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation.
    loss = weighted_mean(example_lambda * jax.nn.sigmoid(-margin), weights, total_weight)
    is_desirable = desirable.astype(margin.dtype)
    metrics["loss/kto"] = loss
    metrics["kl/z0"] = _batch_constant(z0, weights, total_weight)
    metrics["reward/desirable_fraction"] = weighted_mean(is_desirable, weights, total_weight)
    return loss, metrics


def kto_threshold(
    *, reward: jax.Array, weights: jax.Array, dataset_mean_reward: float = 0.0
) -> jax.Array:
    """Returns the reward above which an example is desirable: the batch's weighted mean reward.

    Where all rewards of the batch are equal (spread under 1e-6) no example would be desirable, and
    the data set's mean reward is returned instead.

    Args:
      reward: r(x, y) of the global batch.
      weights: the same shape; 1 for a real example, 0 for padding.
      dataset_mean_reward: 0 when the rewards are normalised.

    Returns:
      A scalar in units of reward.

    Raises:
      ValueError: the shapes differ.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> float(kto_threshold(reward=jnp.array([1.0, 2.0, 6.0]), weights=jnp.ones(3)))
    3.0
    >>> float(kto_threshold(reward=jnp.array([2.0, 2.0]), weights=jnp.ones(2)))
    0.0
    """
    check_arrays(reward=reward, weights=weights)
    is_real = weights > 0
    highest = jnp.max(jnp.where(is_real, reward, -jnp.inf))
    lowest = jnp.min(jnp.where(is_real, reward, jnp.inf))
    all_equal = highest - lowest < _EQUAL_REWARDS
    return jnp.where(all_equal, dataset_mean_reward, weighted_mean(reward, weights))


def kto_z0(
    *,
    mismatched_policy_log_prob: jax.Array,
    mismatched_reference_log_prob: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Returns KTO's estimate of KL: max(0, weighted mean of log pi(y'|x) - log pi_ref(y'|x)).

    y' is the response to another prompt. A batch of one real example gives no estimate: z0 is 0.
    No gradient passes.

    Args:
      mismatched_policy_log_prob: log pi(y'|x) summed over tokens, nats.
      mismatched_reference_log_prob: log pi_ref(y'|x), nats, the same shape.
      weights: the same shape; 1 for a real example, 0 for padding.

    Returns:
      A scalar in nats.

    Raises:
      ValueError: the shapes differ.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> float(kto_z0(mismatched_policy_log_prob=jnp.array([-3.0, -4.0]),
    ...              mismatched_reference_log_prob=jnp.array([-4.0, -6.0]), weights=jnp.ones(2)))
    1.5
    """
    check_arrays(
        mismatched_policy_log_prob=mismatched_policy_log_prob,
        mismatched_reference_log_prob=mismatched_reference_log_prob,
        weights=weights,
    )
    policy_log_prob, reference_log_prob = zero_padding(
        weights, mismatched_policy_log_prob, mismatched_reference_log_prob
    )
    log_ratio = policy_log_prob - reference_log_prob
    estimate = jnp.maximum(weighted_mean(log_ratio, weights), 0)
    return stop_gradient(jnp.where(_is_single(weights), 0, estimate))


def _is_single(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights > 0) <= 1


def _batch_constant(constant: Scalar, weights: jax.Array, total_weight: Scalar | None) -> jax.Array:
    """Returns the part of a batch-wide number that adds up to it over microbatches."""
    return weighted_mean(jnp.full_like(weights, constant), weights, total_weight)
