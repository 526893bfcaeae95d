"""The paper's numbers beside ours: places in the plane of KL and reward, orders, and the page."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from etils import epath

from dro_jax.evaluation import experiments, paper_page
from dro_jax.evaluation.enumeration import (
    AnswerScores,
    divergence,
    frontier,
    head_to_head,
    optimum,
    renormalise,
)


def scores_of(seed, *, shift=0.0, prompts=4, answers=5):
    """A policy between its reference (shift 0) and the optimum at tau = 1 (shift 1), both with mass elsewhere."""
    rng = np.random.default_rng(seed)
    reference = np.log(rng.dirichlet(np.ones(answers), size=prompts)) + np.log(0.9)
    reward = rng.normal(size=(prompts, answers))
    policy = renormalise(reference + shift * reward) + np.log(0.8)
    score = rng.integers(0, 3, size=(prompts, answers)).astype(float)
    return AnswerScores(policy, reference, np.zeros(prompts), reward, score)


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
        short = best.gain_at(divergence(policy, reference).mean()) - gain
        assert short > -1e-5
        nearest = min(nearest, short)
    assert nearest < 0.02


def test_an_optimum_is_on_the_frontier():
    scores = scores_of(3)
    best = optimum(scores.reference_log_prob, scores.reward, 0.37).log_prob
    point = experiments.point_of(dataclasses.replace(scores, policy_log_prob=best))
    assert point.short_of_frontier == pytest.approx(0, abs=2e-3)
    assert point.mass == pytest.approx(1)
    unmoved = experiments.point_of(
        dataclasses.replace(scores, policy_log_prob=scores.reference_log_prob)
    )
    assert (unmoved.kl, unmoved.gain) == pytest.approx((0, 0), abs=1e-12)
    assert unmoved.win_rate == pytest.approx(0.5)


def test_the_exact_optimum_at_tau_1_by_its_own_numbers():
    point = experiments.point_of(scores_of(5, shift=1.0))
    assert point.kl_to_optimum == pytest.approx(0, abs=1e-12)
    assert point.possible_win_rate == pytest.approx(point.optimum_win_rate, abs=2e-3)
    # It loses the prompts on which it says something that is no answer.
    assert point.mass == pytest.approx(0.8)


def point(win_rate):
    return experiments.Point(win_rate, 0.2, 0.3, 0.4, 0.7, 0.66, 0.05, None, 1.0)


def test_the_choice_is_the_mean_over_seeds():
    validation = {"a": [point(0.9), point(0.1)], "b": [point(0.6), point(0.5)], "c": []}
    assert experiments.best_of(["a", "b", "c", "missing"], validation) == "b"


def test_agreement_counts_pairs():
    paper = {"a": 78.9, "b": 70.5, "c": 60.0, "d": 50.0}
    ours = {"a": [0.8, 0.7], "b": [0.6, 0.65], "c": [0.7, 0.54]}
    found = experiments.agreement(paper, ours)
    # a over b and c as in the paper; b over c by 0.005, with a difference of 0.11 between the seeds' differences.
    assert found == experiments.Agreement(same=3, pairs=3, unclear=2)
    ours["b"] = [0.5, 0.4]
    assert experiments.agreement(paper, ours).same == 2


def test_the_paper_s_matrix_is_consistent_with_itself():
    for row, cells in experiments.MATRIX.items():
        for column, rate in cells.items():
            assert rate + experiments.MATRIX[column][row] == pytest.approx(100, abs=0.2)


@pytest.fixture
def runs():
    shifts = {
        "sft": 0.0,
        "dro_v": 1.0,
        "kto": 2.0,
        "kto_tau_1.0": 3.0,
        "dro_p": 0.9,
        "dro_v_single_value": 0.8,
        "larger_dro_v": 1.1,
    }
    return {
        (arm, seed): scores_of(seed, shift=shift, prompts=30)
        for arm, shift in shifts.items()
        for seed in (0, 1)
    }


def test_the_page(runs, tmp_path):
    folder = epath.Path(tmp_path)
    told = paper_page.write(
        folder, runs, runs, {"seed_1/kto_tau_0.1": "loss is nan at <step> 3"}, "dro_jax 7"
    )
    numbers = json.loads((folder / "paper.json").read_text())
    assert numbers["seeds"] == [0, 1]
    ours = [experiments.point_of(runs["dro_v", seed]).win_rate for seed in (0, 1)]
    assert [p["win_rate"] for p in numbers["test"]["dro_v"]] == ours
    assert "sft" not in numbers["test"]
    wins = [
        head_to_head(
            runs["dro_v", s].policy_log_prob, runs["kto", s].policy_log_prob, runs["kto", s].score
        )
        for s in (0, 1)
    ]
    assert numbers["win_rate_of_column_over_row"]["kto"]["dro_v"] == wins
    assert "larger_dro_v" not in numbers["win_rate_of_column_over_row"]["dro_v"]
    text = (folder / "paper.md").read_text()
    mean, spread = 100 * np.mean(ours), 100 * np.std(ours, ddof=1)
    assert f"| smaller: DRO-V over SFT | {mean:.1f} ± {spread:.1f} | 78.9 | dro_v |" in text
    # The policy that went furthest wins most on the validation prompts.
    assert "| dro_v, kto_tau_1.0 |" in text
    assert "## tau of KTO (figure 4)" in text
    assert "0 of 1 pairs of arms are in the paper's order" in text
    assert "seed_1/kto_tau_0.1 failed: loss is nan at <step> 3" in text
    assert "reaches: DRO-V 100% (KL 0." in told[0]
    for name in ("dro_p", "dro_v_single_value"):
        assert f"| {name} | " in text
    page = (folder / "paper.html").read_text()
    assert "dro_jax 7" in page
    assert "loss is nan at &lt;step&gt; 3" in page
    assert f"<td>{mean:.1f} ± {spread:.1f}</td>" in page
    # Two charts a size, with the frontier and every group that was run.
    assert page.count("<figure>") == 4
    assert "{{" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
