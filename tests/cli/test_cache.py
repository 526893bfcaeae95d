"""`dro_jax cache`: training from it is training without it, and what does not fit it is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from dro_jax.cli import generate
from dro_jax.data import caching
from dro_jax.data.feedback import RewardStatistics
from dro_jax.training import checkpoints

LENGTHS = {"inputs": 40, "targets": 24}


@pytest.fixture
def both(command, train_flags, feedback_file, sft_run, tmp_path):
    """Runs `cache` or `train` on the same settings."""

    def call(subcommand, method="dro_v", **settings):
        defaults = {
            "FEEDBACK_FILE": str(feedback_file),
            "MODEL_DIR": str(tmp_path / "out"),
            "INIT_CHECKPOINT": str(sft_run.directory),
            "CACHE_DIR": str(tmp_path / "cache"),
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "TRAIN_STEPS": 3,
        }
        _, *flags = train_flags("runs/dro_v_tiny.gin", **(defaults | settings))
        return command(subcommand, flags[0], f"--gin_file=algorithms/{method}.gin", *flags[1:])

    return call


@pytest.fixture
def trained_both_ways(both, watching, tmp_path):
    """Trains from the cache and without it, in folders of these names; gives the batches of each."""

    def train(**settings):
        batches = []
        for name, cache in (("cached", str(tmp_path / "cache")), ("plain", None)):
            with watching() as seen:
                result = both("train", CACHE_DIR=cache, MODEL_DIR=str(tmp_path / name), **settings)
            assert (result.code, result.err) == (0, "")
            batches.append(seen)
        return batches

    return train


def losses(directory):
    """Of the training steps that were logged, and of the held-out split, from TensorBoard."""
    found = []
    for name in ("train", "training_eval"):
        events = EventAccumulator(str(directory / name))
        events.Reload()
        for tag in sorted(events.Tags()["tensors"]):
            if tag.startswith("loss"):
                found += [float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
    return found


@pytest.mark.parametrize(
    ("method", "max_examples"), [("dro_v", 1), ("dro_v", 3), ("kto", 3), ("dro_two_sample", 1)]
)
def test_training_on_a_cache_is_training_without_it(
    method, max_examples, cache_made, both, trained_both_ways, tmp_path
):
    if method == "dro_v":
        shutil.copytree(cache_made, tmp_path / "cache")
    else:
        made = both("cache", method)
        assert (made.code, made.err) == (0, "")
        assert "60 examples, " in made.out
    settings = {"method": method, "MAX_EXAMPLES": max_examples}
    batches = trained_both_ways(**settings)
    assert len(batches[0]) == len(batches[1]) > 3
    for cached, plain in zip(*batches, strict=True):
        log_probs = {name for name in cached if "log_probs" in name}
        assert log_probs == {"reference_log_probs"} | (
            {"mismatched_reference_log_probs"} if method == "kto" else set()
        )
        assert set(cached) == set(plain) | log_probs
        for name, array in plain.items():
            np.testing.assert_array_equal(cached[name], array)
        assert np.all((cached["reference_log_probs"] < 0) == (cached["reward_weights"] > 0))
    states = [generate.load_policy(str(tmp_path / name)).params for name in ("cached", "plain")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *states)
    ours, theirs = (losses(tmp_path / name) for name in ("cached", "plain"))
    assert len(ours) > 3
    assert ours == pytest.approx(theirs, rel=1e-5)
    # It is stored for later all the same.
    assert checkpoints.steps(tmp_path / "cached" / "reference") == [0]


def test_a_cached_run_stops_and_goes_on(cache_made, both, watching, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    with watching(interrupt_at=2):
        assert both("train").code == 75
    # What a resumed run needs of the reference is in the cache.
    shutil.rmtree(tmp_path / "out" / "reference")
    assert both("train", INIT_CHECKPOINT=None).code == 0


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 20}}, "lengths {'inputs': 40, 't"),
        ({"train__drop_overlong": True}, "drop_overlong False there, True here"),
        ({"feedback__FeedbackFile__validation_fraction": 0.2}, "validation_fraction 0.3 there, 0"),
        ({"method": "kto"}, "mismatched False there, True here"),
        ({"method": "dro_v_single_net"}, "reserved_entry False there, True here"),
        ({"INIT_CHECKPOINT": None}, "give the INIT_CHECKPOINT that the cache was made with"),
    ],
)
def test_a_cache_of_something_else_is_refused(settings, difference, cache_made, both, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    result = both("train", **settings)
    assert result.code == 2
    assert difference in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_reference_is_refused(cache_made, both, sft_run, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    result = both("train", INIT_CHECKPOINT=str(sft_run.directory / "checkpoint_4"))
    assert result.code == 2
    assert "the cache was made with another reference '" in result.err


@pytest.fixture(scope="module")
def cache_made(command, train_flags, feedback_file, sft_run, tmp_path_factory):
    """A finished cache for DRO-V; copies of it may be damaged."""
    folder = tmp_path_factory.mktemp("cache")
    flags = train_flags(
        "runs/dro_v_tiny.gin",
        FEEDBACK_FILE=str(feedback_file),
        MODEL_DIR="out",
        INIT_CHECKPOINT=str(sft_run.directory),
        CACHE_DIR=str(folder),
        TASK_FEATURE_LENGTHS=LENGTHS,
        TRAIN_STEPS=3,
    )
    assert command("cache", *flags[1:]).code == 0
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def no_counts(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"counts": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.tfrecord-00000-of-00001", cut, "bytes where"),
        ("train.tfrecord-00000-of-00001", os.remove, "is missing"),
        ("manifest.json", os.remove, "is missing or damaged"),
        ("manifest.json", lambda p: p.write_text("{}"), "is not a manifest"),
        ("manifest.json", lambda p: p.write_text('{"facts"'), "is missing or damaged"),
        ("manifest.json", no_counts, "the manifest lacks what training needs"),
        ("info.train.json", cut, "bytes where"),
        ("stats.validation.json", os.remove, "is missing"),
        ("COMPLETED", os.remove, "the cache is not finished; run the same `dro_jax cache` again"),
    ],
)
def test_a_damaged_cache_is_named_and_refused(name, damage, message, cache_made, both, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    damage(tmp_path / "cache" / "feedback" / name)
    result = both("train")
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_caching_says_what_it_needs(both, tmp_path):
    assert "CACHE_DIR must be given: add" in both("cache", CACHE_DIR=None).err
    assert "INIT_CHECKPOINT must be given" in both("cache", INIT_CHECKPOINT=None).err
    assert "no cache here; make one" in both("train").err
    assert not (tmp_path / "cache").exists()


def test_a_flipped_bit_is_named_when_it_is_read(cache_made, both, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    shard = tmp_path / "cache" / "feedback" / "train.tfrecord-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = both("train")
    assert result.code == 2
    assert "feedback: cannot be read" in result.err


def test_a_cache_is_of_its_rows(cache_made, both, feedback_file, tmp_path):
    shutil.copytree(cache_made, tmp_path / "cache")
    lines = feedback_file.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([*lines[:10], *lines[11:]]))
    for subcommand in ("cache", "train"):
        result = both(subcommand, FEEDBACK_FILE=str(other))
        assert result.code == 2
        assert "the cache was made with another rows '" in result.err
    result = both("train", FEEDBACK_FILE=str(tmp_path / "oth*.jsonl"))
    assert result.code == 2
    assert "the cache was made with another rows '" in result.err
    # A cache serves when the file is gone, or elsewhere with the same rows.
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text("".join(lines))
    for name, path in (("a", elsewhere), ("b", tmp_path / "gone.jsonl")):
        result = both("train", FEEDBACK_FILE=str(path), MODEL_DIR=str(tmp_path / name))
        assert result.code == 0, result.err


def test_a_killed_caching_goes_on_where_it_was(cache_made, both, monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "SHARD", 14)
    monkeypatch.setattr(caching, "PART", 3)
    whole = both("cache", CACHE_DIR=str(tmp_path / "whole"))
    assert whole.code == 0
    written = []
    original = caching._write_part

    def write(part, *arguments):
        if len(written) == 7:
            epath.Path(f"{part}.partial").write_bytes(b"half of it")
            raise SystemExit(9)
        written.append(part.name)
        original(part, *arguments)

    monkeypatch.setattr(caching, "_write_part", write)
    assert both("cache").code == 9
    other = {"TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 20}}
    assert "another lengths {" in both("cache", **other).err
    assert "the cache is not finished" in both("train").err
    rewritten = []
    monkeypatch.setattr(
        caching,
        "_write_part",
        lambda part, *arguments: (rewritten.append(part.name), original(part, *arguments)),
    )
    assert both("cache").code == 0
    assert not set(written) & set(rewritten)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "feedback").iterdir()}
        for name in ("cache", "whole")
    )
    assert ours == theirs
    assert len(ours) > 8
    manifest = json.loads(ours["manifest.json"])
    assert manifest["counts"]["summary"]["rows"] == 60
    assert manifest["counts"]["overlong"]["completions"] == 0


def test_of_several_processes_the_writer_s_view_decides_what_is_scored(cache_made, tmp_path):
    """Scoring takes all of them: one that sees other files, or none, must not score other parts."""
    from dro_jax.data.feedback import FeedbackFile
    from dro_jax.data.tasks import feedback_task
    from dro_jax.data.vocabulary import load_vocabulary

    rows = [{"prompt": f"p{i}", "completion": "c", "reward": i % 2} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    feedback = FeedbackFile(str(file), validation_fraction=0.0)
    said = []

    def call(process, **arguments):
        task = feedback_task(
            feedback,
            vocabulary=load_vocabulary(None),
            statistics=RewardStatistics(0.5, 0.5),
            num_input_examples={"train": 40, "validation": 0},
        )
        scored = []

        def score(examples):
            scored.append(len(examples))
            if process == "killed" and len(scored) == 3:
                raise KeyboardInterrupt
            return {"reference_log_probs": np.zeros(len(examples), np.float32)}

        with contextlib.suppress(KeyboardInterrupt):
            caching.write(
                tmp_path / ("cache" if arguments.get("writes", True) else "elsewhere"),
                task,
                facts={},
                counts={},
                score=score,
                scored=["reference_log_probs"],
                **arguments,
            )
        return scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "PART", 8)
        assert call("killed") == [8, 8, 8]
        of_writer = call("writer", of_writer=lambda work: said.append(work()) or said[-1])
        others = iter(said)
        of_other = call("other", writes=False, of_writer=lambda work: next(others))
    assert of_writer == of_other == [8, 8, 8]
    assert next(others, None) is None
    assert not (tmp_path / "elsewhere").exists()


def test_a_cache_that_seqio_made_is_trained_from(both, feedback_file, trained_both_ways, tmp_path):
    """The files of `seqio_cache_tasks` for README's one line, written as Beam would: it is not in the test extra."""
    import seqio
    import tensorflow as tf

    from dro_jax.data.feedback import FeedbackFile
    from dro_jax.data.tasks import register_feedback_task

    task = register_feedback_task("of_seqio", FeedbackFile(str(feedback_file)))
    seqio.TaskRegistry.remove("of_seqio")
    folder = tmp_path / "cache" / "feedback"
    folder.mkdir(parents=True)
    for split in task.splits:
        source = task.source.get_dataset(split, shuffle=False)
        rows = list(task.preprocess_precache(source).as_numpy_iterator())
        kinds = {
            name: {"dtype": np.asarray(value).dtype.name, "shape": [None] * np.ndim(value)}
            for name, value in rows[0].items()
        }
        info = {"features": kinds, "num_shards": 1, "seqio_version": seqio.__version__}
        (folder / f"info.{split}.json").write_text(json.dumps(info))
        (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))
        with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as file:
            for row in rows:
                file.write(seqio.dict_to_tfexample(row).SerializeToString())
    (folder / "COMPLETED").write_text("COMPLETED")
    settings = {"feedback__FeedbackFile__validation_fraction": None}
    batches = trained_both_ways(**settings)
    for cached, plain in zip(*batches, strict=True):
        assert cached.keys() == plain.keys()
        for name, array in plain.items():
            np.testing.assert_array_equal(cached[name], array)
    refused = both("train", MODEL_DIR=str(tmp_path / "other"))
    assert refused.code == 2
    assert "but the feedback file" in refused.err
    refused = both("train", "kto", MODEL_DIR=str(tmp_path / "other"), **settings)
    assert refused.code == 2
    assert "has no mismatched_targets, which this method takes" in refused.err


