"""What T5X wrote is the same model here, and what is no whole T5 is refused in a line."""

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import serialization
from flax.traverse_util import unflatten_dict

from dro_jax.errors import UsageError
from dro_jax.interop import parameter_shapes
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.interop.t5x import checkpoints as t5x_checkpoints
from dro_jax.networks import T5

GOLDEN = Path(__file__).parent / "golden_t5x"
NAMES = sorted(path.stem for path in GOLDEN.glob("v*.npz"))
TOLERANCE = 1e-5


@pytest.fixture
def unpacked(tmp_path):
    """A golden MODEL_DIR that a test may damage."""

    def unpack(name):
        with zipfile.ZipFile(GOLDEN / f"{name}.zip") as file:
            file.extractall(tmp_path / name)
        return tmp_path / name

    return unpack


def opened(folder):
    path = t5x_checkpoints.find(folder)
    assert path is not None
    return t5x_checkpoints.open_model(path)


def arrays_of(arrays):
    return {name: array.read() for name, array in arrays.items()}


def refusal(folder):
    """What is said of it, in one line."""
    with pytest.raises(UsageError) as caught:
        arrays_of(opened(folder).policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, change):
    """Rewrites the msgpack file of a checkpoint."""
    path = next(folder.rglob("checkpoint"))
    content = serialization.msgpack_restore(path.read_bytes())
    change(content["optimizer"]["target"])
    path.write_bytes(serialization.msgpack_serialize(content))


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def test_the_files_are_small_and_name_their_versions():
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 300_000
    about = {str(golden(name)["about"]) for name in NAMES}
    assert len(about) == 1
    assert json.loads(about.pop())["t5x"].startswith("cc342d4")


@pytest.mark.parametrize("name", ["v1_0_bfloat16_msgpack", "v1_1", "v1_1_scanned"])
def test_logits_are_t5x_s(name, unpacked):
    model, arrays = opened(unpacked(name)), golden(name)
    read = arrays_of(model.policy)
    params = unflatten_dict({key: jnp.asarray(array) for key, array in read.items()}, sep="/")
    config = dataclasses.replace(model.config, dtype="float32")
    tokens = (arrays["encoder_tokens"], arrays["decoder_tokens"])
    ours = jax.jit(T5(config).apply)({"params": params}, *map(jnp.asarray, tokens))
    assert np.abs(np.asarray(ours, np.float64) - arrays["logits"]).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["v1_0_bfloat16_msgpack", "v1_1_msgpack", "v1_1"])
def test_parameters_are_t5x_s_bit_for_bit(name, unpacked):
    model, arrays = opened(unpacked(name)), golden(name)
    assert model.value == {}
    read = arrays_of(model.policy)
    assert all(model.policy[key].shape == array.shape for key, array in read.items())
    assert all(array.dtype == np.float32 for array in read.values())
    kept = {key.removeprefix("parameters/"): a for key, a in arrays.items() if "/" in key}
    assert len(kept) > 8
    assert all(read[key].tobytes() == array.tobytes() for key, array in kept.items())


@pytest.mark.parametrize("name", ["v1_1_scanned", "v1_1_scanned_msgpack"])
def test_the_layers_of_a_scanned_stack_are_in_order(name, unpacked):
    read, arrays = arrays_of(opened(unpacked(name)).policy), golden(name)
    scale = arrays["parameters/decoder/decoder/pre_mlp_layer_norm/scale"]
    query = arrays["parameters/decoder/decoder/self_attention/query/kernel"]
    assert query.shape == (4, 3, 2, 3)
    for layer in range(3):
        here = f"decoder/layers_{layer}"
        assert np.array_equal(read[f"{here}/pre_mlp_layer_norm/scale"], scale[:, layer])
        kernel = read[f"{here}/self_attention/query/kernel"]
        assert np.array_equal(kernel, query[:, layer].reshape(4, 6))
    bias = arrays["parameters/encoder/encoder/relpos_bias/rel_embedding"]
    assert np.array_equal(read["encoder/relpos_bias/rel_embedding"], bias[:, 1])


