"""KTO against derivations by hand and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.objectives import kto_loss, kto_threshold, kto_z0

NAMES = (
    "policy_log_prob",
    "reference_log_prob",
    "mismatched_policy_log_prob",
    "mismatched_reference_log_prob",
    "reward",
)
# Rewards 3, 1, -1 (mean 1): only the first is desirable. Mismatched log-ratios 1, 2, 0: z0 = 1.
BY_HAND = {
    "policy_log_prob": jnp.array([-2.0, -3.0, -4.0, 9.0]),
    "reference_log_prob": jnp.array([-4.0, -3.0, -3.0, 0.0]),
    "mismatched_policy_log_prob": jnp.array([-4.0, -4.0, -4.0, 9.0]),
    "mismatched_reference_log_prob": jnp.array([-5.0, -6.0, -4.0, 0.0]),
    "reward": jnp.array([3.0, 1.0, -1.0, 9.0]),
    "weights": jnp.array([1.0, 1.0, 1.0, 0.0]),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(batch, beta, labels=None, lambda_d=1.0, lambda_u=1.0, dataset_mean=0.0):
    """KTO with loops over the real examples, written from the paper's formulas."""
    real = [i for i, w in enumerate(np.ravel(batch["weights"])) if w > 0]
    flat = {name: np.ravel(array) for name, array in batch.items()}
    rewards = [flat["reward"][i] for i in real]
    threshold = sum(rewards) / len(rewards)
    if max(rewards) - min(rewards) < 1e-6:
        threshold = dataset_mean
    kl = [
        flat["mismatched_policy_log_prob"][i] - flat["mismatched_reference_log_prob"][i]
        for i in real
    ]
    z0 = max(0.0, sum(kl) / len(kl)) if len(real) > 1 else 0.0
    losses = []
    for i in real:
        h = flat["policy_log_prob"][i] - flat["reference_log_prob"][i]
        good = flat["reward"][i] > threshold if labels is None else np.ravel(labels)[i]
        if good:
            losses.append(lambda_d - lambda_d * sigmoid(beta * (h - z0)))
        else:
            losses.append(lambda_u - lambda_u * sigmoid(beta * (z0 - h)))
    return sum(losses) / len(losses), z0


def test_value_by_hand():
    loss, metrics = kto_loss(**BY_HAND, tau=0.5)
    # Margins: desirable 0.5 (2 - 1); undesirable 0.5 (1 - 0) and 0.5 (1 + 1).
    expected = ((1 - sigmoid(0.5)) + (1 - sigmoid(0.5)) + (1 - sigmoid(1.0))) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/desirable_fraction"], 1 / 3, rtol=1e-6)
    assert metrics["kl/z0"] == 1
    assert metrics["reward/threshold"] == 1
    assert metrics["kl/batch_of_one"] == 0


def test_gradient_by_hand():
    inputs = {name: BY_HAND[name] for name in NAMES}
    weights = BY_HAND["weights"]
    gradients = jax.jit(jax.grad(lambda i: kto_loss(**i, weights=weights, tau=0.5)[0]))(inputs)
    # d/dh of 1 - sigmoid(beta (h - z0)) is -beta s (1 - s), of 1 - sigmoid(beta (z0 - h)) is +.
    slope_half, slope_one = (sigmoid(m) * (1 - sigmoid(m)) for m in (0.5, 1.0))
    expected = 0.5 / 3 * np.array([-slope_half, slope_half, slope_one, 0])
    np.testing.assert_allclose(gradients.pop("policy_log_prob"), expected, rtol=1e-6)
    for name, gradient in gradients.items():
        assert np.all(gradient == 0), name


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_numpy_oracle(beta, double_precision, random_batch):
    for seed in range(4):
        batch = random_batch(seed, (8, 2), NAMES)
        # Both signs of the mean mismatched log-ratio, so that the clamp is met.
        batch["mismatched_policy_log_prob"] += (-1) ** seed
        loss, metrics = jax.jit(kto_loss)(**batch, tau=beta)
        expected, z0 = oracle(batch, beta)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["kl/z0"], z0, rtol=1e-12)

        labels = np.random.default_rng(seed).random((8, 2)) < 0.5
        labelled = {"desirable": labels, "lambda_desirable": 1.3, "lambda_undesirable": 0.6}
        loss, _ = jax.jit(kto_loss)(**batch, **labelled, tau=beta)
        expected, _ = oracle(batch, beta, labels, 1.3, 0.6)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_gradient_is_the_oracles_finite_difference(double_precision, random_batch):
    batch, beta = random_batch(7, (6,), NAMES), 0.8

    def loss(policy_log_prob):
        return kto_loss(**batch | {"policy_log_prob": policy_log_prob}, tau=beta)[0]

    gradient = jax.jit(jax.grad(loss))(batch["policy_log_prob"])
    for slot in range(6):
        step = 1e-5 * np.eye(6)[slot]
        above, below = (
            oracle(batch | {"policy_log_prob": batch["policy_log_prob"] + s}, beta)[0]
            for s in (step, -step)
        )
        np.testing.assert_allclose(gradient[slot], (above - below) / 2e-5, atol=1e-9)


