"""SFT against derivations by hand and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from dro_jax.objectives import sft_loss

BY_HAND = {
    "policy_log_prob": jnp.array([-6.0, -1.0, 100.0]),
    "target_tokens": jnp.array([3.0, 4.0, 100.0]),
    "weights": jnp.array([1.0, 1.0, 0.0]),
}


def test_value_and_gradient_by_hand():
    def loss(policy_log_prob):
        return sft_loss(**BY_HAND | {"policy_log_prob": policy_log_prob})

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(BY_HAND["policy_log_prob"])
    assert value == 1  # 7 nats over 7 tokens, not the mean of 2 and 1/4
    assert metrics == {"loss/sft": 1}
    np.testing.assert_allclose(gradient, [-1 / 7, -1 / 7, 0], rtol=1e-6)


def test_numpy_oracle(double_precision, random_batch):
    batch = random_batch(0, (9, 2), ("policy_log_prob", "target_tokens"))
    batch["target_tokens"] = np.ceil(5 * np.abs(batch["target_tokens"])) + 1
    nats = tokens = 0.0
    for slot in np.ndindex(9, 2):
        if batch["weights"][slot] > 0:
            nats -= batch["policy_log_prob"][slot]
            tokens += batch["target_tokens"][slot]
    np.testing.assert_allclose(sft_loss(**batch)[0], nats / tokens, rtol=1e-12)
