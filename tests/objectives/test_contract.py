"""What holds for every loss: shapes, padding, order, microbatches, extremes, the frozen reference."""

import dataclasses
import doctest
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax import objectives

LOG_PROBS = ("policy_log_prob", "reference_log_prob")
MISMATCHED = ("mismatched_policy_log_prob", "mismatched_reference_log_prob")
TAU = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, the names of its arrays, and what must be known of the global batch."""

    loss: Callable
    names: tuple[str, ...]
    statistics: Callable
    example_shape: tuple[int, ...] = ()


def pick(arrays, *names):
    return {name: arrays[name] for name in names}


def weight_statistics(arrays):
    return {"total_weight": jnp.sum(arrays["weights"])}


def single_value_statistics(arrays):
    return {
        "mean_value": objectives.weighted_mean(arrays["value"], arrays["weights"]),
        "mean_residual": objectives.dro_mean_residual(
            **pick(arrays, *LOG_PROBS, "reward", "weights"), tau=TAU
        ),
    } | weight_statistics(arrays)


def dro_p_statistics(arrays):
    return {"mean_residual": objectives.dro_mean_residual(**arrays, tau=TAU)} | weight_statistics(
        arrays
    )


def kto_statistics(arrays):
    return {
        "threshold": objectives.kto_threshold(**pick(arrays, "reward", "weights")),
        "z0": objectives.kto_z0(**pick(arrays, *MISMATCHED, "weights")),
    } | weight_statistics(arrays)


def kto_label_statistics(arrays):
    return {name: value for name, value in kto_statistics(arrays).items() if name != "threshold"}


def sft_statistics(arrays):
    real = arrays["weights"] > 0
    return {"total_tokens": jnp.sum(jnp.where(real, arrays["target_tokens"], 0))}


def two_sample_statistics(arrays):
    return {"total_weight": jnp.sum(objectives.pair_weights(arrays["weights"]))}


def pairwise_statistics(arrays):
    pair_weight = objectives.pair_weights(arrays["weights"], arrays["reward"])
    return {"total_weight": jnp.sum(pair_weight)}


def single_value_loss(**arguments):
    mean_value = objectives.weighted_mean(arguments["value"], arguments["weights"])
    return objectives.dro_v_loss(**({"mean_value": mean_value} | arguments))


def labelled_kto_loss(*, label, **arguments):
    return objectives.kto_loss(
        **arguments, desirable=label > 0.5, lambda_desirable=1.5, lambda_undesirable=0.8
    )


TRIPLETS = (*LOG_PROBS, "reward", "weights")
DRO_V = (*TRIPLETS, "value")
KTO = (*TRIPLETS, *MISMATCHED)
bind = functools.partial(functools.partial, tau=TAU)

CASES = {
    "dro_v": Case(bind(objectives.dro_v_loss), DRO_V, weight_statistics),
    "dro_v_single_value": Case(bind(single_value_loss), DRO_V, single_value_statistics),
    "dro_v_per_token": Case(
        bind(objectives.dro_v_loss), (*DRO_V, "value_variance"), weight_statistics
    ),
    "dro_p": Case(bind(objectives.dro_p_loss), TRIPLETS, dro_p_statistics),
    "two_sample": Case(bind(objectives.two_sample_dro_loss), TRIPLETS, two_sample_statistics, (2,)),
    "kto": Case(bind(objectives.kto_loss), KTO, kto_statistics),
    "kto_labels": Case(bind(labelled_kto_loss), (*KTO, "label"), kto_label_statistics),
    "sft": Case(
        objectives.sft_loss, ("policy_log_prob", "target_tokens", "weights"), sft_statistics
    ),
} | {
    kind: Case(bind(objectives.pairwise_loss, kind=kind), TRIPLETS, pairwise_statistics, (2,))
    for kind in ("dpo", "ipo", "slic")
}

each_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_arrays(case, seed, batch_size, dtype=np.float32):
    """Arrays whose first axis counts examples (or pairs), all of them real."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in case.names:
        draw = rng.normal(size=(batch_size, *case.example_shape))
        if name.endswith("log_prob"):
            draw = draw - 20
        elif name == "target_tokens":
            draw = np.ceil(5 + np.abs(draw))
        elif name in ("value_variance", "label"):
            draw = np.abs(draw)
        elif name == "weights":
            draw = np.ones_like(draw)
        arrays[name] = jnp.asarray(draw, dtype)
    return arrays


