"""Direct Reward Optimisation, arXiv 2405.19107: DRO-V, DRO-P and the two-sample loss.

All three square the log-ratio of the whole SEQUENCE, log pi(y|x) - log pi_ref(y|x), the sum over
its tokens. Losses of the same name elsewhere square token log-ratios, or mean something else.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from dro_jax.objectives.pairs import check_pairs, pair_weights
from dro_jax.objectives.per_example import (
    Metrics,
    Scalar,
    check_arrays,
    check_scalars,
    weighted_mean,
    zero_padding,
)


def dro_v_loss(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    value: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    value_variance: jax.Array | None = None,
    mean_value: Scalar | None = None,
    mean_residual: Scalar | None = None,
    total_weight: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns DRO-V's loss, whose gradients are eq. 7 and eq. 8 of arXiv 2405.19107.

    With h = log pi(y|x) - log pi_ref(y|x) and sg = stop_gradient, the weighted mean over examples

      (r - sg(V) - tau h)^2 / (2 tau)  +  (r - V - tau sg(h))^2 / 2.

    The first term trains the policy (eq. 8: 1/tau times the gradient of eq. 4), the second the
    value (eq. 7). The reference receives no gradient. Algorithm 1 as printed has 1/2 where eq. 8
    divided by tau has tau/2; we follow eq. 8, and the two agree at tau = 1.

    Which V (the paper's variants):
      * one value per example: `value` alone. Where policy and value are one network, the same scalar.
      * a single value for the batch: give `mean_value` too. It replaces each V(x_i) in both terms,
        and the second term's gradient is that of V as the weighted mean of `value`: -(w_i / W)
        times the MEAN residual, the same for every example. Also exact from microbatches.
      * a value per token: `value` is the mean of V_t over the response's positions and
        `value_variance` its population variance there, since
        mean_t (a - V_t)^2 = (a - mean_t V_t)^2 + Var_t V_t. Biased: such a V has seen y.

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats. All arrays share one shape, e.g. [B, N].
      reference_log_prob: log pi_ref(y|x), nats.
      value: V(x), in units of reward.
      reward: r(x, y).
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN.
      tau: strength of the regularisation, units of reward per nat, > 0.
      value_variance: Var_t V_t of per-token values, units of reward squared.
      mean_value: weighted_mean(value, weights) over the global batch; makes V a single value.
      mean_residual: dro_mean_residual of the global batch; used with mean_value only. By default
        computed from the arrays given.
      total_weight: sum of the weights over the global batch; by default of the arrays given.

    Returns:
      The loss, and metrics that, like the loss, add up over microbatches:
      loss/dro (eq. 4 itself: 1/2 mean (r - V - tau h)^2), loss/policy and loss/value (the terms).

    Raises:
      ValueError: shapes differ, a statistic is not a scalar, tau <= 0, value_variance or
        mean_residual does not fit mean_value.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> loss, metrics = dro_v_loss(
    ...     policy_log_prob=jnp.array([-2.0]), reference_log_prob=jnp.array([-3.0]),
    ...     value=jnp.array([0.5]), reward=jnp.array([4.5]), weights=jnp.array([1.0]), tau=2.0)
    >>> float(loss), float(metrics["loss/dro"])  # the residual is 4.5 - 0.5 - 2 = 2
    (3.0, 2.0)
    """
    check_arrays(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        value=value,
        reward=reward,
        weights=weights,
        value_variance=value_variance,
    )
    check_scalars(
        tau=tau, mean_value=mean_value, mean_residual=mean_residual, total_weight=total_weight
    )
    if mean_value is None and mean_residual is not None:
        raise ValueError("mean_residual serves a single value only: give mean_value with it")
    if mean_value is not None and value_variance is not None:
        raise ValueError("mean_value (one V per batch) excludes value_variance (one V per token)")

    if value_variance is None:
        value_variance = jnp.zeros_like(value)
    policy_log_prob, reference_log_prob, value, reward, value_variance = zero_padding(
        weights, policy_log_prob, reference_log_prob, value, reward, value_variance
    )
    log_ratio = policy_log_prob - stop_gradient(reference_log_prob)
    baseline = stop_gradient(value if mean_value is None else mean_value)
    policy_residual = reward - baseline - tau * log_ratio
    policy_square = policy_residual**2 + stop_gradient(value_variance)

    if mean_value is None:
        value_residual = reward - value - tau * stop_gradient(log_ratio)
        value_square = value_residual**2 + value_variance
    else:
        if mean_residual is None:
            mean_residual = dro_mean_residual(
                policy_log_prob=policy_log_prob,
                reference_log_prob=reference_log_prob,
                reward=reward,
                weights=weights,
                tau=tau,
                total_weight=total_weight,
            )
        # Example j moves the single value by w_j / W whatever its own residual is, so its gradient
        # has the mean residual. The second term is 0 and carries it.
        slope = 2 * stop_gradient(mean_residual - mean_value)
        value_square = stop_gradient(policy_residual) ** 2 - slope * (value - stop_gradient(value))

    policy_loss = weighted_mean(policy_square, weights, total_weight) / (2 * tau)
    value_loss = weighted_mean(value_square, weights, total_weight) / 2
    metrics = {"loss/dro": tau * policy_loss, "loss/policy": policy_loss, "loss/value": value_loss}
    return policy_loss + value_loss, metrics


def dro_p_loss(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    mean_residual: Scalar | None = None,
    total_weight: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns DRO-P's loss, eq. 15 of arXiv 2405.19107: no value network.

    1/2 Var_i[ r_i - tau h_i ], the population variance over the real examples of the global batch,
    with h = log pi(y|x) - log pi_ref(y|x). Its gradient is tau times DRO-V's policy gradient (eq. 8)
    with V replaced by the batch mean of r - tau h. Algorithm 2 as printed leaves terms out; we take
    the gradient of eq. 15. With one real example loss and gradient are 0.

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats. All arrays share one shape, e.g. [B, N].
      reference_log_prob: log pi_ref(y|x), nats; receives no gradient.
      reward: r(x, y).
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN.
      tau: strength of the regularisation, units of reward per nat, > 0.
      mean_residual: dro_mean_residual of the global batch, when the arrays are one microbatch of
        it: the gradients then add up to the batch's exactly. By default of the arrays given.
      total_weight: sum of the weights over the global batch; by default of the arrays given.

    Returns:
      The loss, and metrics that, like the loss, add up over microbatches: loss/dro (the loss, which
      is eq. 4 at this V), value/mean (the batch mean of r - tau h, DRO-P's implied V).

    Raises:
      ValueError: shapes differ, a statistic is not a scalar, tau <= 0.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> loss, metrics = dro_p_loss(
    ...     policy_log_prob=jnp.array([-2.0, -3.0]), reference_log_prob=jnp.array([-3.0, -3.0]),
    ...     reward=jnp.array([3.0, 5.0]), weights=jnp.array([1.0, 1.0]), tau=2.0)
    >>> float(loss), float(metrics["value/mean"])  # r - tau h is 1 and 5
    (2.0, 3.0)
    """
    check_arrays(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
    )
    check_scalars(tau=tau, mean_residual=mean_residual, total_weight=total_weight)
    if mean_residual is None:
        mean_residual = dro_mean_residual(
            policy_log_prob=policy_log_prob,
            reference_log_prob=reference_log_prob,
            reward=reward,
            weights=weights,
            tau=tau,
            total_weight=total_weight,
        )
    # The mean needs no gradient: deviations from it sum to 0 over the batch.
    mean_residual = stop_gradient(mean_residual)
    policy_log_prob, reference_log_prob, reward = zero_padding(
        weights, policy_log_prob, reference_log_prob, reward
    )
    residual = reward - tau * (policy_log_prob - stop_gradient(reference_log_prob))
    loss = weighted_mean((residual - mean_residual) ** 2, weights, total_weight) / 2
    implied_value = weighted_mean(jnp.full_like(reward, mean_residual), weights, total_weight)
    return loss, {"loss/dro": loss, "value/mean": implied_value}


def dro_mean_residual(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    total_weight: Scalar | None = None,
) -> jax.Array:
    """Returns the weighted mean of r - tau h, without gradient: the best constant V (Prop. 1).

    Arguments and errors as in `dro_p_loss`; the result is in units of reward.

    >>> import jax.numpy as jnp
    >>> float(dro_mean_residual(
    ...     policy_log_prob=jnp.array([-2.0, -3.0]), reference_log_prob=jnp.array([-3.0, -3.0]),
    ...     reward=jnp.array([3.0, 5.0]), weights=jnp.array([1.0, 1.0]), tau=2.0))
    3.0
    """
    check_arrays(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
    )
    check_scalars(tau=tau, total_weight=total_weight)
    policy_log_prob, reference_log_prob, reward = zero_padding(
        weights, policy_log_prob, reference_log_prob, reward
    )
    residual = reward - tau * (policy_log_prob - reference_log_prob)
    return stop_gradient(weighted_mean(residual, weights, total_weight))


def two_sample_dro_loss(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    total_weight: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the two-sample DRO loss, appendix B of arXiv 2405.19107: V cancels between y1 and y2.

    With h = log pi(y|x) - log pi_ref(y|x), the weighted mean over pairs of

      1/2 ( r(x, y2) - r(x, y1) + tau h(y1) - tau h(y2) )^2.

    The factor 1/2 is the appendix's, and nothing is divided by tau. With a preference indicator as
    the reward (1 for the preferred, 0 for the other) it is half of `pairwise_loss`'s IPO at this tau.

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats, shape [..., 2]: the last axis holds two
        responses to one prompt, in any order. All arrays share the shape.
      reference_log_prob: log pi_ref(y|x), nats; receives no gradient.
      reward: r(x, y).
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN; a
        pair's weight is the product of its two.
      tau: strength of the regularisation, units of reward per nat, > 0.
      total_weight: sum of pair_weights(weights) over the global batch; by default of those given.

    Returns:
      The loss (0 when there is no pair), and metrics that, like the loss, add up over microbatches:
      loss/two_sample_dro, pairs/count (sum of the pairs' weights).

    Raises:
      ValueError: shapes differ, the last axis is not 2, total_weight is not a scalar, tau <= 0.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> loss, _ = two_sample_dro_loss(
    ...     policy_log_prob=jnp.array([[-2.0, -3.0]]), reference_log_prob=jnp.array([[-3.0, -3.0]]),
    ...     reward=jnp.array([[3.0, 5.0]]), weights=jnp.array([[1.0, 1.0]]), tau=2.0)
    >>> float(loss)  # r - tau h is 1 and 5
    8.0
    """
    check_pairs(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
    )
    check_scalars(tau=tau, total_weight=total_weight)
    pair_weight = pair_weights(weights)
    policy_log_prob, reference_log_prob, reward = zero_padding(
        pair_weight[..., None], policy_log_prob, reference_log_prob, reward
    )
    residual = reward - tau * (policy_log_prob - stop_gradient(reference_log_prob))
    difference = residual[..., 1] - residual[..., 0]
    loss = weighted_mean(difference**2, pair_weight, total_weight) / 2
    return loss, {"loss/two_sample_dro": loss, "pairs/count": jnp.sum(pair_weight)}
