"""The value network V(x): zero at the start, yet learning; the policy's stacks with a head of its own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict

from dro_jax.networks import T5, T5Config, ValueNetwork
from dro_jax.networks.t5 import encoder_segments

PROMPTS = jnp.asarray([[7, 3, 30, 2, 1], [5, 1, 0, 0, 0], [9, 0, 0, 0, 0]], jnp.int32)
HEAD = ("value_head/kernel", "value_head/bias")


SMALL = T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=3,
    head_dim=4,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="float32",
)


def at_the_start(random_params: Any, module: ValueNetwork) -> Any:
    """Random stacks, as the reference's would be, and the head as it is initialised."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), PROMPTS)["params"])
    head = jax.jit(lambda key: module.init(key, PROMPTS)["params"]["value_head"])
    head = meta.unbox(head(jax.random.key(0)))
    assert jax.tree.map(jnp.shape, head) == jax.tree.map(jnp.shape, shapes["value_head"])
    return random_params(module, PROMPTS) | {"value_head": head}


def test_values_start_at_exactly_zero_while_the_head_alone_has_a_gradient(random_params):
    module = ValueNetwork(SMALL)
    params = at_the_start(random_params, module)

    @jax.jit
    def values_and_gradient(params: Any) -> Any:
        values, pull = jax.vjp(lambda p: module.apply({"params": p}, PROMPTS), params)
        return values, pull(jnp.ones_like(values))[0]

    values, gradient = values_and_gradient(params)
    assert values.shape == (3, 1)
    assert values.dtype == jnp.float32
    assert np.all(values == 0)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert bool(np.any(leaf != 0)) == (path in HEAD), path
    assert np.array_equal(gradient["value_head"]["bias"], [3.0])


def test_the_value_tree_is_the_policy_tree_with_a_head_for_the_logits(config):
    tokens = jnp.ones((1, 4), jnp.int32)
    key = jax.random.key(0)
    policy = jax.eval_shape(T5(config).init, key, tokens, tokens)["params"]
    value = jax.eval_shape(ValueNetwork(config).init, key, tokens)["params"]
    policy, value = flatten_dict(policy, sep="/"), flatten_dict(value, sep="/")
    assert value.pop("value_head/kernel").value.shape == (config.emb_dim, 1)
    assert value.pop("value_head/bias").value.shape == (1,)
    policy.pop("decoder/logits_dense/kernel", None)
    assert value == policy


def test_a_value_is_the_head_on_the_policys_decoder_state_at_the_start_token(random_params):
    module = ValueNetwork(SMALL)
    params = random_params(module, PROMPTS)
    kernel, bias = params["value_head"]["kernel"], params["value_head"]["bias"]
    stacks = {key: value for key, value in params.items() if key != "value_head"}

    def first_state(policy: T5, prompts: jax.Array) -> jax.Array:
        start = jnp.zeros((len(prompts), 1), jnp.int32)
        embedded, encoded = policy.token_embedder(start), policy.encode(prompts)
        segments = encoder_segments(prompts, None)
        return policy.decoder(embedded, encoded, start + 1, segments)[:, 0]

    states = jax.jit(lambda p: T5(SMALL).apply({"params": p}, PROMPTS, method=first_state))(stacks)
    values = jax.jit(module.apply)({"params": params}, PROMPTS)
    expected = np.asarray(states, np.float64) @ np.asarray(kernel) + np.asarray(bias)
    assert np.abs(values - expected).max() <= 1e-5
    assert np.ptp(values) > 0.1


def test_values_a_token_see_the_prompt_and_the_past_alone(random_params):
    module = ValueNetwork(SMALL)
    params = random_params(module, PROMPTS)
    first = jnp.asarray([[0, 4, 9, 3], [0, 8, 1, 0], [0, 2, 2, 2]], jnp.int32)
    second = first.at[:, 2:].set(30)
    per_token = jax.jit(functools.partial(module.apply, method="per_token"))
    values, others = (per_token({"params": params}, PROMPTS, inputs) for inputs in (first, second))
    assert values.shape == (3, 4)
    one_a_prompt = jax.jit(module.apply)({"params": params}, PROMPTS)
    np.testing.assert_allclose(values[:, :1], one_a_prompt, atol=1e-5)
    np.testing.assert_array_equal(values[:, :2], others[:, :2])
    assert np.abs(values[:, 2:] - others[:, 2:]).min() > 1e-4


def test_values_of_a_bfloat16_network_are_float32():
    module = ValueNetwork(dataclasses.replace(SMALL, dtype="bfloat16"))
    values, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), PROMPTS)
    assert values.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_the_head_multiplies_in_full_float32_which_accelerators_do_not_by_default():
    module = ValueNetwork(SMALL)
    variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), PROMPTS))
    program = jax.make_jaxpr(module.apply)(variables, PROMPTS)
    products = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products[-1].outvars[0].aval.shape == (3, 1, 1)
    assert set(products[-1].params["precision"]) == {jax.lax.Precision.HIGHEST}
