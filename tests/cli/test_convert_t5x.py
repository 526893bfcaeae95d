"""`dro_jax convert` from T5X and to it; what is refused leaves nothing behind."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from dro_jax.cli import generate
from dro_jax.interop import parameter_shapes
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.interop.t5x import checkpoints as t5x_checkpoints
from dro_jax.training import checkpoints

INTEROP = Path(__file__).parents[1] / "interop"
PIECES = INTEROP / "golden" / "v1_1" / "spiece.model"


@pytest.fixture
def unpacked(tmp_path):
    def unpack(name):
        with zipfile.ZipFile(INTEROP / "golden_t5x" / f"{name}.zip") as file:
            file.extractall(tmp_path / name)
        activations = ("relu",) if name.startswith("v1_0") else ("gelu", "linear")
        line = f"network.T5Config.mlp_activations = {activations}\n"
        (tmp_path / name / "config.gin").write_text(f"# As T5X writes it.\n{line}")
        return tmp_path / name

    return unpack


@pytest.fixture
def converted(command, tmp_path):
    """Converts into a new folder and returns it."""

    def run(source, name, *options):
        result = command("convert", f"--from={source}", f"--to={tmp_path / name}", *options)
        assert (result.code, result.err) == (0, "")
        return tmp_path / name

    return run


@pytest.fixture
def refused(command, tmp_path):
    """The one line with which a conversion is refused."""

    def run(source, *options):
        before = sorted(path.name for path in tmp_path.iterdir())
        result = command("convert", f"--from={source}", f"--to={tmp_path / 'never'}", *options)
        assert result.code == 2, result.out
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        (line,) = result.err.splitlines()
        return line

    return run


def policy_of(folder):
    model = t5x_checkpoints.open_model(t5x_checkpoints.find(folder))
    return {name: array.read() for name, array in model.policy.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        array.tobytes() == other[name].tobytes() for name, array in one.items()
    )


@pytest.mark.parametrize(
    ("name", "output_format"),
    [("v1_1_msgpack", "t5x"), ("v1_1_scanned", "t5x_scanned"), ("v1_0_bfloat16_msgpack", "t5x")],
)
def test_there_and_back_bit_for_bit(name, output_format, unpacked, converted):
    source = unpacked(name)
    run = converted(source, "run", f"--vocabulary_file={PIECES}")
    assert (run / "vocabulary.model").read_bytes() == PIECES.read_bytes()
    gin = (run / "model.gin").read_text()
    assert f"VOCABULARY_FILE = '{run}/vocabulary.model'" in gin
    assert "vocab_size = 136" in gin
    back = converted(run, "back", f"--format={output_format}")
    assert same(policy_of(back), policy_of(source))
    assert sorted(path.name for path in back.iterdir()) == [
        "checkpoint_0",
        "model.gin",
        "vocabulary.model",
    ]
    gin = (back / "model.gin").read_text()
    assert f"INITIAL_CHECKPOINT_PATH = '{back}/checkpoint_0'" in gin
    network = "scalable_t5" if "scanned" in name else "t5"
    assert f"from t5x.examples.{network} import network" in gin
    relu = "v1_0" in name
    assert f"mlp_activations = {('relu',) if relu else ('gelu', 'linear')}" in gin
    assert f"logits_via_embedding = {relu}" in gin


def test_generate_on_a_t5x_checkpoint(unpacked, converted):
    run = converted(unpacked("v1_1"), "run", f"--vocabulary_file={PIECES}")
    policy = generate.load_policy(str(run))
    kernel = policy.params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"]
    assert policy.vocabulary.vocab_size == 134
    expected = policy_of(run.parent / "v1_1")["decoder/layers_1/mlp/wo/kernel"]
    assert np.array_equal(kernel, expected)


def test_the_value_network_goes_along(unpacked, converted, tmp_path):
    source = t5x_checkpoints.open_model(t5x_checkpoints.find(unpacked("v1_1_msgpack")))
    rng = np.random.default_rng(0)
    value = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in parameter_shapes.shapes(source.config, value=True).items()
    }
    stored = {name: StoredArray(a.shape, lambda a=a: a) for name, a in value.items()}
    made = epath.Path(tmp_path / "made")
    t5x_checkpoints.write_model(made / "checkpoint_9", 9, source.policy, stored, scan=False)
    run = converted(made, "run", f"--vocabulary_file={PIECES}")
    assert set(checkpoints.read_meta(run, 0)["checksums"]) == {"policy", "value"}
    back = converted(run, "back", "--format=t5x")
    model = t5x_checkpoints.open_model(t5x_checkpoints.find(back))
    assert same({name: array.read() for name, array in model.value.items()}, value)
    exported = converted(run, "exported")
    assert (exported / "value" / "model.safetensors").exists()


def test_what_does_not_belong_together_is_refused(unpacked, converted, refused):
    source = unpacked("v1_1_msgpack")
    run = converted(source, "run", f"--vocabulary_file={PIECES}")
    assert "--format=t5x: " in (line := refused(source, "--format=t5x"))
    assert "becomes a run; convert that run to the format then" in line
    line = refused(run, f"--vocabulary_file={PIECES}")
    assert "--vocabulary_file: is for T5X checkpoints" in line
    # Bytes and their special tokens are more than the model's table.
    assert "the vocabulary has 259 tokens but the model's vocab_size is 136" in refused(source)
    assert "no such file" in refused(source, "--vocabulary_file=nowhere")


def test_a_model_over_pieces_needs_its_vocabulary(unpacked, refused, monkeypatch):
    monkeypatch.setattr("dro_jax.cli.convert._BYTES", 100)
    line = refused(unpacked("v1_1_msgpack"))
    assert "has a vocabulary of 136 entries" in line
    assert "--vocabulary_file" in line


@pytest.mark.parametrize("place", ["", "checkpoint_5", "checkpoint_5/checkpoint"])
def test_another_gate_is_refused(unpacked, refused, place):
    source = unpacked("v1_1_msgpack")
    (source / "config.gin").write_text("network.T5Config.mlp_activations = ('silu', 'linear')\n")
    line = refused(source / place, f"--vocabulary_file={PIECES}")
    assert "has mlp_activations ('silu', 'linear') by its config.gin; what converts has" in line


@pytest.mark.parametrize("text", ["", "network.T5Config.mlp_activations = %ACTIVATIONS\n"])
def test_a_gate_that_nothing_tells_is_warned_of(unpacked, command, tmp_path, text):
    source = unpacked("v1_1_msgpack")
    (source / "config.gin").write_text(text)
    given = (f"--from={source}", f"--to={tmp_path / 'run'}", f"--vocabulary_file={PIECES}")
    result = command("convert", *given)
    assert result.code == 0
    assert "taken to be of gated GELU; no config.gin beside it tells" in result.out.replace(
        "\n", " "
    )


def test_damage_is_told_in_a_line(unpacked, refused):
    source = unpacked("v1_1_msgpack")
    folder = source / "checkpoint_5" / "target.decoder.layers_1.mlp.wi_0.kernel"
    (folder / "0.0").unlink()
    line = refused(source, f"--vocabulary_file={PIECES}")
    assert "decoder/layers_1/mlp/wi_0/kernel is missing or damaged" in line


def test_what_t5x_has_not_is_refused(unpacked, converted, refused, tmp_path):
    run = converted(unpacked("v1_1_msgpack"), "run", f"--vocabulary_file={PIECES}")
    meta = checkpoints.read_meta(run, 0)
    meta["model"]["relative_max_distance"] = 20
    path = run / "checkpoint_0" / "meta" / "metadata"
    meta["digest"] = checkpoints._digest(meta)
    path.write_text(checkpoints.json.dumps(meta))
    assert "(32, 20); every T5 of T5X has (32, 128)" in refused(run, "--format=t5x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "is a pickle, which may run anything when it is read, so it is not;"),
        ("model.safetensors", "is a file; give the folder that the model is in"),
        ("notes.txt", "is a file; give the folder that the model is in"),
        ("checkpoint", "is not a whole checkpoint of T5X (ValueError); get it again"),
    ],
)
def test_a_file_that_is_no_checkpoint(refused, tmp_path, name, said):
    path = tmp_path / name
    path.write_bytes(b"")
    assert f"{path}: {said}" in refused(path)