def test_a_cache_is_seqios(cache_made, feedback_file):
    """SeqIO reads it by itself, by the task's name and the folder."""
    import seqio

    from dro_jax.data.feedback import FeedbackFile
    from dro_jax.data.tasks import feedback_task
    from dro_jax.data.vocabulary import load_vocabulary

    seqio.set_global_cache_dirs([str(cache_made)])
    try:
        task = feedback_task(
            FeedbackFile("gone.jsonl"),
            vocabulary=load_vocabulary(None),
            statistics=RewardStatistics(0.0, 1.0),
        )
        rows = list(
            task.get_dataset(LENGTHS, "train", use_cached=True, shuffle=False).as_numpy_iterator()
        )
        assert task.get_cached_stats("train")["examples"] == len(rows)
    finally:
        seqio.set_global_cache_dirs([])
    assert set(rows[0]) == {"inputs", "targets", "rewards", "reference_log_probs"}
    assert abs(np.mean([row["rewards"] for row in rows])) < 1e-6


def test_sigkill_in_mid_caching(train_flags, feedback_file, sft_run, tmp_path):
    flags = train_flags(
        "runs/dro_v_tiny.gin",
        FEEDBACK_FILE=str(feedback_file),
        MODEL_DIR=str(tmp_path / "out"),
        INIT_CHECKPOINT=str(sft_run.directory),
        CACHE_DIR=str(tmp_path / "cache"),
        TRAIN_STEPS=3,
    )
    code = (
        "import sys; from dro_jax.data import caching; caching.SHARD = 8; caching.PART = 2; "
        "from dro_jax.cli.main import main; sys.exit(main())"
    )
    arguments = [sys.executable, "-c", code, "cache", *flags[1:]]
    folder = tmp_path / "cache" / "feedback"
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(folder.glob("*.tfrecord-*-of-000??"))) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "COMPLETED").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tfrecord-*-of-000??")}
    assert len(kept) >= 2
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    for name, changed in kept.items():
        assert (folder / name).stat().st_mtime_ns == changed
    manifest = caching.read_manifest(tmp_path / "cache")
    shards = [name for name in manifest.files if "tfrecord" in name]
    assert sorted(shards) == sorted(path.name for path in folder.glob("*.tfrecord-*"))
