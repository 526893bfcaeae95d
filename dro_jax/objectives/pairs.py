"""Pairs of responses to one prompt, in the last axis of an array."""

import jax
import jax.numpy as jnp

from dro_jax.objectives.per_example import check_arrays


def check_pairs(**arrays: jax.Array) -> None:
    """Raises unless the arrays, named by keyword, have one shape [..., 2] and are floating."""
    check_arrays(**arrays)
    name, array = next(iter(arrays.items()))
    if jnp.ndim(array) == 0 or jnp.shape(array)[-1] != 2:
        raise ValueError(
            f"{name} has shape {jnp.shape(array)}; expected (..., 2): pairs in the last axis"
        )


def pair_weights(weights: jax.Array, reward: jax.Array | None = None) -> jax.Array:
    """Returns the weight of each pair, [...] from [..., 2]: the product of its two examples'.

    With the rewards given, a pair of equal rewards weighs 0: it expresses no preference.

    >>> import jax.numpy as jnp
    >>> pair_weights(jnp.array([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    pair_weight = weights[..., 0] * weights[..., 1]
    if reward is None:
        return pair_weight
    return jnp.where(reward[..., 0] == reward[..., 1], 0, pair_weight)
