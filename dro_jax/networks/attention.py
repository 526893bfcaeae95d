"""T5's attention: relative positions, masks, and the weighted sums.

Letters in shapes: B rows, T queries, S keys, H heads, D head dimension.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dro_jax.errors import UsageError
from dro_jax.networks.log_probs import MASKED_LOGIT
from dro_jax.networks.sharding import on_one_device

logger = logging.getLogger(__name__)

Array = jax.Array


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Bucket of each relative position (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are for single distances, the other half grows logarithmically up to `max_distance`.

    Args:
      relative_position: key position minus query position, int32 of any shape.
      bidirectional: whether positions after the query have buckets of their own (the encoder).
      num_buckets: number of buckets, both directions together.
      max_distance: distance from which on the last bucket is used.

    Returns:
      Bucket numbers, int32, of the shape of `relative_position`.
    """
    offset = jnp.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    # A table made by NumPy: an accelerator's logarithm and division may round across a bucket's edge.
    # Every distance from max_distance on has the last bucket.
    exact = num_buckets // 2
    table = np.arange(max_distance + 1)
    scaled = np.log(np.maximum(table, 1) / exact) / np.log(max_distance / exact)
    large = exact + (scaled * (num_buckets - exact) + 1e-6).astype(np.int32)
    table = np.where(table < exact, table, np.minimum(large, num_buckets - 1))
    return offset + jnp.asarray(table, jnp.int32)[jnp.minimum(distance, max_distance)]


