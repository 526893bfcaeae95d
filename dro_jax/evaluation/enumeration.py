"""Exact numbers where a prompt's answers can be enumerated: eq. 2's optimum and the distance to it.

Everything is NumPy in float64. P prompts, A answers each. The reference is not renormalised on the answers
when V* is computed; policies are, for KL and J (arXiv 2405.19107, eq. 1 and 2).
"""

import dataclasses

import numpy as np

Float = np.ndarray


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """What a run makes of every answer to every prompt.

    Attributes:
      policy_log_prob: log pi(y|x), nats, [P, A].
      reference_log_prob: log pi_ref(y|x), nats, [P, A].
      value: V(x), units of reward, [P]; None for methods without one.
      reward: r(x, y) as trained on, [P, A].
      score: what answers are compared by, [P, A].
    """

    policy_log_prob: Float
    reference_log_prob: Float
    value: Float | None
    reward: Float
    score: Float


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The optimum of eq. 2 on a set of answers.

    Attributes:
      log_prob: log pi*(y|x), nats, [P, A], normalised on the answers.
      value: V*(x) = tau log sum_A pi_ref exp(r / tau), units of reward, [P].
    """

    log_prob: Float
    value: Float


def optimum(reference_log_prob: Float, reward: Float, tau: float) -> Optimum:
    """Eq. 2, exactly.

    Args:
      reference_log_prob: log pi_ref(y|x) of every answer, nats, [P, A].
      reward: r(x, y), [P, A].
      tau: units of reward per nat.

    Returns:
      pi* and V*.
    """
    unnormalised = _float64(reference_log_prob) + _float64(reward) / tau
    log_partition = _log_sum_exp(unnormalised)
    return Optimum(unnormalised - log_partition[:, None], tau * log_partition)


def log_mass(log_prob: Float) -> Float:
    """log of the probability that a policy [P, A] gives to the answers together, nats, [P]."""
    return _log_sum_exp(_float64(log_prob))


def renormalise(log_prob: Float) -> Float:
    """A policy's log-probabilities [P, A] given that one of the answers is chosen."""
    return _float64(log_prob) - log_mass(log_prob)[:, None]


def divergence(log_p: Float, log_q: Float) -> Float:
    """KL(p || q) of normalised log-probabilities [P, A], nats, [P]."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


def regularised_reward(log_p: Float, reference: Float, reward: Float, tau: float) -> Float:
    """J = E_p[r] - tau KL(p || pi_ref) (eq. 1) of normalised log-probabilities [P, A], [P]."""
    return np.sum(np.exp(log_p) * reward, axis=1) - tau * divergence(log_p, reference)


def win_rate(log_p: Float, log_q: Float, score: Float) -> Float:
    """Probability that an answer of p scores above one of q, ties counting half.

    Args:
      log_p: normalised log-probabilities [P, A].
      log_q: likewise.
      score: of every answer, [P, A].

    Returns:
      [P].
    """
    better = np.sign(score[:, :, None] - score[:, None, :]) / 2 + 0.5
    return np.einsum("pa,pab,pb->p", np.exp(log_p), better, np.exp(log_q))


def with_the_rest(log_prob: Float) -> Float:
    """Adds to a policy's log-probabilities [P, A] that of everything that is no answer: [P, A + 1], normalised."""
    mass = np.exp(log_mass(log_prob))
    # Log-probabilities in float32 do not say how much less than their precision is left.
    rest = np.maximum(1.0 - mass, np.finfo(np.float32).eps)
    return renormalise(np.concatenate([_float64(log_prob), np.log(rest)[:, None]], axis=1))


def everything(scores: AnswerScores, rest_reward: Float) -> AnswerScores:
    """Adds what is no answer as one more, so that probabilities add up to one.

    A divergence on that is at most the one over all texts, and a mean reward is that over all texts, if what is no
    answer has one reward. So no policy, whatever it says, has more reward than the frontier there.

    Args:
      scores: of A answers.
      rest_reward: r of a text that is no answer, [P].

    Returns:
      The same of A + 1; the last one's score is below the others'.
    """
    return AnswerScores(
        policy_log_prob=with_the_rest(scores.policy_log_prob),
        reference_log_prob=with_the_rest(scores.reference_log_prob),
        value=scores.value,
        reward=np.concatenate([_float64(scores.reward), rest_reward[:, None]], axis=1),
        score=_with_lowest(scores.score),
    )


