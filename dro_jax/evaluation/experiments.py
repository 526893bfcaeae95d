"""The experiments of arXiv 2405.19107: its numbers, and what runs of the enumerable task say beside them.

Everything here is exact: all answers to a prompt are enumerated, so that win rates, divergences and rewards are
expectations and not samples. What differs between seeds is the data, the initialisation and their order.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dro_jax.evaluation import enumeration
from dro_jax.evaluation.enumeration import AnswerScores, Frontier

LARGER = "larger_"
"""Begins the name of an arm of the larger model."""

REFERENCE = "sft"
TAU = 1.0
"""Of the optimum that arms are held against, whatever their own: units of reward per nat."""

TAUS = np.geomspace(100.0, 0.01, 81)
"""Of the frontier."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Arms that the paper compares by their win rates over SFT.

    Attributes:
      title: what is varied.
      source: figure or table of the paper.
      paper: win rate over SFT of each arm in the paper, in percent.
    """

    title: str
    source: str
    paper: Mapping[str, float]


EXPERIMENTS = (
    Experiment("Smaller model", "head to head, T5-L", {"dro_v": 78.9, "kto": 67.5}),
    Experiment("Larger model", "head to head, T5-XL", {"larger_dro_v": 81.5, "larger_kto": 78.2}),
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
    ),
)

OVER_KTO = {"": 63.4, LARGER: 57.5}
"""DRO-V's win rate over KTO in the paper, by model size, in percent."""

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
class Point:
    """One run against its reference and the exact optima, means over prompts.

    Attributes:
      win_rate: over the reference; text that is no answer loses.
      kl: KL(pi || pi_ref) on the answers, nats.
      gain: E_pi[r] - E_pi_ref[r] on the answers, standard deviations of the reward.
      possible_gain: the most that any policy can gain at that KL.
      possible_win_rate: of the exact optimum of that KL.
      optimum_win_rate: of the exact optimum at `TAU`.
      kl_to_optimum: KL(pi || pi*) at `TAU`, nats.
      value_error: of V at `TAU`, None without one.
      mass: probability that pi gives to the answers.
    """

    win_rate: float
    kl: float
    gain: float
    possible_gain: float
    possible_win_rate: float
    optimum_win_rate: float
    kl_to_optimum: float
    value_error: float | None
    mass: float

    @property
    def short_of_frontier(self) -> float:
        """Reward that the run leaves behind at its own KL, standard deviations of the reward."""
        return self.possible_gain - self.gain


def frontier_of(scores: AnswerScores) -> Frontier:
    """The exact optima over `TAUS` from a run's reference."""
    return enumeration.frontier(scores.reference_log_prob, scores.reward, scores.score, TAUS)


def point_of(scores: AnswerScores) -> Point:
    """Places a run in the plane of KL and reward, beneath the frontier of its reference."""
    distance = enumeration.distance_to_optimum(scores, TAU)
    policy, reference = (
        enumeration.renormalise(log_prob)
        for log_prob in (scores.policy_log_prob, scores.reference_log_prob)
    )
    best = frontier_of(scores)
    gain = np.sum((np.exp(policy) - np.exp(reference)) * scores.reward, axis=1).mean()
    return Point(
        win_rate=enumeration.head_to_head(
            scores.policy_log_prob, scores.reference_log_prob, scores.score
        ),
        kl=distance.kl_to_reference,
        gain=float(gain),
        possible_gain=best.gain_at(distance.kl_to_reference),
        possible_win_rate=float(np.interp(distance.kl_to_reference, best.kl, best.win_rate)),
        optimum_win_rate=distance.optimum_win_rate,
        kl_to_optimum=distance.kl_to_optimum,
        value_error=distance.value_error,
        mass=distance.policy_mass,
    )


def best_of(candidates: Sequence[str], validation: Mapping[str, Sequence[Point]]) -> str:
    """The candidate that wins most over the reference, mean over seeds; the first of equals.

    Args:
      candidates: names of arms, at least one of which has points.
      validation: by arm, its points on validation prompts, one a seed.
    """
    there = [name for name in candidates if validation.get(name)]
    return max(there, key=lambda name: np.mean([point.win_rate for point in validation[name]]))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Pairs of arms whose order the paper gives.

    Attributes:
      same: pairs in the paper's order.
      pairs: all pairs of arms that are there.
      unclear: pairs nearer to each other than twice the standard error of their difference over seeds.
    """

    same: int
    pairs: int
    unclear: int


def agreement(paper: Mapping[str, float], ours: Mapping[str, Sequence[float]]) -> Agreement:
    """Compares the order of arms with the paper's.

    Args:
      paper: a number of each arm.
      ours: the same number, one a seed, the same seeds for all; arms that were not run may be missing.
    """
    same = unclear = pairs = 0
    for one, other in itertools.combinations([name for name in paper if ours.get(name)], 2):
        differences = np.subtract(ours[one], ours[other])
        pairs += 1
        same += bool(np.sign(differences.mean()) == np.sign(paper[one] - paper[other]))
        if len(differences) > 1:
            error = differences.std(ddof=1) / np.sqrt(len(differences))
            unclear += bool(abs(differences.mean()) < 2 * error)
    return Agreement(same, pairs, unclear)
