"""The experiments of arXiv 2405.19107: its numbers, and what runs of the enumerable task say beside them.

Everything here is exact: all answers to a prompt are enumerated, so that win rates, divergences and rewards are
expectations and not samples. What differs between seeds is the data, the initialisation and their order.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from dro_jax.evaluation import enumeration
from dro_jax.evaluation.enumeration import AnswerScores, Frontier, head_to_head

LARGER = "larger_"
"""Begins the name of an arm of the larger model."""

MODELS = {"": "smaller", LARGER: "larger"}

REFERENCE = "sft"
TAU = 1.0
"""Of the optimum that methods are held against whose tau is not eq. 2's: units of reward per nat."""

TAUS = np.geomspace(100.0, 0.01, 161)
"""Of the frontier."""

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Arms that the paper compares by their win rates over SFT.

    Attributes:
      title: what is varied.
      source: figure or table of the paper.
      paper: win rate over SFT of each arm in the paper, in percent.
      note: what sets the paper's numbers apart.
    """

    title: str
    source: str
    paper: Mapping[str, float]
    note: str = ""


EXPERIMENTS = (
    Experiment(
        "Learning rates of policy and value together",
        "figure 3",
        {
            "dro_v_rates_tenth": 73.7,
            "dro_v_rates_half": 78.7,
            "dro_v": 78.9,
            "dro_v_rates_fivefold": 78.4,
        },
    ),
    Experiment(
        "Learning rate of the value network",
        "figure 3",
        {
            "dro_v_value_rate_tenth": 76.8,
            "dro_v_value_rate_half": 78.0,
            "dro_v": 78.9,
            "dro_v_value_rate_fivefold": 79.1,
        },
    ),
    Experiment(
        "tau of DRO-V", "figure 4", {"dro_v_tau_0.1": 70.5, "dro_v": 78.9, "dro_v_tau_5.0": 76.6}
    ),
    Experiment("tau of KTO", "figure 4", {"kto_tau_0.1": 63.5, "kto_tau_1.0": 61.9, "kto": 67.5}),
    Experiment(
        "Sharing of parameters and values",
        "figure 5",
        {
            "dro_v": 76.6,
            "dro_v_single_value": 72.1,
            "dro_v_single_net_single_value": 57.6,
            "dro_v_single_net": 55.5,
        },
        "The paper's numbers are of a quarter of its training, 10,000 of 40,000 steps; ours of the end.",
    ),
)

HEAD_TO_HEAD = {
    "": Experiment("Smaller model", "head to head, T5-L", {"dro_v": 78.9, "kto": 67.5}),
    LARGER: Experiment(
        "Larger model", "head to head, T5-XL", {"larger_dro_v": 81.5, "larger_kto": 78.2}
    ),
}
"""By model size; KTO with the tau that was searched."""

OVER_KTO = {"": 63.4, LARGER: 57.5}
"""DRO-V's win rate over KTO in the paper, by model size, in percent."""

RESOLUTION = 1.0
"""Points of win rate. Nearer numbers of the paper are no order: it gives ± 0.3 to ± 1.0, where it gives any."""

MATRIX = {
    "dro_v_single_value": {
        "dro_v_single_net_single_value": 37.1,
        "dro_v_single_net": 28.9,
        "dro_v": 54.9,
        "sft": 27.9,
    },
    "dro_v_single_net_single_value": {
        "dro_v_single_value": 62.9,
        "dro_v_single_net": 45.2,
        "dro_v": 70.4,
        "sft": 42.4,
    },
    "dro_v_single_net": {
        "dro_v_single_value": 71.1,
        "dro_v_single_net_single_value": 54.8,
        "dro_v": 74.7,
        "sft": 44.5,
    },
    "dro_v": {
        "dro_v_single_value": 45.1,
        "dro_v_single_net_single_value": 29.6,
        "dro_v_single_net": 25.3,
        "sft": 23.4,
    },
    "sft": {
        "dro_v_single_value": 72.1,
        "dro_v_single_net_single_value": 57.6,
        "dro_v_single_net": 55.5,
        "dro_v": 76.6,
    },
}
"""The paper's figure 6: of each row, the win rate of others over it, in percent."""

KTO_SEARCH = ("kto_tau_0.1", "kto_tau_1.0", "kto")
"""The paper searches KTO's tau, and none of DRO-V's settings."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a run makes of the prompts of a split.

    Attributes:
      scores: of every answer.
      rest_reward: r of a text that is no answer, [P].
      tau: of the optimum that the run aims at, units of reward per nat; `TAU` where it aims at none.
    """

    scores: AnswerScores
    rest_reward: np.ndarray
    tau: float


