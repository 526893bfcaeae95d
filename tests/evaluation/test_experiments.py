"""The paper's numbers beside ours: places in the plane of KL and reward, and orders."""

import dataclasses
import itertools

import numpy as np
import pytest
from paper_runs import made_up, measured, scores_of

from dro_jax.evaluation import experiments
from dro_jax.evaluation.enumeration import (
    distance_to_optimum,
    divergence,
    everything,
    frontier,
    head_to_head,
    optimum,
    renormalise,
)


@pytest.mark.parametrize("seed", range(3))
def test_head_to_head_is_what_samples_show(seed):
    rng = np.random.default_rng(seed)
    log_p, log_q = (
        np.log(rng.dirichlet(np.ones(4), size=2) * rng.uniform(0.4, 1, (2, 1))) for _ in range(2)
    )
    score = rng.integers(0, 3, size=(2, 4)).astype(float)
    wins = 0.0
    for x in range(2):
        p, q = (np.append(np.exp(lp[x]), 1 - np.exp(lp[x]).sum()) for lp in (log_p, log_q))
        for a, b in itertools.product(range(5), range(5)):
            mine, theirs = (score[x][k] if k < 4 else -99 for k in (a, b))
            wins += p[a] * q[b] * (1.0 if mine > theirs else 0.5 if mine == theirs else 0.0) / 2
    assert head_to_head(log_p, log_q, score) == pytest.approx(wins, rel=1e-12)
    other = head_to_head(log_q, log_p, score)
    assert head_to_head(log_p, log_q, score) + other == pytest.approx(1, rel=1e-12)


def test_no_policy_is_above_the_frontier():
    scores = scores_of(0)
    reference = renormalise(scores.reference_log_prob)
    best = frontier(
        scores.reference_log_prob, scores.reward, scores.score, np.geomspace(100, 0.01, 2001)
    )
    assert np.all(np.diff(best.kl) > 0)
    assert np.all(np.diff(best.gain) > 0)
    rng = np.random.default_rng(1)
    start = np.sum(np.exp(reference) * scores.reward, axis=1)
    nearest = np.inf
    for _ in range(300):
        # Near an optimum, or far from all of them.
        tilt = rng.uniform(0, 3) * scores.reward + rng.uniform(0, 0.5) * rng.normal(size=(4, 5))
        policy = renormalise(reference + tilt)
        gain = np.mean(np.sum(np.exp(policy) * scores.reward, axis=1) - start)
        short = best.at(divergence(policy, reference).mean())[0] - gain
        assert short > -1e-5
        nearest = min(nearest, short)
    assert nearest < 0.02


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.999])
def test_what_leaves_the_answers_is_paid_for(mass):
    """Against loops over all outcomes, what is no answer being the last."""
    run = measured(scores_of(2, shift=0.8, mass=mass))
    point = experiments.point_of(run, experiments.frontier_of(run))
    kl = gain = 0.0
    for x in range(4):
        p, q = (
            [*np.exp(log_prob[x]), 1 - np.exp(log_prob[x]).sum()]
            for log_prob in (run.scores.policy_log_prob, run.scores.reference_log_prob)
        )
        r = [*run.scores.reward[x], run.rest_reward[x]]
        kl += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)) / 4
        gain += sum((a - b) * c for a, b, c in zip(p, q, r, strict=True)) / 4
    assert (point.kl, point.gain) == pytest.approx((kl, gain), rel=1e-9)
    assert point.mass == pytest.approx(mass)
    assert point.lost_gain > 0
    assert (point.gain < 0) == (mass == 0.3)
    # On the answers alone it would be as near to the optimum whatever its mass.
    assert point.kl_to_optimum == pytest.approx(
        experiments.point_of(
            measured(scores_of(2, shift=0.8)), experiments.frontier_of(run)
        ).kl_to_optimum
    )


