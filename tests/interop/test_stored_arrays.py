"""Arrays that pass one by one between files and checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dro_jax.interop import stored_arrays
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.training import checkpoints

RNG = np.random.default_rng(1)
ARRAYS = {
    "a/kernel": RNG.standard_normal((4, 3)).astype(np.float32),
    "a/b/scale": RNG.standard_normal(5).astype(np.float32),
    "c": RNG.standard_normal((2, 7)).astype(np.float32),
}
META = {"model": {"emb_dim": 4}, "vocabulary": "bytes"}


def stored():
    """The arrays; those of rank 2 lie the other way round in their files."""
    return {
        name: StoredArray(array.T.shape, lambda array=array: array.T.copy()).transposed()
        for name, array in ARRAYS.items()
    }


@pytest.fixture
def directory(tmp_path):
    directory = epath.Path(tmp_path / "run")
    directory.mkdir()
    stored_arrays.save_run(directory, {"policy": stored()}, META)
    return directory


def test_the_checkpoint_is_like_any_other(directory):
    assert checkpoints.find(directory) == (directory, 0)
    meta = checkpoints.read_meta(directory, 0)
    assert META.items() <= meta.items()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device)
        for name, array in ARRAYS.items()
    }
    tree = unflatten_dict(abstract, sep="/")
    restored = flatten_dict(checkpoints.restore_policy(directory, 0, tree, META), sep="/")
    assert all(np.asarray(restored[name]).tobytes() == a.tobytes() for name, a in ARRAYS.items())
    assert meta["checksums"]["policy"] == checkpoints.checksums(unflatten_dict(ARRAYS, sep="/"))


def test_any_checkpoint_is_read_array_by_array(tmp_path):
    directory = epath.Path(tmp_path)
    tree = jax.tree.map(jax.numpy.asarray, unflatten_dict(ARRAYS, sep="/"))
    checkpoints.save_policy(directory, tree, META)
    shapes = {name: array.shape for name, array in ARRAYS.items()}
    read = stored_arrays.of_checkpoint(directory, 0, "policy", shapes)
    assert {name: array.shape for name, array in read.items()} == shapes
    for name, array in ARRAYS.items():
        assert read[name].read().tobytes() == array.tobytes()


def test_damage_is_noticed(directory):
    shapes = {name: array.shape for name, array in ARRAYS.items()}
    item = directory / "checkpoint_0" / "policy"
    meta = directory / "checkpoint_0" / "meta" / "metadata"
    written = meta.read_text()
    content = json.loads(written)
    content["checksums"]["policy"]["c"] ^= 1
    content["digest"] = checkpoints._digest(content)
    meta.write_text(json.dumps(content))
    read = stored_arrays.of_checkpoint(directory, 0, "policy", shapes)
    read["a/kernel"].read()
    with pytest.raises(checkpoints.DamagedError, match="damaged, policy/c is not what was written"):
        read["c"].read()
    meta.write_text(written)
    for path in Path(item).rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(checkpoints.DamagedError, match="damaged, cannot be read"):
        stored_arrays.of_checkpoint(directory, 0, "policy", shapes)["c"].read()


def test_only_one_array_is_held_at_a_time(tmp_path):
    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= self.base is None

    def read():
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        array = np.ndarray.__new__(Counted, (8, 8), np.float32)
        array[...] = 1
        return array

    arrays = {f"w{i}": StoredArray((8, 8), read) for i in range(12)}
    stored_arrays.save_run(epath.Path(tmp_path), {"policy": arrays}, META)
    assert most[0] <= 2  # what is written is let go of a moment after the next is read


def test_same_bits():
    one, other = (
        StoredArray((2,), lambda x=x: np.array(x, np.float32)) for x in ([0, 1], [-0.0, 1])
    )
    assert stored_arrays.same_bits(one, one)
    assert not stored_arrays.same_bits(one, other)
    assert not stored_arrays.same_bits(one, StoredArray((3,), lambda: np.zeros(3, np.float32)))