Measurements = Mapping[tuple[str, int], Measurement]
"""By arm and seed."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run against its reference and the exact optima, means over prompts.

    Text that is no answer counts as one more answer, but for the last two.

    Attributes:
      win_rate: over the reference; text that is no answer loses.
      kl: KL(pi || pi_ref), all that is no answer taken as one: at most the whole one, nats.
      gain: E_pi[r] - E_pi_ref[r], standard deviations of the reward.
      possible_gain: the most that any policy can gain at that KL.
      possible_win_rate: of the exact optimum of that KL.
      optimum_win_rate: of the exact optimum at the run's tau.
      mass: probability that pi gives to the answers.
      kl_to_optimum: KL(pi || pi*) at the run's tau, nats, given that one of the answers is chosen.
      value_error: of V at the run's tau, None without one.
    """

    win_rate: float
    kl: float
    gain: float
    possible_gain: float
    possible_win_rate: float
    optimum_win_rate: float
    mass: float
    kl_to_optimum: float
    value_error: float | None

    @property
    def lost_gain(self) -> float:
        """Reward that the run leaves behind at its own KL, standard deviations of the reward."""
        return self.possible_gain - self.gain

    @property
    def lost_win_rate(self) -> float:
        """By how much the exact optimum of its own KL wins more often."""
        return self.possible_win_rate - self.win_rate


def frontier_of(run: Measurement) -> Frontier:
    """The exact optima over `TAUS` from a run's reference."""
    whole = enumeration.everything(run.scores, run.rest_reward)
    return enumeration.frontier(whole.reference_log_prob, whole.reward, whole.score, TAUS)


def point_of(run: Measurement, best: Frontier) -> Point:
    """Places a run in the plane of KL and reward, beneath the frontier of its reference."""
    whole = enumeration.everything(run.scores, run.rest_reward)
    policy, reference = whole.policy_log_prob, whole.reference_log_prob
    kl = float(enumeration.divergence(policy, reference).mean())
    gain = np.sum((np.exp(policy) - np.exp(reference)) * whole.reward, axis=1).mean()
    optimum = enumeration.optimum(reference, whole.reward, run.tau).log_prob
    possible_gain, possible_win_rate = best.at(kl)
    distance = enumeration.distance_to_optimum(run.scores, run.tau)
    return Point(
        win_rate=float(enumeration.win_rate(policy, reference, whole.score).mean()),
        kl=kl,
        gain=float(gain),
        possible_gain=possible_gain,
        possible_win_rate=possible_win_rate,
        optimum_win_rate=float(enumeration.win_rate(optimum, reference, whole.score).mean()),
        mass=distance.policy_mass,
        kl_to_optimum=distance.kl_to_optimum,
        value_error=distance.value_error,
    )


