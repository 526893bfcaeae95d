"""The safetensors format: a length, a JSON table of what is where, and the bytes. Nothing in it can run.

Read and written here, one array at a time: the library of that name wants a whole file's arrays at once to write
one, and its NumPy side has no bfloat16. https://huggingface.co/docs/safetensors describes the format.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from dro_jax.errors import UsageError
from dro_jax.interop.stored_arrays import StoredArray

_TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def open_file(path: epath.Path) -> dict[str, StoredArray]:
    """The arrays of a file by their names, none of them read yet.

    float16 and bfloat16 become float32, which holds each of their numbers exactly.

    Raises:
      UsageError: if the file is cut short or something else, or holds numbers of another type.
    """
    size = path.stat().length
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise UsageError(f"{path}: is a pointer of Git LFS, not the file: run `git lfs pull`")
        data = 8 + int.from_bytes(start, "little")
        if size < data or len(start) < 8:
            raise _not_whole(path, f"its header would end at byte {data} of {size}")
        try:
            table = json.loads(file.read(data - 8))
            table.pop("__metadata__", None)
            entries = {name: _entry(entry) for name, entry in table.items()}
        # Arithmetic: no number of bytes is infinite.
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise UsageError(
                f"{path}: is no safetensors file (its header is not the format's); get it again"
            ) from error
    arrays = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _TYPES:
            raise UsageError(
                f"{path}: {name} has type {dtype}; {', '.join(_TYPES)} can be read: save the model "
                "in float32, unquantised"
            )
        size_here = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
        if min((begin, *shape)) < 0 or end - begin != size_here:
            raise _not_whole(path, f"{name} is given {end - begin} bytes")
        if data + end > size:
            raise _not_whole(path, f"{name} would end at byte {data + end} of {size}")
        arrays[name] = _stored(path, _TYPES[dtype], shape, data + begin)
    return arrays


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and the byte after the last, of one line of the table."""
    begin, end = map(int, entry["data_offsets"])
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end


def _not_whole(path: epath.Path, reason: str) -> UsageError:
    return UsageError(f"{path}: is not a whole safetensors file ({reason}); get it again")


def _stored(path: epath.Path, dtype: Any, shape: tuple[int, ...], begin: int) -> StoredArray:
    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(content, dtype).reshape(shape).astype(np.float32, copy=False)

    return StoredArray(shape, read)


def write_file(path: epath.Path, arrays: Mapping[str, StoredArray]) -> None:
    """Writes arrays, in their order, as float32.

    Args:
      path: the file.
      arrays: by name; each is read when its turn comes.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + 4 * math.prod(array.shape)
        table[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (begin, end)}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array.read(), "<f4").data)
