"""The pairwise family that DRO is compared with: DPO, IPO and SLiC."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from dro_jax.objectives.pairs import check_pairs, pair_weights
from dro_jax.objectives.per_example import (
    Metrics,
    Scalar,
    check_scalars,
    weighted_mean,
    zero_padding,
)

_LINKS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "dpo": lambda margin: jax.nn.softplus(-margin),
    "ipo": lambda margin: (margin - 1) ** 2,
    "slic": lambda margin: jax.nn.relu(1 - margin),
}


def pairwise_loss(
    *,
    policy_log_prob: jax.Array,
    reference_log_prob: jax.Array,
    reward: jax.Array,
    weights: jax.Array,
    tau: Scalar,
    kind: Literal["dpo", "ipo", "slic"],
    total_weight: Scalar | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns a preference loss on pairs of responses (the background of arXiv 2405.19107).

    With h = log pi(y|x) - log pi_ref(y|x), y_w the response of greater reward, y_l the other, the
    weighted mean over pairs of f(z), z = tau (h(y_w) - h(y_l)):

      dpo   f(z) = log(1 + e^-z)     (arXiv 2305.18290)
      ipo   f(z) = (z - 1)^2         (arXiv 2310.12036, whose (h(y_w) - h(y_l) - 1/(2 tau'))^2 is
                                      this at tau = 2 tau', divided by tau^2)
      slic  f(z) = max(0, 1 - z)     (arXiv 2305.10425)

    The size of the reward difference is not used. Pairs of equal reward express no preference and
    are left out of the mean. Labelled pairs have the reward 1 for the chosen and 0 for the rejected.

    Args:
      policy_log_prob: log pi(y|x) summed over tokens, nats, shape [..., 2]: the last axis holds two
        responses to one prompt, in any order. All arrays share the shape.
      reference_log_prob: log pi_ref(y|x), nats; receives no gradient.
      reward: r(x, y); only its order in a pair matters.
      weights: 1 for a real example, 0 for padding, whose entries may hold anything, even NaN; a
        pair's weight is the product of its two.
      tau: the family's beta, per nat, > 0.
      kind: which f.
      total_weight: sum of pair_weights(weights, reward) over the global batch; by default of those
        given.

    Returns:
      The loss (0 when there is no pair), and metrics that, like the loss, add up over microbatches:
      loss/<kind>, pairs/count (sum of the pairs' weights), pairs/margin (mean z), pairs/accuracy
      (fraction of pairs with z > 0).

    Raises:
      ValueError: shapes differ, the last axis is not 2, total_weight is not a scalar, tau <= 0, or
        kind is unknown.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> loss, metrics = pairwise_loss(
    ...     policy_log_prob=jnp.array([[-2.0, -3.0]]), reference_log_prob=jnp.array([[-3.0, -3.0]]),
    ...     reward=jnp.array([[0.0, 1.0]]), weights=jnp.array([[1.0, 1.0]]), tau=2.0, kind="ipo")
    >>> float(loss), float(metrics["pairs/margin"])  # the second is preferred: z = 2 (0 - 1)
    (9.0, -2.0)
    """
    check_pairs(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        reward=reward,
        weights=weights,
    )
    check_scalars(tau=tau, total_weight=total_weight)
    if kind not in _LINKS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(_LINKS)}")
    pair_weight = pair_weights(weights, reward)
    policy_log_prob, reference_log_prob, reward = zero_padding(
        pair_weight[..., None], policy_log_prob, reference_log_prob, reward
    )
    log_ratio = policy_log_prob - stop_gradient(reference_log_prob)
    preference = jnp.sign(reward[..., 0] - reward[..., 1])
    margin = tau * preference * (log_ratio[..., 0] - log_ratio[..., 1])
    loss = weighted_mean(_LINKS[kind](margin), pair_weight, total_weight)
    won = (margin > 0).astype(margin.dtype)
    metrics = {
        f"loss/{kind}": loss,
        "pairs/count": jnp.sum(pair_weight),
        "pairs/margin": weighted_mean(margin, pair_weight, total_weight),
        "pairs/accuracy": weighted_mean(won, pair_weight, total_weight),
    }
    return loss, metrics