def test_a_mass_of_one_to_the_last_digit_stays_finite():
    run = measured(scores_of(2, shift=0.8, mass=1.0 + 1e-7))
    point = experiments.point_of(run, experiments.frontier_of(run))
    assert np.isfinite([point.kl, point.gain]).all()
    unmoved = measured(
        dataclasses.replace(run.scores, reference_log_prob=run.scores.policy_log_prob)
    )
    point = experiments.point_of(unmoved, experiments.frontier_of(unmoved))
    assert (point.kl, point.gain, point.win_rate) == pytest.approx((0, 0, 0.5), abs=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.37, 5.0])
def test_an_optimum_is_on_the_frontier(tau):
    run = measured(scores_of(3), tau)
    whole = everything(run.scores, run.rest_reward)
    best = optimum(whole.reference_log_prob, whole.reward, tau).log_prob[:, :-1]
    run = dataclasses.replace(run, scores=dataclasses.replace(run.scores, policy_log_prob=best))
    point = experiments.point_of(run, experiments.frontier_of(run))
    assert point.lost_gain == pytest.approx(0, abs=1e-3)
    assert point.lost_win_rate == pytest.approx(0, abs=1e-3)
    assert point.win_rate == pytest.approx(point.optimum_win_rate)
    assert point.kl_to_optimum == pytest.approx(0, abs=1e-12)


def test_v_is_held_against_the_optimum_of_the_run_s_own_tau():
    scores = scores_of(5, shift=1 / 5.0, mass=0.9)
    exact = optimum(scores.reference_log_prob, scores.reward, 5.0).value - 5.0 * np.log(0.9)
    run = measured(dataclasses.replace(scores, value=exact), 5.0)
    point = experiments.point_of(run, experiments.frontier_of(run))
    assert point.value_error == pytest.approx(0, abs=1e-12)
    assert point.kl_to_optimum == pytest.approx(0, abs=1e-12)
    at_1 = experiments.point_of(dataclasses.replace(run, tau=1.0), experiments.frontier_of(run))
    assert at_1.value_error == distance_to_optimum(run.scores, 1.0).value_error > 0.1
    assert at_1.optimum_win_rate > point.optimum_win_rate


def test_an_interval_over_seeds_is_student_s():
    assert experiments.interval([3.0]) == (3.0, None)
    # Three numbers: 4.303 standard errors, from a table.
    mean, half = experiments.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)


def test_the_choice_is_the_mean_over_the_seeds_that_all_have():
    rates = {"a": {0: 0.9, 1: 0.1}, "b": {0: 0.6, 1: 0.5}}
    assert experiments.best_of(rates) == "b"
    # One candidate's lucky extra seed is no advantage.
    assert experiments.best_of({"a": {0: 0.4, 7: 0.99}, "b": {0: 0.6}}) == "b"
    assert experiments.best_of({"a": {7: 0.99}, "b": {0: 0.6}}) == "a"
    assert experiments.best_of({}) is None


def point(win_rate, possible=0.8):
    return experiments.Point(win_rate, 0.2, 0.3, 0.4, possible, 0.66, 1.0, 0.05, None)


def test_orders_are_of_the_seeds_that_both_have():
    paper = {"b": 70.5, "a": 78.9, "c": 70.0, "d": 50.0}
    points = {
        "a": {0: point(0.80), 1: point(0.79), 2: point(0.81), 7: point(0.1)},
        "b": {2: point(0.62, 0.7), 1: point(0.60, 0.7), 0: point(0.61, 0.7)},
        "c": {7: point(0.3)},
    }
    one, of_seed_7 = experiments.orders(paper, points)
    assert (one.first, one.second, one.over_sft) == ("a", "b", True)
    assert one.paper == pytest.approx(8.4)
    assert one.ours == pytest.approx([19, 19, 19])
    # a is as far below its optimum as the 10 points nearer optimum of b lets it be.
    assert one.equal_kl == pytest.approx([9, 9, 9])
    assert one.verdict == experiments.SAME
    assert (of_seed_7.first, of_seed_7.second) == ("a", "c")
    assert of_seed_7.ours == pytest.approx([-20])
    assert of_seed_7.verdict == experiments.OTHER


