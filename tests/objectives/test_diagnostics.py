"""The diagnostics against NumPy, and finite where nothing varies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.objectives import alignment_diagnostics

NAMES = ("policy_log_prob", "reference_log_prob", "reward", "value", "weights")


def test_numpy_oracle(double_precision, random_batch):
    for seed, tau in enumerate((0.1, 1.0, 5.0)):
        batch = random_batch(seed, (9, 2))
        real = batch["weights"] > 0
        p, q, r, v = (batch[name][real] for name in NAMES[:4])
        h = p - q
        expected = {
            "kl/log_ratio_mean": np.mean(h),
            "kl/log_ratio_std": np.std(h),
            "reward/mean": np.mean(r),
            "reward/log_ratio_correlation": np.corrcoef(r, h)[0, 1],
            "value/mean": np.mean(v),
            "value/explained_variance": 1 - np.var(r - tau * h - v) / np.var(r - tau * h),
        }
        garbage = {name: np.where(real, batch[name], np.nan) for name in NAMES[:4]}
        actual = jax.jit(alignment_diagnostics)(**garbage, weights=batch["weights"], tau=tau)
        assert actual.keys() == expected.keys()
        for name, metric in actual.items():
            np.testing.assert_allclose(metric, expected[name], rtol=1e-10, err_msg=name)


def test_without_a_value():
    batch = {name: jnp.arange(3.0) for name in NAMES if name != "value"}
    assert not any(n.startswith("value/") for n in alignment_diagnostics(**batch, tau=1.0))


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_constants_explain_and_correlate_nothing(weights, level):
    # 0.1 has no exact mean in float32: rounding must not be read as variance.
    constant = {name: jnp.full(5, level, jnp.float32) for name in NAMES}
    constant["reference_log_prob"] = jnp.full(5, -level, jnp.float32)
    constant["weights"] = jnp.array(weights, jnp.float32)
    metrics = jax.jit(alignment_diagnostics)(**constant, tau=jnp.float32(0.3))
    for name in ("kl/log_ratio_std", "reward/log_ratio_correlation", "value/explained_variance"):
        assert metrics[name] == 0, name
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_a_perfect_value_and_a_constant_one():
    reward, log_ratio = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.1, -0.6])
    batch = {
        "policy_log_prob": log_ratio,
        "reference_log_prob": jnp.zeros(3),
        "reward": reward,
        "weights": jnp.ones(3),
    }
    perfect = alignment_diagnostics(**batch, value=reward - 2 * log_ratio, tau=2.0)
    np.testing.assert_allclose(perfect["value/explained_variance"], 1, rtol=1e-6)
    constant = alignment_diagnostics(**batch, value=jnp.full(3, 0.7), tau=2.0)
    np.testing.assert_allclose(constant["value/explained_variance"], 0, atol=1e-6)


def test_shape_mistakes():
    batch = {name: jnp.ones(4) for name in NAMES}
    with pytest.raises(ValueError, match=r"value has shape \(4, 1\).*\(4,\)"):
        alignment_diagnostics(**batch | {"value": jnp.ones((4, 1))}, tau=1.0)