def interval(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of the t interval at `CONFIDENCE`, of one number a seed; None for one seed, which has none."""
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return mean, None
    error = np.std(numbers, ddof=1) / np.sqrt(len(numbers))
    return mean, float(error * stats.t.ppf(0.5 + CONFIDENCE / 2, len(numbers) - 1))


@dataclasses.dataclass(frozen=True)
class Order:
    """Two arms in the paper's order.

    Attributes:
      first: wins more in the paper.
      second: wins less.
      paper: by how much, points of win rate.
      ours: the same of ours, one for every seed that has both.
      equal_kl: the same of how near the win rates come to those of the exact optima at the arms' own KL; empty where
        two arms are compared with each other and not over SFT.
    """

    first: str
    second: str
    paper: float
    ours: Sequence[float]
    equal_kl: Sequence[float] = ()

    @property
    def over_sft(self) -> bool:
        """Whether they are compared by their win rates over SFT, and not with each other."""
        return bool(self.equal_kl)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        mean, half = interval(self.ours)
        if self.paper < RESOLUTION:
            return NO_ORDER
        if half is not None and abs(mean) <= half:
            return UNCLEAR
        return SAME if mean > 0 else OTHER


SAME, OTHER, UNCLEAR, NO_ORDER = VERDICTS = (
    "as in the paper",
    "the other way",
    "not told apart",
    "no order in the paper",
)
"""The third: the interval over seeds of the difference has 0 in it, which takes two seeds."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the runs on disk say.

    Attributes:
      points: by arm and seed, its place on test prompts.
      validation: by arm and seed, its win rate over the reference on validation prompts.
      wins: by row, column and seed, the column's win rate over the row on test prompts, references included.
      frontiers: by size of the model ("" or `LARGER`) and seed, that of the reference on test prompts.
    """

    points: Mapping[str, Mapping[int, Point]]
    validation: Mapping[str, Mapping[int, float]]
    wins: Mapping[str, Mapping[str, Mapping[int, float]]]
    frontiers: Mapping[str, Mapping[int, Frontier]]

    @property
    def seeds(self) -> list[int]:
        """Of any arm, ascending."""
        return sorted({seed for points in self.points.values() for seed in points})

    def kto(self, size: str) -> str | None:
        """KTO with the tau that wins most on validation prompts; None where KTO was not run."""
        there = {name: self.validation.get(size + name) for name in KTO_SEARCH}
        return best_of({size + name: rates for name, rates in there.items() if rates})

    def experiments(self) -> list[Experiment]:
        """All of them, head to head first and there KTO as it was chosen."""
        heads = [
            dataclasses.replace(
                experiment,
                paper={
                    self.kto(size) or name if name == size + "kto" else name: number
                    for name, number in experiment.paper.items()
                },
            )
            for size, experiment in HEAD_TO_HEAD.items()
        ]
        return [*heads, *EXPERIMENTS]


def findings_of(test: Measurements, validation: Measurements) -> Findings:
    """Places every run.

    Args:
      test: runs from a reference on the test prompts.
      validation: the same runs on the validation prompts.
    """
    points: dict[str, dict[int, Point]] = {}
    rates: dict[str, dict[int, float]] = {}
    frontiers: dict[str, dict[int, Frontier]] = {}
    for arm, seed in sorted(test):
        run = test[arm, seed]
        best = frontiers.setdefault(size_of(arm), {})
        if seed not in best:
            best[seed] = frontier_of(run)
        points.setdefault(arm, {})[seed] = point_of(run, best[seed])
        held_out = validation[arm, seed].scores
        rates.setdefault(arm, {})[seed] = head_to_head(
            held_out.policy_log_prob, held_out.reference_log_prob, held_out.score
        )
    return Findings(points, rates, _wins(test), frontiers)


def size_of(arm: str) -> str:
    """ "" or `LARGER`."""
    return LARGER if arm.startswith(LARGER) else ""


def _wins(test: Measurements) -> dict[str, dict[str, dict[int, float]]]:
    """Win rates of all pairs of one size and seed."""
    policies = {key: (run.scores.policy_log_prob, run.scores.score) for key, run in test.items()}
    policies |= {
        (size_of(arm) + REFERENCE, seed): (run.scores.reference_log_prob, run.scores.score)
        for (arm, seed), run in test.items()
    }
    wins: dict[str, dict[str, dict[int, float]]] = {}
    for (row, seed), (column, other) in itertools.permutations(sorted(policies), 2):
        if seed == other and size_of(row) == size_of(column):
            (theirs, score), (ours, _) = policies[row, seed], policies[column, seed]
            rate = head_to_head(ours, theirs, score)
            wins.setdefault(row, {}).setdefault(column, {})[seed] = rate
    return wins


def best_of(candidates: Mapping[str, Mapping[int, float]]) -> str | None:
    """The candidate with the greatest mean over the seeds that all have; the first of equals, None of none.

    Args:
      candidates: by name, a number for every seed. Where no seed has all of them, each is judged by its own.
    """
    shared = set.intersection(*(set(rates) for rates in candidates.values())) if candidates else ()

    def mean(name: str) -> float:
        rates = candidates[name]
        return float(np.mean([rates[seed] for seed in shared or rates]))

    return max(candidates, key=mean) if candidates else None


def orders(
    paper: Mapping[str, float], points: Mapping[str, Mapping[int, Point]]
) -> Iterator[Order]:
    """Pairs of arms of which some seed has both, compared by their win rates over SFT.

    Args:
      paper: win rate of each arm in the paper, percent.
      points: by arm and seed; arms that were not run may be missing.
    """
    for pair in itertools.combinations([name for name in paper if name in points], 2):
        first, second = sorted(pair, key=lambda name: -paper[name])
        both = [
            (points[first][seed], points[second][seed])
            for seed in points[first]
            if seed in points[second]
        ]
        if both:
            yield Order(
                first,
                second,
                paper[first] - paper[second],
                [100 * (one.win_rate - other.win_rate) for one, other in both],
                [100 * (other.lost_win_rate - one.lost_win_rate) for one, other in both],
            )


def matrix_orders(findings: Findings) -> Iterator[Order]:
    """Each pair of the paper's figure 6 once, by who wins of the two."""
    for row, column in itertools.combinations(MATRIX, 2):
        first, second = (column, row) if MATRIX[row][column] > 50 else (row, column)
        wins = findings.wins.get(second, {}).get(first)
        if wins:
            ours = [100 * rate - 50 for rate in wins.values()]
            yield Order(first, second, MATRIX[second][first] - 50, ours)


def over_kto(findings: Findings, size: str) -> Order | None:
    """DRO-V against KTO as it was chosen, by who wins of the two; None where one of them was not run."""
    kto = findings.kto(size)
    wins = findings.wins.get(kto or "", {}).get(f"{size}dro_v")
    if kto is None or not wins:
        return None
    return Order(
        f"{size}dro_v", kto, OVER_KTO[size] - 50, [100 * rate - 50 for rate in wins.values()]
    )
