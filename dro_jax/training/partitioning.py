"""The device mesh and the rules by which logical axes are laid over it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dro_jax.errors import UsageError, check_number
from dro_jax.networks.sharding import LOGICAL_AXES, Rules, mesh_axes

MESH_AXES = ("data", "fsdp", "model")

DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """Sizes of the mesh axes and where each logical axis of weights and activations goes.

    As shipped, rows of a batch are spread over "data" and "fsdp" together, parameters over "fsdp" and "model".

    Attributes:
      data: size of the data axis, -1 for all the devices that the other axes leave.
      fsdp: size of the fsdp axis.
      model: size of the model axis.
      rules: (logical axis, mesh axis, several or None) pairs, in order of precedence; a logical axis without
        a rule is not cut.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    rules: Rules = DEFAULT_RULES

    def __post_init__(self) -> None:
        """Raises UsageError for a rule of an axis that does not exist."""
        try:
            pairs = [(axis, (to,) if isinstance(to, str) else to or ()) for axis, to in self.rules]
        except (TypeError, ValueError):
            raise UsageError(
                f"Partitioning.rules is {self.rules!r}: write (('embed', 'fsdp'), …)"
            ) from None
        for axis, to in pairs:
            if axis not in LOGICAL_AXES:
                raise UsageError(
                    f"Partitioning.rules: there is no logical axis {axis!r}; there are {', '.join(LOGICAL_AXES)}"
                )
            for name in to:
                if name not in MESH_AXES:
                    raise UsageError(
                        f"Partitioning.rules: {axis!r} goes to {name!r}, which is no mesh axis; there are "
                        f"{', '.join(MESH_AXES)}"
                    )
        # Lists serve in gin as well, but compiled programs are found again by their rules.
        rules = tuple(
            (axis, to if isinstance(to, str | None) else tuple(to)) for axis, to in self.rules
        )
        object.__setattr__(self, "rules", rules)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over the devices, by default all of all processes. Raises UsageError where it does not fit."""
        devices = jax.devices() if devices is None else devices
        count = len(devices)
        sizes = [self.data, self.fsdp, self.model]
        whole = all(isinstance(size, int) for size in sizes)
        if not whole or sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise UsageError(
                f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: give positive sizes, "
                "and -1 for at most one axis (Partitioning.data, .fsdp, .model)"
            )
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and count % fixed == 0:
            sizes[sizes.index(-1)] = count // fixed
        if math.prod(sizes) != count:
            raise UsageError(
                f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} does not fit {count} devices: "
                "set Partitioning.data, .fsdp and .model so that their product is the device count"
            )
        # On a TPU the order of the devices follows its wires.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES)


def check_batch_size(
    batch_size: int,
    mesh: Mesh,
    partitioning: Partitioning,
    microbatches: int = 1,
    *,
    pairs: bool = False,
) -> None:
    """Raises UsageError unless the rows of a microbatch divide evenly over the mesh, and into pairs if asked."""
    check_number("MICROBATCHES", microbatches, whole=True, at_least=1)
    axes = _axes_of_rows(partitioning.rules)
    shards = row_shards(mesh, partitioning.rules)
    unit = math.lcm(shards, 2 if pairs else 1) * microbatches
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % unit:
        of = " of pairs" if pairs else ""
        of += f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise UsageError(
            f"BATCH_SIZE {batch_size!r} does not divide into {shards} data shards "
            f"(mesh axes {' x '.join(axes) or 'none'}){of}: "
            f"choose a multiple of {unit}"
        )


def row_shards(mesh: Mesh, rules: Rules) -> int:
    """How many parts the rules cut the rows of a batch into."""
    return math.prod(mesh.shape[axis] for axis in _axes_of_rows(rules))


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Rows as the rules have them, as shipped over "data" and "fsdp"; everything else whole."""
    return NamedSharding(mesh, PartitionSpec(_axes_of_rows(rules)))


def _axes_of_rows(rules: Rules) -> tuple[str, ...]:
    to = next((to for axis, to in rules if axis == "batch"), None)
    return (to,) if isinstance(to, str) else tuple(to or ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(boxed: Any, mesh: Mesh, partitioning: Partitioning) -> Any:
    """Shardings of a parameter tree from its logical axis names.

    Args:
      boxed: tree of `nn.LogicallyPartitioned` shapes, as `jax.eval_shape` of a module's `init` gives it.
      mesh: the mesh.
      partitioning: the rules.

    Returns:
      Tree of `NamedSharding`, without boxes.
    """
    return jax.tree.map(
        lambda box: NamedSharding(
            mesh, mesh_axes(box.names, box.value.shape, mesh, partitioning.rules)
        ),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def like_parameters(state: Any, parameters: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimiser state whose leaves stand beside parameters.

    Args:
      state: tree of shapes in which parts have the structure of `parameters`.
      parameters: tree of shapes.
      shardings: tree of `NamedSharding` of `parameters`.
      mesh: the mesh.

    Returns:
      Tree of `NamedSharding` of the structure of `state`: by `specs_like_parameters`, what has no place replicated.
    """
    specs = specs_like_parameters(state, parameters, jax.tree.map(lambda s: s.spec, shardings))
    return jax.tree.map(
        lambda _, spec: replicated(mesh) if spec is None else NamedSharding(mesh, spec),
        state,
        specs,
    )


def specs_like_parameters(state: Any, parameters: Any, specs: Any) -> Any:
    """Where an optimiser state lies whose leaves stand beside parameters.

    Args:
      state: tree of shapes in which parts have the structure of `parameters`.
      parameters: tree of shapes.
      specs: tree of `PartitionSpec` of `parameters`, of mesh or logical axes.

    Returns:
      Tree of the structure of `state`. A leaf of a parameter's shape lies as the parameter does; a factored moment,
      which lacks one of its axes, as what remains of it; all others have None.
    """
    by_path = {
        _names(path): (parameter.shape, spec)
        for (path, parameter), spec in zip(
            jax.tree_util.tree_leaves_with_path(parameters),
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
            strict=True,
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> PartitionSpec | None:
        names = _names(path)
        # The parameter's own path is the tail of the path inside the optimiser's state.
        known = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        if known is None:
            return None
        shape, spec = known
        axes = [*spec, *[None] * (len(shape) - len(spec))]
        if leaf.shape == shape:
            return PartitionSpec(*axes)
        # Of a square parameter, Optax's v_row lacks the later axis and v_col the earlier.
        later_first = any(getattr(entry, "name", None) == "v_row" for entry in path)
        for dropped in sorted(range(len(shape)), reverse=later_first):
            if leaf.shape == shape[:dropped] + shape[dropped + 1 :]:
                return PartitionSpec(*axes[:dropped], *axes[dropped + 1 :])
        return None

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if hasattr(entry, "key"))