def head_to_head(log_prob: Float, other_log_prob: Float, score: Float) -> float:
    """Win rate of a policy over another as their samples would show it, mean over prompts.

    Args:
      log_prob: log pi(y|x) of every answer, nats, [P, A], not renormalised.
      other_log_prob: likewise, of the other policy.
      score: of every answer, [P, A]. What is no answer loses to every answer and ties with its like.

    Returns:
      A probability; ties count half.
    """
    wins = win_rate(with_the_rest(log_prob), with_the_rest(other_log_prob), _with_lowest(score))
    return float(wins.mean())


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The exact optima of eq. 2 over tau: no policy has more reward at as small a divergence.

    Attributes:
      tau: units of reward per nat, descending, [T].
      kl: KL(pi* || pi_ref), nats, mean over prompts, ascending, [T].
      gain: E_pi*[r] - E_pi_ref[r], units of reward, likewise.
      win_rate: of pi* over pi_ref, likewise.
    """

    tau: Float
    kl: Float
    gain: Float
    win_rate: Float

    def at(self, kl: float) -> tuple[float, float]:
        """The most that a policy can gain at a divergence from the reference, in nats, and that optimum's win rate."""
        kls = np.append(0.0, self.kl)
        gain, wins = np.append(0.0, self.gain), np.append(0.5, self.win_rate)
        return float(np.interp(kl, kls, gain)), float(np.interp(kl, kls, wins))


def frontier(reference_log_prob: Float, reward: Float, score: Float, tau: Float) -> Frontier:
    """Eq. 2's optima over tau, which maximise the reward at every price of leaving the reference.

    Args:
      reference_log_prob: log pi_ref(y|x) of every answer, nats, [P, A].
      reward: r(x, y), [P, A].
      score: what answers are compared by, [P, A].
      tau: units of reward per nat, descending, [T].

    Returns:
      The optimum of every tau, as means over the prompts.
    """
    reference = renormalise(reference_log_prob)
    start = np.sum(np.exp(reference) * reward, axis=1)
    points = []
    for each in tau:
        best = optimum(reference, reward, float(each)).log_prob
        gain = np.sum(np.exp(best) * reward, axis=1) - start
        points.append([divergence(best, reference), gain, win_rate(best, reference, score)])
    kl, gain, wins = np.mean(points, axis=2).T
    return Frontier(_float64(tau), kl, gain, wins)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How near a trained policy and value are to the optimum, means over prompts.

    Attributes:
      improvement_fraction: (J(pi) - J(pi_ref)) / (J(pi*) - J(pi_ref)).
      kl_to_optimum: KL(pi || pi*), nats.
      kl_to_reference: KL(pi || pi_ref), nats.
      value_error: |V + tau log m - V*| with m the policy's mass on the answers: the data fix V only up to
        that shift. None without a value.
      constant_value_error: the same for the constant with the smallest such error.
      optimum_win_rate: of pi* over pi_ref.
      exact_win_rate: of pi over pi_ref.
      reference_mass: probability that pi_ref gives to the answers.
      policy_mass: that pi gives to them.
    """

    improvement_fraction: float
    kl_to_optimum: float
    kl_to_reference: float
    value_error: float | None
    constant_value_error: float
    optimum_win_rate: float
    exact_win_rate: float
    reference_mass: float
    policy_mass: float


def distance_to_optimum(scores: AnswerScores, tau: float) -> Distance:
    """Measures a policy and a value network against eq. 2.

    Args:
      scores: of every answer.
      tau: units of reward per nat.

    Returns:
      Means over the prompts.
    """
    best = optimum(scores.reference_log_prob, scores.reward, tau)
    policy, reference = (
        renormalise(log_prob) for log_prob in (scores.policy_log_prob, scores.reference_log_prob)
    )
    start = regularised_reward(reference, reference, scores.reward, tau).mean()
    reached = regularised_reward(policy, reference, scores.reward, tau).mean()
    possible = regularised_reward(best.log_prob, reference, scores.reward, tau).mean()
    target = best.value - tau * log_mass(scores.policy_log_prob)
    value = scores.value
    return Distance(
        improvement_fraction=float((reached - start) / (possible - start)),
        kl_to_optimum=float(divergence(policy, best.log_prob).mean()),
        kl_to_reference=float(divergence(policy, reference).mean()),
        value_error=None if value is None else float(np.abs(value - target).mean()),
        # The median is the constant of least mean absolute error.
        constant_value_error=float(np.abs(np.median(target) - target).mean()),
        optimum_win_rate=float(win_rate(best.log_prob, reference, scores.score).mean()),
        exact_win_rate=float(win_rate(policy, reference, scores.score).mean()),
        reference_mass=float(np.exp(log_mass(scores.reference_log_prob)).mean()),
        policy_mass=float(np.exp(log_mass(scores.policy_log_prob)).mean()),
    )


def _with_lowest(score: Float) -> Float:
    return np.concatenate([_float64(score), score.min(axis=1, keepdims=True) - 1.0], axis=1)


def _float64(x: Float) -> Float:
    return np.asarray(x, np.float64)


def _log_sum_exp(x: Float) -> Float:
    top = x.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=1, keepdims=True)))[:, 0]