def segment_mask(query_segments: Array, key_segments: Array) -> Array:
    """Which keys [B, S] each query [B, T] may see: those of its own segment; 0 is padding. Bool [B, 1, T, S]."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments > 0)[:, None, :])[:, None, :, :]


@jax.custom_vjp
def attend(queries: Array, keys: Array, values: Array, bias: Array | None, mask: Array) -> Array:
    """Sums of the values, weighted by softmax(queries . keys + bias) where the mask allows.

    There is no 1/sqrt(D), which T5 leaves to the initial query kernel. Scores and softmax are float32. Kept for the
    backward pass are the weights, in the type of the values, and of that type are the factors of its products, which
    are added up in float32. Differentiable once, in all but the mask.

    Args:
      queries: [B, T, H, D], float32 or bfloat16.
      keys: [B, S, H, D] of the same type.
      values: [B, S, H, D] of the same type.
      bias: float32 [1, H, T, S]; None for none.
      mask: bool [B, 1, T, S], whether a query may look at a key. A query that may look at none gets the
        mean of all values, which has no gradient in queries, keys and bias.

    Returns:
      [B, T, H, D], of the type of the values.
    """
    return _sums(_weights(queries, keys, bias, mask, values.dtype), values)


def attend_by_cudnn(
    queries: Array, keys: Array, values: Array, bias: Array | None, mask: Array
) -> Array:
    """`attend` by cuDNN's fused kernels, for bfloat16 on an NVIDIA GPU; T and S are even.

    The weights of all keys are never in memory. The bias and its gradient are bfloat16, and with the mask they are
    [B, H, T, S] for one layer at a time.
    """
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        bias=None if bias is None else bias.astype(queries.dtype),
        mask=mask,
        scale=1.0,
        implementation="cudnn",
    )


def use_cudnn(attention: str, dtype: Any, head_dim: int) -> bool:
    """Whether layers attend by `attend_by_cudnn` here.

    Args:
      attention: "xla" for no; "cudnn" for yes; "auto" for one GPU on which it gives what `attend` does, in bfloat16.
      dtype: of the computation.
      head_dim: D.

    Returns:
      Whether they do.

    Raises:
      UsageError: for "cudnn" without a GPU or in another type.
    """
    possible = jax.default_backend() == "gpu" and dtype == jnp.bfloat16
    if attention == "cudnn" and not possible:
        raise UsageError(
            "T5Config.attention='cudnn' is for bfloat16 on an NVIDIA GPU, "
            f"and this is {jnp.dtype(dtype).name} on {jax.default_backend()}: set 'auto'"
        )
    if attention != "auto":
        return attention == "cudnn"
    return possible and on_one_device() and _cudnn_agrees(head_dim)


@functools.cache
def _cudnn_agrees(head_dim: int) -> bool:
    fault = find_fault(attend_by_cudnn, head_dim)
    if fault is not None:
        logger.warning("cuDNN's attention is not used: %s", fault)
    return fault is None


def find_fault(function: Callable[..., Array], head_dim: int) -> str | None:
    """Looks for what a stand-in for `attend` does otherwise, in bfloat16, with and without a bias.

    Args:
      function: takes what `attend` takes.
      head_dim: D.

    Returns:
      What differs by more than rounding, or the error; None where sums and gradients are the same. The sums of a
      query that may look at nothing need only be finite. Also inside of a function that is being traced.
    """
    rng = np.random.default_rng(0)
    rows, length, seen, heads = 2, 64, 96, 2
    mask = rng.random((rows, 1, length, seen)) < 0.5
    mask[..., 0] = True
    # As padding in packed rows.
    mask[1, :, -8:] = False
    sees = np.any(mask, axis=-1)[:, 0, :, None, None]
    towards = np.where(sees, rng.standard_normal((rows, length, heads, head_dim)), 0)
    shapes = {
        "queries": (rows, length, heads, head_dim),
        "keys": (rows, seen, heads, head_dim),
        "values": (rows, seen, heads, head_dim),
        "bias": (1, heads, length, seen),
    }
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs["queries"] /= np.sqrt(head_dim)

    @functools.partial(jax.jit, static_argnums=0)
    def sums_and_gradients(
        function: Callable[..., Array], given: dict[str, Array | None]
    ) -> tuple[Array, dict[str, Array | None]]:
        sums, pull = jax.vjp(lambda given: function(**given, mask=jnp.asarray(mask)), given)
        return sums, pull(jnp.asarray(towards, sums.dtype))[0]

    def far(got: Array, wanted: Array, where: Any = True) -> str | None:
        exact, found = (np.asarray(x, np.float32) for x in (wanted, got))
        off = (np.where(where, np.abs(found - exact), 0 * found) / np.abs(exact).max()).max()
        return None if off <= 0.03 else f"off by {off:.2g} of the largest"

    try:
        with jax.ensure_compile_time_eval():
            for bias in (None, jnp.asarray(inputs["bias"], jnp.float32)):
                given: dict[str, Array | None] = {
                    name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()
                }
                given["bias"] = bias
                (wanted, slopes), (got, found) = (
                    sums_and_gradients(one, given) for one in (attend, function)
                )
                if fault := far(got, wanted, sees):
                    return f"sums are {fault}"
                for name, slope in slopes.items():
                    if slope is not None and (fault := far(found[name], slope)):
                        return f"gradients of {name} are {fault}"
    # Whatever a stand-in and its library raise: there is another way.
    except Exception as error:
        return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
    return None


def _weights(
    queries: Array, keys: Array, bias: Array | None, mask: Array, dtype: jnp.dtype
) -> Array:
    """[B, H, T, S]."""
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    return jax.nn.softmax(jnp.where(mask, scores, MASKED_LOGIT)).astype(dtype)


def _sums(weights: Array, values: Array) -> Array:
    return jnp.einsum("bhts,bshd->bthd", weights, values)


_Saved = tuple[Array, Array, Array, Array | None, Array, Array]


def _forward(
    queries: Array, keys: Array, values: Array, bias: Array | None, mask: Array
) -> tuple[Array, _Saved]:
    weights = _weights(queries, keys, bias, mask, values.dtype)
    return _sums(weights, values), (queries, keys, values, bias, mask, weights)


def _backward(saved: _Saved, cotangent: Array) -> tuple[Array, Array, Array, Array | None, None]:
    queries, keys, values, bias, mask, weights = saved
    of_values = jnp.einsum("bhts,bthd->bshd", weights, cotangent)
    of_weights = jnp.einsum("bthd,bshd->bhts", cotangent, values).astype(jnp.float32)
    exact = weights.astype(jnp.float32)
    slopes = exact * (of_weights - jnp.sum(exact * of_weights, axis=-1, keepdims=True))
    # Half as much to write and to read four times where the type is bfloat16.
    slopes = jnp.where(mask, slopes, 0).astype(values.dtype)
    of_bias = None
    if bias is not None:
        # A product with ones: XLA's sum over the rows takes twice as long as all else here on CPU.
        ones = jnp.ones(slopes.shape[0], slopes.dtype)
        total = jnp.einsum("b,bhts->hts", ones, slopes, preferred_element_type=jnp.float32)
        of_bias = total[None]
    of_queries = jnp.einsum("bhts,bshd->bthd", slopes, keys)
    of_keys = jnp.einsum("bhts,bthd->bshd", slopes, queries)
    return of_queries, of_keys, of_values, of_bias, None


attend.defvjp(_forward, _backward)
