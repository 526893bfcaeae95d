"""The arithmetic of `dro_jax demo`, without its trainings; see also test_end_to_end.py."""

import json
import math

import numpy as np
import pytest

from dro_jax.cli import demo, generate
from dro_jax.data import demonstration
from dro_jax.evaluation.enumeration import Distance
from dro_jax.evaluation.sampling import Decoding

DISTANCE = Distance(0.9, 0.1, 0.2, 0.05, 0.5, 0.8, 0.75, 0.99, 0.98)


@pytest.fixture
def paths(tmp_path):
    from etils import epath

    folder = epath.Path(tmp_path)
    (folder / "dro_v").mkdir()
    return demo.Paths(
        data=folder / "feedback.jsonl",
        sft=folder / "sft",
        aligned=folder / "dro_v",
        samples=folder / "samples.jsonl",
        summary=folder / "summary.json",
    )


def test_answer_batch_holds_every_answer_in_order(sft_run):
    policy = generate.load_policy(str(sft_run.directory))
    prompts = ["ann: d b a c", "fay: a b c d"]
    answers = [demonstration.answers(prompt) for prompt in prompts]
    batch = demo.answer_batch(policy, prompts, answers)
    assert batch["encoder_input_tokens"].shape == (48, 13)
    for i in range(48):
        prompt, answer = prompts[i // 24], answers[i // 24][i % 24]
        inputs = [byte + 3 for byte in prompt.encode()] + [1]
        targets = [byte + 3 for byte in answer.encode()] + [1]
        assert batch["encoder_input_tokens"][i].tolist() == inputs
        assert batch["decoder_target_tokens"][i].tolist() == targets
        assert batch["decoder_input_tokens"][i].tolist() == [0, *targets[:-1]]
        assert batch["decoder_loss_weights"][i].tolist() == [1] * 8
    assert batch["rewards"].shape == (48, 1)


def test_answer_batch_pads_short_answers(sft_run):
    policy = generate.load_policy(str(sft_run.directory))
    batch = demo.answer_batch(policy, ["x"], [["ab", "a"]])
    assert batch["encoder_input_tokens"].tolist() == [[123, 1] + [0] * 11] * 2
    assert batch["decoder_target_tokens"].tolist() == [[100, 101, 1] + [0] * 5, [100, 1] + [0] * 6]
    assert batch["decoder_input_tokens"].tolist() == [
        [0, 100, 101, 1] + [0] * 4,
        [0, 100, 1] + [0] * 5,
    ]
    assert batch["decoder_loss_weights"].sum(axis=1).tolist() == [3, 2]


def test_the_judge_scores_order_and_calls_ties_a_half(sft_run, monkeypatch):
    policy = generate.load_policy(str(sft_run.directory))
    prompts = ["ann: d b a c", "fay: c a d b"]
    texts = {
        1: [
            "a b c d",
            "d c b a",
            "a b c d",
            "nonsense",
            "nonsense",
            "b a c d",
            "d c b a",
            "a b d c",
        ],
        2: ["a b c d", "a b c d", "d c b a", "d c b a", "other", "a b c d", "nonsense", "b a c d"],
    }

    def scripted(of, repeated, decoding, *, seed, batch_size):
        assert len(repeated) == 2 * demo.SAMPLES_PER_PROMPT
        assert decoding == Decoding(max_tokens=8)
        for text in texts[seed] * 2:
            yield generate.Completion(text, np.array([1], np.int32))

    monkeypatch.setattr(demo, "complete", scripted)
    rows = demo.sample_side_by_side("dro_v", policy, policy, prompts)
    assert [row["prompt"] for row in rows] == [p for p in prompts for _ in range(8)]
    assert [row["win"] for row in rows] == [0.5, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.5] * 2
    assert [row["sft"] for row in rows] == texts[1] * 2
    assert [row["dro_v"] for row in rows] == texts[2] * 2
    # Both raters get the same scores: the judge does not know their shift.
    assert [row["sft_score"] for row in rows] == [6, 0, 6, -1, -1, 5, 0, 5] * 2
    assert [row["dro_v_score"] for row in rows] == [6, 6, 0, 0, -1, 6, -1, 5] * 2


def test_both_policies_are_really_sampled(sft_run):
    policies = [
        generate.load_policy(str(sft_run.directory / f"checkpoint_{step}")) for step in (4, 6)
    ]
    prompts = ["ann: d b a c", "fay: c a d b"]
    rows = demo.sample_side_by_side("dro_v", *policies, prompts)
    assert len(rows) == 2 * demo.SAMPLES_PER_PROMPT
    assert len({row["sft"] for row in rows}) > 2
    assert len({row["dro_v"] for row in rows}) > 2
    for row in rows:
        for name in ("sft", "dro_v"):
            score = demonstration.order_score(row["prompt"], row[name])
            assert row[f"{name}_score"] == score


def test_the_interval_is_over_prompts(paths):
    wins = {"p": [1.0, 1.0, 0.5, 0.5], "q": [0.0, 1.0, 1.0, 0.0], "r": [1.0, 1.0, 1.0, 1.0]}
    samples = [{"prompt": p, "win": w} for p, row in wins.items() for w in row]
    summary = demo.write_results(paths, "dro_v", samples, DISTANCE, 12.5)
    means = [0.75, 0.5, 1.0]
    deviation = math.sqrt(sum((m - 0.75) ** 2 for m in means) / 2)
    half = 1.96 * deviation / math.sqrt(3)
    assert summary["win_rate"] == pytest.approx(0.75)
    assert summary["win_rate_interval"] == pytest.approx([0.75 - half, 1.0])  # 1.03, cut
    promised = """win_rate win_rate_interval optimum_win_rate improvement_fraction kl_to_optimum
        value_error constant_value_error reference_mass policy_mass seconds"""
    assert set(promised.split()) <= set(summary)
    assert summary["seconds"] == 12.5
    assert summary["optimum_win_rate"] == DISTANCE.optimum_win_rate
    assert json.loads(paths.summary.read_text()) == summary
    assert json.loads((paths.aligned / "summary.json").read_text()) == summary
    assert [json.loads(line) for line in paths.samples.read_text().splitlines()] == samples


def test_what_is_shown(paths, capsys):
    prompts = [f"ann: {letters}" for letters in ("a b c d", "b a c d", "c a b d", "d a b c")]
    row = {"sft": "d c b a", "dro_v": "a b c d", "sft_score": 0.0, "dro_v_score": 6.0, "win": 1.0}
    samples = [{"prompt": p, **row} for p in prompts for _ in range(demo.SAMPLES_PER_PROMPT)]
    demo.show(paths, samples, demo.write_results(paths, "dro_v", samples, DISTANCE, 12.5))
    out = capsys.readouterr().out
    assert all(prompt in out for prompt in prompts)
    assert "win rate of dro_v over sft     100.0%  (95% interval 100.0% to 100.0%)" in out
    assert "improvement reached            90.0%" in out
    for path in (paths.data, paths.samples, paths.summary, f"--logdir {paths.summary.parent}"):
        assert str(path) in out
