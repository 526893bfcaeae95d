"""A judge beside the training: what it is asked, what is logged and kept, and what a resumed run does not do again."""

import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from dro_jax.cli import generate, win_rates
from dro_jax.cli.train import warn_of_changes
from dro_jax.data import demonstration
from dro_jax.data.feedback import FeedbackFile, read_feedback
from dro_jax.errors import UsageError
from dro_jax.evaluation.judges import Verdict
from dro_jax.training import checkpoints

REWARD = """
import json, pathlib

def noise(prompts, answers):
    folder = pathlib.Path(__file__).parent / "run" / "side_by_side"
    rows = [row for path in folder.glob("step_4_*") for row in path.read_text().splitlines()]
    # So that the last step, which is there anyhow, is not the best.
    liked = {json.loads(row)["completion"] for row in rows}
    return [sum(map(ord, answer)) % 97 + 100 * (answer in liked) for answer in answers]
"""


SETTINGS = {
    "win_rates.WinRate.prompts": 7,
    "POLICY_LEARNING_RATE": 1e-1,
    "loop.Periods.evaluate": 2,
    "loop.Periods.checkpoint": 2,
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, train, sft_run):
    """Three evaluations of a run with a judge, stopped after the second and gone on with."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "rewards_of_test.py").write_text(REWARD)
    settings = SETTINGS | {
        "MODEL_DIR": str(folder / "run"),
        "INIT_CHECKPOINT": str(sft_run.directory),
        "JUDGE": "reward:rewards_of_test:noise",
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
    liked = [row["completion"] for row in completions(folder, "step_4")] if step >= 4 else []

    def reward(text):
        return sum(map(ord, text)) % 97 + 100 * (text in liked)

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
    assert rates[4] > max(rates[2], rates[6])
    assert checkpoints.find(folder / "best") == (folder, 4)
    assert checkpoints.steps(folder) == [4, 6]
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
        # What it cannot do is seen before the first evaluation.
        ({"JUDGE": "reward:math:hypot"}, "--judge=reward:math:hypot: raised TypeError"),
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


def test_a_judge_that_fails_costs_a_win_rate_and_no_step(train, sft_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    import judge_server

    folder = tmp_path / "run"

    def respond(request):
        sampled = {path.name[:6] for path in (folder / "side_by_side").glob("step_*")}
        if sampled == {"step_2", "step_4"}:
            request.send(429, b"", Retry_After="3600")
        else:
            judge_server.prefer_longer(request)

    monkeypatch.setenv("DRO_JAX_JUDGE_MODEL", "oracle")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge_server.serving(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        result = train(
            **SETTINGS, MODEL_DIR=str(folder), INIT_CHECKPOINT=str(sft_run.directory), JUDGE="llm"
        )
    assert (result.code, result.err) == (0, "")
    out = " ".join(result.out.split())
    assert "no win rate of step 4, and training goes on: http" in out
    assert "asks to wait for longer than 600 s" in out
    rates = [checkpoints.read_meta(folder, step)["win_rate"] for step in (2, 4, 6)]
    assert [rate is None for rate in rates] == [False, True, False]
    assert [f"side by side, step {step} " in out for step in (2, 4, 6)] == [True, False, True]
    assert checkpoints.read_meta(folder, 6)["settings"]["JUDGE"] == "llm (oracle)"


def test_answers_of_other_weights_are_not_taken_for_these(sft_run, tmp_path):
    policies = [generate.load_policy(str(sft_run.directory / f"checkpoint_{k}")) for k in (4, 6)]
    prompts = demonstration.prompts("abcd")[:12]
    asked = []

    def judge(comparisons):
        asked.append(comparisons)
        return (Verdict("A") for _ in comparisons)

    def hold(reference, dtype="float32"):
        config = dataclasses.replace(policies[0].config, dtype=dtype)
        return win_rates.against_reference(
            win_rates.WinRate(),
            win_rates.Jury(judge, "ours", prompts),
            folder=epath.Path(tmp_path),
            policy_of=lambda params: dataclasses.replace(policies[0], params=params, config=config),
            reference=reference.params,
        )

    def answers(policy, seed):
        decoding = generate.Decoding(policy.lengths["targets"])
        return [
            c.text for c in generate.complete(policy, prompts, decoding, seed=seed, batch_size=32)
        ]

    alive = []
    for which, of in ((0, 0), (1, 0), (0, 1)):
        evaluate = hold(policies[which])
        assert (
            evaluate(2, policies[of].params, lambda: alive.append(1))["side_by_side/win_rate"] == 1
        )
        assert [c.answer_a for c in asked[-1]] == answers(policies[of], 1)
        assert [c.answer_b for c in asked[-1]] == answers(policies[which], 0)
    assert len(list(tmp_path.glob("reference_*"))) == len(list(tmp_path.glob("step_2_*"))) == 2
    # A sign of life for every answer that was sampled and every verdict.
    assert len(alive) == (2 + 3) * len(prompts)
    hold(policies[0], dtype="bfloat16")
    assert len(list(tmp_path.glob("reference_*"))) == 3


@pytest.mark.parametrize("sampled", [["same", "same", "other"], ["same", "same", "same"]])
def test_a_judge_is_tried_out_on_answers_that_differ(sampled, tmp_path, monkeypatch):
    """Of two equal ones a language model is not asked, and a wrong key would show hours later."""
    monkeypatch.setattr(
        win_rates, "complete", lambda *_, **__: [generate.Completion(text, []) for text in sampled]
    )
    monkeypatch.setattr(checkpoints, "weights_digest", lambda tree: "digest")
    asked = []
    policy = types.SimpleNamespace(
        config=types.SimpleNamespace(compute_dtype="float32"), lengths={"targets": 3}
    )
    win_rates.against_reference(
        win_rates.WinRate(),
        win_rates.Jury(lambda some: asked.extend(some) or iter([Verdict("A")]), "ours", ["p"] * 3),
        folder=epath.Path(tmp_path),
        policy_of=lambda params: policy,
        reference={},
    )
    (comparison,) = asked
    assert comparison.answer_a == "same"
    assert comparison.answer_b != "same"


def test_another_judge_is_another_setting(judged, caplog):
    meta = checkpoints.read_meta(judged[0], 6)
    changed = {"JUDGE": "llm (oracle)", "WinRate.prompts": 9, "WinRate.temperature": 0.5}
    warn_of_changes(meta, {"settings": meta["settings"] | changed})
    assert [name for name in changed if any(m.startswith(name) for m in caplog.messages)] == list(
        changed
    )
    assert meta["settings"]["JUDGE"] == "reward:rewards_of_test:noise"
    # So are other rates, and another compute type.
    caplog.clear()
    changed = {"Adafactor.policy_learning_rate": 7.0, "T5Config.dtype": "float16"}
    warn_of_changes(meta, {"settings": meta["settings"] | changed})
    assert len(caplog.messages) == 2


def test_a_win_rate_by_hand():
    verdicts = [Verdict("A"), Verdict("tie"), Verdict("tie", flipped=True), Verdict("B")]
    missing = [Verdict(None), Verdict(None, unanswered=True), Verdict(None, unanswered=True)]
    scalars = win_rates.summarise([Verdict("A"), *verdicts, *missing])
    assert scalars == pytest.approx(
        {
            "side_by_side/win_rate": 3 / 5,
            "side_by_side/win_rate_standard_error": math.sqrt(0.175 / 5),
            "side_by_side/ties": 2 / 8,
            "side_by_side/no_verdict": 3 / 8,
            "side_by_side/unanswered": 2 / 8,
        }
    )
    assert "side_by_side/win_rate" not in win_rates.summarise(missing)


def test_a_method_without_a_reference_has_nobody_to_be_held_against(train, tmp_path):
    result = train("runs/sft_tiny.gin", MODEL_DIR=str(tmp_path / "run"), JUDGE="reward:math:hypot")
    assert result.code == 2
    assert "no reference to hold the policy against" in result.err


def test_a_run_that_nobody_judged_has_no_best(sft_run):
    with pytest.raises(UsageError, match="no checkpoint of that run was held against its ref"):
        checkpoints.find(sft_run.directory / "best")
