"""`dro_jax paper` on a model of a few thousand parameters: stopped, gone on with, and called once more."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from dro_jax.cli import configuration, demo, paper, train
from dro_jax.data import demonstration
from dro_jax.data.feedback import FeedbackFile, RewardStatistics, read_feedback
from dro_jax.errors import UsageError
from dro_jax.training.loop import StopRequest

SETTINGS = {
    "t5.T5Config.emb_dim": 16,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 8,
    "t5.T5Config.mlp_dim": 16,
    "t5.T5Config.num_encoder_layers": 1,
    "t5.T5Config.num_decoder_layers": 1,
    "loop.Periods.log": 1,
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 40,
}


def arguments(folder, *extra):
    flags = [f"--gin.{name}={value!r}" for name, value in SETTINGS.items()]
    return ["paper", f"--workdir={folder}", "--seeds", "3", "--arms", "dro_v", *extra, *flags]


def test_stopped_and_gone_on_with_and_called_again(tmp_path, command):
    folder = tmp_path / "paper"
    program = [sys.executable, "-m", "dro_jax.cli.main", *arguments(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    log = folder / "logs" / "seed_3_sft.log"
    process = subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (log.exists() and "\nstep " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    # What it starts holds the lock as well, and would go on holding it were this process killed.
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    held = {os.readlink(fd) for fd in Path(f"/proc/{child}/fd").iterdir() if fd.exists()}
    assert str(folder / "lock") in held
    beside = command(*arguments(folder))
    assert (beside.code, beside.out) == (2, "")
    assert "another `dro_jax paper`" in beside.err
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 75, out
    assert "SIGTERM" in out
    assert "the same command goes on" in out
    assert "saved" in log.read_text()
    assert not (folder / "paper.md").exists()

    done = command(*arguments(folder))
    assert done.code == 0, done.out + done.err
    assert "goes on from step" in log.read_text()
    page = folder / "paper.md"
    assert str(page) in done.out
    assert "| dro_v over SFT | " in page.read_text()
    assert "40 steps of 8 examples, learning rates 0.0005 for the policy" in page.read_text()
    assert "Every training had TRAIN_STEPS = 40." in page.read_text()
    numbers = json.loads((folder / "paper.json").read_text())
    assert numbers["seeds"] == [3]
    assert 0 < numbers["test"]["dro_v"]["3"]["win_rate"] < 1

    # Test prompts are in no file, and the numbers are of them and of the validation prompts.
    sides = paper.split_prompts()
    file = FeedbackFile(str(folder / "seed_3" / "feedback.jsonl"), validation_fraction=0.1)
    seen = {row.prompt for row in read_feedback(file)}
    assert not seen & set(sides["test"])
    assert seen | set(sides["test"]) == set(demonstration.prompts())
    held_out = {row.prompt for row in read_feedback(file, "validation")}
    assert held_out == set(sides["validation"])
    with np.load(folder / "seed_3" / "dro_v" / paper.ANSWERS) as arrays:
        for split in ("validation", "test"):
            assert arrays[f"{split}/policy_log_prob"].shape == (len(sides[split]), 24)
        assert not np.array_equal(arrays["test/policy_log_prob"], arrays["test/reference_log_prob"])
        assert arrays["test/score"].max() == 6

    # Everything is there: the page is made anew and nothing is trained.
    page.unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()}
    assert command(*arguments(folder)).code == 0
    assert page.exists()

    # One seed more of one arm, and a run that was begun and has no answers.
    for arm in ("sft", "dro_v"):
        place = shutil.copytree(folder / "seed_3" / arm, folder / "seed_11" / arm)
        change(place / paper.CONFIG, "train.train.seed = 3", "train.train.seed = 11")
    shutil.copytree(folder / "seed_11" / "dro_v", folder / "seed_12" / "dro_v")
    change(
        folder / "seed_12/dro_v" / paper.CONFIG, "train.train.seed = 11", "train.train.seed = 12"
    )
    (folder / "seed_12" / "dro_v" / paper.ANSWERS).unlink()
    assert command(*arguments(folder)).code == 0
    numbers = json.loads((folder / "paper.json").read_text())
    assert numbers["seeds"] == [3, 11]
    assert "seed_12/dro_v is missing: was begun and has not ended" in page.read_text()

    # Numbers of other settings are not passed off as these.
    written = page.read_text()
    for extra, difference in {
        "--gin.TRAIN_STEPS=41": "train.train.num_steps = 40, and now it is 41",
        "--gin.optimizers.Adafactor.warmup_steps=7": "Adafactor.warmup_steps = 150, and now it is 7",
    }.items():
        other = command(*arguments(folder), extra)
        assert other.code == 2
        assert difference in other.err
    place = folder / "seed_3" / "dro_v"
    change(place / paper.CONFIG, "TAU = 1.0", "TAU = 0.5")
    other = command(*arguments(folder, "--seeds", "5"))
    assert f"{place}: was trained with DroV.tau = 0.5, and now it is 1.0; choose" in other.err
    assert not (folder / "seed_5").exists()
    assert page.read_text() == written
    assert {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()} == before

    # A run is measured as it was trained: by its own tau, against the reference that it keeps.
    read = paper.read_answers(epath.Path(place), "test")
    assert read.tau == 0.5
    pair = 1 / RewardStatistics.load_json(place / "reward_statistics.json").std
    np.testing.assert_allclose(read.rest_reward, read.scores.reward.min(axis=1) - pair)
    shutil.rmtree(folder / "seed_3" / "sft")
    (place / paper.ANSWERS).unlink()
    paper.measure(epath.Path(folder), paper.Run("dro_v", 3))
    again = paper.read_answers(epath.Path(place), "test")
    for name in ("policy_log_prob", "reference_log_prob", "value", "reward"):
        np.testing.assert_array_equal(getattr(again.scores, name), getattr(read.scores, name))


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_folder_is_one_call_s_alone_and_that_of_what_it_started(tmp_path):
    folder = epath.Path(tmp_path)
    with paper.alone(folder) as lock:
        with pytest.raises(UsageError, match="is at work here"), paper.alone(folder):
            pass
        left_behind = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    with pytest.raises(UsageError, match="is at work here"), paper.alone(folder):
        pass
    left_behind.kill()
    left_behind.wait()
    with paper.alone(folder):
        pass


def test_no_training_is_left_behind_when_something_else_fails(tmp_path, monkeypatch):
    started = []

    def start(directory, each, *_):
        started.append(subprocess.Popen(["sleep", "0" if each.arm == "kto" else "60"]))
        return started[-1]

    monkeypatch.setattr(paper, "start", start)
    runs = [paper.Run("dro_v", 0), paper.Run("kto", 0)]
    trained = paper.train_all(epath.Path(tmp_path), runs, 2, [], StopRequest(), lock=0)
    assert next(trained) == (paper.Run("kto", 0), None)
    assert started[0].poll() is None
    trained.close()
    assert [process.poll() for process in started] == [-signal.SIGTERM, 0]


def test_what_is_named_twice_is_trained_once(tmp_path, command, monkeypatch):
    wanted = []

    def train_missing(directory, runs, jobs, bindings, lock):
        wanted.extend(runs)
        assert jobs == min(8, len(os.sched_getaffinity(0)))
        return {}, train.Interrupted(0, "SIGTERM")

    monkeypatch.setattr(paper, "train_missing", train_missing)
    flags = ["--arms", "kto", "dro_v", "kto", "--seeds", "1", "0", "1"]
    assert command("paper", f"--workdir={tmp_path}", *flags).code == 75
    assert wanted == [paper.Run(arm, seed) for seed in (1, 0) for arm in ("kto", "dro_v")]


def test_no_test_prompt_is_among_those_that_the_demo_s_settings_were_looked_at_on():
    """As the page says of its hyper-parameters."""
    _, held_out = demonstration.split_prompts(demonstration.prompts(), demo.VALIDATION_FRACTION)
    sides = paper.split_prompts()
    assert sides["validation"] == held_out
    assert not set(sides["test"]) & set(held_out)
    assert len(sides["test"]) > 150


def test_a_training_that_fails_is_named_and_the_rest_goes_on(tmp_path, command):
    folder = tmp_path / "paper"
    result = command(*arguments(folder, "--jobs", "1"), "--gin.POLICY_LEARNING_RATE=-1")
    assert result.code == 1
    assert "seed_3/sft: dro_jax: Adafactor.policy_learning_rate is -1" in result.out
    assert result.err.startswith("dro_jax: 1 of the trainings failed")
    assert not (folder / "seed_3" / "dro_v").exists()
    text = Path(folder, "paper.md").read_text()
    assert "seed_3/sft is missing: dro_jax: Adafactor.policy_learning_rate is -1" in text
    assert "Neither DRO-V nor KTO" in text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--arms", "dro_w"], "--arms dro_w: choose from dro_p, dro_v, "),
        (["--jobs", "0"], "--jobs is 0"),
        (["--seeds", "-1"], "--seeds is -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(flags, line, tmp_path, command):
    result = command("paper", f"--workdir={tmp_path / 'paper'}", *flags)
    assert (result.code, result.out) == (2, "")
    assert line in result.err
    assert not (tmp_path / "paper").exists()


def test_every_arm_has_its_file_and_its_reference():
    arms = paper.all_arms()
    assert set(paper.MAIN_ARMS) < set(arms)
    for arm in arms:
        reference = paper.Run(arm, 0).reference.arm
        assert reference == ("larger_sft" if arm.startswith("larger_") else "sft")
        configuration.load(
            [f"{paper.FOLDER}/{reference}.gin"], ["FEEDBACK_FILE = 'x'", "MODEL_DIR = 'y'"]
        )
