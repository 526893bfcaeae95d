"""The real T5X trains, evaluates and infers by our gin files, and its losses are those of our own trainer."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from dro_jax.cli.configuration import shipped_configs
from dro_jax.data import demonstration
from dro_jax.interop import parameter_shapes
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.interop.t5x import checkpoints as t5x_checkpoints

if importlib.util.find_spec("t5x") is None:
    pytest.skip("T5X is not installed: requirements-t5x.txt says how", allow_module_level=True)

HERE = Path(__file__).parent
STEPS = 20
TOLERANCE = 1e-4
RATES = {"POLICY_LEARNING_RATE": 1e-3, "VALUE_LEARNING_RATE": 4e-4}
TINY = """
from __gin__ import dynamic_registration
from t5x.examples.t5 import network
include "t5x/examples/t5/t5_1_1/base.gin"
network.T5Config:
  vocab_size = 136
  dtype = 'float32'
  emb_dim = 4
  num_heads = 2
  num_encoder_layers = {}
  num_decoder_layers = {}
  head_dim = 3
  mlp_dim = 6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Feedback, T5X's own checkpoints and gin files of their sizes."""
    folder = tmp_path_factory.mktemp("t5x")
    rng = np.random.default_rng(0)
    with (folder / "feedback.jsonl").open("w") as file:
        for prompt in rng.choice(demonstration.prompts("abcd"), 60, replace=False):
            for answer in rng.choice(demonstration.answers(prompt), 2, replace=False):
                reward = demonstration.reward(prompt, answer)
                row = {"prompt": str(prompt), "completion": str(answer), "reward": reward}
                file.write(json.dumps(row) + "\n")
    for name in ("v1_1_msgpack", "v1_1", "v1_1_scanned"):
        with zipfile.ZipFile(HERE / "golden_t5x" / f"{name}.zip") as archive:
            archive.extractall(folder / name)
    (folder / "tiny.gin").write_text(TINY.format(1, 2))
    (folder / "deeper.gin").write_text(TINY.format(2, 3))
    return folder


def flags(folder, files, **settings):
    """Flags of one of T5X's programs; None takes a setting away."""
    settings = {
        "FEEDBACK_FILE": str(folder / "feedback.jsonl"),
        "VOCABULARY_FILE": str(HERE / "golden" / "v1_1" / "spiece.model"),
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 13, "targets": 8, "rewards": 1},
        **settings,
    }
    return [
        f"--gin_search_paths={shipped_configs()}",
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name.replace('__', '.')}={value!r}" for name, value in settings.items()),
    ]


def run(folder, *command):
    """One Python process on one CPU device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
        "PYTHONWARNINGS": "ignore",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def training_flags(folder, method, start, name, *, model="tiny.gin", evaluate=False, **settings):
    settings = {
        "INITIAL_CHECKPOINT_PATH": str(folder / start / "checkpoint_5"),
        "MODEL_DIR": str(folder / name),
        "TRAIN_STEPS": STEPS,
        "RANDOM_SEED": 0,
        "EVAL_STEPS": 1,
        "EVAL_PERIOD": STEPS,
        "utils.SaveCheckpointConfig.period": STEPS,
        "optimizers.Adafactor.warmup_steps": 5,
        "train/utils.DatasetConfig.seed": 3,
        "train.stats_period": 1,
        "train.gc_period": 0,
        **RATES,
        **settings,
    }
    if not evaluate:
        settings |= dict.fromkeys(
            ("train.train_eval_dataset_cfg", "train.infer_eval_dataset_cfg"), None
        )
    return flags(folder, (folder / model, "t5x/train.gin", f"t5x/{method}.gin"), **settings)


def train(folder, *arguments, **settings):
    given = training_flags(folder, *arguments, **settings)
    result = run(folder, "-m", "t5x.train", *given)
    assert result.returncode == 0, result.stderr[-3000:]
    return given


def beside(folder, given):
    """What our own trainer makes of the same batches, next to T5X's; see losses_beside_t5x.py."""
    result = run(folder, str(HERE / "losses_beside_t5x.py"), *given)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_equal(found, parts, names=("loss", "kl/log_ratio_std")):
    assert len(found["t5x"]["loss"]) == STEPS
    for name in names:
        difference = np.subtract(found["ours"][name], found["t5x"][name])
        assert np.abs(difference).max() <= TOLERANCE, name
    assert found["parameters"].keys() == parts
    assert max(found["parameters"].values()) <= 1e-5
    # They moved, and not a little.
    assert found["t5x"]["kl/log_ratio_std"][0] <= 1e-5
    assert found["t5x"]["kl/log_ratio_std"][-1] > 1e-3


