"""The T5 policy: parameter names, its parts against oracles, cached decoding, precision, extremes."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict

from dro_jax.networks import T5, T5Config, ValueNetwork
from dro_jax.networks.attention import relative_position_bucket
from dro_jax.networks.t5 import Attention, Embedding, RelativeBias, RMSNorm

# Written out from T5X's examples/t5/network.py and layers.py (commit cc342d4) for vocabulary V=50, embed E=8,
# heads H=3 of width 4 (joined 12), mlp 20: what T5X's Transformer(...).init holds under "params".
ENCODER_LAYER = {
    "pre_attention_layer_norm/scale": (8,),
    "attention/query/kernel": (8, 12),
    "attention/key/kernel": (8, 12),
    "attention/value/kernel": (8, 12),
    "attention/out/kernel": (12, 8),
    "pre_mlp_layer_norm/scale": (8,),
    "mlp/wo/kernel": (20, 8),
}
DECODER_LAYER = {
    "pre_self_attention_layer_norm/scale": (8,),
    "self_attention/query/kernel": (8, 12),
    "self_attention/key/kernel": (8, 12),
    "self_attention/value/kernel": (8, 12),
    "self_attention/out/kernel": (12, 8),
    "pre_cross_attention_layer_norm/scale": (8,),
    "encoder_decoder_attention/query/kernel": (8, 12),
    "encoder_decoder_attention/key/kernel": (8, 12),
    "encoder_decoder_attention/value/kernel": (8, 12),
    "encoder_decoder_attention/out/kernel": (12, 8),
    "pre_mlp_layer_norm/scale": (8,),
    "mlp/wo/kernel": (20, 8),
}
GATED_MLP = {"mlp/wi_0/kernel": (8, 20), "mlp/wi_1/kernel": (8, 20)}
RELU_MLP = {"mlp/wi/kernel": (8, 20)}
OUTSIDE_THE_LAYERS = {
    "token_embedder/embedding": (50, 8),
    "encoder/relpos_bias/rel_embedding": (3, 32),
    "encoder/encoder_norm/scale": (8,),
    "decoder/relpos_bias/rel_embedding": (3, 32),
    "decoder/decoder_norm/scale": (8,),
}
UNTIED = {"decoder/logits_dense/kernel": (8, 50)}
AXES = {
    "embedding": ("vocab", "embed"),
    "rel_embedding": ("heads", "relpos_buckets"),
    "scale": ("embed",),
    "query/kernel": ("embed", "joined_kv"),
    "key/kernel": ("embed", "joined_kv"),
    "value/kernel": ("embed", "joined_kv"),
    "out/kernel": ("joined_kv", "embed"),
    "wi/kernel": ("embed", "mlp"),
    "wi_0/kernel": ("embed", "mlp"),
    "wi_1/kernel": ("embed", "mlp"),
    "wo/kernel": ("mlp", "embed"),
    "logits_dense/kernel": ("embed", "vocab"),
    "value_head/kernel": ("embed", None),
    "value_head/bias": (None,),
}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "emb_dim": 8,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 20,
    "dtype": "float32",
}
TOKENS = jnp.ones((1, 4), jnp.int32)


def boxed_params(module: Any, *inputs: Any) -> dict[str, Any]:
    """Shapes with their logical axes, by path."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return flatten_dict(shapes, sep="/")


def in_layer(stack: str, number: int, *groups: dict[str, Any]) -> dict[str, Any]:
    return {f"{stack}/layers_{number}/{k}": v for group in groups for k, v in group.items()}


def test_parameters_of_version_1_1_are_those_of_t5x():
    config = T5Config(num_encoder_layers=2, num_decoder_layers=1, **SIZES)
    ours = {k: v.value.shape for k, v in boxed_params(T5(config), TOKENS, TOKENS).items()}
    assert ours == (
        OUTSIDE_THE_LAYERS
        | UNTIED
        | in_layer("encoder", 0, ENCODER_LAYER, GATED_MLP)
        | in_layer("encoder", 1, ENCODER_LAYER, GATED_MLP)
        | in_layer("decoder", 0, DECODER_LAYER, GATED_MLP)
    )


def test_parameters_of_version_1_0_are_those_of_t5x():
    config = T5Config(
        num_encoder_layers=1,
        num_decoder_layers=2,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        **SIZES,
    )
    ours = {k: v.value.shape for k, v in boxed_params(T5(config), TOKENS, TOKENS).items()}
    assert ours == (
        OUTSIDE_THE_LAYERS
        | in_layer("encoder", 0, ENCODER_LAYER, RELU_MLP)
        | in_layer("decoder", 0, DECODER_LAYER, RELU_MLP)
        | in_layer("decoder", 1, DECODER_LAYER, RELU_MLP)
    )


