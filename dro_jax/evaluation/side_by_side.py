"""Statistics of side-by-side verdicts: win rates, what is sure about them, and what else explains them.

Everything is NumPy and SciPy on one pair's scores, a float64 array [N] over the prompts: 1 where the first policy's
answer was preferred, 0 where the second's was, 0.5 for a tie, NaN where the judge gave no verdict. Prompts without a
verdict are left out of every rate and counted.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

Array = np.ndarray

SCORES: dict[str | None, float] = {"A": 1.0, "tie": 0.5, "B": 0.0, None: math.nan}
"""The score of a verdict's winner, for the first policy."""

CONFIDENCE = 0.95

_PRIOR_DEVIATION = 10.0
"""Of the normal prior on the coefficients of `length_controlled_win_rate`: it binds only where the data separate."""

_LEAST_VARIATION = 0.1
"""Standard deviation over mean. Below, the win rate at equal lengths is ten times as uncertain as the win rate is."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """What verdicts say about two policies. Rates are of the first, 0 to 1, NaN where nothing was judged.

    Attributes:
      first: name of the first policy.
      second: name of the second.
      wins: prompts on which the first was preferred.
      ties: on which neither was.
      losses: on which the second was.
      unjudged: without a verdict.
      unanswered: of those, where the judge did not answer at all.
      flips: verdicts that changed with the order of the answers.
      both_orders: verdicts of a judge that was asked in both orders, those that changed and those that did not.
      win_rate: (wins + ties / 2) / (wins + ties + losses).
      interval: of the win rate, see `win_rate_interval`.
      fold_rates: the win rate of each fold.
      fold_intervals: their intervals.
      fold_mean: mean of the fold rates.
      fold_deviation: standard deviation of the fold rates with one degree of freedom less, NaN for one fold.
      p_value: of `sign_test`.
      adjusted_p_value: that after `holm` over all pairs.
      length_controlled: see `length_controlled_win_rate`.
      longer: share of the prompts on which the first policy's answer is the longer one, equal lengths counting half.
    """

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    unjudged: int
    unanswered: int
    flips: int
    both_orders: int
    win_rate: float
    interval: tuple[float, float]
    fold_rates: tuple[float, ...]
    fold_intervals: tuple[tuple[float, float], ...]
    fold_mean: float
    fold_deviation: float
    p_value: float
    adjusted_p_value: float
    length_controlled: float
    longer: float

    def swapped(self) -> "Pair":
        """The same verdicts with the other policy first."""
        return dataclasses.replace(
            self,
            first=self.second,
            second=self.first,
            wins=self.losses,
            losses=self.wins,
            win_rate=1 - self.win_rate,
            interval=_mirrored(self.interval),
            fold_rates=tuple(1 - rate for rate in self.fold_rates),
            fold_intervals=tuple(map(_mirrored, self.fold_intervals)),
            fold_mean=1 - self.fold_mean,
            length_controlled=1 - self.length_controlled,
            longer=1 - self.longer,
        )

    def seen_from(self, name: str) -> "Pair":
        """The same verdicts with the named one of the two policies first."""
        return self if name == self.first else self.swapped()


def _mirrored(interval: tuple[float, float]) -> tuple[float, float]:
    return 1 - interval[1], 1 - interval[0]


def compare_pair(
    first: str,
    second: str,
    scores: Array,
    flipped: Sequence[bool | None],
    unanswered: Sequence[bool],
    lengths: tuple[Array, Array],
    folds: Sequence[Array],
) -> Pair:
    """Statistics of one pair; its p-value is not adjusted for others yet (see `adjusted`).

    Args:
      first: name of the first policy.
      second: name of the second.
      scores: of the first, [N].
      flipped: whether a verdict changed with the order of the answers, N; None where not both orders were asked.
      unanswered: whether the judge did not answer, N.
      lengths: of the first's and the second's answers, [N] each, in any one unit.
      folds: of `make_folds`.

    Returns:
      The statistics.
    """
    wins, ties, losses = _counts(scores)
    rates = tuple(win_rate(scores[fold]) for fold in folds)
    judged = [rate for rate in rates if not math.isnan(rate)]
    p_value = sign_test(wins, losses)
    return Pair(
        first=first,
        second=second,
        wins=wins,
        ties=ties,
        losses=losses,
        unjudged=int(np.sum(np.isnan(scores))),
        unanswered=sum(unanswered),
        flips=sum(flip is True for flip in flipped),
        both_orders=sum(flip is not None for flip in flipped),
        win_rate=win_rate(scores),
        interval=win_rate_interval(wins, ties, losses),
        fold_rates=rates,
        fold_intervals=tuple(win_rate_interval(*_counts(scores[fold])) for fold in folds),
        fold_mean=float(np.mean(judged)) if judged else math.nan,
        fold_deviation=float(np.std(judged, ddof=1)) if len(judged) > 1 else math.nan,
        p_value=p_value,
        adjusted_p_value=p_value,
        length_controlled=length_controlled_win_rate(scores, lengths[0] - lengths[1]),
        longer=float(np.mean(0.5 + 0.5 * np.sign(lengths[0] - lengths[1]))),
    )


def _counts(scores: Array) -> tuple[int, int, int]:
    """Wins, ties and losses."""
    wins, ties, losses = (int(np.sum(scores == score)) for score in (1.0, 0.5, 0.0))
    return wins, ties, losses


def adjusted(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs with p-values adjusted for there being so many."""
    p_values = holm([pair.p_value for pair in pairs])
    return [
        dataclasses.replace(pair, adjusted_p_value=p_value)
        for pair, p_value in zip(pairs, p_values, strict=True)
    ]