@pytest.fixture(scope="module")
def dro_v(folder):
    """A DRO-V run with all of T5X's evaluation, and its flags."""
    return train(folder, "dro_v", "v1_1_msgpack", "dro_v", evaluate=True)


def stored(path):
    model = t5x_checkpoints.open_model(t5x_checkpoints.find(path))
    return {name: array.read() for name, array in model.policy.items()}


def reference_of(path):
    """The reference in a checkpoint of ours, which reads as an ordinary T5 once it is at the root."""
    found = dict(t5x_checkpoints._read_orbax(path / "state"))
    found = {
        name.removeprefix("reference/"): array
        for name, array in found.items()
        if name.startswith("reference/")
    }
    return {name: array.read().result() for name, array in found.items()}


def test_dro_v_s_losses_are_our_own_trainer_s(folder, dro_v):
    found = beside(folder, dro_v)
    check_equal(found, {"policy", "value"})
    rates = np.minimum(np.arange(STEPS) / 5, 1) * RATES["POLICY_LEARNING_RATE"]
    assert np.allclose(found["learning_rate"], rates)


def test_the_reference_stays_and_has_no_optimiser_state(folder, dro_v):
    saved = folder / "dro_v" / f"checkpoint_{STEPS}"
    reference, start = reference_of(saved), stored(folder / "v1_1_msgpack")
    assert reference.keys() == start.keys()
    assert all(array.tobytes() == start[name].tobytes() for name, array in reference.items())
    keys = t5x_checkpoints.ts.KvStore.open(
        {"driver": "ocdbt", "base": f"file://{saved}/state/"}
    ).result()
    names = [key.decode() for key in keys.list().result()]
    states = [name for name in names if name.startswith("state.param_states.")]
    assert len(states) > 100
    assert not [name for name in states if ".reference." in name]
    policy = stored(saved)
    assert all(array.tobytes() != start[name].tobytes() for name, array in policy.items())


def test_t5x_writes_what_its_users_expect(folder, dro_v):
    names = {path.name for path in (folder / "dro_v").iterdir()}
    assert {"config.gin", "model-info.txt", "train", "training_eval", "inference_eval"} <= names
    config = (folder / "dro_v" / "config.gin").read_text()
    assert "AlignmentModel" in config
    (line,) = (
        (folder / "dro_v" / "inference_eval" / "feedback-metrics.jsonl").read_text().splitlines()
    )
    metrics = json.loads(line)
    assert metrics["step"] == STEPS
    assert metrics["log_prob"] < -10
    assert metrics["completions/characters"] > 0


def test_a_run_goes_on(folder, dro_v):
    before = stored(folder / "dro_v" / f"checkpoint_{STEPS}")
    train(folder, "dro_v", "v1_1_msgpack", "dro_v", TRAIN_STEPS=STEPS + 2)
    after = folder / "dro_v" / f"checkpoint_{STEPS + 2}"
    start = stored(folder / "v1_1_msgpack")
    assert all(
        array.tobytes() == start[name].tobytes() for name, array in reference_of(after).items()
    )
    distances = [
        np.abs(stored(after)["decoder/logits_dense/kernel"] - other["decoder/logits_dense/kernel"])
        for other in (before, start)
    ]
    assert 0 < distances[0].max() < distances[1].max()


def test_eval(folder, dro_v):
    given = flags(
        folder,
        (folder / "tiny.gin", "t5x/eval.gin", "t5x/dro_v.gin"),
        CHECKPOINT_PATH=str(folder / "dro_v" / f"checkpoint_{STEPS}"),
        EVAL_OUTPUT_DIR=str(folder / "evaluated"),
    )
    result = run(folder, "-m", "t5x.eval", *given)
    assert result.returncode == 0, result.stderr[-3000:]
    names = ("evaluated", "dro_v")
    evaluated, during = (
        json.loads(
            (folder / name / "inference_eval" / "feedback-metrics.jsonl")
            .read_text()
            .splitlines()[0]
        )
        for name in names
    )
    assert evaluated["log_prob"] == pytest.approx(during["log_prob"], abs=1e-3)


def test_infer(folder, dro_v):
    given = flags(
        folder,
        (folder / "tiny.gin", "t5x/infer.gin", "t5x/dro_v.gin"),
        CHECKPOINT_PATH=str(folder / "dro_v" / f"checkpoint_{STEPS}"),
        INFER_OUTPUT_DIR=str(folder / "inferred"),
    )
    result = run(folder, "-m", "t5x.infer", *given)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (folder / "inferred").glob("feedback-predict.jsonl-*-of-00001")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) > 4
    prompts = demonstration.prompts("abcd")
    assert all(row["inputs"]["inputs_pretokenized"] in prompts for row in rows)
    assert all(isinstance(row["prediction"], str) for row in rows)


