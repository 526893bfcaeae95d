"""Attention by `attend`, against float64 NumPy and finite differences of it."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dro_jax.errors import UsageError
from dro_jax.networks import T5, T5Config, ValueNetwork, attention, t5
from dro_jax.networks.attention import attend, find_fault, segment_mask
from dro_jax.networks.sharding import laid_over
from dro_jax.training import partitioning

B, T, S, H, D = 2, 5, 6, 3, 4
TINY = T5Config(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Random queries, keys, values, bias and mask; the last query of row 1 may look at nothing."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, 1, T, S)) < 0.6
    mask[..., 0] = True
    mask[1, :, -1] = False
    return {
        "queries": rng.standard_normal((B, T, H, D)),
        "keys": rng.standard_normal((B, S, H, D)),
        "values": rng.standard_normal((B, S, H, D)),
        "bias": rng.standard_normal((1, H, T, S)),
        "mask": mask,
    }


def exact(queries, keys, values, bias, mask) -> np.ndarray:
    """Attention in float64, one query at a time."""
    found = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(mask[b, 0, t])
        if not len(seen):
            found[b, t, h] = values[b, :, h].mean(0)
            continue
        scores = keys[b, seen, h] @ queries[b, t, h]
        if bias is not None:
            scores = scores + bias[0, h, t, seen]
        weights = np.exp(scores - scores.max())
        found[b, t, h] = weights @ values[b, seen, h] / weights.sum()
    return found


def cast(arrays: dict[str, np.ndarray], dtype: jnp.dtype) -> dict[str, jax.Array | None]:
    """The arrays as a layer has them: the bias float32, the mask bool, the others of this type."""
    types = {"bias": jnp.float32, "mask": bool}
    return {
        name: None if x is None else jnp.asarray(x, types.get(name, dtype))
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_agrees_with_float64(with_bias):
    arrays = inputs() | ({} if with_bias else {"bias": None})
    ours = attend(**cast(arrays, jnp.float32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact(**arrays), rtol=0, atol=2e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_finite_differences_in_float64(with_bias):
    arrays = inputs(1) | ({} if with_bias else {"bias": None})
    towards = np.random.default_rng(2).standard_normal((B, T, H, D))
    _, pull = jax.vjp(
        lambda given: attend(**given, mask=jnp.asarray(arrays["mask"])),
        {name: x for name, x in cast(arrays, jnp.float32).items() if name != "mask"},
    )
    (slopes,) = pull(jnp.asarray(towards, jnp.float32))
    assert (slopes["bias"] is None) == (not with_bias)
    step = 1e-5
    for name, slope in slopes.items():
        if slope is None:
            continue
        for place in np.ndindex(arrays[name].shape):
            ends = []
            for sign in (1, -1):
                moved = arrays | {name: arrays[name].copy()}
                moved[name][place] += sign * step
                ends.append((exact(**moved) * towards).sum())
            by_difference = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope[place] - by_difference) <= 2e-5, (name, place)


def test_a_query_that_may_look_at_nothing_gets_the_mean_and_leaves_no_gradient_behind():
    arrays = cast(inputs(), jnp.float32)
    blind = arrays["queries"][1, -1]

    def of_blind(queries, keys, bias):
        given = arrays | {"queries": queries, "keys": keys, "bias": bias}
        return attend(**given)[1, -1]

    found, pull = jax.vjp(of_blind, arrays["queries"], arrays["keys"], arrays["bias"])
    np.testing.assert_allclose(found, arrays["values"][1].mean(0), atol=1e-6)
    assert all(not np.any(slope) for slope in pull(jnp.ones_like(blind)))


def test_what_is_masked_may_be_of_any_size():
    segments = jnp.array([[1, 1, 2, 2, 0, 0]])
    mask = segment_mask(segments, segments)
    x = jax.random.normal(jax.random.key(0), (1, 6, H, D))
    large = x.at[:, 4:].set(1e30)

    def of_real(x, keys):
        return jnp.sum(attend(x, keys, x, None, mask)[:, :4] ** 2)

    plain, odd = (jax.value_and_grad(of_real)(x, keys) for keys in (x, large))
    np.testing.assert_array_equal(plain[0], odd[0])
    np.testing.assert_array_equal(plain[1], odd[1])


def test_bfloat16_is_multiplied_as_bfloat16_and_added_up_in_float32():
    arrays = cast(inputs(3), jnp.bfloat16)
    mask = arrays.pop("mask")

    def loss(given):
        return jnp.sum(attend(**given, mask=mask).astype(jnp.float32) ** 2)

    slopes = jax.grad(loss)(arrays)
    whole = jax.grad(loss)({name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert slopes["bias"].dtype == jnp.float32
    for name, slope in slopes.items():
        assert slope.dtype == arrays[name].dtype
        scale = np.abs(whole[name]).max()
        np.testing.assert_allclose(
            np.asarray(slope, np.float32) / scale, whole[name] / scale, atol=0.03
        )
    factors = [
        x.aval.dtype
        for equation in jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr.eqns
        for x in _factors(equation)
    ]
    # Two products forward, five backward.
    assert len(factors) == 14
    assert set(factors) == {jnp.dtype("bfloat16")}


def _factors(equation) -> list:
    if equation.primitive.name == "dot_general":
        return list(equation.invars)
    inner = [x for x in equation.params.values() if isinstance(x, jax.extend.core.ClosedJaxpr)]
    return [x for one in inner for below in one.jaxpr.eqns for x in _factors(below)]


def without_bias(queries, keys, values, bias, mask):
    return attend(queries, keys, values, None, mask)


def without_mask(queries, keys, values, bias, mask):
    return attend(queries, keys, values, bias, jnp.ones_like(mask))


def without_gradient_of_the_bias(queries, keys, values, bias, mask):
    return attend(queries, keys, values, jax.lax.stop_gradient(bias), mask)


def no_number_where_nothing_is_seen(queries, keys, values, bias, mask):
    sums = attend(queries, keys, values, bias, mask)
    return jnp.where(mask.any(-1)[:, 0, :, None, None], sums, jnp.nan)


def not_there(queries, keys, values, bias, mask):
    raise RuntimeError("cuDNN is not detected.\nand more")


def broken(queries, keys, values, bias, mask):
    raise AssertionError


def test_a_stand_in_that_does_the_same_has_no_fault():
    def in_float32(queries, keys, values, bias, mask):
        whole = (x.astype(jnp.float32) for x in (queries, keys, values))
        sums = attend(*whole, bias, mask).astype(values.dtype)
        # Of queries that see nothing nobody reads the sums.
        return jnp.where(mask.any(-1)[:, 0, :, None, None], sums, 0)

    assert find_fault(in_float32, D) is None


@pytest.mark.parametrize(
    ("stand_in", "fault"),
    [
        (without_bias, "sums are off by"),
        (without_mask, "sums are off by"),
        (without_gradient_of_the_bias, "gradients of bias are off by"),
        (no_number_where_nothing_is_seen, "sums are off by nan"),
        (not_there, "RuntimeError: cuDNN is not detected."),
        (broken, "AssertionError:"),
    ],
)
def test_a_stand_in_that_does_otherwise_is_found_out(stand_in, fault):
    found = find_fault(stand_in, D)
    assert found.startswith(fault)
    assert "\n" not in found


def test_faults_are_looked_for_while_something_else_is_traced():
    def traced(x):
        return x + (find_fault(attend, D) is None) + 2 * (find_fault(without_bias, D) is None)

    assert jax.jit(traced)(1.0) == 2.0


@pytest.fixture
def gpu(monkeypatch):
    """JAX as on a GPU, with a stand-in for cuDNN's attention; the shapes that it was called with."""
    called = []

    def stand_in(queries, keys, values, bias, mask):
        called.append((queries.shape[1], keys.shape[1]))
        return attend(queries, keys, values, bias, mask)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (attention, t5):
        monkeypatch.setattr(module, "attend_by_cudnn", stand_in)
    attention._cudnn_agrees.cache_clear()
    yield called
    attention._cudnn_agrees.cache_clear()