@pytest.mark.parametrize(
    ("paper", "ours", "verdict"),
    [
        (8.4, [1.0, 1.1, 0.9], experiments.SAME),
        (8.4, [-1.0, -1.1, -0.9], experiments.OTHER),
        # Two standard errors from 0, but three seeds say little.
        (8.4, [1.0, 2.0, 0.6], experiments.UNCLEAR),
        (8.4, [1.0, 1.1, -0.9], experiments.UNCLEAR),
        (0.9, [1.0, 1.1, 0.9], experiments.NO_ORDER),
        (8.4, [0.1], experiments.SAME),
        (8.4, [-0.1], experiments.OTHER),
    ],
)
def test_verdicts(paper, ours, verdict):
    assert experiments.Order("a", "b", paper, ours).verdict == verdict


def test_unequal_seeds_of_arms_and_arms_that_are_missing():
    runs = made_up(["dro_v", "kto", "dro_v_single_value", "larger_dro_v"], prompts=5)
    runs |= made_up(["kto"], seeds=[7], prompts=5)
    del runs["dro_v", 1]
    found = experiments.findings_of(runs, runs)
    assert found.seeds == [0, 1, 2, 7]
    assert sorted(found.points["kto"]) == [0, 1, 2, 7]
    assert sorted(found.wins["kto"]["dro_v"]) == [0, 2]
    assert found.kto("") == "kto"
    assert found.kto("larger_") is None
    head = found.experiments()[0]
    (order,) = experiments.orders(head.paper, found.points)
    expected = [
        100 * (found.points["dro_v"][s].win_rate - found.points["kto"][s].win_rate) for s in (0, 2)
    ]
    assert order.ours == pytest.approx(expected)
    assert len(experiments.over_kto(found, "").ours) == 2
    assert experiments.over_kto(found, "larger_") is None


def test_each_size_is_held_against_its_own_reference():
    runs = made_up(["dro_v", "larger_dro_v"], seeds=[0], prompts=5)
    wins = experiments.findings_of(runs, runs).wins
    assert set(wins) == {"dro_v", "larger_dro_v", "sft", "larger_sft"}
    assert set(wins["dro_v"]) == {"sft"}
    for size in ("", "larger_"):
        over = wins[f"{size}sft"][f"{size}dro_v"][0]
        scores = runs[f"{size}dro_v", 0].scores
        assert over == head_to_head(scores.policy_log_prob, scores.reference_log_prob, scores.score)
        assert over + wins[f"{size}dro_v"][f"{size}sft"][0] == pytest.approx(1)


def test_kto_is_chosen_on_validation_prompts():
    arms = ["dro_v", "kto", "kto_tau_1.0", "kto_tau_0.1"]
    test, other = made_up(arms, prompts=5), made_up(arms, prompts=5)
    for seed in range(3):
        other["kto_tau_1.0", seed], other["kto", seed] = (
            other["kto", seed],
            other["kto_tau_1.0", seed],
        )
    chosen, swapped = (experiments.findings_of(test, v).kto("") for v in (test, other))
    assert chosen != swapped
    found = experiments.findings_of(test, other)
    assert found.experiments()[0].paper == {"dro_v": 78.9, swapped: 67.5}
    assert experiments.over_kto(found, "").second == swapped


def test_figure_6_has_each_pair_once():
    arms = [arm for arm in experiments.MATRIX if arm != "sft"]
    runs = made_up(arms, prompts=5)
    found = experiments.findings_of(runs, runs)
    orders = list(experiments.matrix_orders(found))
    assert len(orders) == 10
    assert len({frozenset((o.first, o.second)) for o in orders}) == 10
    for order in orders:
        assert order.paper > 0
        assert order.ours == pytest.approx(
            [100 * rate - 50 for rate in found.wins[order.second][order.first].values()]
        )


def test_the_paper_s_matrix_is_consistent_with_itself():
    for row, cells in experiments.MATRIX.items():
        for column, rate in cells.items():
            assert rate + experiments.MATRIX[column][row] == pytest.approx(100, abs=0.2)
