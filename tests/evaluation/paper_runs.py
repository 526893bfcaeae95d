"""Made-up runs of `dro_jax paper`: policies at known distances from the optimum, with some mass elsewhere."""

import dataclasses

import numpy as np

from dro_jax.evaluation.enumeration import AnswerScores, optimum, renormalise
from dro_jax.evaluation.experiments import Measurement

ARMS = {
    "dro_v": (1.0, 0.99),
    "dro_v_rates_tenth": (0.5, 0.99),
    "dro_v_rates_half": (0.9, 0.99),
    "dro_v_rates_fivefold": (1.0, 0.98),
    "dro_v_value_rate_tenth": (0.8, 0.95),
    "dro_v_value_rate_half": (0.9, 0.98),
    "dro_v_value_rate_fivefold": (1.0, 0.98),
    "dro_v_tau_0.1": (6.0, 0.98),
    "dro_v_tau_5.0": (0.2, 0.99),
    "dro_v_single_value": (1.0, 0.51),
    "dro_v_single_net": (1.0, 0.59),
    "dro_v_single_net_single_value": (1.0, 0.57),
    "dro_p": (0.9, 0.45),
    "kto": (1.9, 0.89),
    "kto_tau_1.0": (2.6, 0.86),
    "kto_tau_0.1": (3.2, 0.8),
    "larger_dro_v": (1.0, 0.99),
    "larger_kto": (1.9, 0.9),
}
"""By name: how far towards the optimum at tau = 1, which is 1, and the probability of the answers."""


def scores_of(seed, *, shift=0.0, mass=0.8, prompts=4, answers=5, noise=0.0):
    """A policy between its reference (shift 0) and the optimum at tau = 1 (shift 1), both with mass elsewhere."""
    rng = np.random.default_rng(seed)
    reference = np.log(rng.dirichlet(np.ones(answers), size=prompts)) + np.log(0.9)
    reward = rng.normal(size=(prompts, answers))
    score = rng.integers(0, 3, size=(prompts, answers)).astype(float)
    tilt = shift * reward + noise * rng.normal(size=reward.shape)
    policy = renormalise(reference + tilt) + np.log(mass)
    return AnswerScores(policy, reference, np.zeros(prompts), reward, score)


def measured(scores, tau=1.0):
    """With a reward of everything else that is 1 below the answers'."""
    return Measurement(scores, scores.reward.min(axis=1) - 1.0, tau)


def made_up(arms=ARMS, seeds=(0, 1, 2), prompts=30):
    """Runs by arm and seed. Seeds have references of their own; a score is the order of the reward."""
    runs = {}
    for seed in seeds:
        for place, arm in enumerate(arms):
            shift, mass = ARMS[arm]
            size = 1000 * arm.startswith("larger_")
            shift += 0.02 * np.random.default_rng([seed, place]).normal()
            scores = scores_of(seed + size, shift=shift, mass=mass, prompts=prompts)
            ranks = scores.reward.argsort(axis=1).argsort(axis=1).astype(float)
            tau = 0.1 if arm == "dro_v_tau_0.1" else 5.0 if arm == "dro_v_tau_5.0" else 1.0
            best = optimum(scores.reference_log_prob, scores.reward, tau).value
            value = best - tau * np.log(mass) + 0.03 if arm.count("dro_v") else None
            runs[arm, seed] = measured(dataclasses.replace(scores, score=ranks, value=value), tau)
    return runs
