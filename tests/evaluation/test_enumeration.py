"""eq. 2's optimum and the distance to it, against loops over plain Python numbers."""

import math

import numpy as np
import pytest

from dro_jax.evaluation.enumeration import (
    AnswerScores,
    distance_to_optimum,
    divergence,
    log_mass,
    optimum,
    regularised_reward,
    renormalise,
    win_rate,
)

TAUS = [0.1, 1.0, 5.0]


def random_problem(seed, prompts=5, answers=6):
    """Two policies that leave some mass elsewhere, rewards, and scores with ties."""
    rng = np.random.default_rng(seed)

    def log_probs():
        p = rng.dirichlet(np.ones(answers), size=prompts)
        return np.log(p) + np.log(rng.uniform(0.7, 1.0, size=(prompts, 1)))

    return {
        "policy_log_prob": log_probs(),
        "reference_log_prob": log_probs(),
        "value": rng.normal(size=prompts),
        "reward": rng.normal(size=(prompts, answers)),
        "score": rng.integers(0, 3, size=(prompts, answers)).astype(float),
    }


def oracle(policy_log_prob, reference_log_prob, value, reward, score, tau):
    """Every field of `Distance` by the definitions, with loops."""
    rows = []
    for x in range(len(reward)):
        answers = range(len(reward[x]))
        reference = [math.exp(v) for v in reference_log_prob[x]]
        policy = [math.exp(v) for v in policy_log_prob[x]]
        tilted = [reference[a] * math.exp(reward[x][a] / tau) for a in answers]
        best = [t / sum(tilted) for t in tilted]
        value_star = tau * math.log(sum(tilted))
        reference_mass, policy_mass = sum(reference), sum(policy)
        reference = [p / reference_mass for p in reference]
        policy = [p / policy_mass for p in policy]

        def kl(p, q, answers=answers):
            return sum(p[a] * math.log(p[a] / q[a]) for a in answers)

        def j(p, x=x, answers=answers, reference=reference, kl=kl):
            return sum(p[a] * reward[x][a] for a in answers) - tau * kl(p, reference)

        def wins(p, x=x, answers=answers, reference=reference):
            total = 0.0
            for a in answers:
                for b in answers:
                    credit = 1.0 if score[x][a] > score[x][b] else 0.0
                    credit = 0.5 if score[x][a] == score[x][b] else credit
                    total += p[a] * reference[b] * credit
            return total

        rows.append(
            {
                "best": best,
                "value_star": value_star,
                "target": value_star - tau * math.log(policy_mass),
                "start": j(reference),
                "reached": j(policy),
                "possible": j(best),
                "kl_to_optimum": kl(policy, best),
                "kl_to_reference": kl(policy, reference),
                "optimum_win_rate": wins(best),
                "exact_win_rate": wins(policy),
                "reference_mass": reference_mass,
                "policy_mass": policy_mass,
            }
        )
    names = """kl_to_optimum kl_to_reference optimum_win_rate exact_win_rate reference_mass
        policy_mass start reached possible"""
    mean = {n: sum(row[n] for row in rows) / len(rows) for n in names.split()}
    start, reached, possible = (mean.pop(name) for name in ("start", "reached", "possible"))
    targets = [row["target"] for row in rows]
    value_error = sum(abs(v - t) for v, t in zip(value, targets, strict=True)) / len(rows)
    mean |= {
        "improvement_fraction": (reached - start) / (possible - start),
        "value_error": value_error,
        # The mean absolute deviation is piecewise linear: its least value lies at one of the targets.
        "constant_value_error": min(sum(abs(c - t) for t in targets) / len(rows) for c in targets),
    }
    return mean, [row["best"] for row in rows], [row["value_star"] for row in rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", TAUS)
def test_distance_against_loops(seed, tau):
    problem = random_problem(seed)
    expected, best, value_star = oracle(**problem, tau=tau)
    ours = optimum(problem["reference_log_prob"], problem["reward"], tau)
    np.testing.assert_allclose(np.exp(ours.log_prob), best, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(ours.value, value_star, rtol=1e-9)
    distance = distance_to_optimum(AnswerScores(**problem), tau)
    for name, number in expected.items():
        assert getattr(distance, name) == pytest.approx(number, rel=1e-9, abs=1e-12), name
    assert set(expected) == set(vars(distance))


def test_two_answers_by_hand():
    # pi_ref = (1/2, 1/4), r = (0, log 2), tau = 1: both answers tilt to 1/2, so V* = log 1 = 0.
    reference = np.log([[0.5, 0.25]])
    reward = np.array([[0.0, math.log(2)]])
    best = optimum(reference, reward, 1.0)
    np.testing.assert_allclose(np.exp(best.log_prob), [[0.5, 0.5]], rtol=1e-12)
    np.testing.assert_allclose(best.value, [0.0], atol=1e-12)
    scores = AnswerScores(
        policy_log_prob=np.log([[0.4, 0.4]]),
        reference_log_prob=reference,
        value=np.array([1.0]),
        reward=reward,
        score=np.array([[0.0, 1.0]]),
    )
    distance = distance_to_optimum(scores, 1.0)
    # Renormalised, the policy is pi*; the reference is (2/3, 1/3).
    assert distance.improvement_fraction == pytest.approx(1)
    assert distance.kl_to_optimum == pytest.approx(0, abs=1e-12)
    assert distance.kl_to_reference == pytest.approx(math.log(9 / 8) / 2)
    assert distance.exact_win_rate == distance.optimum_win_rate == pytest.approx(7 / 12)
    assert distance.reference_mass == pytest.approx(0.75)
    assert distance.policy_mass == pytest.approx(0.8)
    assert distance.value_error == pytest.approx(1 + math.log(0.8))
    assert distance.constant_value_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_no_policy_is_better_than_the_optimum(tau):
    problem = random_problem(7)
    reward = problem["reward"]
    reference = renormalise(problem["reference_log_prob"])
    best = optimum(problem["reference_log_prob"], reward, tau).log_prob
    most = regularised_reward(best, reference, reward, tau)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.1, 1.0, 10.0):
        for _ in range(25):
            other = renormalise(best + scale * rng.normal(size=best.shape))
            assert (regularised_reward(other, reference, reward, tau) < most).all()


@pytest.mark.parametrize("tau", TAUS)
def test_equation_3_holds_at_the_optimum(tau):
    """r(x, y) = V*(x) + tau log(pi*(y|x) / pi_ref(y|x)), the reference not renormalised."""
    problem = random_problem(11)
    best = optimum(problem["reference_log_prob"], problem["reward"], tau)
    log_ratio = best.log_prob - problem["reference_log_prob"]
    np.testing.assert_allclose(best.value[:, None] + tau * log_ratio, problem["reward"], rtol=1e-9)


@pytest.mark.parametrize("tau", TAUS)
def test_most_of_j_is_the_value_of_a_normalised_reference(tau):
    problem = random_problem(13)
    reference = renormalise(problem["reference_log_prob"])
    best = optimum(reference, problem["reward"], tau)
    j = regularised_reward(best.log_prob, reference, problem["reward"], tau)
    np.testing.assert_allclose(j, best.value, rtol=1e-9)


def test_the_reference_itself_has_improved_nothing():
    problem = random_problem(17)
    problem["policy_log_prob"] = problem["reference_log_prob"]
    distance = distance_to_optimum(AnswerScores(**problem), 1.0)
    assert distance.improvement_fraction == 0
    assert distance.kl_to_reference == pytest.approx(0, abs=1e-15)
    assert distance.exact_win_rate == pytest.approx(0.5)


def test_a_value_off_by_the_lost_mass_has_no_error():
    problem = random_problem(19)
    tau = 0.5
    best = optimum(problem["reference_log_prob"], problem["reward"], tau)
    problem["value"] = best.value - tau * log_mass(problem["policy_log_prob"])
    assert distance_to_optimum(AnswerScores(**problem), tau).value_error == pytest.approx(
        0, abs=1e-12
    )


def test_without_a_value_it_has_no_error():
    distance = distance_to_optimum(AnswerScores(**random_problem(0) | {"value": None}), 1.0)
    assert distance.value_error is None
    assert distance.constant_value_error > 0


def test_win_rates_of_both_sides_add_up_to_one():
    problem = random_problem(23)
    p, q = (renormalise(problem[f"{name}_log_prob"]) for name in ("policy", "reference"))
    score = problem["score"]
    np.testing.assert_allclose(win_rate(p, q, score) + win_rate(q, p, score), 1, rtol=1e-12)
    np.testing.assert_allclose(win_rate(p, p, score), 0.5, rtol=1e-12)
    np.testing.assert_allclose(win_rate(p, q, np.zeros_like(score)), 0.5, rtol=1e-12)


def test_log_probabilities_far_from_zero_stay_finite():
    far = np.array([[-2000.0, -2001.0]])
    np.testing.assert_allclose(log_mass(far), [-2000 + math.log1p(math.exp(-1))], rtol=1e-12)
    assert divergence(renormalise(far), renormalise(far))[0] == 0
    best = optimum(far, np.array([[1e4, 0.0]]), 0.1)
    assert np.isfinite(best.value).all()
    np.testing.assert_allclose(np.exp(best.log_prob), [[1.0, 0.0]], atol=1e-300)
