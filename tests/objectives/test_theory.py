"""The theory of arXiv 2405.19107, executed on tabular problems with the losses that training uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.objectives import (
    dro_mean_residual,
    dro_p_loss,
    dro_v_loss,
    pairwise_loss,
    two_sample_dro_loss,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def random_problem(seed, shape):
    """Reference, behaviour and reward over the answers in the last axis; mu is not pi_ref."""
    rng = np.random.default_rng(seed)
    reference, behaviour = (rng.dirichlet(np.full(shape[-1], 3.0), shape[:-1]) for _ in range(2))
    behaviour = 0.8 * behaviour + 0.2 / shape[-1]
    return {"reference": reference, "behaviour": behaviour, "reward": rng.normal(size=shape)}


def optimum(problem, tau):
    """log pi* and V* of eq. 2; tau has the shape of V*."""
    tau = np.asarray(tau)[..., None]
    tilted = problem["reference"] * np.exp(problem["reward"] / tau)
    total = tilted.sum(-1, keepdims=True)
    return np.log(tilted / total), (tau * np.log(total))[..., 0]


def expected_loss(logits, value, problem, tau, sampler=None):
    """The DRO-V scalar in expectation: each answer weighted by the probability of being sampled."""
    weights = problem["behaviour"] if sampler is None else sampler
    return dro_v_loss(
        policy_log_prob=jax.nn.log_softmax(logits),
        reference_log_prob=jnp.log(problem["reference"]),
        value=jnp.broadcast_to(value[..., None], problem["reward"].shape),
        reward=jnp.asarray(problem["reward"]),
        weights=jnp.asarray(weights),
        tau=tau,
    )


def objective(logits, problem, tau):
    """Eq. 1 with every prompt equally likely: E_pi[r] - tau KL(pi || pi_ref)."""
    log_policy = jax.nn.log_softmax(logits)
    log_ratio = log_policy - jnp.log(problem["reference"])
    gain = jnp.exp(log_policy) * (problem["reward"] - tau * log_ratio)
    return jnp.mean(jnp.sum(gain, -1))


@functools.partial(jax.jit, static_argnames="steps")
def descend(logits, value, problem, tau, steps=4000, learning_rate=1.0):
    def step(parameters, _):
        gradients = jax.grad(lambda p: expected_loss(*p, problem, tau)[0])(parameters)
        return jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradients), None

    (logits, value), _ = jax.lax.scan(step, (logits, value), length=steps)
    equation_4 = expected_loss(logits, value, problem, tau)[1]["loss/dro"]
    return jax.nn.log_softmax(logits), value, equation_4


class TestTheorem1:
    TAU = 0.7

    def starts(self):
        rng = np.random.default_rng(1)
        return [(rng.normal(size=(2, 4)), rng.normal(size=2)) for _ in range(3)]

    def test_descent_from_any_start_reaches_the_optimum(self):
        problem = random_problem(0, (2, 4))
        log_optimum, best_value = optimum(problem, self.TAU)
        for start in self.starts():
            log_policy, value, loss = descend(*start, problem, self.TAU)
            assert loss < 1e-12
            np.testing.assert_allclose(log_policy, log_optimum, atol=1e-5)
            np.testing.assert_allclose(value, best_value, atol=1e-5)

    def test_where_mu_misses_an_answer_the_optimum_is_one_of_many(self):
        problem = random_problem(0, (2, 4))
        problem["behaviour"][:, 0] = 0
        problem["behaviour"] /= problem["behaviour"].sum(-1, keepdims=True)
        log_optimum, best_value = optimum(problem, self.TAU)
        assert expected_loss(log_optimum, best_value, problem, self.TAU)[0] < 1e-24
        for start in self.starts():
            log_policy, value, loss = descend(*start, problem, self.TAU)
            assert loss < 1e-12
            assert np.max(np.abs(log_policy - log_optimum)) > 0.1
            # All that the data fix is V up to the mass that the policy has on their answers.
            seen_mass = np.exp(log_policy[:, 1:]).sum(-1)
            seen_tilt = (problem["reference"] * np.exp(problem["reward"] / self.TAU))[:, 1:].sum(-1)
            np.testing.assert_allclose(value, self.TAU * np.log(seen_tilt / seen_mass), atol=1e-5)


class TestProposition1:
    def test_the_best_value_for_a_fixed_policy(self):
        tau, problem = 0.7, random_problem(2, (2, 4))
        logits = np.random.default_rng(3).normal(size=(2, 4))
        log_ratio = jax.nn.log_softmax(logits) - np.log(problem["reference"])
        best = np.sum(problem["behaviour"] * (problem["reward"] - tau * log_ratio), -1)

        def equation_4(value):
            return expected_loss(logits, value, problem, tau)[1]["loss/dro"]

        least, gradient = jax.jit(jax.value_and_grad(equation_4))(best)
        np.testing.assert_allclose(gradient, 0, atol=1e-15)
        for change in ([0.1, 0.0], [0.0, -0.1]):
            assert equation_4(best + np.array(change)) > least
        # The best constant is its mean, which is what DRO-P and a single value use.
        constant = dro_mean_residual(
            policy_log_prob=jax.nn.log_softmax(logits),
            reference_log_prob=jnp.log(problem["reference"]),
            reward=jnp.asarray(problem["reward"]),
            weights=jnp.asarray(problem["behaviour"]),
            tau=tau,
        )
        np.testing.assert_allclose(constant, best.mean(), rtol=1e-12)

    def test_equations_5_and_6_on_two_thousand_problems(self):
        count, answers = 2000, 5
        problem = random_problem(4, (count, answers))
        rng = np.random.default_rng(5)
        tau = rng.uniform(0.3, 3.0, size=count)
        log_optimum, best_value = optimum(problem, tau)
        wrong_value = best_value + rng.normal(size=count)

        log_policy, gradient = best_policies(problem, wrong_value, tau)
        np.testing.assert_allclose(gradient, 0, atol=1e-10)

        tau = tau[:, None]
        policy, behaviour = np.exp(log_policy), problem["behaviour"]
        residual = problem["reward"] - tau * (log_policy - np.log(problem["reference"]))
        value_of_policy = np.sum(behaviour * residual, -1, keepdims=True)
        value_error = value_of_policy - wrong_value[:, None]

        equation_5 = problem["reference"] * np.exp(
            (problem["reward"] - policy / behaviour * value_error) / tau
        )
        equation_5 /= equation_5.sum(-1, keepdims=True)
        np.testing.assert_allclose(policy, equation_5, rtol=1e-7)

        distance = np.max(np.abs(log_policy - log_optimum), -1)
        bound = 2 / tau[:, 0] * np.max(np.abs(value_error * (1 - policy / behaviour)), -1)
        assert np.all(distance <= bound + 1e-9)
        # A wrong V does move the policy, and the bound is not idle.
        assert np.median(distance) > 0.1
        assert np.max(distance / bound) > 0.8


@jax.jit
def best_policies(problem, value, tau):
    """argmin over pi of L(pi, V) for each problem, by Newton steps that are damped until they descend."""

    def solve(problem, value, tau):
        def loss(logits):
            return expected_loss(logits, value, problem, tau)[1]["loss/policy"]

        def step(_, state):
            logits, damping = state
            matrix = jax.hessian(loss)(logits) + damping * jnp.eye(logits.size)
            proposal = logits - jnp.linalg.solve(matrix, jax.grad(loss)(logits))
            # The last steps change the loss by less than its rounding.
            descends = loss(proposal) <= loss(logits) * (1 + 1e-14)
            return (
                jnp.where(descends, proposal, logits),
                jnp.clip(jnp.where(descends, damping / 4, damping * 4), 1e-9, 1e9),
            )

        logits, _ = jax.lax.fori_loop(0, 60, step, (jnp.log(problem["reference"]), 1.0))
        return jax.nn.log_softmax(logits), jax.grad(loss)(logits)

    return jax.vmap(solve)(problem, value, tau)


def test_dropping_the_value_biases_the_gradient_off_policy_only():
    tau, problem = 0.7, random_problem(6, (3, 4))
    logits = np.random.default_rng(7).normal(size=(3, 4))
    value = optimum(problem, tau)[1]

    @jax.jit
    def gradient(value, sampler):
        return jax.grad(lambda p: expected_loss(p, value, problem, tau, sampler)[0])(logits)

    policy = np.asarray(jax.nn.softmax(logits))
    exact = -jax.grad(objective)(logits, problem, tau)
    for on_policy in (gradient(value, policy), gradient(0 * value, policy)):
        np.testing.assert_allclose(on_policy, exact, atol=1e-14)
    behaviour = problem["behaviour"]
    off_policy = gradient(value, behaviour) - gradient(0 * value, behaviour)
    assert np.max(np.abs(off_policy)) > 0.01


def test_the_squared_log_ratio_is_the_kl_on_policy_only():
    tau, problem = 0.7, random_problem(8, (3, 4))
    problem["reward"] = np.zeros((3, 4))
    logits = np.random.default_rng(9).normal(size=(3, 4))

    @jax.jit
    def l2_gradient(sampler):
        # Without reward and value what is left of the policy's term is tau/2 E[h^2].
        return jax.grad(lambda p: expected_loss(p, jnp.zeros(3), problem, tau, sampler)[0])(logits)

    kl_gradient = -jax.grad(objective)(logits, problem, tau)
    on_policy = l2_gradient(np.asarray(jax.nn.softmax(logits)))
    np.testing.assert_allclose(on_policy, kl_gradient, atol=1e-14)
    assert np.max(np.abs(l2_gradient(problem["behaviour"]) - kl_gradient)) > 0.01


def test_dro_p_is_tau_times_dro_v_with_the_batch_mean_at_every_batch_size():
    tau, most = 0.7, 8
    rng = np.random.default_rng(10)
    policy, reference, reward = rng.normal(size=(3, most))

    @jax.jit
    def gradients(weights):
        shared = {"reference_log_prob": reference, "reward": reward, "weights": weights, "tau": tau}
        mean = dro_mean_residual(policy_log_prob=policy, **shared)
        value = jnp.full(most, mean)
        return (
            jax.grad(lambda p: dro_p_loss(policy_log_prob=p, **shared)[0])(policy),
            jax.grad(lambda p: dro_v_loss(policy_log_prob=p, value=value, **shared)[0])(policy),
        )

    for batch_size in range(1, most + 1):
        dro_p, dro_v = gradients((np.arange(most) < batch_size).astype(float))
        np.testing.assert_allclose(dro_p, tau * dro_v, rtol=1e-12, atol=1e-16)
        assert np.any(dro_p != 0) == (batch_size > 1)


def test_two_sample_dro_with_an_indicator_is_half_of_ipo():
    rng = np.random.default_rng(11)
    policy = rng.normal(size=(6, 2))
    arrays = {
        "reference_log_prob": rng.normal(size=(6, 2)),
        "reward": np.eye(2)[rng.integers(2, size=6)],
        "weights": np.ones((6, 2)),
    }
    for tau in (0.1, 1.0, 5.0):

        def two_sample(policy, tau=tau):
            return two_sample_dro_loss(policy_log_prob=policy, **arrays, tau=tau)[0]

        def half_ipo(policy, tau=tau):
            return pairwise_loss(policy_log_prob=policy, **arrays, tau=tau, kind="ipo")[0] / 2

        ours, theirs = (jax.jit(jax.value_and_grad(f))(policy) for f in (two_sample, half_ipo))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)
