"""`dro_jax paper` on a model of a few thousand parameters: stopped, gone on with, and called once more."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dro_jax.cli import configuration, paper
from dro_jax.data import demonstration
from dro_jax.data.feedback import FeedbackFile, read_feedback

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
    assert "smaller: DRO-V over SFT" in page.read_text()
    numbers = json.loads((folder / "paper.json").read_text())
    assert numbers["seeds"] == [3]
    assert 0 < numbers["test"]["dro_v"][0]["win_rate"] < 1

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
    assert {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()} == before


def test_a_training_that_fails_is_named_and_the_rest_goes_on(tmp_path, command):
    folder = tmp_path / "paper"
    result = command(*arguments(folder, "--jobs", "1"), "--gin.POLICY_LEARNING_RATE=-1")
    assert result.code == 1
    assert "seed_3/sft: dro_jax: Adafactor.policy_learning_rate is -1" in result.out
    assert result.err.startswith("dro_jax: 1 of the trainings failed")
    assert not (folder / "seed_3" / "dro_v").exists()
    assert "seed_3/sft failed" in Path(folder, "paper.md").read_text()


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
