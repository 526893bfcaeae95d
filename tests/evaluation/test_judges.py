"""The judge by a reward, and what the judges may import."""

import math
import subprocess
import sys

import numpy as np
import pytest

from dro_jax.errors import UsageError
from dro_jax.evaluation import judges
from dro_jax.evaluation.judges import Comparison, judge_by_reward


def length(prompts, answers):
    assert len(prompts) == len(answers)
    return [len(answer) for answer in answers]


def winners(judge, *pairs):
    return [v.winner for v in judge([Comparison("p", a, b) for a, b in pairs])]


def test_the_answer_of_greater_reward_wins():
    pairs = [("long", "s"), ("s", "long"), ("same", "size"), ("same", "same")]
    assert winners(judge_by_reward(length), *pairs) == ["A", "B", "tie", "tie"]


def test_a_margin_makes_ties():
    judge = judge_by_reward(length, margin=2)
    pairs = [("abc", "a"), ("a", "abc"), ("abcd", "a"), ("a", "abcd")]
    assert winners(judge, *pairs) == ["tie", "tie", "A", "B"]
    with pytest.raises(UsageError, match="margin is -1"):
        judge_by_reward(length, margin=-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_reward_that_is_not_finite_is_no_verdict(bad):
    judge = judge_by_reward(lambda _, answers: [bad if a == "x" else 1 for a in answers])
    pairs = [("x", "a"), ("a", "x"), ("x", "x"), ("a", "b")]
    assert winners(judge, *pairs) == [None, None, None, "tie"]


def test_the_reason_has_both_rewards_in_order():
    (verdict,) = judge_by_reward(length)([Comparison("p", "abc", "a")])
    assert (verdict.reason, verdict.flipped) == ("reward 3 against 1", None)


def test_the_reward_sees_each_text_once_with_its_prompt(monkeypatch):
    monkeypatch.setattr(judges, "AT_A_TIME", 2)
    calls = []

    def of_prompt(prompts, answers):
        calls.append(list(zip(prompts, answers, strict=True)))
        return np.array([len(p) * a.count("x") for p, a in calls[-1]])

    comparisons = [
        Comparison("p", "x", "xx"),
        Comparison("q", "xx", "x"),
        Comparison("p", "x", ""),
    ]
    verdicts = judge_by_reward(of_prompt)(comparisons)
    assert next(verdicts).winner == "B"
    # Nothing is scored before it is asked for.
    assert calls == [[("p", "x"), ("p", "xx"), ("q", "xx"), ("q", "x")]]
    assert [v.winner for v in verdicts] == ["A", "A"]
    assert calls[1:] == [[("p", "x"), ("p", "")]]


def test_equal_answers_are_a_tie_whatever_noise_the_reward_has():
    noise = iter(np.linspace(0, 1, 100))
    judge = judge_by_reward(lambda _, answers: [next(noise) for _ in answers])
    assert winners(judge, ("a", "a"), ("a", "b"), ("b", "b")) == ["tie", "B", "tie"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned numbers of shape (1,) for 2 answers; return one number an answer"),
        ([[1.0, 2.0]], "returned numbers of shape (1, 2) for 2 answers"),
        (None, "returned numbers of shape () for 2 answers"),
        (["a", "b"], "returned no numbers"),
        ([[1], [1, 2]], "returned no numbers"),
    ],
    ids=["too few", "too deep", "None", "text", "ragged"],
)
def test_a_function_that_returns_something_else(returned, message):
    def mine(prompts, answers):
        return returned

    with pytest.raises(UsageError) as raised:
        list(judge_by_reward(mine)([Comparison("p", "a", "b")]))
    assert str(raised.value).startswith("reward function mine: ")
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_no_comparisons_no_verdicts():
    assert list(judge_by_reward(length)([])) == []


def test_the_judges_import_neither_tensorflow_nor_seqio_nor_gin_nor_jax():
    heavy = ["gin", "jax", "seqio", "tensorflow", "t5x", "clu"]
    code = (
        f"import sys, dro_jax.evaluation.llm_judge; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
