"""Where weights and activations lie on a device mesh: logical axis names, and rules that lay them over it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
MeshAxes = str | tuple[str, ...] | None
Rules = tuple[tuple[str, MeshAxes], ...]

LOGICAL_AXES = ("batch", "vocab", "embed", "mlp", "heads", "joined_kv", "relpos_buckets")
"""Names of the axes of weights and activations; "batch" is the rows."""

_here: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("mesh and rules", default=None)


@contextlib.contextmanager
def laid_over(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """While it lasts, networks that are traced put their activations where the rules say."""
    token = _here.set((mesh, rules))
    try:
        yield
    finally:
        _here.reset(token)


def mesh_axes(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules
) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names.

    Rules come in order of precedence; a mesh axis serves one axis of an array. An axis that its mesh axes do
    not divide stays whole.

    Args:
      axes: logical name of each axis, None for one that is never cut.
      shape: of the array.
      mesh: the mesh.
      rules: (logical axis, mesh axis, several or None) pairs.

    Returns:
      The spec, an entry for each axis.
    """
    spec = nn.logical_to_mesh_axes(tuple(axes), rules) or ()
    return PartitionSpec(
        *(
            entry if size % math.prod(mesh.shape[name] for name in _names(entry)) == 0 else None
            for entry, size in zip(spec, shape, strict=True)
        )
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """The activation, laid as the rules say for axes of these names. Outside of `laid_over` nothing is done."""
    here = _several_devices()
    if here is None:
        return x
    mesh, rules = here
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, mesh_axes(axes, x.shape, mesh, rules))
    )


def on_one_device() -> bool:
    """Whether nothing is laid over several devices here."""
    return _several_devices() is None


def row_parts(rows: int) -> int:
    """How many parts so many rows are cut into here."""
    here = _several_devices()
    if here is None:
        return 1
    mesh, rules = here
    (entry,) = mesh_axes(("batch",), (rows,), mesh, rules)
    return math.prod(mesh.shape[name] for name in _names(entry))


def gather(weight: Array, *axes: str | None) -> Array:
    """The weight made whole along the mesh axes that the rows are spread over, for the layer that uses it.

    Its gradient goes back to where the weight lies, so that it is summed and cut in one step. Without this
    the compiler may choose to move the activations instead.
    """
    here = _several_devices()
    if here is None:
        return weight
    mesh, rules = here
    stored = mesh_axes(axes, weight.shape, mesh, rules)
    rows = {name for axis, entry in rules if axis == "batch" for name in _names(entry)}
    used = PartitionSpec(*(None if rows & set(_names(entry)) else entry for entry in stored))
    return _move(weight, NamedSharding(mesh, stored), NamedSharding(mesh, used))


def by_rows(function: Callable[[Array], Any], x: Array) -> Any:
    """`function(x)` where every row of the result depends on that row of x [B, …] alone, each device with its rows.

    For what the compiler cannot cut, such as top-k, before which it would send all rows to all devices.
    """
    here = _several_devices()
    if here is None:
        return function(x)
    mesh, rules = here
    rows = PartitionSpec(*mesh_axes(("batch",), x.shape[:1], mesh, rules))
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)(x)


def _several_devices() -> tuple[Mesh, Rules] | None:
    here = _here.get()
    return None if here is None or here[0].size == 1 else here


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x: Array, stored: NamedSharding, used: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, used)


def _move_forward(x: Array, stored: NamedSharding, used: NamedSharding) -> tuple[Array, None]:
    return _move(x, stored, used), None


def _move_backward(
    stored: NamedSharding, used: NamedSharding, _: None, cotangent: Array
) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(cotangent, stored),)


_move.defvjp(_move_forward, _move_backward)


def _names(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
