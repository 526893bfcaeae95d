"""The safetensors format, against the library of that name and against damage."""

import json

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dro_jax.errors import UsageError
from dro_jax.interop import safetensors_files
from dro_jax.interop.stored_arrays import StoredArray

RNG = np.random.default_rng(0)
ARRAYS = {
    "b": RNG.standard_normal((3, 5)).astype(np.float32),
    "a": np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}


@pytest.fixture
def path(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    stored = {k: StoredArray(v.shape, lambda v=v: v) for k, v in ARRAYS.items()}
    safetensors_files.write_file(path, stored)
    return path


def same(read):
    assert read.keys() == ARRAYS.keys()
    for name, array in read.items():
        assert (array.shape, array.dtype) == (ARRAYS[name].shape, np.float32)
        assert array.tobytes() == ARRAYS[name].tobytes()


def test_there_and_back(path):
    stored = safetensors_files.open_file(path)
    assert {name: a.shape for name, a in stored.items()} == {k: a.shape for k, a in ARRAYS.items()}
    same({name: array.read() for name, array in stored.items()})


def test_the_library_reads_what_is_written(path):
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        same({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0


def test_what_the_library_writes_is_read(path):
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt", "other": "words"})
    same({name: array.read() for name, array in safetensors_files.open_file(path).items()})


def test_views_are_written_as_they_look(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    wide = ARRAYS["b"]
    stored = {"t": StoredArray(wide.shape, lambda: wide).transposed()}
    safetensors_files.write_file(path, stored)
    (read,) = safetensors_files.open_file(path).values()
    assert read.shape == (5, 3)
    assert np.array_equal(read.read(), wide.T)


def refusal(path):
    with pytest.raises(UsageError, match=r"^[^\n]*$") as refused:
        safetensors_files.open_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    return str(refused.value).removeprefix(f"{path}: ")


def test_every_cut_is_noticed(path):
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert refusal(path).startswith("is not a whole safetensors file ("), size
    path.write_bytes(content[:-1])
    assert f"would end at byte {len(content)} of {len(content) - 1}" in refusal(path)


def with_header(path, table, data=b""):
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"not JSON", "is no safetensors file (its header is not the format's)"),
        ([], "is no safetensors file"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "is no safetensors file"),
        (
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
            "is no safetensors file",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
            "is no safetensors file",
        ),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, "is no safetensors file"),
        (
            {"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}},
            "a has type I8; F32, F16, BF16 can be read: save the model in float32, unquantised",
        ),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "is not a whole safetensors file (a is given 4 bytes)",
        ),
        (
            {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
            "is not a whole safetensors file",
        ),
        (
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
            "is not a whole safetensors file",
        ),
    ],
)
def test_header_of_something_else(path, table, message):
    assert refusal(with_header(path, table, b"\0" * 4)).startswith(message)


def test_other_files(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert refusal(path).startswith("is a pointer of Git LFS, not the file: run `git lfs pull`")
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    assert refusal(path).startswith("is not a whole safetensors file (its header would end")