def lengths_attended(called: list[tuple[int, int]], **changes) -> set[tuple[int, int]]:
    """The (queries, keys) that a policy and a value network attend over by what `gpu` stands in for."""
    config = dataclasses.replace(TINY, **changes)
    tokens = jnp.ones((2, 6), jnp.int32)
    inputs = tokens, tokens[:, :4]
    # Traced alone.
    params = jax.eval_shape(T5(config).init, jax.random.key(0), *inputs)
    value = jax.eval_shape(ValueNetwork(config).init, jax.random.key(0), tokens)
    attention.use_cudnn("auto", jnp.bfloat16, 4)  # the trial
    called.clear()
    jax.eval_shape(T5(config).apply, params, *inputs)
    jax.eval_shape(ValueNetwork(config).apply, value, tokens)
    return set(called)


def test_on_a_gpu_everything_but_a_single_query_is_cudnns(gpu):
    assert lengths_attended(gpu, dtype="bfloat16") == {(6, 6), (4, 4), (4, 6)}


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"attention": "xla"}])
def test_cudnn_is_not_for_float32_nor_where_it_is_not_wanted(gpu, changes):
    assert lengths_attended(gpu, **{"dtype": "bfloat16"} | changes) == set()


def test_cudnn_is_left_alone_where_it_does_otherwise_and_that_is_said(gpu, monkeypatch, caplog):
    for module in (attention, t5):
        monkeypatch.setattr(module, "attend_by_cudnn", without_mask)
    assert lengths_attended(gpu, dtype="bfloat16") == set()
    (record,) = caplog.records
    assert record.getMessage().startswith("cuDNN's attention is not used: sums are off by")


def test_on_several_devices_cudnn_is_taken_only_when_it_is_asked_for(gpu):
    rules = partitioning.Partitioning()
    with laid_over(rules.mesh(jax.devices()[:2]), rules.rules):
        assert not attention.use_cudnn("auto", jnp.bfloat16, 4)
        assert attention.use_cudnn("cudnn", jnp.bfloat16, 4)
    assert attention.use_cudnn("auto", jnp.bfloat16, 4)


def test_cudnn_without_a_gpu_is_refused_in_a_line():
    config = dataclasses.replace(TINY, dtype="bfloat16", attention="cudnn")
    tokens = jnp.ones((1, 2), jnp.int32)
    params = jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens)
    with pytest.raises(UsageError, match=r"is for bfloat16 on an NVIDIA GPU.*bfloat16 on cpu"):
        jax.eval_shape(T5(config).apply, params, tokens, tokens)