def win_rate(scores: Array) -> float:
    """Mean of the scores that are there; NaN without any."""
    judged = scores[~np.isnan(scores)]
    return float(judged.mean()) if len(judged) else math.nan


def win_rate_interval(
    wins: int, ties: int, losses: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson's score interval of a win rate in which ties count half.

    It holds the rates m at which (rate - m)^2 <= z^2 (m (1 - m) - t / 4) / n, the variance of a mean score being
    (m (1 - m) - t / 4) / n where ties have probability t. Without ties this is Wilson's interval. t is estimated by
    ties / (n + z^2), as the interval's centre shrinks a rate, so that five ties of five are not certainty.

    Args:
      wins: prompts won.
      ties: prompts tied.
      losses: prompts lost.
      confidence: coverage to aim at.

    Returns:
      Lowest and highest rate, both NaN without a verdict.
    """
    n = wins + ties + losses
    if not n:
        return math.nan, math.nan
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    rate = (wins + ties / 2) / n
    tied = ties / (n + z**2)
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    inside = middle**2 - (rate**2 + z**2 * tied / (4 * n)) / (1 + z**2 / n)
    half_width = math.sqrt(max(0.0, inside))
    return max(0.0, middle - half_width), min(1.0, middle + half_width)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of as uneven a split of wins and losses if both were equally likely, exactly.

    The prompts are paired, one answer of each policy, so this is also McNemar's exact test. Ties say nothing about who
    is better and are left out.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): what is below 0.05 holds for all of them together, at 5%."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def make_folds(num_prompts: int, num_folds: int, fold_size: int, seed: int) -> list[Array]:
    """Disjoint random parts of the prompts, all of one size.

    Args:
      num_prompts: how many prompts there are, at least 1.
      num_folds: folds to make; as many as there are prompts where there are fewer.
      fold_size: prompts a fold; fewer where they do not suffice.
      seed: of the shuffle.

    Returns:
      Places of the prompts, int [size] a fold, ascending.
    """
    num_folds = min(num_folds, num_prompts)
    size = min(fold_size, num_prompts // num_folds)
    shuffled = np.random.default_rng(seed).permutation(num_prompts)
    return [np.sort(shuffled[size * fold : size * (fold + 1)]) for fold in range(num_folds)]


def length_controlled_win_rate(scores: Array, longer_by: Array) -> float:
    """The win rate if both policies' answers were equally long, by logistic regression.

    Fits score = sigmoid(a + b tanh(d / s)) with d the difference of lengths and s its root mean square, a tie being
    half a win, and returns sigmoid(a). This is length-controlled AlpacaEval (arXiv 2404.04475) for one pair, without
    its term for how hard an instruction is, which it learns from many models. A normal prior of standard deviation
    10 keeps a and b finite where every verdict is the same or length explains all of them.

    Where one policy's answers are always longer by about as much, a and b have nearly the same feature, and the prior
    alone would say which of them explains the verdicts: there is no rate then.

    Args:
      scores: of the first policy, [N].
      longer_by: length of its answer less that of the other's, [N].

    Returns:
      A rate from 0 to 1; NaN without a verdict, and where tanh(d / s) varies by less than `_LEAST_VARIATION`.
    """
    judged = ~np.isnan(scores)
    score, difference = scores[judged], np.asarray(longer_by, np.float64)[judged]
    if not len(score):
        return math.nan
    scale = np.sqrt(np.mean(difference**2))
    lengths = np.tanh(difference / scale) if scale else difference
    if np.std(lengths) < _LEAST_VARIATION * abs(np.mean(lengths)):
        return math.nan
    features = np.stack([np.ones(len(score)), lengths])

    def loss(coefficients: Array) -> tuple[float, Array]:
        logit = coefficients @ features
        cross_entropy = np.logaddexp(0, logit) - score * logit
        gradient = features @ (1 / (1 + np.exp(-logit)) - score)
        prior = coefficients / _PRIOR_DEVIATION**2
        return float(cross_entropy.sum() + coefficients @ prior / 2), gradient + prior

    fitted = optimize.minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", tol=1e-12)
    return float(1 / (1 + np.exp(-fitted.x[0])))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error, NaN for one prompt."""

    mean: float
    standard_error: float


def estimate(values: Array) -> Estimate:
    """Mean and standard error of values [N], N at least 1.

    Of log pi(y|x) - log pi_ref(y|x), y drawn from pi, this is KL(pi || pi_ref), nats a sequence.
    """
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def win_rate_matrix(names: Sequence[str], pairs: Sequence[Pair]) -> Array:
    """Win rates of the row's policy over the column's, [P, P]; NaN on the diagonal and where nothing was judged."""
    matrix = np.full((len(names), len(names)), math.nan)
    for pair in pairs:
        row, column = names.index(pair.first), names.index(pair.second)
        matrix[row, column], matrix[column, row] = pair.win_rate, 1 - pair.win_rate
    return matrix