@pytest.mark.parametrize("name", ["v1_1_msgpack", "v1_1"])
def test_a_checkpoint_is_found_from_its_folder_and_its_run_s(name, unpacked):
    folder = unpacked(name)
    (folder / "checkpoint_5").rename(folder / "checkpoint_12")
    (folder / "checkpoint_9").mkdir()
    assert t5x_checkpoints.find(folder) == epath.Path(folder / "checkpoint_12")
    assert t5x_checkpoints.find(folder / "checkpoint_12") == epath.Path(folder / "checkpoint_12")
    (folder / "checkpoint_100").mkdir()
    assert t5x_checkpoints.find(folder) is None
    if name == "v1_1_msgpack":
        file = folder / "checkpoint_12" / "checkpoint"
        assert opened(file).config == opened(folder / "checkpoint_12").config


@pytest.mark.parametrize("driver", ["gfile", "gcs", "before 0.1.14", "Orbax of 2022"])
def test_where_a_checkpoint_was_written_does_not_matter(driver, unpacked):
    folder = unpacked("v1_1_msgpack")
    before = arrays_of(opened(folder).policy)

    def move(tree):
        for name, node in tree.items():
            if isinstance(node, dict) and "kvstore" in node:
                path = node["kvstore"].pop("path")
                if driver == "Orbax of 2022":
                    tree[name] = f"PLACEHOLDER://{path.strip('/')}"
                elif driver == "before 0.1.14":
                    node["path"] = path.strip("/")
                else:
                    node["kvstore"] = {"driver": driver, "path": path, "bucket": "t5x-dummy-bucket"}
            elif isinstance(node, dict):
                move(node)

    edit(folder, move)
    after = arrays_of(opened(folder).policy)
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())


def test_an_array_inside_the_msgpack_file(unpacked):
    folder = unpacked("v1_1_msgpack")
    scale = np.arange(4, dtype=np.float32)

    def put(target):
        target["encoder"]["encoder_norm"]["scale"] = scale

    edit(folder, put)
    read = opened(folder).policy["encoder/encoder_norm/scale"].read()
    assert np.array_equal(read, scale)


def random_arrays(shapes, seed):
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made, {name: StoredArray(a.shape, lambda a=a: a) for name, a in made.items()}


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_written_reads_the_same(scan, unpacked, tmp_path):
    config = opened(unpacked("v1_1_scanned")).config
    shapes = parameter_shapes.shapes
    policy, stored = random_arrays(shapes(config), 0)
    value, stored_value = random_arrays(shapes(config, value=True), 1)
    path = epath.Path(tmp_path / "checkpoint_7")
    t5x_checkpoints.write_model(path, 7, stored, stored_value, scan=scan)
    base = {"driver": "ocdbt", "base": f"file://{path}/state/", "path": "state.step/"}
    step = t5x_checkpoints.ts.open({"driver": "zarr", "kvstore": base}, open=True).result()
    assert (step.dtype.name, int(step.read().result())) == ("int32", 7)
    model = opened(tmp_path)
    assert model.config == config
    for written, read in ((policy, model.policy), (value, model.value)):
        assert written.keys() == read.keys()
        assert all(
            array.tobytes() == read[name].read().tobytes() for name, array in written.items()
        )


def remove_encoder(target):
    del target["encoder"]


def test_a_decoder_only_model_is_refused(unpacked):
    folder = unpacked("v1_1_msgpack")
    edit(folder, remove_encoder)
    assert "is a decoder without an encoder" in refusal(folder)


def test_another_size_is_told_with_both_shapes(unpacked):
    folder = unpacked("v1_1_msgpack")

    def swap(target):
        target["decoder"]["layers_0"]["mlp"]["wo"]["kernel"] = np.zeros((6, 5), np.float32)
        target["decoder"]["layers_1"]["mlp"]["wi_0"]["kernel"] = np.zeros((4, 9), np.float32)
        target["decoder"]["layers_1"]["pre_mlp_layer_norm"]["bias"] = np.zeros(4, np.float32)
        del target["encoder"]["layers_0"]["pre_mlp_layer_norm"]

    edit(folder, swap)
    message = refusal(folder)
    assert "4 parameters are not those of one T5" in message
    assert "decoder/layers_0/mlp/wo/kernel [6, 5] there and [6, 4] in such a model" in message
    assert "decoder/layers_1/mlp/wi_0/kernel [4, 9] there and [4, 6]" in message
    assert "encoder/layers_0/pre_mlp_layer_norm/scale absent there and [4]" in message
    assert "bias" not in message


def test_no_heads_are_refused(unpacked):
    folder = unpacked("v1_1_msgpack")

    def empty(target):
        target["encoder"]["relpos_bias"]["rel_embedding"] = np.zeros((0, 32), np.float32)

    edit(folder, empty)
    assert "T5Config.num_heads is 0" in refusal(folder)