def test_dro_p_from_orbax(folder):
    given = train(folder, "dro_p", "v1_1", "dro_p")
    check_equal(beside(folder, given), {"policy"})


LENGTHS = {"inputs": 13, "targets": 8, "mismatched_targets": 8, "rewards": 1}


def test_kto_from_a_scanned_checkpoint(folder):
    settings = {"model": "deeper.gin", "TASK_FEATURE_LENGTHS": LENGTHS}
    given = train(folder, "kto", "v1_1_scanned", "kto", **settings)
    check_equal(beside(folder, given), {"policy"})


def test_microbatches_make_no_difference_to_dro_v(folder):
    settings = {"NUM_MICROBATCHES": 2}
    given = train(folder, "dro_v", "v1_1_msgpack", "in_parts", **settings)
    # A standard deviation is the parts' mean then.
    check_equal(beside(folder, given), {"policy", "value"}, ("loss", "value/mean"))


def refusal(folder, *arguments, **settings):
    """The last line with which T5X ends."""
    result = run(folder, "-m", "t5x.train", *training_flags(folder, *arguments, **settings))
    assert result.returncode != 0
    # Gin tells it again, with the call that raised it.
    lines = result.stderr.splitlines()
    return next(line for line in reversed(lines) if line.startswith("dro_jax.errors.UsageError"))


def test_microbatches_are_refused_where_the_batch_is_one(folder):
    settings = {"TASK_FEATURE_LENGTHS": LENGTHS, "NUM_MICROBATCHES": 2}
    line = refusal(folder, "kto", "v1_1_msgpack", "refused", **settings)
    assert "NUM_MICROBATCHES is 2: Kto needs all of the batch at once" in line
    assert not (folder / "refused" / "checkpoint_0").exists()


REFUSED = """
import numpy as np
from t5x.examples.t5 import network
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import UsageError
from dro_jax.interop.t5x.alignment import AlignmentModel
from dro_jax.training.algorithms import DroP

def model(dropout_rate):
    config = network.T5Config(vocab_size=260, dropout_rate=dropout_rate)
    module, vocabulary = network.Transformer(config), load_vocabulary(None)
    return AlignmentModel(module, vocabulary, vocabulary, None, DroP({arguments}), batch_size=8)

packed = {{"rewards": np.zeros((8, 2))}}
for refused in (
    lambda: model(0.1),
    lambda: model(0.0).loss_fn({{}}, packed, None),
    lambda: model(0.0).eval_fn({{}}, packed),
):
    try:
        refused()
    except UsageError as error:
        print(error)
"""


def test_dropout_and_packed_rows_are_refused(folder):
    result = run(folder, "-c", REFUSED.format(arguments="tau=1.0"))
    assert result.returncode == 0, result.stderr[-3000:]
    dropout, *packed = result.stdout.splitlines()
    assert dropout.startswith("network.T5Config.dropout_rate is 0.1: the loss is computed without")
    said = "TASK_FEATURE_LENGTHS has rewards 2: rows are not packed inside T5X; give 1,"
    assert [line[: len(said)] for line in packed] == [said, said]


def test_a_checkpoint_of_another_size_is_refused(folder):
    line = refusal(folder, "dro_v", "v1_1_scanned", "never")
    assert "parameters are not those of network.T5Config: " in line
    kernel = "decoder/layers_2/encoder_decoder_attention/key/kernel"
    assert f"{kernel} [4, 6] there and absent in such a model" in line


ORDINARY = """
from __gin__ import dynamic_registration
from t5x import models
MODEL = @models.EncoderDecoderModel()
"""


CONVERT = ("-m", "dro_jax.cli.main", "convert")
PIECES = HERE / "golden" / "v1_1" / "spiece.model"


@pytest.fixture(scope="module")
def with_value(folder):
    """A run's folder: T5X's scanned model, and a value network beside it."""
    source = t5x_checkpoints.open_model(t5x_checkpoints.find(folder / "v1_1_scanned"))
    value = {
        name: StoredArray(shape, lambda shape=shape: np.ones(shape, np.float32))
        for name, shape in parameter_shapes.shapes(source.config, value=True).items()
    }
    place = epath.Path(folder / "with_value" / "checkpoint_0")
    t5x_checkpoints.write_model(place, 0, source.policy, value, scan=False)
    given = (f"--from={place}", f"--vocabulary_file={PIECES}", f"--to={folder / 'run'}")
    run(folder, *CONVERT, *given).check_returncode()
    (folder / "ordinary.gin").write_text(ORDINARY)
    return folder / "run"