@pytest.mark.parametrize(("reward", "fraction"), [(0.5, 1.0), (-0.5, 0.0), (0.0, 0.0)])
def test_rewards_all_equal_are_compared_with_the_data_sets_mean(reward, fraction):
    batch = BY_HAND | {"reward": jnp.array([reward, reward + 5e-7, reward, 9.0])}
    batch["reward"] = batch["reward"].at[1].set(reward) if reward == 0 else batch["reward"]
    metrics = kto_loss(**batch, tau=1.0)[1]
    assert metrics["reward/threshold"] == 0
    np.testing.assert_allclose(metrics["reward/desirable_fraction"], fraction, rtol=1e-6)
    shifted = kto_loss(**batch, tau=1.0, dataset_mean_reward=-1.0)[1]
    assert shifted["reward/threshold"] == -1
    np.testing.assert_allclose(shifted["reward/desirable_fraction"], 1, rtol=1e-6)


def test_rewards_all_above_or_all_below_the_given_threshold():
    for threshold, fraction in ((-5.0, 1.0), (5.0, 0.0)):
        loss, metrics = kto_loss(**BY_HAND, tau=1.0, threshold=threshold)
        np.testing.assert_allclose(metrics["reward/desirable_fraction"], fraction, rtol=1e-6)
        assert 0 < loss < 1


def test_a_reward_at_the_threshold_is_undesirable():
    assert kto_threshold(reward=BY_HAND["reward"], weights=BY_HAND["weights"]) == 1
    everything = kto_loss(**BY_HAND, tau=1.0)[1]["reward/desirable_fraction"]
    np.testing.assert_allclose(everything, 1 / 3, rtol=1e-6)


def test_one_real_example_has_no_mismatched_partner():
    for weights in ([1.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]):
        loss, metrics = kto_loss(**BY_HAND | {"weights": jnp.array(weights)}, tau=0.5)
        assert metrics["kl/z0"] == 0
        assert metrics["kl/batch_of_one"] == 1
        # Its reward 3 is above the data set's mean 0, and h = 2.
        np.testing.assert_allclose(loss, 1 - sigmoid(1.0), rtol=1e-6)


def test_z0_is_clamped_at_zero():
    policy, reference = jnp.array([-4.0, -3.0]), jnp.array([-3.0, -3.0])
    arguments = {"weights": jnp.ones(2), "mismatched_reference_log_prob": reference}
    assert kto_z0(**arguments, mismatched_policy_log_prob=policy) == 0
    assert kto_z0(**arguments, mismatched_policy_log_prob=-policy) == 6.5


def test_no_gradient_passes_through_z0():
    names = ("mismatched_policy_log_prob", "mismatched_reference_log_prob", "weights")
    arrays = {name: BY_HAND[name] for name in names}
    gradient = jax.grad(lambda p: kto_z0(**arrays | {names[0]: p}))(arrays[names[0]])
    assert np.all(gradient == 0)
    given = {n: a for n, a in BY_HAND.items() if not n.startswith("mismatched")}
    assert jax.grad(lambda z0: kto_loss(**given, tau=0.5, z0=z0)[0])(1.0) == 0


def test_z0_replaces_the_mismatched_log_probs():
    given = {name: array for name, array in BY_HAND.items() if not name.startswith("mismatched")}
    assert kto_loss(**given, tau=0.5, z0=1.0)[0] == kto_loss(**BY_HAND, tau=0.5)[0]
    with pytest.raises(ValueError, match="give z0, or mismatched_policy_log_prob"):
        kto_loss(**given, tau=0.5)


def test_mistakes_in_the_labels():
    with pytest.raises(ValueError, match=r"desirable has shape \(4, 1\).*\(4,\)"):
        kto_loss(**BY_HAND, tau=0.5, desirable=jnp.ones((4, 1), bool))
    with pytest.raises(TypeError, match="desirable has dtype float32"):
        kto_loss(**BY_HAND, tau=0.5, desirable=jnp.ones(4))
