"""Judges of answers: which of two answers to a prompt is the better one.

A judge is a function from comparisons to verdicts. This module has the types and the judge by a reward;
`dro_jax.evaluation.llm_judge` asks a language model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from dro_jax.errors import UsageError, check_number

AT_A_TIME = 1024
"""Comparisons whose answers a reward is given together."""

Winner = Literal["A", "B", "tie"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prompt and two answers to it."""

    prompt: str
    answer_a: str
    answer_b: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of one comparison.

    Attributes:
      winner: the better answer; None where the judge gave no verdict that can be used. Those are to be counted,
        and are neither a win nor a tie.
      reason: in the judge's words, "" for none.
      flipped: whether the judge, asked in both orders, did not say the same (the winner is then "tie"); None where it
        was not asked in both, or one of its replies had no verdict.
      unanswered: there is no verdict because the judge did not answer, and not because of what it answered.
    """

    winner: Winner | None
    reason: str = ""
    flipped: bool | None = None
    unanswered: bool = False


Judge = Callable[[Sequence[Comparison]], Iterator[Verdict]]
"""Verdicts come one by one, in the order of the comparisons."""

Reward = Callable[[Sequence[str], Sequence[str]], Any]
"""From n prompts and n answers to n numbers, the greater the better."""


def judge_by_reward(reward: Reward, margin: float = 0.0) -> Judge:
    """A judge that prefers the answer of greater reward.

    Args:
      reward: is given many answers at a time, and each text once, so that equal answers have equal rewards.
      margin: rewards that differ by no more than this are a tie, units of reward.

    Returns:
      The judge. A reward that is not finite is no verdict. It raises UsageError where the function does not
      return one number an answer.
    """
    check_number("margin", margin)

    def judge(comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
        for start in range(0, len(comparisons), AT_A_TIME):
            some = comparisons[start : start + AT_A_TIME]
            texts = list(
                dict.fromkeys((c.prompt, text) for c in some for text in (c.answer_a, c.answer_b))
            )
            rewards = dict(zip(texts, _rewards(reward, texts), strict=True))
            for c in some:
                a, b = rewards[c.prompt, c.answer_a], rewards[c.prompt, c.answer_b]
                yield Verdict(_greater(a, b, margin), f"reward {a:.6g} against {b:.6g}")

    return judge


def _greater(a: float, b: float, margin: float) -> Winner | None:
    if not (np.isfinite(a) and np.isfinite(b)):
        return None
    if abs(a - b) <= margin:
        return "tie"
    return "A" if a > b else "B"


def _rewards(reward: Reward, texts: Sequence[tuple[str, str]]) -> list[float]:
    given = reward([prompt for prompt, _ in texts], [answer for _, answer in texts])
    try:
        rewards = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{_name(reward)}: returned no numbers ({error})") from error
    if rewards.shape != (len(texts),):
        raise UsageError(
            f"{_name(reward)}: returned numbers of shape {rewards.shape} for {len(texts)} answers; return one "
            "number an answer"
        )
    return [float(number) for number in rewards]


def _name(reward: Reward) -> str:
    return f"reward function {getattr(reward, '__name__', repr(reward))}"
