"""The demonstration task: rewards by brute force, exact behaviour probabilities, determinism."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dro_jax.data import demonstration, feedback


def test_prompts_are_every_rater_with_every_arrangement():
    prompts = demonstration.prompts()
    assert len(prompts) == len(set(prompts)) == 6 * 360
    assert "ann: d b a c" in prompts
    assert len(demonstration.prompts("abcdefgh")) == 6 * 1680


def test_held_out_prompts_are_those_of_the_written_file(tmp_path):
    path = tmp_path / "demonstration.jsonl"
    demonstration.write_demonstration(path, demonstration.prompts(), samples_per_prompt=1, seed=0)
    train, held_out = demonstration.split_prompts(demonstration.prompts(), 0.1)
    assert sorted(train + held_out) == sorted(demonstration.prompts())
    assert 160 < len(held_out) < 280
    file = feedback.FeedbackFile(str(path), validation_fraction=0.1)
    assert [r.prompt for r in feedback.read_feedback(file, "validation")] == held_out


def test_order_score_by_brute_force():
    prompt = "fay: d b a c"
    answers = demonstration.answers(prompt)
    assert len(set(answers)) == 24
    assert answers[0] == "a b c d"
    for answer in answers:
        pairs = itertools.combinations("abcd", 2)
        in_order = sum(answer.index(first) < answer.index(second) for first, second in pairs)
        assert demonstration.order_score(prompt, answer) == in_order
        assert demonstration.reward(prompt, answer) == in_order + 2.0
        assert demonstration.reward("ann: d b a c", answer) == in_order - 2.0
    assert demonstration.order_score(prompt, "d c b a") == 0


@pytest.mark.parametrize(
    "text",
    ["", "a b c", "a b c d d", "a b c e", "abcd", "a  b c d", " a b c d", "A b c d", "a b c d\n"],
)
def test_malformed_answers_score_below_all_others(text):
    assert demonstration.order_score("ann: d b a c", text) == demonstration.MALFORMED_SCORE < 0
    assert demonstration.reward("ann: d b a c", text) == -3.0


def test_behaviour_probabilities_are_those_of_the_swaps():
    probabilities = demonstration.behaviour_probabilities()
    assert probabilities.shape == (24,)
    assert probabilities.min() > 0.01
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-12)
    # Carried forward over dictionaries instead of a matrix.
    counts = Counter()
    for swaps in range(13):
        states = {tuple("abcd"): 1.0}
        for _ in range(swaps):
            following = Counter()
            for state, mass in states.items():
                for left in range(3):
                    pair = (state[left + 1], state[left])
                    following[state[:left] + pair + state[left + 2 :]] += mass / 3
            states = following
        for state, mass in states.items():
            counts[" ".join(state)] += mass / 13
    expected = [counts[answer] for answer in demonstration.answers("ann: d b a c")]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)


def test_written_answers_follow_the_behaviour_policy(tmp_path):
    path = tmp_path / "demonstration.jsonl"
    demonstration.write_demonstration(path, demonstration.prompts(), samples_per_prompt=20, seed=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2160 * 20
    assert all(
        r["reward"] == demonstration.reward(r["prompt"], r["completion"]) for r in rows[::50]
    )
    counts = Counter(demonstration.answers(r["prompt"]).index(r["completion"]) for r in rows)
    probabilities = demonstration.behaviour_probabilities()
    frequencies = np.array([counts[i] for i in range(24)]) / len(rows)
    deviations = np.sqrt(probabilities * (1 - probabilities) / len(rows))
    assert np.all(np.abs(frequencies - probabilities) < 4.5 * deviations)


def test_same_seed_same_file_other_seed_another(tmp_path):
    def content(seed):
        path = tmp_path / f"{seed}.jsonl"
        asked = demonstration.prompts("abcd")
        demonstration.write_demonstration(path, asked, samples_per_prompt=1, seed=seed)
        return path.read_text()

    assert content(0) == content(0)
    assert content(0) != content(1)


def test_a_constant_baseline_is_wrong():
    """The raters' shifts take up a good part of the variance of the rewards."""
    probabilities = demonstration.behaviour_probabilities()
    scores = [
        demonstration.order_score("ann: d b a c", a) for a in demonstration.answers("ann: d b a c")
    ]
    within = np.cov(scores, aweights=probabilities, ddof=0)
    between = np.var(list(demonstration.RATER_SHIFTS.values()))
    assert 0.3 < between / (within + between) < 0.7


def test_import_without_tensorflow():
    program = (
        "import sys, dro_jax.data.feedback, dro_jax.data.demonstration\n"
        "assert not {'tensorflow', 'seqio', 'gin', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
