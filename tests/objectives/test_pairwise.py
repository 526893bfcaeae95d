"""DPO, IPO and SLiC against derivations by hand and plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.objectives import pairwise_loss

# At tau = 0.5: the second of the first pair is preferred, z = 0.5 (-1 - 2); the second pair ties and the
# third is half padding.
BY_HAND = {
    "policy_log_prob": jnp.array([[-2.0, -4.0], [-1.0, -1.0], [-1.0, -1.0]]),
    "reference_log_prob": jnp.array([[-4.0, -3.0], [-1.0, -2.0], [-1.0, -2.0]]),
    "reward": jnp.array([[0.2, 0.9], [0.4, 0.4], [0.0, 1.0]]),
    "weights": jnp.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]),
}
Z = -1.5
VALUES = {"dpo": np.log(1 + np.exp(-Z)), "ipo": (Z - 1) ** 2, "slic": 1 - Z}
SLOPES = {"dpo": -1 / (1 + np.exp(Z)), "ipo": 2 * (Z - 1), "slic": -1.0}
FORMULAS = {
    "dpo": lambda z: np.log(1 + np.exp(-z)),
    "ipo": lambda z: (z - 1) ** 2,
    "slic": lambda z: max(0.0, 1 - z),
}
each_kind = pytest.mark.parametrize("kind", FORMULAS)


@each_kind
def test_value_and_gradient_by_hand(kind):
    def loss(policy_log_prob):
        return pairwise_loss(**BY_HAND | {"policy_log_prob": policy_log_prob}, tau=0.5, kind=kind)

    value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = value_and_gradient(BY_HAND["policy_log_prob"])
    np.testing.assert_allclose(value, VALUES[kind], rtol=1e-6)
    assert metrics["pairs/count"] == 1
    assert metrics["pairs/margin"] == Z
    assert metrics["pairs/accuracy"] == 0
    slope = 0.5 * SLOPES[kind]
    np.testing.assert_allclose(gradient, [[-slope, slope], [0, 0], [0, 0]], rtol=1e-6)


@each_kind
def test_numpy_oracle(kind, double_precision, random_batch):
    names = ("policy_log_prob", "reference_log_prob", "reward")
    compiled = jax.jit(functools.partial(pairwise_loss, kind=kind))
    for seed, beta in enumerate((0.1, 1.0, 5.0)):
        batch = random_batch(seed, (4, 5, 2), names)
        batch["reward"][0, 0] = 0.25
        batch["weights"][0, 0] = 1
        losses, won = [], []
        for slot in np.ndindex(4, 5):
            p, q, r, w = (batch[name][slot] for name in (*names, "weights"))
            if w.min() == 0 or r[0] == r[1]:
                continue
            chosen = int(r[1] > r[0])
            z = beta * ((p - q)[chosen] - (p - q)[1 - chosen])
            losses.append(FORMULAS[kind](z))
            won.append(z > 0)
        loss, metrics = compiled(**batch, tau=beta)
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-12)
        np.testing.assert_allclose(metrics["pairs/accuracy"], np.mean(won), rtol=1e-12)
        assert metrics["pairs/count"] == len(losses)


@each_kind
def test_neither_the_order_in_a_pair_nor_the_size_of_its_difference_counts(kind):
    swapped = {name: array[:, ::-1] for name, array in BY_HAND.items()}
    scaled = BY_HAND | {"reward": 7 * BY_HAND["reward"]}
    loss, _ = pairwise_loss(**BY_HAND, tau=0.5, kind=kind)
    for other in (swapped, scaled):
        assert pairwise_loss(**other, tau=0.5, kind=kind)[0] == loss


def test_no_preference_in_the_batch():
    ties = BY_HAND | {"reward": jnp.zeros((3, 2))}
    loss, metrics = pairwise_loss(**ties, tau=0.5, kind="dpo")
    assert loss == 0
    assert metrics["pairs/count"] == 0


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'kto'; expected one of dpo, ipo, slic"):
        pairwise_loss(**BY_HAND, tau=0.5, kind="kto")
