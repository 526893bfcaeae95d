"""DRO-V, DRO-P and the two-sample loss against derivations by hand and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.objectives import (
    dro_mean_residual,
    dro_p_loss,
    dro_v_loss,
    pair_weights,
    two_sample_dro_loss,
    weighted_mean,
)

# Two real examples and a padded one; at tau = 2 the residuals r - V - tau h are 3, -4.
BY_HAND = {
    "policy_log_prob": jnp.array([-4.0, -7.0, 5.0]),
    "reference_log_prob": jnp.array([-5.0, -6.5, 5.0]),
    "value": jnp.array([-1.0, 2.0, 5.0]),
    "reward": jnp.array([4.0, -3.0, 5.0]),
    "weights": jnp.array([1.0, 1.0, 0.0]),
}
PAIRS_BY_HAND = {
    "policy_log_prob": jnp.array([[-4.0, -7.0], [1.0, 1.0]]),
    "reference_log_prob": jnp.array([[-5.0, -6.5], [1.0, 1.0]]),
    "reward": jnp.array([[4.0, -3.0], [1.0, 9.0]]),
    "weights": jnp.array([[1.0, 1.0], [1.0, 0.0]]),
}
TRIPLETS = ("policy_log_prob", "reference_log_prob", "reward", "weights")


def without_value(batch):
    return {name: batch[name] for name in TRIPLETS}


def real_rows(batch, *names):
    """The real examples, one tuple of Python floats each."""
    columns = [np.ravel(batch[name]).tolist() for name in names]
    kept = np.ravel(batch["weights"]) > 0
    return [row for row, keep in zip(zip(*columns, strict=True), kept, strict=True) if keep]


class TestDroV:
    def test_value_by_hand(self):
        loss, metrics = dro_v_loss(**BY_HAND, tau=2.0)
        # Policy: (9 + 16) / 2 / (2 tau) = 3.125; value: (9 + 16) / 2 / 2 = 6.25.
        assert loss == 9.375
        assert metrics == {"loss/dro": 6.25, "loss/policy": 3.125, "loss/value": 6.25}

    def test_gradient_by_hand(self):
        def loss(policy_log_prob, value):
            changed = {"policy_log_prob": policy_log_prob, "value": value}
            return dro_v_loss(**BY_HAND | changed, tau=2.0)[0]

        gradients = jax.grad(loss, argnums=(0, 1))(BY_HAND["policy_log_prob"], BY_HAND["value"])
        # Both are -residual / 2, the policy's without a factor tau: it is (1/tau) grad L.
        np.testing.assert_array_equal(gradients[0], [-1.5, 2.0, 0.0])
        np.testing.assert_array_equal(gradients[1], [-1.5, 2.0, 0.0])

    @pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
    def test_gradients_are_equations_7_and_8(self, tau, double_precision):
        # pi(.|x) = softmax(theta[x]) and V(x) = features(x) . phi, both differentiated by hand.
        rng = np.random.default_rng(0)
        prompts, answers, batch_size = 3, 4, 6
        theta, phi = rng.normal(size=(prompts, answers)), rng.normal(size=2)
        features = rng.normal(size=(prompts, 2))
        x, y = rng.integers(prompts, size=batch_size), rng.integers(answers, size=batch_size)
        reward, reference = rng.normal(size=batch_size), -1.0 - rng.random(batch_size)

        def loss(theta, phi):
            return dro_v_loss(
                policy_log_prob=jax.nn.log_softmax(theta)[x, y],
                reference_log_prob=jnp.asarray(reference),
                value=jnp.sum(features[x] * phi[None], axis=-1),
                reward=jnp.asarray(reward),
                weights=jnp.ones(batch_size),
                tau=tau,
            )[0]

        theta_gradient, phi_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(theta, phi)

        equation_8, equation_7 = np.zeros_like(theta), np.zeros_like(phi)
        for i in range(batch_size):
            policy = np.exp(theta[x[i]]) / np.exp(theta[x[i]]).sum()
            grad_log_policy = np.zeros_like(theta)
            grad_log_policy[x[i]] = -policy
            grad_log_policy[x[i], y[i]] += 1
            log_ratio = np.log(policy[y[i]]) - reference[i]
            value = features[x[i]] @ phi
            # grad of (log pi/pi_ref)^2 is 2 (log pi/pi_ref) grad log pi.
            advantage_term = grad_log_policy * (reward[i] - value)
            square_term = tau / 2 * 2 * log_ratio * grad_log_policy
            equation_8 -= (advantage_term - square_term) / batch_size
            equation_7 += (value - reward[i] + tau * log_ratio) * features[x[i]] / batch_size
        np.testing.assert_allclose(theta_gradient, equation_8, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(phi_gradient, equation_7, rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
    def test_gradients_are_finite_differences_of_equation_4(
        self, tau, double_precision, random_batch
    ):
        batch = random_batch(1, (4, 2))

        def equation_4(**changed):
            rows = real_rows(
                batch | changed, "reward", "value", "policy_log_prob", "reference_log_prob"
            )
            return np.mean([(r - v - tau * (p - q)) ** 2 for r, v, p, q in rows]) / 2

        def loss(inputs):
            return dro_v_loss(**batch | inputs, tau=tau)[0]

        trained = {name: batch[name] for name in ("policy_log_prob", "value")}
        gradients = jax.jit(jax.grad(loss))(trained)
        for name, scale in (("policy_log_prob", 1 / tau), ("value", 1.0)):
            for slot in np.ndindex(4, 2):
                step = np.zeros((4, 2))
                step[slot] = 1e-4
                above, below = (equation_4(**{name: batch[name] + s}) for s in (step, -step))
                difference = scale * (above - below) / 2e-4
                np.testing.assert_allclose(gradients[name][slot], difference, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("variant", ["per_example", "per_token", "single"])
    def test_nothing_crosses_the_stop_gradients(self, variant):
        """The term for the policy is blind to V, the term for V blind to the policy."""
        batch = dict(BY_HAND)
        if variant == "per_token":
            batch["value_variance"] = jnp.array([1.0, 2.0, 3.0])
        if variant == "single":
            batch["mean_value"] = weighted_mean(batch["value"], batch["weights"])

        def terms(name, array):
            metrics = dro_v_loss(**batch | {name: array}, tau=2.0)[1]
            return metrics["loss/policy"], metrics["loss/value"]

        for name, forbidden in (
            ("policy_log_prob", 1),
            ("value", 0),
            ("value_variance", 0),
            ("mean_value", 0),
            ("mean_value", 1),
        ):
            if name in batch:
                gradient = jax.grad(lambda a, n=name, i=forbidden: terms(n, a)[i])(batch[name])
                assert np.all(gradient == 0), (name, forbidden)

    def test_numpy_oracle(self, double_precision, random_batch):
        for seed, tau in enumerate((0.1, 1.0, 5.0)):
            batch = random_batch(seed, (9, 3))
            rows = real_rows(batch, "reward", "value", "policy_log_prob", "reference_log_prob")
            square = np.mean([(r - v - tau * (p - q)) ** 2 for r, v, p, q in rows])
            loss, metrics = jax.jit(dro_v_loss)(**batch, tau=tau)
            np.testing.assert_allclose(loss, square / (2 * tau) + square / 2, rtol=1e-12)
            np.testing.assert_allclose(metrics["loss/dro"], square / 2, rtol=1e-12)

    def test_a_padded_slot_beside_weights_other_than_one(self):
        batch = BY_HAND | {"weights": jnp.array([3.0, 1.0, 0.0])}
        assert dro_v_loss(**batch, tau=2.0)[1]["loss/dro"] == (3 * 9 + 16) / 4 / 2

    def test_values_per_token_are_the_residual_at_each_position(
        self, double_precision, random_batch
    ):
        tau, positions = 0.6, 5
        batch = random_batch(2, (6, 2))
        token_values = np.random.default_rng(3).normal(size=(6, 2, positions))

        def loss_from_moments(token_values):
            moments = {"value": token_values.mean(-1), "value_variance": token_values.var(-1)}
            return dro_v_loss(**batch | moments, tau=tau)[0]

        def loss_over_positions(token_values):
            each = [
                dro_v_loss(**batch | {"value": v}, tau=tau)[0]
                for v in jnp.moveaxis(token_values, -1, 0)
            ]
            return sum(each) / positions

        token_values = jnp.asarray(token_values)
        expected = jax.jit(jax.value_and_grad(loss_over_positions))(token_values)
        actual = jax.jit(jax.value_and_grad(loss_from_moments))(token_values)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-10, atol=1e-14)

    def test_a_single_value_is_its_mean_in_each_example(self, double_precision, random_batch):
        tau = 0.6
        batch = random_batch(4, (5, 2))

        def single(value):
            mean_value = weighted_mean(value, batch["weights"])
            return dro_v_loss(**batch | {"value": value}, mean_value=mean_value, tau=tau)[0]

        def broadcast(value):
            mean_value = weighted_mean(value, batch["weights"])
            return dro_v_loss(**batch | {"value": jnp.full((5, 2), mean_value)}, tau=tau)[0]

        actual, expected = (
            jax.jit(jax.value_and_grad(f))(batch["value"]) for f in (single, broadcast)
        )
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-11, atol=1e-14)
        # By hand: every real example gets minus the mean residual over the number of examples.
        rows = real_rows(batch, "reward", "value", "policy_log_prob", "reference_log_prob")
        mean_residual = np.mean([r - v - tau * (p - q) for r, v, p, q in rows])
        by_hand = np.where(batch["weights"] > 0, -mean_residual / len(rows), 0)
        np.testing.assert_allclose(actual[1], by_hand, rtol=1e-11, atol=1e-14)

    def test_arguments_that_exclude_each_other(self):
        with pytest.raises(ValueError, match="give mean_value"):
            dro_v_loss(**BY_HAND, tau=2.0, mean_residual=0.5)
        with pytest.raises(ValueError, match="excludes value_variance"):
            dro_v_loss(**BY_HAND, tau=2.0, mean_value=0.5, value_variance=BY_HAND["value"])


class TestDroP:
    def test_value_and_gradient_by_hand(self):
        def loss(policy_log_prob):
            batch = without_value(BY_HAND) | {"policy_log_prob": policy_log_prob}
            return dro_p_loss(**batch, tau=2.0)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            BY_HAND["policy_log_prob"]
        )
        # r - tau h = 2, -2: mean 0, variance 4.
        assert value == 2
        assert metrics == {"loss/dro": 2, "value/mean": 0}
        # -tau (deviation) / 2 = -2 (2) / 2.
        np.testing.assert_array_equal(gradient, [-2.0, 2.0, 0.0])

    def test_numpy_oracle(self, double_precision, random_batch):
        def loss(policy_log_prob, batch, tau):
            return dro_p_loss(**batch | {"policy_log_prob": policy_log_prob}, tau=tau)[0]

        value_and_gradient = jax.jit(jax.value_and_grad(loss))
        for seed, tau in enumerate((0.1, 1.0, 5.0)):
            batch = without_value(random_batch(seed, (9, 3)))
            rows = real_rows(batch, "reward", "policy_log_prob", "reference_log_prob")
            residuals = np.array([r - tau * (p - q) for r, p, q in rows])
            value, gradient = value_and_gradient(batch["policy_log_prob"], batch, tau)
            np.testing.assert_allclose(value, np.var(residuals) / 2, rtol=1e-12)
            expected = -tau * (residuals - residuals.mean()) / len(residuals)
            np.testing.assert_allclose(gradient[batch["weights"] > 0], expected, rtol=1e-11)
            mean = jax.jit(dro_mean_residual)(**batch, tau=tau)
            np.testing.assert_allclose(mean, residuals.mean(), rtol=1e-12)

    def test_one_example_teaches_nothing(self):
        batch = {name: array[:1] for name, array in without_value(BY_HAND).items()}
        gradient = jax.grad(lambda p: dro_p_loss(**batch | {"policy_log_prob": p}, tau=2.0)[0])(
            batch["policy_log_prob"]
        )
        assert gradient == 0


class TestTwoSample:
    def test_value_and_gradient_by_hand(self):
        def loss(policy_log_prob):
            return two_sample_dro_loss(
                **PAIRS_BY_HAND | {"policy_log_prob": policy_log_prob}, tau=2.0
            )

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            PAIRS_BY_HAND["policy_log_prob"]
        )
        # r2 - r1 + tau h1 - tau h2 = -7 + 2 + 1 = -4, and one pair only.
        assert value == 8
        assert metrics == {"loss/two_sample_dro": 8, "pairs/count": 1}
        np.testing.assert_array_equal(gradient, [[-8.0, 8.0], [0.0, 0.0]])

    def test_numpy_oracle(self, double_precision, random_batch):
        tau, batch = 0.3, without_value(random_batch(5, (12, 2)))
        squares = []
        for p, q, r, w in zip(*(batch[name] for name in TRIPLETS), strict=True):
            if w[0] * w[1] > 0:
                h = p - q
                squares.append((r[1] - r[0] + tau * h[0] - tau * h[1]) ** 2)
        assert len(squares) not in (0, 12)
        loss, _ = jax.jit(two_sample_dro_loss)(**batch, tau=tau)
        np.testing.assert_allclose(loss, np.mean(squares) / 2, rtol=1e-12)

    def test_the_order_within_a_pair_is_irrelevant(self):
        swapped = {name: array[:, ::-1] for name, array in PAIRS_BY_HAND.items()}
        assert (
            two_sample_dro_loss(**swapped, tau=2.0)[0]
            == two_sample_dro_loss(**PAIRS_BY_HAND, tau=2.0)[0]
        )


def test_pair_weights():
    weights = jnp.array([[2.0, 3.0], [1.0, 1.0]])
    np.testing.assert_array_equal(pair_weights(weights), [6.0, 1.0])
    reward = jnp.array([[0.0, 1.0], [0.5, 0.5]])
    np.testing.assert_array_equal(pair_weights(weights, reward), [6.0, 0.0])
