"""The demonstration task: put letters in order for a rater who is harsh or mild.

A prompt names a rater and a few distinct letters, "ann: d b a c"; an answer is those letters in some
order, "a b c d". The reward is the number of letter pairs in alphabetical order plus the rater's
shift, so no constant baseline fits. All answers to a prompt can be enumerated, which makes the
optimum of eq. 2 known exactly.
"""

import functools
import itertools
import json
from collections.abc import Iterable

import numpy as np
from etils import epath

from dro_jax.data.feedback import split_of
from dro_jax.whole_files import write_whole

RATER_SHIFTS = {"ann": -2.0, "bob": -1.0, "cat": -0.5, "dan": 0.5, "eve": 1.0, "fay": 2.0}
"""What each rater adds to every reward, from harsh to mild."""

LETTERS_PER_PROMPT = 4

MALFORMED_SCORE = -1.0
"""The order score of a text that is no arrangement of the prompt's letters: below any that is."""

_MOST_SWAPS = 12  # Six reverse four letters, so every answer has a positive probability.


def prompts(alphabet: str = "abcdef") -> list[str]:
    """Returns every prompt: each rater with each arrangement of four letters of the alphabet."""
    return [
        f"{rater}: {' '.join(letters)}"
        for rater in RATER_SHIFTS
        for letters in itertools.permutations(alphabet, LETTERS_PER_PROMPT)
    ]


def split_prompts(
    all_prompts: Iterable[str], validation_fraction: float
) -> tuple[list[str], list[str]]:
    """Returns the training and the held-out prompts, as `dro_jax train` splits a file of them."""
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for prompt in all_prompts:
        sides[split_of(prompt, validation_fraction)].append(prompt)
    return sides["train"], sides["validation"]


def answers(prompt: str) -> list[str]:
    """Returns the 24 answers to a prompt, alphabetical order first."""
    _, letters = _parts(prompt)
    return [" ".join(answer) for answer in itertools.permutations(sorted(letters))]


def order_score(prompt: str, completion: str) -> float:
    """Returns the number of letter pairs in alphabetical order: 0 to 6.

    `MALFORMED_SCORE` if the completion is not the prompt's letters, separated by single spaces.
    """
    _, letters = _parts(prompt)
    answer = completion.split(" ")
    if sorted(answer) != sorted(letters):
        return MALFORMED_SCORE
    return float(sum(first < second for first, second in itertools.combinations(answer, 2)))


def reward(prompt: str, completion: str) -> float:
    """Returns the rater's reward: the order score plus the rater's shift."""
    rater, _ = _parts(prompt)
    return order_score(prompt, completion) + RATER_SHIFTS[rater]


@functools.cache
def behaviour_probabilities() -> np.ndarray:
    """Returns the behaviour policy's probability of each of `answers(prompt)`: float64 [24].

    The behaviour policy starts from alphabetical order and swaps neighbours, each pair as likely as
    the others, 0 to 12 times with equal probability.
    """
    orders = list(itertools.permutations(range(LETTERS_PER_PROMPT)))
    swap = np.zeros((len(orders), len(orders)))
    for row, order in enumerate(orders):
        for left in range(LETTERS_PER_PROMPT - 1):
            swapped = list(order)
            swapped[left], swapped[left + 1] = order[left + 1], order[left]
            swap[row, orders.index(tuple(swapped))] += 1 / (LETTERS_PER_PROMPT - 1)
    after_swaps = np.eye(len(orders))[0]
    probabilities = np.zeros(len(orders))
    for _ in range(_MOST_SWAPS + 1):
        probabilities += after_swaps / (_MOST_SWAPS + 1)
        after_swaps = after_swaps @ swap
    probabilities.setflags(write=False)  # Every caller is given this one array.
    return probabilities


def write_demonstration(
    path: epath.PathLike, asked: Iterable[str], *, samples_per_prompt: int, seed: int
) -> None:
    """Writes a feedback file: answers of the behaviour policy to some prompts, with their rewards.

    Args:
        path: the JSONL file to write.
        asked: the prompts.
        samples_per_prompt: answers drawn for each prompt, with replacement.
        seed: of the answers.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for prompt in asked:
        choices = answers(prompt)
        drawn = generator.choice(len(choices), samples_per_prompt, p=behaviour_probabilities())
        for completion in (choices[index] for index in drawn):
            row = {"prompt": prompt, "completion": completion}
            lines.append(json.dumps({**row, "reward": reward(prompt, completion)}) + "\n")
    write_whole(path, "".join(lines))


def _parts(prompt: str) -> tuple[str, list[str]]:
    rater, letters = prompt.split(": ")
    return rater, letters.split(" ")
