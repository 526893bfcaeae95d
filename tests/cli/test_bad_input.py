"""What a person can get wrong: one line that names it, exit code 2, nothing written, nothing compiled."""

import json
import os
import shutil

import jax
import pytest

from dro_jax.training import loop

GOOD = [
    {"prompt": f"prompt {i}", "completion": "yes" if i % 2 else "no", "reward": i % 3}
    for i in range(40)
]


@pytest.fixture
def compiled(monkeypatch):
    """Names of the programs that are compiled, and a training loop that must not be reached."""
    names = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details.get("fun_name", event))

    def train(*_, **__):
        pytest.fail("training was reached")

    monkeypatch.setattr(loop, "train", train)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(train, tmp_path, compiled):
    """Runs a command that must be refused; returns the one line on stderr."""

    def run(gin_file="runs/dro_v_tiny.gin", may_compile=False, **settings):
        directory = settings.setdefault("MODEL_DIR", str(tmp_path / "out"))
        existed = os.path.exists(str(directory))
        result = train(gin_file, **settings)
        assert result.code == 2, result
        (line,) = result.err.splitlines()
        assert line.startswith("dro_jax: ")
        assert result.out == ""
        assert os.path.exists(str(directory)) == existed
        assert may_compile or compiled == []
        return line.removeprefix("dro_jax: ")

    return run


def write_rows(path, rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def bad_line(row):
    return [*GOOD[:6], row, *GOOD[6:]]


NAN_ROW = '{"prompt": "p", "completion": "c", "reward": NaN}'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not JSON", ", line 7: is not JSON (Expecting value)"),
        ('["a"]', ", line 7: is"),
        ({"completion": "c", "reward": 1}, ", line 7: field 'prompt' is missing"),
        ({"prompt": "p", "reward": 1}, ", line 7: field 'completion' (or 'response') is missing"),
        (
            {"prompt": "p", "completion": "c"},
            ", line 7: field 'reward' (or 'label', 'score') is missing",
        ),
        (NAN_ROW, ", line 7: field 'reward' is NaN, not a finite number"),
        (NAN_ROW.replace("NaN", "1e999"), ", line 7: field 'reward' is Infinity, not a finite"),
        (NAN_ROW.replace("NaN", '"good"'), ", line 7: field 'reward' is \"good\", not a number"),
        (
            {"prompt": "p", "completion": "c", "reward": 1, "label": True},
            ", line 7: fields 'reward' and 'label' are both given; keep one of them",
        ),
        (
            {"prompt": "p", "completion": "c", "response": "c", "reward": 1},
            ", line 7: fields 'completion' and 'response' are both given",
        ),
    ],
)
def test_a_bad_row_is_named(refused, tmp_path, row, message):
    path = write_rows(tmp_path / "bad.jsonl", bad_line(row))
    line = refused(FEEDBACK_FILE=str(path))
    assert line.startswith(f"{path}{message}")
    assert "skip_bad_rows" in line


def test_missing_file(refused, tmp_path):
    path = tmp_path / "nowhere.jsonl"
    assert refused(FEEDBACK_FILE=str(path)).startswith(f"{path}: no such file")