@functools.cache
def compiled(case):
    def loss(inputs, constants, statistics):
        return case.loss(**inputs, **constants, **statistics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_gradients(case, arrays, **statistics):
    """Loss, metrics, and the loss's gradient with respect to all it could be differentiated in."""
    constants = {name: arrays[name] for name in arrays.keys() & {"weights", "target_tokens"}}
    inputs = {name: arrays[name] for name in arrays.keys() - constants.keys()}
    (loss, metrics), gradients = compiled(case)(inputs, constants, statistics)
    return loss, metrics, gradients


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


@each_loss
def test_padding_with_any_content_equals_removal(case):
    arrays = make_arrays(case, seed=0, batch_size=6)
    keep = np.array([0, 1, 3, 4])
    garbage = np.zeros(6)
    garbage[[2, 5]] = [np.nan, np.inf]
    garbage = jnp.asarray(garbage.reshape(6, *(1 for _ in case.example_shape)), jnp.float32)
    padded = {name: array + garbage for name, array in arrays.items() if name != "weights"}
    weights = arrays["weights"].at[2].set(0).at[5].set(0)
    loss, metrics, gradients = value_and_gradients(case, padded | {"weights": weights})

    removed = {name: array[keep] for name, array in arrays.items()}
    expected_loss, expected_metrics, expected_gradients = value_and_gradients(case, removed)
    assert_close(loss, expected_loss)
    assert_close(metrics, expected_metrics)
    assert_close({name: g[keep] for name, g in gradients.items()}, expected_gradients)
    for name, gradient in gradients.items():
        assert np.all(gradient[np.array([2, 5])] == 0), name


@each_loss
def test_all_padding_is_zero(case):
    arrays = make_arrays(case, seed=1, batch_size=6)
    padded = {name: jnp.full_like(array, jnp.nan) for name, array in arrays.items()}
    padded["weights"] = jnp.zeros_like(arrays["weights"])
    loss, metrics, gradients = value_and_gradients(case, padded)
    assert loss == 0
    assert all(np.isfinite(metric) for metric in metrics.values())
    assert all(np.all(gradient == 0) for gradient in gradients.values())


@each_loss
def test_permuting_the_batch_changes_nothing(case):
    arrays = make_arrays(case, seed=2, batch_size=6)
    arrays["weights"] = arrays["weights"].at[1].set(0)
    order = np.random.default_rng(0).permutation(6)
    permuted = {name: array[order] for name, array in arrays.items()}
    loss, metrics, gradients = value_and_gradients(case, arrays)
    permuted_loss, permuted_metrics, permuted_gradients = value_and_gradients(case, permuted)
    assert_close(permuted_loss, loss)
    assert_close(permuted_metrics, metrics)
    assert_close(permuted_gradients, {name: g[order] for name, g in gradients.items()})


@each_loss
def test_microbatches_add_up_to_the_batch(case):
    arrays = make_arrays(case, seed=3, batch_size=6)
    arrays["weights"] = arrays["weights"].at[2].set(0).at[4].set(0).at[5].set(0)
    arrays["policy_log_prob"] = arrays["policy_log_prob"].at[5].set(jnp.nan)
    whole_loss, whole_metrics, whole_gradients = value_and_gradients(case, arrays)
    statistics = case.statistics(arrays)
    parts = [
        value_and_gradients(case, {name: a[rows] for name, a in arrays.items()}, **statistics)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    losses, metrics, gradients = zip(*parts, strict=True)
    assert_close(sum(losses), whole_loss)
    whole_metrics.pop("kl/batch_of_one", None)  # Not known where z0 is given.
    assert_close({name: sum(m[name] for m in metrics) for name in metrics[0]}, whole_metrics)
    joined = {name: jnp.concatenate([g[name] for g in gradients]) for name in whole_gradients}
    assert_close(joined, whole_gradients)


@each_loss
def test_the_reference_receives_no_gradient(case):
    arrays = make_arrays(case, seed=4, batch_size=6)
    _, _, gradients = value_and_gradients(case, arrays)
    assert np.any(gradients["policy_log_prob"] != 0)
    for name in ("reference_log_prob", *MISMATCHED):
        assert np.all(gradients.get(name, 0) == 0), name


@each_loss
def test_extreme_log_ratios_stay_finite(case):
    arrays = make_arrays(case, seed=5, batch_size=6)
    extreme = jnp.array([1e4, -1e4, 1e4, -1e4, 0, 1e4], jnp.float32)
    if case.example_shape:
        extreme = jnp.stack([extreme, -extreme], axis=-1)
    arrays["policy_log_prob"] = extreme
    if "mismatched_policy_log_prob" in arrays:
        arrays["mismatched_policy_log_prob"] = extreme
    everything = value_and_gradients(case, arrays)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), everything)


