"""Adafactor: a NumPy oracle, warm-up, rates that do not touch one another, and the value head's step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dro_jax.training.optimizers import Adafactor

PARAMS = {
    "encoder": {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)},
    "value_head": {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros((1,))},
}
GRADIENTS = {
    "encoder": {"kernel": jnp.linspace(-3.0, 1.0, 12).reshape(4, 3)},
    "value_head": {
        "kernel": jnp.asarray([[0.3], [-2.0], [1e-3], [0.7]]),
        "bias": jnp.asarray([-5.0]),
    },
}


def updates(optimizer: Adafactor, params=PARAMS, steps=3):
    """The last update of each part after a few steps with the same gradients; policy and value alike."""
    last = {}
    for part, transform in optimizer.transforms().items():
        state = transform.init(params)
        for _ in range(steps):
            last[part], state = transform.update(GRADIENTS, state, params)
    return last


def same(a, b):
    return all(
        x.tobytes() == y.tobytes()
        for x, y in zip(*(map(np.asarray, jax.tree.leaves(t)) for t in (a, b)), strict=True)
    )


@pytest.mark.parametrize(
    ("rate", "touched"),
    [
        ("policy_learning_rate", ("policy",)),
        ("value_learning_rate", ("value", "encoder")),
        ("value_head_learning_rate", ("value", "value_head")),
    ],
)
def test_each_rate_moves_its_own_part_and_no_bit_of_the_others(rate, touched):
    before, after = updates(Adafactor()), updates(Adafactor(**{rate: 0.5}))
    pieces = [("policy",), ("value", "encoder"), ("value", "value_head")]
    for piece in pieces:
        first, second = before, after
        for name in piece:
            first, second = first[name], second[name]
        assert same(first, second) == (piece != touched), piece


def test_the_warm_up_is_linear_over_150_steps_and_constant_after():
    schedules = Adafactor().schedules()
    peaks = {"policy": 1e-4, "value": 1e-4, "value_head": 1e-2}
    assert schedules.keys() == peaks.keys()
    for name, peak in peaks.items():
        got = [float(schedules[name](step)) for step in (0, 75, 150, 1000)]
        np.testing.assert_allclose(got, [0.0, peak / 2, peak, peak], rtol=1e-6)
    assert float(Adafactor(warmup_steps=0).schedules()["policy"](0)) == pytest.approx(1e-4)


def test_the_heads_step_is_not_scaled_by_the_parameter_and_divided_by_fan_in():
    optimizer = Adafactor(warmup_steps=0, value_head_learning_rate=0.02)
    # The first update of Adafactor is the sign of the gradient.
    small = updates(optimizer, steps=1)["value"]
    sign = np.sign(GRADIENTS["value_head"]["kernel"])
    np.testing.assert_allclose(small["value_head"]["kernel"], -0.02 * sign / 4, rtol=1e-5)
    np.testing.assert_allclose(small["value_head"]["bias"], [0.02], rtol=1e-5)

    large = jax.tree.map(lambda p: 100 * (p + 1), PARAMS)
    scaled = updates(optimizer, large, steps=1)["value"]
    assert same(scaled["value_head"], small["value_head"])
    rms = [np.sqrt(np.mean(p["encoder"]["kernel"] ** 2)) for p in (PARAMS, large)]
    np.testing.assert_allclose(
        scaled["encoder"]["kernel"],
        small["encoder"]["kernel"] * rms[1] / rms[0],
        rtol=1e-5,
    )


def oracle(param, gradients, rates):
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5) in float64; yields the parameter after each step."""
    param = param.astype(np.float64)
    row, column, moment = 0.0, 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.astype(np.float64)
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
        if param.ndim == 2:
            row = beta * row + (1 - beta) * square.mean(axis=1)
            column = beta * column + (1 - beta) * square.mean(axis=0)
            second = np.outer(row, column) / row.mean()
        else:
            second = moment = beta * moment + (1 - beta) * square
        u = g / np.sqrt(second)
        clip = max(1.0, np.sqrt(np.mean(u**2)))
        scale = max(1e-3, np.sqrt(np.mean(param**2)))
        param = param - rate * scale * u / clip
        yield param, clip


@pytest.mark.parametrize(
    ("shape", "size"), [((128, 160), 0.3), ((160, 128), 2.0), ((130,), 0.5), ((130,), 1e-5)]
)
def test_five_steps_agree_with_a_numpy_adafactor(shape, size):
    rng = np.random.default_rng(0)
    start = (size * rng.standard_normal(shape)).astype(np.float32)
    growth = np.asarray([1.0, 0.1, 3.0, 10.0, 0.5])
    gradients = [(c * rng.standard_normal(shape)).astype(np.float32) for c in growth]
    for g in gradients:
        g[0] = 1e-16  # as small as eps in the square
        g[1] = 0.0
    transform = Adafactor(policy_learning_rate=0.1, warmup_steps=4).transforms()["policy"]
    params = {"w": jnp.asarray(start)}
    state = transform.init(params)
    rates = [0.0, 0.025, 0.05, 0.075, 0.1]
    clips, previous = [], start
    for g, rate, (want, clip) in zip(
        gradients, rates, oracle(start, gradients, rates), strict=True
    ):
        change, state = transform.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, change)
        clips.append(clip)
        error = np.abs(np.asarray(params["w"]) - want).max()
        assert error <= 1e-5 * max(np.abs(want).max(), np.abs(want - previous).max()), rate
        previous = want
    # Both sides of the clipping were seen.
    assert max(clips) > 1.2
    assert min(clips) == pytest.approx(1.0)


def test_another_decay_rate_gives_another_second_moment_to_both_parts():
    before, after = (
        updates(Adafactor(warmup_steps=0)),
        updates(Adafactor(warmup_steps=0, decay_rate=0.5)),
    )
    # With constant gradients the moments are the same: nothing may change.
    assert np.allclose(before["policy"]["encoder"]["kernel"], after["policy"]["encoder"]["kernel"])
    shrinking = [GRADIENTS, jax.tree.map(lambda g: g / 8, GRADIENTS)]
    for part in ("policy", "value"):
        sizes = []
        for decay in (0.5, 0.8):
            transform = Adafactor(warmup_steps=0, decay_rate=decay).transforms()[part]
            state = transform.init(PARAMS)
            for g in shrinking:
                change, state = transform.update(g, state, PARAMS)
            sizes.append(jax.tree.map(lambda x: float(np.abs(x).max()), change))
        # t = 2: the old square weighs 1 - 2^-decay of the sum, so u = 1/8 / sqrt(beta + (1-beta)/64).
        for slow, fast in zip(*map(jax.tree.leaves, sizes), strict=True):
            beta = [1 - 2**-decay for decay in (0.5, 0.8)]
            want = np.sqrt((beta[0] * 63 + 1) / (beta[1] * 63 + 1))
            assert fast / slow == pytest.approx(want, rel=1e-4), part