def test_directory_for_a_file(refused, tmp_path):
    assert refused(FEEDBACK_FILE=str(tmp_path)).startswith(f"{tmp_path}: is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(refused, tmp_path):
    path = write_rows(tmp_path / "secret.jsonl", GOOD)
    path.chmod(0)
    line = refused(FEEDBACK_FILE=str(path))
    assert line.startswith(f"{path}: cannot be read (Permission denied)")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_file(refused, tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    assert refused(FEEDBACK_FILE=str(path)).startswith(f"{path}: the file has no rows")


def test_equal_rewards(refused, tmp_path):
    path = write_rows(tmp_path / "equal.jsonl", [row | {"reward": 0.1} for row in GOOD])
    line = refused(FEEDBACK_FILE=str(path))
    assert line.startswith(f"{path}: field 'reward' is the same (0.1) in all ")
    assert "variance 0" in line


def test_too_many_empty_rows(refused, tmp_path):
    rows = [row | {"completion": " "} if i in (3, 5, 9) else row for i, row in enumerate(GOOD)]
    path = write_rows(tmp_path / "empties.jsonl", rows)
    line = refused(FEEDBACK_FILE=str(path))
    assert line.startswith(f"{path}: 3 of 40 rows are unusable")
    assert "more than max_unusable_fraction = 0.05" in line
    assert f"the first: {path}, line 4: field 'completion' is empty" in line


def test_skip_bad_rows_has_a_limit(refused, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [*GOOD, NAN_ROW, "{", "{"])
    line = refused(FEEDBACK_FILE=str(path), feedback__FeedbackFile__skip_bad_rows=True)
    assert line.startswith(f"{path}: 3 of 43 rows are unusable (3 bad")
    assert f"{path}, line 41: " in line


def test_skip_bad_rows_counts_those_within_the_limit(train, tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def reached(*_, **__):
        raise ReachedError

    monkeypatch.setattr("dro_jax.training.checkpoints.restore_latest", reached)
    path = write_rows(tmp_path / "bad.jsonl", [*GOOD, NAN_ROW, "{"])
    with pytest.raises(ReachedError):
        train(
            FEEDBACK_FILE=str(path),
            MODEL_DIR=str(tmp_path / "out"),
            feedback__FeedbackFile__skip_bad_rows=True,
        )


def test_validation_fraction_out_of_range(refused):
    line = refused(feedback__FeedbackFile__validation_fraction=1.5)
    assert line == "validation_fraction is 1.5; set it in [0, 1)"


def test_init_checkpoint_without_a_checkpoint(refused, tmp_path):
    line = refused(INIT_CHECKPOINT=str(tmp_path))
    assert line.startswith(f"{tmp_path}: no checkpoint here (looked for checkpoint_<step>)")


def test_init_checkpoint_of_another_model(refused, sft_run):
    line = refused(INIT_CHECKPOINT=str(sft_run.directory), t5__T5Config__mlp_dim=32)
    assert line.startswith(f"{sft_run.directory}/checkpoint_6: this checkpoint has another model")
    assert "mlp_dim 16 there, 32 here" in line


@pytest.mark.usefixtures("damaged_reads")
def test_init_checkpoint_that_is_damaged(refused, sft_run, tmp_path):
    shutil.copytree(sft_run.directory, tmp_path / "sft")
    for path in (tmp_path / "sft" / "checkpoint_6" / "policy").glob("**/d/*"):
        path.write_bytes(b"")
    line = refused(INIT_CHECKPOINT=str(tmp_path / "sft"), may_compile=True)
    assert line.startswith(f"{tmp_path}/sft/checkpoint_6: damaged")


def test_model_dir_of_another_model(refused, sft_run):
    directory = str(sft_run.directory)
    line = refused("runs/sft_tiny.gin", MODEL_DIR=directory, t5__T5Config__num_heads=4)
    assert line.startswith(f"{directory}/checkpoint_6: this checkpoint has another model")
    assert "num_heads 2 there, 4 here" in line
    assert "choose another MODEL_DIR" in line


def test_model_dir_of_another_algorithm(refused, sft_run):
    line = refused(MODEL_DIR=str(sft_run.directory))
    assert line.startswith(
        f"{sft_run.directory}/checkpoint_6: this checkpoint has another algorithm"
    )
    assert "'sft' there, 'dro_v' here" in line


@pytest.mark.usefixtures("damaged_reads")
@pytest.mark.parametrize("what", ["emptied", "flipped"])
def test_model_dir_with_damaged_checkpoints_only(refused, sft_run, tmp_path, what):
    directory = tmp_path / "damaged"
    shutil.copytree(sft_run.directory, directory)
    shutil.rmtree(directory / "checkpoint_4")
    for path in (directory / "checkpoint_6" / "policy").glob("**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(b"" if what == "emptied" else bytes(content))
    before = sorted(path.name for path in directory.rglob("*"))
    line = refused("runs/sft_tiny.gin", may_compile=True, MODEL_DIR=str(directory))
    assert line.startswith(f"{directory}/checkpoint_6: damaged")
    assert line.endswith("there is no older one: choose another MODEL_DIR")
    assert sorted(path.name for path in directory.rglob("*")) == before


@pytest.mark.usefixtures("damaged_reads")
def test_a_reference_that_is_lost_for_good(refused, dro_v_run, sft_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(dro_v_run.directory, directory)
    for path in (directory / "reference" / "checkpoint_0" / "policy").glob("**/d/*"):
        path.write_bytes(b"")
    before = sorted(path.name for path in directory.rglob("*"))
    line = refused(MODEL_DIR=str(directory), may_compile=True)
    assert line.startswith(f"{directory}/reference/checkpoint_0: damaged")
    advice = ": give the INIT_CHECKPOINT that the run began with, or choose another MODEL_DIR"
    assert line.endswith(advice)
    older = str(sft_run.directory / "checkpoint_4")
    line = refused(MODEL_DIR=str(directory), INIT_CHECKPOINT=older, may_compile=True)
    assert f", and {older} has other weights: give the INIT_CHECKPOINT that the run" in line
    assert sorted(path.name for path in directory.rglob("*")) == before
    shutil.rmtree(directory / "reference")
    line = refused(MODEL_DIR=str(directory), may_compile=True)
    assert line.startswith(
        f"{directory}/reference: the run's reference is not there any more: give"
    )


def test_a_place_for_the_reference_that_is_taken(refused, sft_run, tmp_path):
    """Where a run's reference would be written nothing else may lie: it would be taken for it, or lost."""
    advice = (
        "reference: the run's reference is to be kept there, and another run or model is: choose"
    )
    shutil.copytree(sft_run.directory, tmp_path / "run" / "reference")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    inside = tmp_path / "run" / "reference" / "checkpoint_6"
    for start in (sft_run.directory, inside, inside.parent):
        line = refused(MODEL_DIR=str(tmp_path / "run"), INIT_CHECKPOINT=str(start))
        assert advice in line
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    imported = tmp_path / "other" / "reference"
    shutil.copytree(sft_run.directory / "checkpoint_6", imported / "checkpoint_0")
    (imported / "model.gin").write_text("")
    line = refused(MODEL_DIR=str(imported.parent), INIT_CHECKPOINT=str(sft_run.directory))
    assert advice in line


def test_model_dir_under_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(MODEL_DIR=str(tmp_path / "file" / "out"))
    assert line.startswith(f"{tmp_path}/file/out: cannot be written (Not a directory)")


def test_model_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(MODEL_DIR=str(tmp_path / "file"))
    assert line.startswith(f"{tmp_path}/file: cannot be written (")
    assert (tmp_path / "file").read_text() == "in the way"


def test_model_dir_where_nothing_can_be_written(refused):
    line = refused(MODEL_DIR="/proc/dro_jax")
    assert line.startswith("/proc/dro_jax: cannot be written (")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_model_dir(refused, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    line = refused(MODEL_DIR=str(tmp_path / "out"))
    assert line.startswith(f"{tmp_path}/out: cannot be written (Permission denied)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 3}, "mesh {'data': 3, 'fsdp': 1, 'model': 1} does not fit 8 devices"),
        ({"model": 3}, "mesh {'data': -1, 'fsdp': 1, 'model': 3} does not fit 8 devices"),
        ({"fsdp": 0}, "mesh {'data': -1, 'fsdp': 0, 'model': 1}: give positive sizes"),
        ({"fsdp": -1}, "mesh {'data': -1, 'fsdp': -1, 'model': 1}: give positive sizes"),
    ],
)
def test_mesh_that_does_not_fit(refused, settings, message):
    axes = {f"partitioning__Partitioning__{axis}": size for axis, size in settings.items()}
    assert refused(**axes).startswith(message)


@pytest.mark.parametrize("batch_size", [0, -8, 12, "a", 8.0])
def test_batch_size_that_does_not_divide(refused, batch_size):
    line = refused(BATCH_SIZE=batch_size)
    assert line.startswith(f"BATCH_SIZE {batch_size!r} does not divide into 8 data shards")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TRAIN_STEPS": 0}, "TRAIN_STEPS is 0: give a whole number of at least 1"),
        ({"TRAIN_STEPS": "200"}, "TRAIN_STEPS is '200': give a whole number"),
        ({"MICROBATCHES": 0}, "MICROBATCHES is 0: give a whole number of at least 1"),
        ({"MICROBATCHES": 2}, "BATCH_SIZE 8 does not divide into 8 data shards"),
        (
            {"partitioning__Partitioning__rules": (("embd", "fsdp"),)},
            "Partitioning.rules: there is no logical axis 'embd'",
        ),
        ({"t5__T5Config__remat": "all"}, "T5Config.remat is 'all': give one of 'none', 'dots'"),
        ({"t5__T5Config__logits_chunk": 0}, "T5Config.logits_chunk is 0: give a whole number of"),
        ({"t5__T5Config__scan_layers": 1}, "T5Config.scan_layers is 1: give True or False"),
        ({"train__train__stall_seconds": 0}, "train.stall_seconds is 0: give a number greater"),
        (
            {"train__train__compilation_cache_dir": 5},
            "train.compilation_cache_dir is 5: give a path, or None",
        ),
        ({"TAU": -1}, "TAU (DroV.tau) is -1: give a number greater than 0"),
        ({"TAU": True}, "TAU (DroV.tau) is True: give a number greater than 0"),
        ({"MODEL_DIR": 3}, "MODEL_DIR is 3: give a path"),
        ({"FEEDBACK_FILE": 3}, "FEEDBACK_FILE is 3; give a path"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 13}}, "TASK_FEATURE_LENGTHS is {'inputs': 13}: write"),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 13, "targets": 0}},
            "TASK_FEATURE_LENGTHS['targets'] is 0: give a whole number of at least 2",
        ),
        (
            {"POLICY_LEARNING_RATE": -1e-4},
            "Adafactor.policy_learning_rate is -0.0001: give a number",
        ),
        ({"loop__Periods__log": 0}, "Periods.log is 0: give a whole number of at least 1"),
        ({"train__train__keep_last": 0}, "train.keep_last is 0: give a whole number of at least 1"),
        (
            {"partitioning__Partitioning__fsdp": "a"},
            "'fsdp': 'a', 'model': 1}: give positive sizes",
        ),
        ({"algorithms__DroV__values": "sngle"}, "DroV.values is 'sngle': give one of 'multiple'"),
        ({"t5__T5Config__dtype": "float16"}, "T5Config.dtype is 'float16': give one of 'auto'"),
        (
            {"t5__T5Config__mlp_activations": ("swish", "linear")},
            "T5Config.mlp_activations is ('swish', 'linear'): give one of",
        ),
        ({"t5__T5Config__emb_dim": 0}, "T5Config.emb_dim is 0: give a whole number of at least 1"),
        (
            {"feedback__FeedbackFile__validation_fraction": "a"},
            "validation_fraction is 'a'; set it in",
        ),
    ],
)
def test_settings_that_mean_nothing(refused, tmp_path, settings, message):
    directory = {"MODEL_DIR": str(tmp_path / "out")} | settings
    assert message in refused(**directory)


def test_vocabulary_larger_than_the_model(refused):
    line = refused(t5__T5Config__vocab_size=100)
    assert line.startswith("the vocabulary has 259 tokens but the model's vocab_size is 100")


def test_missing_vocabulary_file(refused, tmp_path):
    line = refused(VOCABULARY_FILE=str(tmp_path / "spiece.model"))
    assert line.startswith(f"{tmp_path}/spiece.model: no such file")
