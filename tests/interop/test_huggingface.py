"""What Hugging Face transformers wrote is the same model here: names, layout, types, shape and logits."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax.traverse_util import unflatten_dict

from dro_jax.errors import UsageError
from dro_jax.interop import huggingface, parameter_shapes, safetensors_files
from dro_jax.networks import T5, T5Config

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5

CONFIG = T5Config(
    vocab_size=40,
    emb_dim=6,
    num_heads=2,
    head_dim=4,
    mlp_dim=10,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_buckets=8,
    relative_max_distance=20,
)


def opened(folder):
    folder = epath.Path(folder)
    config = huggingface.model_config(huggingface.read_config(folder))
    config = dataclasses.replace(config, dtype="float32")
    return config, huggingface.open_model(folder, config)


def arrays_of(folder):
    return {name: array.read() for name, array in opened(folder)[1].items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(a.tobytes() == other[name].tobytes() for name, a in one.items())


def test_the_folders_are_small_and_name_their_version():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as file:
            assert json.loads(str(file["about"]))["transformers"].startswith("5.")


def test_logits_agree(golden):
    config, stored = opened(golden.folder)
    params = {name: jnp.asarray(array.read()) for name, array in stored.items()}
    tokens = (golden.arrays["encoder_tokens"], golden.arrays["decoder_tokens"])
    tokens = [jnp.asarray(array, jnp.int32) for array in tokens]
    ours = jax.jit(T5(config).apply)({"params": unflatten_dict(params, sep="/")}, *tokens)
    difference = np.asarray(ours, np.float64) - golden.arrays["logits"]
    assert np.abs(difference).max() <= TOLERANCE
    assert abs(difference.mean()) <= TOLERANCE / 10


@pytest.mark.parametrize("name", ["v1_1", "v1_1_sharded"])
def test_shapes_are_told_without_reading(name, monkeypatch):
    def read(*_):
        raise AssertionError

    with monkeypatch.context() as patched:
        # By which alone bytes become arrays there.
        patched.setattr(safetensors_files.np, "frombuffer", read)
        config, stored = opened(GOLDEN / name)
        assert {name: array.shape for name, array in stored.items()} == parameter_shapes.shapes(
            config
        )
        with pytest.raises(AssertionError):
            next(iter(stored.values())).read()
    assert all(array.shape == array.read().shape for array in stored.values())
    assert all(array.read().dtype == np.float32 for array in stored.values())


def test_shards_make_no_difference():
    same(arrays_of(GOLDEN / "v1_1"), arrays_of(GOLDEN / "v1_1_sharded"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(copied, dtype):
    folder = copied("v1_1")
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    halves = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
    safetensors.numpy.save_file(halves, folder / "model.safetensors")
    read = arrays_of(folder)
    for ours, theirs in huggingface.parameter_names(CONFIG).items():
        if ours in read and theirs in halves:
            exact = halves[theirs].astype(np.float64)
            assert np.array_equal(read[ours], exact.T if huggingface.is_transposed(ours) else exact)


@pytest.mark.parametrize("size", [10**9, 9000, 1])
def test_what_is_written_reads_the_same(tmp_path, size):
    config, stored = opened(GOLDEN / "v1_1")
    huggingface.write_json(
        epath.Path(tmp_path / "config.json"), huggingface.config_json(config, eos_id=1)
    )
    names = huggingface.parameter_names(config)
    huggingface.write_model(epath.Path(tmp_path), stored, names, shard_bytes=size)
    again, written = opened(tmp_path)
    assert again == config
    same({k: v.read() for k, v in stored.items()}, {k: v.read() for k, v in written.items()})
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (size == 10**9)
    if size == 1:
        assert len(files) == len(names)
        assert files[0] == f"model-00001-of-{len(names):05}.safetensors"
    if size == 9000:
        limits = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
        largest = max(4 * array.read().size for array in stored.values())
        assert max(limits) < max(9000, largest) + 4000  # with its header
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert sorted(index["weight_map"]) == sorted(names.values())
        counts = [array.read().size for array in stored.values()]
        assert index["metadata"] == {"total_size": 4 * sum(counts)}


def test_value_network_has_no_logits_and_a_head():
    names = huggingface.parameter_names(CONFIG, value=True)
    assert names.keys() == parameter_shapes.shapes(CONFIG, value=True).keys()
    assert names["value_head/kernel"] == "value_head.weight"
    assert "lm_head.weight" not in names.values()
    policy = huggingface.parameter_names(CONFIG)
    assert policy.keys() == parameter_shapes.shapes(CONFIG).keys()
    assert policy.keys() - names.keys() == {"decoder/logits_dense/kernel"}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, mlp_activations=("relu",), logits_via_embedding=True),
        dataclasses.replace(CONFIG, mlp_activations=("relu",)),
    ],
)
def test_config_there_and_back(config):
    written = json.loads(json.dumps(huggingface.config_json(config, eos_id=1)))
    assert huggingface.model_config(written) == config


def edit(folder, **entries):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return folder


def refusal(folder):
    with pytest.raises(UsageError) as refused:
        opened(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; a T5 of dro_jax"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; a T5 of dro_jax has 'gelu_new'"),
        ({"dense_act_fn": "relu"}, "dense_act_fn is 'relu'; a T5 of dro_jax has 'gelu_new'"),
        ({"feed_forward_proj": "relu"}, "dense_act_fn is 'gelu_new'; a T5 of dro_jax has 'relu'"),
        ({"is_gated_act": False}, "is_gated_act is False; a T5 of dro_jax has True"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05; a T5 of dro_jax has 1e-06"),
        ({"d_kv": "absent"}, "lacks d_kv; give the config.json of the weights"),
        ({"d_kv": "five"}, "T5Config.head_dim is 'five': give a whole number of at least 1"),
        ({"model_type": "mt5"}, "is of model_type 'mt5' ('T5ForConditionalGeneration'); what co"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "is of model_type 'gpt2' ('GPT2LMHeadModel'), a decoder without an encoder; what",
        ),
        ({"model_type": "absent", "architectures": "absent"}, "is of model_type None; what conve"),
    ],
)
def test_config_of_another_model(copied, entries, message):
    assert f"config.json: {message}" in refusal(edit(copied("v1_1"), **entries))


def test_config_that_is_no_json(copied):
    folder = copied("v1_1")
    (folder / "config.json").write_text("{")
    assert "config.json: cannot be read as JSON" in refusal(folder)
    (folder / "config.json").write_text('{"a":' * 10**5)
    assert "config.json: cannot be read as JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: is JSON but no object" in refusal(folder)


def test_another_size_names_the_first_three_with_both_shapes(copied):
    line = refusal(edit(copied("v1_1"), d_model=16))
    assert line.count(" there and ") == 3
    assert "shared.weight [136, 8] there and [136, 16] in such a model" in line
    assert ": 36 parameters are not those of the T5 in config.json: shared.weight" in line


def test_another_depth_names_what_is_absent_or_left_over(copied):
    line = refusal(edit(copied("v1_1"), num_decoder_layers=2))
    assert "decoder.block.1.layer.0.layer_norm.weight absent there and [8] in such a model" in line
    assert "decoder.block.1.layer.0.SelfAttention.q.weight absent there and [15, 8] in" in line
    folder = copied("v1_0")
    line = refusal(edit(folder, num_decoder_layers=1))
    assert "there and absent in such a model" in line


def test_logits_that_are_no_table_s_copy_have_to_be_there(copied):
    folder = copied("v1_1_sharded")
    arrays = {}
    for path in (GOLDEN / "v1_1_sharded").glob("*.safetensors"):
        arrays |= safetensors_files.open_file(epath.Path(path))
    del arrays["lm_head.weight"]
    safetensors_files.write_file(epath.Path(folder / "model.safetensors"), arrays)
    line = refusal(folder)
    assert "lm_head.weight absent there and [136, 8] in such a model" in line
    # A model of which transformers 5 says that they are.
    edit(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    opened(folder)


def test_copies_of_the_embedding_have_to_be_copies(copied):
    folder = copied("v1_0")
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    before = arrays_of(folder)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = arrays | {name: arrays["shared.weight"] for name in copies}
    more[unused] = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file(more, folder / "model.safetensors")
    same(before, arrays_of(folder))
    del more["shared.weight"]
    safetensors.numpy.save_file(more, folder / "model.safetensors")
    same(before, arrays_of(folder))
    changed = arrays["shared.weight"].copy()
    changed[3, 1] += 1
    for name in copies:
        safetensors.numpy.save_file(arrays | {name: changed}, folder / "model.safetensors")
        assert f"{name} is another table than shared.weight" in refusal(folder)


def test_missing_shards(copied):
    folder = copied("v1_1_sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder}: 1 of 3 files of model.safetensors.index.json are missing, "
        "model-00002-of-00003.safetensors the first; get them"
    )
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "index.json: names no files (weight_map)" in refusal(folder)


def test_pickles_are_not_opened(copied):
    folder = copied("v1_1")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    line = refusal(folder)
    assert "pytorch_model.bin is a pickle, which may run anything when it is read" in line
    assert "save_pretrained() it, which writes safetensors" in line
    (folder / "pytorch_model.bin").rename(folder / "flax_model.msgpack")
    assert "has no model.safetensors (nor model.safetensors.index.json)" in refusal(folder)


def test_the_room_imports_no_other_library():
    code = """
import sys
from pathlib import Path
import dro_jax.interop
assert "jax" not in sys.modules
from dro_jax.interop import huggingface, hub
others = {"torch", "transformers", "safetensors", "huggingface_hub", "tensorflow", "seqio"}
assert not others & set(sys.modules), others & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