def test_every_parameter_is_float32_and_carries_t5x_names_of_its_axes(config):
    boxes = boxed_params(T5(config), TOKENS, TOKENS)
    boxes |= {f"V/{k}": v for k, v in boxed_params(ValueNetwork(config), TOKENS).items()}
    for path, box in boxes.items():
        (axes,) = [axes for end, axes in AXES.items() if f"/{path}".endswith(f"/{end}")]
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert box.names == axes, path
        assert len(box.names) == box.value.ndim, path
        assert box.value.dtype == jnp.float32, path
        assert not path.endswith("kernel") or box.value.ndim == 2, path


def attend_to_itself(attention: Attention, x: jax.Array) -> jax.Array:
    mask = jnp.ones((1, 1, x.shape[1], x.shape[1]), bool)
    return attention(x, *attention.keys_values(x), bias=None, mask=mask)


def test_a_list_of_activations_is_as_good_as_a_tuple():
    sizes = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 1) | SIZES
    configs = {T5Config(mlp_activations=given, **sizes) for given in (["relu"], ("relu",))}
    assert [config.mlp_activations for config in configs] == [("relu",)]


def test_initial_scales_are_t5x_ones():
    config = T5Config(64, 64, 4, 16, 128, num_encoder_layers=1, num_decoder_layers=1)
    x = jnp.ones((1, 2, 64))
    distances = jnp.arange(2)
    init = jax.jit(
        lambda key: {
            "embed": Embedding(config).init(key, TOKENS),
            "bias": RelativeBias(config, bidirectional=True).init(key, distances, distances),
            "attention": Attention(config).init(key, x, method=attend_to_itself),
        }
    )
    params = flatten_dict(meta.unbox(init(jax.random.key(0))), sep="/")
    deviations = {
        "embed/params/embedding": 1.0,
        "bias/params/rel_embedding": ((4 + 32) / 2) ** -0.5,
        "attention/params/query/kernel": (64 * 16) ** -0.5,
        "attention/params/key/kernel": 64**-0.5,
        "attention/params/value/kernel": 64**-0.5,
        "attention/params/out/kernel": 64**-0.5,
    }
    assert params.keys() == deviations.keys()
    for path, deviation in deviations.items():
        assert np.std(params[path]) == pytest.approx(deviation, rel=0.15), path
        assert abs(np.mean(params[path])) < 0.3 * deviation, path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_token_that_comes_often_is_the_sum_of_all(dtype):
    config = T5Config(
        vocab_size=7, emb_dim=5, num_heads=1, head_dim=2, mlp_dim=2, num_encoder_layers=1,
        num_decoder_layers=1, dtype=dtype,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((8, 2048)) < 0.5, 1, rng.integers(0, 6, (8, 2048)))
    cotangents = jnp.asarray(rng.normal(0.1, 1, (8, 2048, 5)), config.compute_dtype)
    table = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    embed = Embedding(config)

    def total(table, tokens, cotangents):
        looked_up = embed.apply({"params": {"embedding": table}}, tokens)
        return jnp.sum(looked_up * cotangents, dtype=jnp.float32)

    found = jax.jit(jax.grad(total))(table, tokens, cotangents)
    assert found.dtype == jnp.float32
    expected = np.zeros((7, 5))
    np.add.at(expected, tokens, np.asarray(cotangents, np.float64))
    # Bfloat16 has 8 bits; added up in it the most frequent token's would be 80% too small.
    np.testing.assert_allclose(found, expected, rtol={"float32": 1e-4, "bfloat16": 2**-8}[dtype])
    assert not found[6].any()


def exact_bucket(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The definition in whole numbers: no logarithm, so nothing to round at a bucket's edge."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    steps = buckets - exact
    distance = min(distance, max_distance)
    # floor(steps * log(distance / exact) / log(max_distance / exact)), the largest k with
    # (distance / exact) ** steps >= (max_distance / exact) ** k.
    k = 0
    while (
        k < steps and distance**steps * exact ** (k + 1) >= max_distance ** (k + 1) * exact**steps
    ):
        k += 1
    return offset + min(exact + k, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (8, 10), (16, 256), (4, 9), (32, 64)]
)
def test_relative_position_buckets_follow_the_definition(bidirectional, buckets, max_distance):
    extremes = [-(2**31) + 1, -(10**6), 10**6, 2**31 - 1]
    positions = [*range(-300, 301), *extremes]
    ours = jax.jit(
        lambda x: relative_position_bucket(
            x, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
        )
    )(jnp.asarray(positions, jnp.int32))
    expected = [exact_bucket(x, bidirectional, buckets, max_distance) for x in positions]
    assert ours.dtype == jnp.int32
    assert ours.tolist() == expected
    assert set(expected) <= set(range(buckets))