def test_another_model_is_no_t5(unpacked):
    folder = unpacked("v1_1_msgpack")

    def replace(target):
        target.clear()
        target["bias"] = np.zeros(5, np.float32)
        target["kernel"] = np.zeros((10, 5), np.float32)

    edit(folder, replace)
    assert "is of no T5: its parameters begin with bias [5], kernel [10, 5]" in refusal(folder)
    edit(folder, dict.clear)
    assert "holds no parameters" in refusal(folder)


def test_layers_with_biases_of_their_own_are_refused(unpacked):
    message = refusal(unpacked("scanned_with_own_biases"))
    assert "every layer of the encoder has a relative bias of its own, as in umT5" in message


def test_integers_are_refused(unpacked):
    folder = unpacked("v1_1_msgpack")

    def quantise(target):
        target["decoder"]["logits_dense"]["kernel"] = np.zeros((4, 136), np.int8)

    edit(folder, quantise)
    assert "decoder/logits_dense/kernel has type int8" in refusal(folder)


MLP = "target.encoder.layers_0.mlp.wo.kernel"


@pytest.mark.parametrize("lost", ["chunk", "folder", "half a chunk", "no .zarray"])
def test_missing_and_cut_arrays_are_named(lost, unpacked):
    folder = unpacked("v1_1_msgpack")
    array = folder / "checkpoint_5" / MLP
    (chunk,) = array.glob("[0-9]*")
    if lost == "half a chunk":
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    elif lost == "no .zarray":
        (array / ".zarray").unlink()
    else:
        chunk.unlink()
    if lost == "folder":
        (array / ".zarray").unlink()
        array.rmdir()
    message = refusal(folder)
    assert "encoder/layers_0/mlp/wo/kernel is missing or damaged" in message
    assert "get the checkpoint again" in message


@pytest.mark.parametrize("content", ["half", "empty", "text", "TensorFlow"])
def test_a_msgpack_file_that_is_none(content, unpacked):
    folder = unpacked("v1_1_msgpack")
    path = folder / "checkpoint_5" / "checkpoint"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"a text\n",
            "TensorFlow": b'model_checkpoint_path: "model.ckpt-0"\n',
        }[content]
    )
    said = "Mesh TensorFlow" if content == "TensorFlow" else "is not a whole checkpoint of T5X"
    assert said in refusal(folder)


@pytest.mark.parametrize("lost", ["manifest", "data", "cut"])
def test_a_damaged_orbax_checkpoint(lost, unpacked):
    folder = unpacked("v1_1")
    files = sorted(path for path in folder.rglob("d/*") if path.is_file())
    if lost == "manifest":
        (folder / "checkpoint_5" / "state" / "manifest.ocdbt").write_bytes(b"")
    for path in files if lost != "manifest" else ():
        if lost == "data":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is missing or damaged" in refusal(folder)


def test_an_array_that_orbax_lists_has_to_be_there(unpacked):
    """As where every array has a folder, which T5X wrote before it had OCDBT."""
    folder = unpacked("v1_1")
    before = arrays_of(opened(folder).policy)
    state = folder / "checkpoint_5" / "state"
    store = t5x_checkpoints.ts.KvStore.open(
        {"driver": "ocdbt", "base": f"file://{state}/"}
    ).result()
    content = {key.decode(): bytes(store[key]) for key in store.list().result()}
    (state / "manifest.ocdbt").unlink()
    for name, value in content.items():
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_bytes(value)
    after = arrays_of(opened(folder).policy)
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())
    shutil.rmtree(state / "target.decoder.logits_dense.kernel")
    assert "decoder.logits_dense.kernel is missing or damaged (_METADATA lists it" in refusal(
        folder
    )
    for damaged in (
        "{",
        '{"tree_metadata": [1]}',
        '{"tree_metadata": {"x": {"key_metadata": []}}}',
    ):
        (state / "_METADATA").write_text(damaged)
        assert "_METADATA" in refusal(folder)


def test_what_is_no_checkpoint_is_not_found(tmp_path):
    assert t5x_checkpoints.find(tmp_path) is None
    (tmp_path / "checkpoint_3" / "policy").mkdir(parents=True)
    assert t5x_checkpoints.find(tmp_path) is None


def test_reading_needs_no_t5x_and_no_tensorflow():
    code = """
import sys
import dro_jax.interop.t5x.checkpoints
assert not {"t5x", "tensorflow", "seqio", "gin"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
