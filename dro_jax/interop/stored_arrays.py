"""Arrays that stay in their files until they are asked for, so that a model may be larger than the memory."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dro_jax.errors import UsageError
from dro_jax.training import checkpoints


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A float32 array in a file.

    Attributes:
      shape: of the array.
      read: reads it, anew with every call. Raises UsageError if the file is damaged.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def transposed(self) -> "StoredArray":
        """The same array with its axes in reverse order."""
        return StoredArray(self.shape[::-1], lambda: self.read().T)


def same_bits(one: StoredArray, other: StoredArray) -> bool:
    """Whether two arrays have the same shape and the same bits."""
    if one.shape != other.shape:
        return False
    return np.array_equal(one.read().view(np.uint32), other.read().view(np.uint32))


def of_checkpoint(
    directory: epath.Path, step: int, item: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredArray]:
    """The parameters of one checkpoint, none of them read yet.

    Args:
      directory: folder of the checkpoint.
      step: its step.
      item: "policy" or "value".
      shapes: of the parameters, by their path with slashes.

    Returns:
      The arrays by the same paths. Reading raises DamagedError where the bits are not those that were written.
    """
    path = checkpoints.path_of(directory, step)
    sums = checkpoints.read_meta(directory, step)["checksums"][item]

    def read(name: str) -> np.ndarray:
        args = ocp.args.PyTreeRestore(
            unflatten_dict({name: 0}, sep="/"),
            restore_args=unflatten_dict({name: ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/"),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(path, args=ocp.args.Composite(**{item: args}))
        except (MemoryError, PermissionError):
            raise
        # Whatever a damaged file makes the readers below raise, it means one thing here.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise checkpoints.DamagedError(f"{path}: damaged, cannot be read ({reason})") from error
        array: np.ndarray = flatten_dict(restored[item], sep="/")[name]
        if checkpoints.checksums({name: array})[name] != sums.get(name):
            raise checkpoints.DamagedError(
                f"{path}: damaged, {item}/{name} is not what was written"
            )
        return array

    return {
        name: StoredArray(shape, functools.partial(read, name)) for name, shape in shapes.items()
    }


def save_run(
    directory: epath.Path, items: Mapping[str, Mapping[str, StoredArray]], meta: checkpoints.Meta
) -> None:
    """Writes `directory/checkpoint_0`, as a run saves it, one array after the other.

    Args:
      directory: folder to write to.
      items: parameters of "policy", and of "value" where there is one, by their path with slashes. Each is read
        twice: for its checksum and to be written.
      meta: JSON-ready facts that the checkpoint belongs to.

    Raises:
      UsageError: if an array cannot be read.
      SaveError: if the checkpoint cannot be written.
    """
    sums: dict[str, dict[str, int]] = {item: {} for item in items}
    for item, arrays in items.items():
        for name, array in arrays.items():
            sums[item] |= checkpoints.checksums({name: array.read()})
    meta = meta | {"step": 0, "checksums": sums}
    meta["digest"] = checkpoints._digest(meta)
    write(directory / "checkpoint_0", items, meta)


def write(
    path: epath.Path,
    items: Mapping[str, Mapping[str, StoredArray]],
    meta: checkpoints.Meta | None = None,
) -> None:
    """Writes one Orbax checkpoint, one array after the other.

    Args:
      path: folder to make.
      items: arrays of each item, by their path with slashes.
      meta: JSON of the item "meta"; None writes no such item.

    Raises:
      UsageError: if an array cannot be read.
      SaveError: if the checkpoint cannot be written.
    """
    readers = ocp.type_handlers.create_type_handler_registry(
        (StoredArray, _StoredArrayHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handlers: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for item, arrays in items.items():
        handlers[item] = ocp.PyTreeCheckpointHandler(type_handler_registry=readers)
        args[item] = ocp.args.PyTreeSave(unflatten_dict(dict(arrays), sep="/"))
    if meta is not None:
        handlers["meta"] = ocp.JsonCheckpointHandler()
        args["meta"] = ocp.args.JsonSave(meta)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.Composite(**args))
    except (UsageError, MemoryError):
        raise
    # A full disk is an OSError in one writer below and a ValueError in another.
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in lines if "No space left" in line), (lines or [repr(error)])[0]
        )
        raise checkpoints.SaveError(f"{path.parent}: cannot be written ({reason[:200]})") from error


class _StoredArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves arrays as Orbax saves NumPy's, but has only one of them in memory."""

    async def serialize(self, values, infos, args=None):  # type: ignore[no-untyped-def]
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []
