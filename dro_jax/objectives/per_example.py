"""Arrays with one entry per example: their checks, and means over the real examples."""

import jax
import jax.numpy as jnp

Scalar = jax.Array | float
Metrics = dict[str, jax.Array]


def check_arrays(**arrays: jax.Array | None) -> None:
    """Raises unless the arrays, named by keyword, have one shape and are float32 or float64.

    None stands for an optional array that was not given. Half precision is refused because a
    sequence's log-probability of -300 nats would be off by a nat in bfloat16.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    first = next(iter(given))
    for name, array in given.items():
        if jnp.shape(array) != jnp.shape(given[first]):
            raise ValueError(
                f"{name} has shape {jnp.shape(array)} but {first} has shape "
                f"{jnp.shape(given[first])}: arrays of per-example numbers must have one shape"
            )
        if jnp.result_type(array) not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"{name} has dtype {jnp.result_type(array)}; expected float32 (or float64)"
            )


def check_scalars(**scalars: Scalar | None) -> None:
    """Raises unless the numbers, named by keyword, have shape (), and tau is positive."""
    for name, scalar in scalars.items():
        if scalar is not None and jnp.shape(scalar) != ():
            raise ValueError(f"{name} has shape {jnp.shape(scalar)}; expected a scalar, shape ()")
    tau = scalars.get("tau")
    if isinstance(tau, int | float) and not tau > 0:
        raise ValueError(f"tau is {tau}; expected a number greater than 0")


def zero_padding(weights: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays with 0 where the weight is 0, whatever stood there (NaN and inf too).

    Done to the inputs of a loss, not to its output: 0 times the gradient of a NaN is a NaN.
    """
    return tuple(jnp.where(weights > 0, array, 0) for array in arrays)


def weighted_mean(
    array: jax.Array, weights: jax.Array, total_weight: Scalar | None = None
) -> jax.Array:
    """Returns sum_i w_i a_i / W over the real examples (w_i > 0), differentiable in the array.

    Args:
      array: any shape; what stands where the weight is 0 is ignored, even NaN.
      weights: the array's shape, non-negative; 1 for a real example, 0 for padding.
      total_weight: W of the global batch, when the arrays are one microbatch of it: the results of
        the microbatches then add up to the batch's mean. By default the sum of the weights given.

    Returns:
      A scalar; 0 when no example is real.

    Raises:
      ValueError: the two shapes differ, or total_weight is not a scalar.
      TypeError: an array is not float32 or float64.

    >>> import jax.numpy as jnp
    >>> float(weighted_mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])))
    1.5
    """
    check_arrays(array=array, weights=weights)
    check_scalars(total_weight=total_weight)
    total = jnp.sum(weights) if total_weight is None else total_weight
    (array,) = zero_padding(weights, array)
    return jnp.sum(weights * array) / jnp.where(total > 0, total, 1)
