"""Pairs of responses to one prompt, found in a batch of single examples."""

import itertools

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


def same_prompt_pairs(
    *, prompt_id: jax.Array, weights: jax.Array, **arrays: jax.Array
) -> dict[str, jax.Array]:
    """Returns the arrays as pairs [P, 2] of responses to one prompt, for the losses on pairs.

    Every unordered pair of the batch's M examples has a row, P = M (M - 1) / 2, whatever the ids
    are, so that shapes are static; rows whose prompts differ weigh 0. A prompt with k responses makes
    k (k - 1) / 2 pairs. Pairs form within the arrays given: with microbatches, the responses to one
    prompt must be in the same one.

    Args:
      prompt_id: integers, equal for responses to one prompt, the shape of the other arrays.
      weights: 1 for a real example, 0 for padding.
      **arrays: what else to pair up, by name: policy_log_prob, reference_log_prob, reward.

    Returns:
      `weights` and the named arrays, each [P, 2].

    Raises:
      ValueError: the shapes differ.
      TypeError: an array is not float32 or float64, or prompt_id is not of integers.

    >>> import jax.numpy as jnp
    >>> pairs = same_prompt_pairs(
    ...     prompt_id=jnp.array([7, 8, 7]), weights=jnp.ones(3), reward=jnp.array([0.1, 0.2, 0.3]))
    >>> pairs["weights"].tolist()  # examples 0 and 1, 0 and 2, 1 and 2
    [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    check_arrays(weights=weights, **arrays)
    if jnp.shape(prompt_id) != jnp.shape(weights):
        raise ValueError(
            f"prompt_id has shape {jnp.shape(prompt_id)} but weights has shape {jnp.shape(weights)}"
        )
    if not jnp.issubdtype(jnp.result_type(prompt_id), jnp.integer):
        raise TypeError(f"prompt_id has dtype {jnp.result_type(prompt_id)}; expected integers")
    slots = itertools.combinations(range(weights.size), 2)
    pair_index = jnp.array(list(slots), jnp.int32).reshape(-1, 2)
    prompts = prompt_id.reshape(-1)[pair_index]
    pairs = {name: array.reshape(-1)[pair_index] for name, array in arrays.items()}
    same_prompt = prompts[:, :1] == prompts[:, 1:]
    return pairs | {"weights": jnp.where(same_prompt, weights.reshape(-1)[pair_index], 0)}