def test_rms_norm_agrees_with_float64():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 5, 8)) * 10.0 ** rng.integers(-4, 5, (2, 5, 1))).astype("f4")
    x[0, 0] = 0
    scale = rng.standard_normal(8).astype("f4")
    ours = RMSNorm(jnp.float32).apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    exact = x.astype("f8")
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=1e-7)


def test_rms_norm_computes_in_float32_on_bfloat16_states():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 512)) + 300, jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(512)}}
    ours = RMSNorm(jnp.bfloat16).apply(params, x)
    exact = RMSNorm(jnp.float32).apply(params, x)
    assert ours.dtype == jnp.bfloat16
    assert np.array_equal(ours, exact.astype(jnp.bfloat16))


def prompts_and_answers(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Padded prompts [3, 9] of lengths 9, 4 and 1, and decoder inputs [3, 15] behind the start token."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 40, (3, 9)) * (np.arange(9) < np.array([[9], [4], [1]]))
    answers = rng.integers(1, 40, (3, 15)) * (np.arange(15) > 0)
    return jnp.asarray(prompts, jnp.int32), jnp.asarray(answers, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)  # one compilation a module, whichever test asks
def teacher_forced_logits(module: T5, params: Any, *inputs: jax.Array) -> jax.Array:
    return module.apply({"params": params}, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(module: T5, params: Any, prompts: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits of feeding the tokens one by one into a cache with room to spare."""
    variables = {"params": params}
    cache = module.apply(variables, prompts, tokens.shape[1] + 2, method="init_cache")

    def step(cache: Any, index: jax.Array) -> Any:
        logits, cache = module.apply(
            variables, tokens[:, index], cache, index, prompts, method="decode_step"
        )
        return cache, logits

    return jax.lax.scan(step, cache, jnp.arange(tokens.shape[1]))[1].swapaxes(0, 1)


def test_cached_decoding_is_teacher_forcing(config, random_params):
    module = T5(config)
    prompts, tokens = prompts_and_answers()
    params = random_params(module, prompts, tokens)
    cached = cached_logits(module, params, prompts, tokens)
    difference = cached - teacher_forced_logits(module, params, prompts, tokens)
    assert jnp.max(jnp.abs(difference)) <= 1e-5
    assert jnp.abs(jnp.mean(difference)) <= 1e-6


def test_no_position_sees_a_later_token(config, random_params):
    module = T5(config)
    prompts, tokens = prompts_and_answers()
    params = random_params(module, prompts, tokens)
    changed = tokens.at[:, 6].set(39 - tokens[:, 6])
    before = teacher_forced_logits(module, params, prompts, tokens)
    after = teacher_forced_logits(module, params, prompts, changed)
    assert np.array_equal(before[:, :6], after[:, :6])
    assert np.all(np.any(before[:, 6:] != after[:, 6:], axis=-1))


def test_bfloat16_stays_near_float32_with_float32_logits(config, random_params):
    module = T5(config)
    half = T5(dataclasses.replace(config, dtype="bfloat16"))
    inputs = prompts_and_answers()
    params = random_params(module, *inputs)
    logits = teacher_forced_logits(half, params, *inputs)
    difference = np.asarray(logits - teacher_forced_logits(module, params, *inputs))
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(difference).max() <= 0.15
    assert np.abs(difference).mean() <= 0.02
    assert abs(difference.mean()) <= 0.005


def test_cached_decoding_in_bfloat16_keeps_a_bfloat16_cache_and_float32_logits(config):
    half = T5(dataclasses.replace(config, dtype="bfloat16"))
    prompts, tokens = prompts_and_answers()

    def first_step(key: jax.Array) -> Any:
        variables = meta.unbox(half.init(key, prompts, tokens))
        cache = half.apply(variables, prompts, 15, method="init_cache")
        index = jnp.asarray(0)
        return cache, half.apply(
            variables, tokens[:, 0], cache, index, prompts, method="decode_step"
        )

    cache, (logits, grown) = jax.eval_shape(first_step, jax.random.key(0))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert grown == cache  # a scan's carry keeps its shapes and types


def test_the_architecture_is_json_and_ignores_the_compute_type(config):
    stored = json.loads(json.dumps(config.architecture()))
    assert stored == dataclasses.replace(config, dtype="bfloat16", logits_chunk=4).architecture()
    assert stored != dataclasses.replace(config, mlp_dim=21).architecture()


def test_the_compute_type_auto_is_float32_on_cpu(config):
    assert dataclasses.replace(config, dtype="auto").compute_dtype == jnp.float32
    assert dataclasses.replace(config, dtype="bfloat16").compute_dtype == jnp.bfloat16


def test_networks_and_objectives_import_without_tensorflow_seqio_gin_or_t5x():
    code = (
        "import sys, dro_jax.networks, dro_jax.objectives\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'seqio', 'gin', 't5x', 'torch', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
