"""A judge beside the training: what it is asked, what is logged and kept, and what a resumed run does not do again."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from dro_jax.cli import generate
from dro_jax.data.feedback import FeedbackFile, read_feedback
from dro_jax.errors import UsageError
from dro_jax.training import checkpoints

REWARD = """
def noise(prompts, answers):
    return [sum(map(ord, answer)) % 97 for answer in answers]
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory, train, sft_run):
    """Three evaluations of a run with a judge, stopped after the second and gone on with."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "rewards_of_test.py").write_text(REWARD)
    settings = {
        "MODEL_DIR": str(folder / "run"),
        "INIT_CHECKPOINT": str(sft_run.directory),
        "JUDGE": "reward:rewards_of_test:noise",
        "win_rates.WinRate.prompts": 7,
        "POLICY_LEARNING_RATE": 1e-1,
        "loop.Periods.evaluate": 2,
        "loop.Periods.checkpoint": 2,
        "train.train.keep_last": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        result = train(**settings, TRAIN_STEPS=4)
        assert result.code == 0, result.err
        first = {
            path.name: path.stat().st_mtime_ns for path in (folder / "run/side_by_side").iterdir()
        }
        again = train(**settings)
    assert again.code == 0, again.err
    return folder / "run", result.out + again.out, first


def completions(folder, name):
    (path,) = folder.joinpath("side_by_side").glob(f"{name}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def win_rate(folder, step):
    def reward(text):
        return sum(map(ord, text)) % 97

    rows = zip(completions(folder, f"step_{step}"), completions(folder, "reference"), strict=True)
    scores = [(reward(p["completion"]), reward(r["completion"])) for p, r in rows]
    return float(np.mean([1.0 if p > r else 0.5 if p == r else 0.0 for p, r in scores]))


def test_the_logs_say_who_won(judged):
    folder, out, _ = judged
    events = EventAccumulator(str(folder / "training_eval"))
    events.Reload()
    logged = {
        e.step: float(tensor_util.make_ndarray(e.tensor_proto))
        for e in events.Tensors("side_by_side/win_rate")
    }
    assert logged == pytest.approx({step: win_rate(folder, step) for step in (2, 4, 6)})
    assert len(set(logged.values())) > 1
    for step, rate in logged.items():
        assert f"side by side, step {step}  win rate over the reference {rate:.4g}" in out


def test_the_prompts_are_held_out_and_the_answers_the_policies_own(judged, feedback_file):
    folder, _, _ = judged
    file = FeedbackFile(str(feedback_file), validation_fraction=0.3)
    held_out = list(dict.fromkeys(r.prompt for r in read_feedback(file, "validation")))[:7]
    last = completions(folder, "step_6")
    assert [row["prompt"] for row in last] == held_out
    policy = generate.load_policy(str(folder))
    decoding = generate.Decoding(policy.lengths["targets"])
    expected = generate.complete(policy, held_out, decoding, seed=1, batch_size=32)
    assert [row["completion"] for row in last] == [c.text for c in expected]
    reference = generate.load_policy(str(folder / "reference"))
    expected = generate.complete(reference, held_out, decoding, seed=0, batch_size=32)
    assert [row["completion"] for row in completions(folder, "reference")] == [
        c.text for c in expected
    ]


def test_a_resumed_run_keeps_what_was_answered(judged):
    folder, _, first = judged
    now = {path.name: path.stat().st_mtime_ns for path in (folder / "side_by_side").iterdir()}
    assert {name: now[name] for name in first} == first
    assert any("step_6" in name for name in set(now) - set(first))


def test_the_best_is_kept_and_has_a_name(judged):
    folder, _, _ = judged
    rates = {step: win_rate(folder, step) for step in (2, 4, 6)}
    best = max(rates, key=lambda step: (rates[step], step))
    assert checkpoints.find(folder / "best") == (folder, best)
    assert set(checkpoints.steps(folder)) == {best, 6}
    assert checkpoints.read_meta(folder, 6)["win_rate"] == rates[6]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"JUDGE": "oracle"}, "oracle: there is no such judge"),
        ({"JUDGE": 3}, "JUDGE is 3: give a judge's name"),
        ({"JUDGE": "llm"}, "OPENAI_BASE_URL is not set"),
        (
            {"JUDGE": "reward:math:hypot", "loop.Periods.evaluate": 3},
            "Periods.evaluate is 3 and Periods.checkpoint 4: with a JUDGE",
        ),
        (
            {"JUDGE": "reward:math:hypot", "feedback.FeedbackFile.validation_fraction": 0.0},
            "0 prompts are held out, and JUDGE needs two",
        ),
        ({"JUDGE": "reward:math:hypot", "win_rates.WinRate.prompts": 1}, "WinRate.prompts is 1"),
    ],
)
def test_mistakes(settings, line, train, sft_run, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    folder = tmp_path / "run"
    base = {"MODEL_DIR": str(folder), "INIT_CHECKPOINT": str(sft_run.directory)}
    periods = {"loop.Periods.evaluate": 4}
    result = train(**base | periods | settings)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.splitlines()) == 1
    assert not list(folder.glob("checkpoint_*"))


def test_a_method_without_a_reference_has_nobody_to_be_held_against(train, tmp_path):
    result = train("runs/sft_tiny.gin", MODEL_DIR=str(tmp_path / "run"), JUDGE="reward:math:hypot")
    assert result.code == 2
    assert "no reference to hold the policy against" in result.err


def test_a_run_that_nobody_judged_has_no_best(sft_run):
    with pytest.raises(UsageError, match="no checkpoint of that run was held against its ref"):
        checkpoints.find(sft_run.directory / "best")
