"""The one jitted training step, and its forward half for evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dro_jax.networks import T5, T5Config, ValueNetwork, sum_by_example, token_log_probs
from dro_jax.training import partitioning
from dro_jax.training.algorithms import Algorithm, Examples
from dro_jax.training.train_state import Layout, TrainState

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def sequence_log_prob(config: T5Config, policy: Any, batch: Batch) -> Array:
    """log pi(y|x) of each example, the sum over its target tokens.

    Args:
      config: the T5's shape.
      policy: its parameters.
      batch: the batch contract (shared names with T5X): encoder_input_tokens [B, Ti], decoder_input_tokens,
        decoder_target_tokens, decoder_loss_weights [B, To], rewards [B, N]; segment ids when packed.

    Returns:
      float32 [B, N], nats.
    """
    logits: Any = T5(config).apply(
        {"params": policy},
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
    )
    return _sum(token_log_probs(logits, batch["decoder_target_tokens"]), batch)


def example_arrays(
    config: T5Config, algorithm: Algorithm, params: dict[str, Any], reference: Any, batch: Batch
) -> Examples:
    """Runs the networks that the method needs over a batch.

    Args:
      config: shape of all networks.
      algorithm: the method.
      params: {"policy": tree, "value": tree}.
      reference: parameters of pi_ref; None when the batch carries reference_log_probs or none is needed.
      batch: the batch contract.

    Returns:
      Arrays [B, N], differentiable in `params` and not in `reference`.
    """
    reference_log_prob = None
    if algorithm.has_reference:
        if "reference_log_probs" in batch:
            reference_log_prob = batch["reference_log_probs"]
        else:
            reference_log_prob = sequence_log_prob(config, jax.lax.stop_gradient(reference), batch)
    value: Any = None
    if algorithm.has_value:
        value = ValueNetwork(config).apply(
            {"params": params["value"]},
            batch["encoder_input_tokens"],
            batch.get("encoder_segment_ids"),
            batch["rewards"].shape[1],
        )
    return Examples(
        policy_log_prob=sequence_log_prob(config, params["policy"], batch),
        reference_log_prob=reference_log_prob,
        value=value,
        reward=batch["rewards"],
        weights=batch["reward_weights"],
        target_tokens=_sum(jnp.ones(batch["decoder_target_tokens"].shape, jnp.float32), batch),
    )


def make_train_step(
    config: T5Config,
    algorithm: Algorithm,
    transforms: dict[str, optax.GradientTransformation],
    schedules: dict[str, Callable[[Any], Any]],
    layout: Layout,
) -> TrainStep:
    """Builds `train_step(state, reference, batch) -> state, metrics`; the state is donated.

    Args:
      config: shape of all networks.
      algorithm: the method.
      transforms: optimiser of each part.
      schedules: learning rates, for the metrics.
      layout: shardings of the state.

    Returns:
      The jitted step. `reference` is laid out as the policy is, or None.
    """

    def train_step(state: TrainState, reference: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        params = {"policy": state.policy}
        if algorithm.has_value:
            params["value"] = state.value

        def loss_fn(params: dict[str, Any]) -> tuple[Array, Metrics]:
            return algorithm.loss(example_arrays(config, algorithm, params, reference, batch))

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        opt_state = {}
        for part in params:
            updates, opt_state[part] = transforms[part].update(
                grads[part], state.opt_state[part], params[part]
            )
            params[part] = optax.apply_updates(params[part], updates)
            metrics[f"parameter_norm/{part}"] = optax.tree.norm(params[part])
            metrics[f"grad_norm/{part}"] = optax.tree.norm(grads[part])
            metrics[f"learning_rate/{part}"] = schedules[part](state.step)
        metrics |= {"loss": loss, **batch_metrics(batch)}
        value = params.get("value", state.value)
        return TrainState(state.step + 1, params["policy"], value, opt_state), metrics

    mesh = layout.mesh
    return jax.jit(
        train_step,
        donate_argnums=0,
        # The reference lies as it comes: there is none when the batch carries its log-probabilities.
        in_shardings=(layout.shardings, None, partitioning.batch_sharding(mesh)),
        out_shardings=(layout.shardings, partitioning.replicated(mesh)),
    )


def make_evaluation_step(
    config: T5Config, algorithm: Algorithm, layout: Layout
) -> Callable[[TrainState, Any, Batch], Examples]:
    """Builds `evaluation_step(state, reference, batch) -> Examples`, whole on every device."""

    def evaluation_step(state: TrainState, reference: Any, batch: Batch) -> Examples:
        params = {"policy": state.policy, "value": state.value}
        return example_arrays(config, algorithm, params, reference, batch)

    return jax.jit(evaluation_step, out_shardings=partitioning.replicated(layout.mesh))


def batch_metrics(batch: Batch) -> Metrics:
    """Examples, real tokens (encoder and decoder) and the fraction of positions that are padding."""
    encoder = batch["encoder_input_tokens"]
    tokens = jnp.sum(encoder > 0) + jnp.sum(batch["decoder_loss_weights"])
    positions = encoder.size + batch["decoder_target_tokens"].size
    return {
        "data/examples": jnp.sum(batch["reward_weights"]),
        "data/tokens": tokens.astype(jnp.float32),
        "data/padding_fraction": (positions - tokens) / positions,
    }


def _sum(per_token: Array, batch: Batch) -> Array:
    return sum_by_example(
        per_token,
        batch["decoder_loss_weights"],
        batch.get("decoder_segment_ids"),
        batch["rewards"].shape[1],
    )