@each_loss
def test_a_batch_of_one(case):
    arrays = make_arrays(case, seed=6, batch_size=1)
    everything = value_and_gradients(case, arrays)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), everything)


@each_loss
def test_one_common_shape_of_any_rank(case):
    arrays = make_arrays(case, seed=7, batch_size=6)
    rows = {name: a.reshape(3, 2, *case.example_shape) for name, a in arrays.items()}
    loss, metrics, _ = value_and_gradients(case, arrays)
    assert_close(jax.jit(lambda inputs: case.loss(**inputs))(rows), (loss, metrics))


@each_loss
def test_precision_follows_the_arrays(case, double_precision):
    for dtype in (np.float32, np.float64):
        arrays = make_arrays(case, seed=8, batch_size=4, dtype=dtype)
        everything = jax.eval_shape(lambda inputs: case.loss(**inputs), arrays)
        assert {leaf.dtype for leaf in jax.tree.leaves(everything)} == {np.dtype(dtype)}
        assert all(leaf.shape == () for leaf in jax.tree.leaves(everything))


@each_loss
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_column_among_rows_raises_and_names_both_shapes(case, transform):
    for name in case.names:
        arrays = make_arrays(case, seed=9, batch_size=4)
        wrong = arrays | {name: arrays[name][:, None]}
        with pytest.raises(ValueError, match="shape") as error:
            transform(lambda inputs: case.loss(**inputs))(wrong)
        assert str(wrong[name].shape) in str(error.value)
        assert str(arrays[name].shape) in str(error.value)


@each_loss
def test_other_dtypes_raise(case):
    arrays = make_arrays(case, seed=10, batch_size=4)
    for dtype in (jnp.bfloat16, jnp.int32):
        name = case.names[0]
        with pytest.raises(TypeError, match=f"{name} has dtype {jnp.dtype(dtype).name}"):
            case.loss(**arrays | {name: arrays[name].astype(dtype)})


@each_loss
def test_a_statistic_must_be_a_scalar(case):
    arrays = make_arrays(case, seed=11, batch_size=4)
    for name, statistic in case.statistics(arrays).items():
        statistics = case.statistics(arrays) | {name: jnp.full(4, statistic)}
        with pytest.raises(ValueError, match=rf"{name} has shape \(4,\)"):
            case.loss(**arrays, **statistics)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sft"}))
def test_tau_must_be_positive(name):
    arrays = make_arrays(CASES[name], seed=12, batch_size=4)
    for tau in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"tau is {tau}"):
            CASES[name].loss(**arrays, tau=tau)


@pytest.mark.parametrize("name", ["two_sample", "dpo"])
def test_pairs_must_lie_in_the_last_axis(name):
    case = CASES[name]
    arrays = make_arrays(dataclasses.replace(case, example_shape=(3,)), seed=13, batch_size=4)
    with pytest.raises(ValueError, match=r"policy_log_prob has shape \(4, 3\)"):
        case.loss(**arrays)


def test_weighted_mean():
    array, weights = jnp.array([1.0, 4.0, jnp.nan]), jnp.array([3.0, 1.0, 0.0])
    assert objectives.weighted_mean(array, weights) == 1.75
    assert objectives.weighted_mean(array, weights, 14) == 0.5
    assert objectives.weighted_mean(array, jnp.zeros(3)) == 0


@pytest.mark.parametrize(
    "module", ["diagnostics", "dro", "kto", "pairs", "pairwise", "per_example", "sft"]
)
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"dro_jax.objectives.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
