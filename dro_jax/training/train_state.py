"""What a training step updates, and how it is laid out over the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dro_jax.networks import T5, T5Config, ValueNetwork
from dro_jax.networks.sharding import Rules
from dro_jax.training import partitioning

Tree = Any


@struct.dataclass
class TrainState:
    """All that changes in training.

    Attributes:
      step: int32 scalar array, optimiser steps done.
      policy: parameters of the policy, an ordinary T5 tree.
      value: parameters of the value network, {} for methods without one.
      opt_state: optimiser state of each part that has parameters.
    """

    step: Any
    policy: Tree
    value: Tree
    opt_state: dict[str, Tree]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes and shardings of a training state, known before any array exists.

    Attributes:
      mesh: the device mesh.
      rules: how logical axes lie on it.
      shapes: `TrainState` of `jax.ShapeDtypeStruct`.
      shardings: `TrainState` of `NamedSharding`.
    """

    mesh: Mesh
    rules: Rules
    shapes: TrainState
    shardings: TrainState

    def abstract(self) -> TrainState:
        """`TrainState` of shapes that carry their sharding, to restore into."""
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            self.shapes,
            self.shardings,
        )


def init_policy(config: T5Config, seed: int) -> Tree:
    """Random parameters of a T5, boxed with their logical axis names."""
    tokens = jnp.ones((1, 1), jnp.int32)
    return T5(config).init(jax.random.key(seed), tokens, tokens)["params"]


def init_value(config: T5Config, seed: int) -> Tree:
    """Random parameters of a value network (head at zero), boxed with their logical axis names."""
    tokens = jnp.ones((1, 1), jnp.int32)
    return ValueNetwork(config).init(jax.random.key(seed), tokens)["params"]


def value_from_policy(policy: Tree, value: Tree) -> Tree:
    """The value network's parameters with everything whose name the policy has too taken from it."""
    return {
        name: value_from_policy(policy[name], tree)
        if name in policy and isinstance(tree, dict)
        else policy.get(name, tree)
        for name, tree in value.items()
    }


def zero_last_entry(config: T5Config, policy: Tree) -> Tree:
    """The policy with 0 for what makes the last vocabulary entry's logit, so that a single net's V starts at 0."""
    flat = flatten_dict(policy, sep="/")
    if config.logits_via_embedding:
        name = "token_embedder/embedding"
        flat[name] = flat[name].at[-1].set(0)
    else:
        name = "decoder/logits_dense/kernel"
        flat[name] = flat[name].at[:, -1].set(0)
    return unflatten_dict(flat, sep="/")


def make_layout(
    config: T5Config,
    transforms: dict[str, optax.GradientTransformation],
    *,
    has_value: bool,
    mesh: Mesh,
    rules: partitioning.Partitioning,
) -> Layout:
    """Shapes and shardings of the state, without computing anything.

    Args:
      config: architecture of policy and value network.
      transforms: optimiser of "policy" and "value".
      has_value: whether the method trains a value network of its own.
      mesh: the device mesh.
      rules: logical axis rules.

    Returns:
      The layout.
    """
    inits: dict[str, Callable[..., Tree]] = {"policy": init_policy}
    if has_value:
        inits["value"] = init_value
    shapes: dict[str, Tree] = {"value": {}}
    shardings: dict[str, Tree] = {"value": {}}
    opt_shapes, opt_shardings = {}, {}
    for part, init in inits.items():
        boxed = jax.eval_shape(lambda init=init: init(config, 0))
        shapes[part] = meta.unbox(boxed)
        shardings[part] = partitioning.parameter_shardings(boxed, mesh, rules)
        opt_shapes[part] = jax.eval_shape(transforms[part].init, shapes[part])
        opt_shardings[part] = partitioning.like_parameters(
            opt_shapes[part], shapes[part], shardings[part], mesh
        )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return Layout(
        mesh=mesh,
        rules=rules.rules,
        shapes=TrainState(step=step, opt_state=opt_shapes, **shapes),
        shardings=TrainState(
            step=partitioning.replicated(mesh), opt_state=opt_shardings, **shardings
        ),
    )


def init_reference(config: T5Config, seed: int, layout: Layout) -> Tree:
    """A randomly initialised policy, laid out on the mesh from the start."""
    init = jax.jit(
        lambda: meta.unbox(init_policy(config, seed)), out_shardings=layout.shardings.policy
    )
    return init()


def init_state(
    config: T5Config,
    transforms: dict[str, optax.GradientTransformation],
    reference: Tree,
    seed: int,
    layout: Layout,
) -> TrainState:
    """The state before the first step: policy and value network start from the reference.

    Args:
      config: architecture.
      transforms: optimiser of each part.
      reference: parameters of pi_ref; they are copied.
      seed: of whatever the reference does not determine (nothing, where the value head starts at zero).
      layout: of the state to make.

    Returns:
      The state at step 0.
    """

    def init(reference: Tree) -> TrainState:
        policy = jax.tree.map(jnp.copy, reference)
        if config.reserved_entry:
            policy = zero_last_entry(config, policy)
        opt_state = {"policy": transforms["policy"].init(policy)}
        value: Tree = {}
        if layout.shapes.value:
            value = value_from_policy(policy, meta.unbox(init_value(config, seed)))
            opt_state["value"] = transforms["value"].init(value)
        return TrainState(jnp.zeros((), jnp.int32), policy, value, opt_state)

    return jax.jit(init, out_shardings=layout.shardings)(reference)
