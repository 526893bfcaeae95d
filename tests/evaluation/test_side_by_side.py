"""Side-by-side statistics: hand numbers, brute force, other libraries, and simulated coverage."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dro_jax.evaluation import side_by_side
from dro_jax.evaluation.side_by_side import (
    SCORES,
    Estimate,
    adjusted,
    compare_pair,
    estimate,
    holm,
    length_controlled_win_rate,
    make_folds,
    sign_test,
    win_rate,
    win_rate_interval,
    win_rate_matrix,
)


def scores_of(verdicts):
    """W, T, L and - as scores."""
    return np.array([SCORES[{"W": "A", "T": "tie", "L": "B", "-": None}[v]] for v in verdicts])


def pair_of(verdicts, *, names=("p", "q"), flipped=None, unanswered=None, lengths=None, folds=None):
    n = len(verdicts)
    return compare_pair(
        *names,
        scores_of(verdicts),
        [None] * n if flipped is None else flipped,
        [False] * n if unanswered is None else unanswered,
        (np.ones(n), np.ones(n)) if lengths is None else lengths,
        [np.arange(n)] if folds is None else folds,
    )


def test_a_pair_counted_by_hand():
    folds = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    flipped = [False, True, False, None, False, None, False]
    pair = pair_of("WTLWW-L", flipped=flipped, folds=folds)
    assert (pair.first, pair.second) == ("p", "q")
    assert (pair.wins, pair.ties, pair.losses, pair.unjudged, pair.flips) == (3, 1, 2, 1, 1)
    assert (pair.both_orders, pair.unanswered) == (5, 0)
    assert pair.win_rate == 3.5 / 6
    assert pair.fold_rates == (0.75, 0.5, 1.0)
    expected = win_rate_interval(1, 1, 0), win_rate_interval(1, 0, 1), win_rate_interval(1, 0, 0)
    assert pair.fold_intervals == expected
    assert pair.fold_mean == 0.75
    assert pair.fold_deviation == 0.25
    assert pair.p_value == pair.adjusted_p_value == 1.0
    assert pair.interval == win_rate_interval(3, 1, 2)
    assert pair.longer == 0.5


def test_lengths_of_a_pair():
    pair = pair_of("WLTW", lengths=(np.array([3, 1, 2, 9]), np.array([1, 3, 2, 1])))
    assert pair.longer == (1 + 0 + 0.5 + 1) / 4
    expected = length_controlled_win_rate(scores_of("WLTW"), np.array([2, -2, 0, 8]))
    assert pair.length_controlled == expected


def test_nothing_judged():
    pair = pair_of("--", folds=[np.array([0]), np.array([1])])
    assert pair.unjudged == 2
    assert (pair.p_value, pair.flips, pair.both_orders) == (1.0, 0, 0)
    assert pair_of("W--", unanswered=[False, True, False]).unanswered == 1
    for value in (pair.win_rate, *pair.interval, pair.fold_mean, pair.fold_deviation):
        assert math.isnan(value)
    assert math.isnan(pair.length_controlled)


def test_a_fold_without_a_verdict_does_not_count():
    pair = pair_of("W--L", folds=[np.array([0]), np.array([1, 2]), np.array([3])])
    assert math.isnan(pair.fold_rates[1])
    assert pair.fold_mean == 0.5
    assert pair.fold_deviation == pytest.approx(math.sqrt(0.5))
    assert math.isnan(pair_of("W-").fold_deviation)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 3), (3, 7), (12, 12), (60, 41)])
def test_sign_test_is_the_binomial_s_two_tails(wins, losses):
    n = wins + losses
    likely = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1)]
    uneven = abs(wins - losses)
    expected = sum(p for k, p in enumerate(likely) if abs(2 * k - n) >= uneven)
    assert sign_test(wins, losses) == pytest.approx(float(expected), rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_as_the_closed_test_of_bonferroni_does():
    rng = np.random.default_rng(0)
    for p_values in rng.uniform(size=(50, 4)) ** 3:
        got = holm(p_values.tolist())
        for place in range(4):
            # The largest Bonferroni p-value of a set of hypotheses that holds this one.
            sets = (
                chosen
                for size in range(1, 5)
                for chosen in itertools.combinations(range(4), size)
                if place in chosen
            )
            closed = max(min(1, len(s) * min(p_values[i] for i in s)) for s in sets)
            assert got[place] == pytest.approx(closed, rel=1e-12)


def test_p_values_are_adjusted_together():
    pairs = [pair_of("W" * 8), pair_of("W" * 5 + "L"), pair_of("WL")]
    got = adjusted(pairs)
    assert [pair.adjusted_p_value for pair in got] == holm([pair.p_value for pair in pairs])
    assert [pair.p_value for pair in got] == [pair.p_value for pair in pairs]
    assert got[0].adjusted_p_value == 3 * 2 / 2**8


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (5, 0), (3, 7), (789, 211), (50, 50)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_without_ties_the_interval_is_wilson_s(wins, losses, confidence):
    test = stats.binomtest(wins, wins + losses)
    expected = test.proportion_ci(confidence, method="wilson")
    got = win_rate_interval(wins, 0, losses, confidence)
    assert got == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("wins", "ties", "losses"), [(3, 4, 3), (30, 50, 20), (0, 9, 1), (0, 5, 0)]
)
def test_the_interval_is_what_the_score_test_accepts(wins, ties, losses):
    n = wins + ties + losses
    rate, z = (wins + ties / 2) / n, 1.959963984540054
    rates = np.linspace(0, 1, 200_001)
    variance = (rates * (1 - rates) - ties / (n + z**2) / 4) / n
    accepted = rates[(rate - rates) ** 2 <= z**2 * variance]
    got = win_rate_interval(wins, ties, losses)
    assert got == pytest.approx((accepted.min(), accepted.max()), abs=1e-5)


@pytest.mark.parametrize(
    ("n", "probabilities"),
    [
        (30, (0.5, 0.0, 0.5)),
        (30, (0.3, 0.5, 0.2)),
        (100, (0.4, 0.3, 0.3)),
        (100, (0.06, 0.9, 0.04)),
        (400, (0.7, 0.2, 0.1)),
    ],
    ids=str,
)
def test_the_interval_covers_as_often_as_it_says(n, probabilities):
    counts, times = np.unique(
        np.random.default_rng(0).multinomial(n, probabilities, 4000), axis=0, return_counts=True
    )
    truth = probabilities[0] + probabilities[1] / 2
    bounds = [win_rate_interval(*(int(count) for count in row)) for row in counts]
    covered = [low <= truth <= high for low, high in bounds]
    # Never far too bold; much too wide only where nearly everything is a tie.
    assert 0.935 < np.average(covered, weights=times) < (0.965 if probabilities[1] < 0.9 else 0.99)


def test_swapping_the_policies_mirrors_everything():
    rng = np.random.default_rng(1)
    scores = rng.choice([0, 0.5, 1, math.nan], 200, p=[0.3, 0.2, 0.4, 0.1])
    lengths = rng.integers(1, 50, size=(2, 200))
    folds, flipped = make_folds(200, 5, 30, 0), [bool(x < 0.2) for x in rng.random(200)]
    same = flipped, [False] * 200
    one = compare_pair("p", "q", scores, *same, (lengths[0], lengths[1]), folds)
    other = compare_pair("q", "p", 1 - scores, *same, (lengths[1], lengths[0]), folds)
    for name, expected in dataclasses.asdict(one.swapped()).items():
        got = getattr(other, name)
        if name == "length_controlled":
            assert got == pytest.approx(expected, abs=1e-6)
        else:
            of_names = isinstance(expected, str)
            assert got == expected if of_names else np.allclose(got, expected, rtol=1e-12)
    assert one.seen_from("p") == one
    assert one.seen_from("q") == one.swapped()


@pytest.mark.parametrize(
    ("prompts", "folds", "size", "expected"),
    [
        (5000, 5, 1000, (5, 1000)),
        (7000, 5, 1000, (5, 1000)),
        (231, 5, 1000, (5, 46)),
        (4, 5, 1000, (4, 1)),
        (1, 5, 10, (1, 1)),
        (10, 1, 7, (1, 7)),
    ],
)
def test_folds_are_disjoint_and_of_one_size(prompts, folds, size, expected):
    got = make_folds(prompts, folds, size, seed=3)
    assert (len(got), len(got[0])) == expected
    together = np.concatenate(got)
    assert len(set(together)) == len(together) == expected[0] * expected[1]
    assert set(together) <= set(range(prompts))


def test_folds_follow_the_seed():
    one, same, other = (make_folds(100, 5, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    # Shuffled: no fold is a stretch of the file.
    assert all(fold[-1] - fold[0] > 40 for fold in one)


def fit_by_newton(scores, longer_by):
    """The same regression by Newton steps, without a prior."""
    features = np.stack([np.ones(len(scores)), np.tanh(longer_by / np.sqrt(np.mean(longer_by**2)))])
    coefficients = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-coefficients @ features))
        hessian = (features * p * (1 - p)) @ features.T
        coefficients = coefficients + np.linalg.solve(hessian, features @ (scores - p))
    return 1 / (1 + np.exp(-coefficients[0]))


def test_length_control_is_the_regression_at_no_difference():
    rng = np.random.default_rng(2)
    longer_by = rng.normal(20, 30, 3000)
    truth = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer_by / 36))))
    scores = (rng.random(3000) < truth).astype(float)
    scores[:200] = 0.5
    got = length_controlled_win_rate(scores, longer_by)
    assert got == pytest.approx(fit_by_newton(scores, longer_by), abs=1e-4)
    with_gaps = np.concatenate([scores, [math.nan] * 3]), np.concatenate([longer_by, [1e6] * 3])
    assert length_controlled_win_rate(*with_gaps) == pytest.approx(got, abs=1e-9)


def test_length_control_takes_back_what_length_alone_won():
    rng = np.random.default_rng(3)
    longer_by = rng.normal(30, 30, 4000)
    scores = (rng.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer_by / 42)))).astype(float)
    assert win_rate(scores) > 0.7
    assert length_controlled_win_rate(scores, longer_by) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "longer_by", [np.zeros(40), np.repeat([5.0, -5.0], 20)], ids=["equal", "balanced"]
)
def test_length_control_of_lengths_that_say_nothing_is_the_win_rate(longer_by):
    scores = np.tile([1.0, 1.0, 0.5, 0.0], 10)
    assert length_controlled_win_rate(scores, longer_by) == pytest.approx(0.625, abs=1e-3)


def test_length_control_says_nothing_where_lengths_always_differ_by_as_much():
    rng = np.random.default_rng(5)
    scores, noise = (rng.random(1000) < 0.8).astype(float), rng.uniform(-1, 1, 1000)
    for longer_by in (np.full(1000, 7.0), 100 + noise, -100 - noise):
        assert math.isnan(length_controlled_win_rate(scores, longer_by))
    # Where lengths vary the regression has an answer, close to that without a prior.
    got = length_controlled_win_rate(scores, 100 + 60 * noise)
    assert got == pytest.approx(fit_by_newton(scores, 100 + 60 * noise), abs=0.02)


def test_length_control_stays_finite_where_the_data_separate():
    rng = np.random.default_rng(4)
    longer_by = rng.normal(size=500)
    always = length_controlled_win_rate(np.ones(500), longer_by)
    assert 0.999 < always <= 1
    assert length_controlled_win_rate((longer_by > 0).astype(float), longer_by) == pytest.approx(
        0.5, abs=0.2
    )


def test_estimate_by_hand():
    assert estimate(np.array([1.0, 2.0, 3.0, 6.0])) == Estimate(
        3.0, pytest.approx(math.sqrt(14 / 3 / 4))
    )
    assert math.isnan(estimate(np.array([1.0])).standard_error)


def test_the_matrix_has_both_views_of_a_pair():
    pairs = [
        pair_of("WWWL", names=("a", "b")),
        pair_of("T", names=("a", "c")),
        pair_of("-", names=("b", "c")),
    ]
    matrix = win_rate_matrix(["a", "b", "c"], pairs)
    np.testing.assert_array_equal(
        matrix,
        [[math.nan, 0.75, 0.5], [0.25, math.nan, math.nan], [0.5, math.nan, math.nan]],
    )


def test_scores_are_those_of_verdicts():
    assert side_by_side.SCORES["A"] == 1
    assert side_by_side.SCORES["B"] == 0
    assert side_by_side.SCORES["tie"] == 0.5
    assert math.isnan(side_by_side.SCORES[None])