def test_fine_tuning_starts_from_what_convert_wrote_as_the_readme_says(folder, with_value):
    to = (f"--from={with_value}", f"--to={folder / 'exported'}", "--format=t5x")
    run(folder, *CONVERT, *to).check_returncode()
    start = t5x_checkpoints.open_model(t5x_checkpoints.find(folder / "exported"))
    assert start.value
    readme = (HERE.parents[1] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(utils.RestoreCheckpointConfig.*?)```", readme, re.S)
    importing = "from __gin__ import dynamic_registration\nfrom t5x import utils\n"
    (folder / "restoring.gin").write_text(importing + lines)
    base = "t5x/examples/t5/t5_1_1/base.gin"
    model = folder / "exported" / "model.gin"
    runs = ["t5x/configs/runs/finetune.gin", "t5x/dro_v.gin"]
    settings = {
        "MODEL_DIR": str(folder / "fine_tuned"),
        "TASK_FEATURE_LENGTHS": {"inputs": 13, "targets": 8},
        "VOCABULARY_FILE": str(folder / "exported" / "vocabulary.model"),
        "network.T5Config.dtype": "float32",
        "TRAIN_STEPS": 1,
        "USE_CACHED_TASKS": False,
        "RANDOM_SEED": 0,
        "utils.create_learning_rate_scheduler.warmup_steps": 1,
        "train.train_eval_dataset_cfg": None,
        "train.infer_eval_dataset_cfg": None,
    }
    files = [base, *runs, model, folder / "ordinary.gin", folder / "restoring.gin"]
    result = run(folder, "-m", "t5x.train", *flags(folder, files, **settings))
    assert result.returncode == 0, result.stderr[-3000:]
    tuned = t5x_checkpoints.open_model(t5x_checkpoints.find(folder / "fine_tuned"))
    assert not tuned.value
    # A step of 0.001 times a parameter's size, at most: these are the exported weights, moved a little.
    for name, array in start.policy.items():
        moved = np.abs(tuned.policy[name].read() - array.read()).max()
        assert 0 < moved < 0.02, name


def test_t5x_s_own_model_reads_what_convert_wrote(folder, with_value):
    scores = {}
    for name, network in (
        ("v1_1_scanned", "scalable_t5"),
        ("t5x", "t5"),
        ("t5x_scanned", "scalable_t5"),
    ):
        if name == "v1_1_scanned":
            place, model = folder / name / "checkpoint_5", folder / "t5x_scanned.gin"
            vocabulary = PIECES
            scanned = TINY.replace("examples.t5", "examples.scalable_t5")
            model.write_text(scanned.replace("examples/t5", "examples/scalable_t5").format(2, 3))
        else:
            to = (f"--from={with_value}", f"--to={folder / name}", f"--format={name}")
            run(folder, *CONVERT, *to).check_returncode()
            place, model = folder / name / "checkpoint_0", folder / name / "model.gin"
            vocabulary = folder / name / "vocabulary.model"
        base = f"t5x/examples/{network}/t5_1_1/base.gin"
        files = [base, "t5x/infer.gin", "t5x/dro_v.gin", model, folder / "ordinary.gin"]
        if name == "v1_1_scanned":
            # This one includes the base.
            files = [model, *files[1:3], files[4]]
        settings = {
            "CHECKPOINT_PATH": str(place),
            "INFER_OUTPUT_DIR": str(folder / f"scores of {name}"),
            "infer.mode": "score",
            "DROPOUT_RATE": 0.0,
            "TASK_FEATURE_LENGTHS": {"inputs": 13, "targets": 8},
            # SeqIO tells vocabularies apart by their paths.
            "VOCABULARY_FILE": str(vocabulary),
            "network.T5Config.dtype": "float32",
        }
        result = run(folder, "-m", "t5x.infer", *flags(folder, files, **settings))
        assert result.returncode == 0, result.stderr[-3000:]
        (path,) = (folder / f"scores of {name}").glob("feedback-score.jsonl-*-of-00001")
        rows = path.read_text().splitlines()
        scores[name] = [json.loads(line)["score"] for line in rows]
    assert len(scores["t5x"]) > 4
    assert np.ptp(scores["t5x"]) > 1
    assert np.allclose(scores["t5x"], scores["v1_1_scanned"], atol=1e-4)
    assert np.allclose(scores["t5x_scanned"], scores["v1_1_scanned"], atol=1e-5)
