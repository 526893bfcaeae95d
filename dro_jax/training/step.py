"""The one jitted training step, and its forward half for evaluation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dro_jax.networks import T5, T5Config, ValueNetwork, sum_by_example
from dro_jax.networks.sharding import Rules, constrain, laid_over
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
      batch: arrays of B rows of N examples, as of `dro_jax.data.packing.fill_rows`.

    Returns:
      float32 [B, N], nats.
    """
    return _log_prob_and_last_logits(config, policy, batch)[0]


def example_arrays(
    config: T5Config, algorithm: Algorithm, params: dict[str, Any], reference: Any, batch: Batch
) -> Examples:
    """Runs the networks that the method needs over a batch.

    Args:
      config: shape of all networks.
      algorithm: the method.
      params: {"policy": tree, "value": tree}.
      reference: parameters of pi_ref; None when the batch carries reference_log_probs (and
        mismatched_reference_log_probs, where the method needs them) or none is needed.
      batch: as of `sequence_log_prob`; with mismatched responses for methods that need them.

    Returns:
      Arrays [B, N], differentiable in `params` and not in `reference`.
    """
    needs = algorithm.needs
    target_tokens = _count_targets(batch)

    def log_prob_of_reference(of: Batch, cached: str) -> Array:
        if cached in batch:
            return batch[cached]
        return sequence_log_prob(config, jax.lax.stop_gradient(reference), of)

    def reduced(log_prob: Array, tokens: Array) -> Array:
        return log_prob / jnp.maximum(tokens, 1) if needs.token_mean else log_prob

    policy_log_prob, last_logits = _log_prob_and_last_logits(config, params["policy"], batch)
    policy_log_prob = reduced(policy_log_prob, target_tokens)
    reference_log_prob = mismatched_policy = mismatched_reference = None
    if needs.reference:
        reference_log_prob = log_prob_of_reference(batch, "reference_log_probs")
        reference_log_prob = reduced(reference_log_prob, target_tokens)
    if needs.mismatched:
        other = _mismatched(batch)
        tokens = _count_targets(other)
        # The estimate of the KL has no gradient.
        policy = jax.lax.stop_gradient(params["policy"])
        mismatched_policy = reduced(sequence_log_prob(config, policy, other), tokens)
        mismatched_reference = log_prob_of_reference(other, "mismatched_reference_log_probs")
        mismatched_reference = reduced(mismatched_reference, tokens)

    value, value_variance = None, None
    if needs.value is not None and needs.per_token_values:
        per_token = last_logits
        if needs.value == "network":
            per_token = _per_token_values(config, params["value"], batch)
        value, value_variance = _mean_and_variance(per_token, target_tokens, batch)
    elif needs.value == "policy":
        value = _sum(last_logits * _starts(batch), batch)
    elif needs.value == "network":
        value = _values(config, params["value"], batch)
    return Examples(
        policy_log_prob=policy_log_prob,
        reference_log_prob=reference_log_prob,
        value=value,
        value_variance=value_variance,
        mismatched_policy_log_prob=mismatched_policy,
        mismatched_reference_log_prob=mismatched_reference,
        reward=batch["rewards"],
        weights=batch["reward_weights"],
        target_tokens=target_tokens,
    )


def loss_and_gradients(
    config: T5Config,
    algorithm: Algorithm,
    params: dict[str, Any],
    reference: Any,
    batch: Batch,
    microbatches: int = 1,
) -> tuple[Array, Metrics, dict[str, Any]]:
    """The loss of a batch, its metrics and its gradients in `params`.

    Args:
      config: shape of all networks.
      algorithm: the method.
      params: {"policy": tree, "value": tree}.
      reference: as of `example_arrays`.
      batch: as of `example_arrays`.
      microbatches: parts of the batch whose gradients are computed one after the other, so that the activations
        of one part are in memory. The results are the batch's own: where an example's gradient depends on
        more of the batch than the loss's total weight, a forward pass over all parts comes first.

    Returns:
      Loss, metrics and gradients (a tree like `params`).
    """
    if microbatches == 1:

        def loss_fn(params: dict[str, Any]) -> tuple[Array, Metrics]:
            return algorithm.loss(example_arrays(config, algorithm, params, reference, batch))

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return loss, metrics, grads

    # Pairs stay side by side. Every device takes a share of its own rows.
    together = 2 if algorithm.needs.pairs else 1

    def split(x: Array) -> Array:
        x = x.reshape(-1, microbatches, together, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(microbatches, -1, *x.shape[3:])

    def merge(x: Array) -> Array:
        x = x.reshape(microbatches, -1, together, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

    def forward(params: dict[str, Any], part: Batch) -> Examples:
        part = {name: constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in part.items()}
        return example_arrays(config, algorithm, params, reference, part)

    def slopes(examples: Examples) -> Examples:
        return jax.grad(lambda examples: algorithm.loss(examples)[0])(examples)

    parts = jax.tree.map(split, batch)
    whole = algorithm.loss_weights(batch["reward_weights"], _count_targets(batch))
    of_whole_batch = None
    if whole is None:
        examples = jax.lax.map(lambda part: forward(params, part), parts)
        of_whole_batch = jax.tree.map(split, slopes(jax.tree.map(merge, examples)))

    def accumulate(grads: Any, inputs: tuple[Batch, Examples | None]) -> tuple[Any, Examples]:
        part, given = inputs
        examples, pull = jax.vjp(lambda params: forward(params, part), params)
        if given is None:
            weights = algorithm.loss_weights(examples.weights, examples.target_tokens)
            assert weights is not None
            assert whole is not None
            share = jnp.sum(weights) / jnp.maximum(jnp.sum(whole), 1)
            given = jax.tree.map(lambda slope: share * slope, slopes(examples))
        return jax.tree.map(jnp.add, grads, pull(given)[0]), examples

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, examples = jax.lax.scan(accumulate, zeros, (parts, of_whole_batch))
    loss, metrics = algorithm.loss(jax.tree.map(merge, examples))
    return loss, metrics, grads


def make_train_step(
    config: T5Config,
    algorithm: Algorithm,
    transforms: dict[str, optax.GradientTransformation],
    schedules: dict[str, Callable[[Any], Any]],
    layout: Layout,
    microbatches: int = 1,
) -> TrainStep:
    """Builds `train_step(state, reference, batch) -> state, metrics`; the state is donated.

    Args:
      config: shape of all networks.
      algorithm: the method.
      transforms: optimiser of each part.
      schedules: learning rates, for the metrics.
      layout: shardings of the state.
      microbatches: parts of a batch, as of `loss_and_gradients`.

    Returns:
      The jitted step. `reference` is laid out as the policy is, or None.
    """

    def train_step(state: TrainState, reference: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        params = {"policy": state.policy}
        if algorithm.needs.value == "network":
            params["value"] = state.value
        with laid_over(layout.mesh, layout.rules):
            loss, metrics, grads = loss_and_gradients(
                config, algorithm, params, reference, batch, microbatches
            )
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

    return jax.jit(
        train_step,
        donate_argnums=0,
        # The reference lies as it comes: there is none when the batch carries its log-probabilities.
        in_shardings=(
            layout.shardings,
            None,
            partitioning.batch_sharding(layout.mesh, layout.rules),
        ),
        out_shardings=(layout.shardings, partitioning.replicated(layout.mesh)),
    )


def make_evaluation_step(
    config: T5Config, algorithm: Algorithm, layout: Layout
) -> Callable[[TrainState, Any, Batch], Examples]:
    """Builds `evaluation_step(state, reference, batch) -> Examples`, whole on every device."""

    def evaluation_step(state: TrainState, reference: Any, batch: Batch) -> Examples:
        params = {"policy": state.policy, "value": state.value}
        with laid_over(layout.mesh, layout.rules):
            return example_arrays(config, algorithm, params, reference, batch)

    return jax.jit(evaluation_step, out_shardings=partitioning.replicated(layout.mesh))


@functools.lru_cache(maxsize=4)
def make_log_prob(config: T5Config, mesh: Mesh, rules: Rules) -> Callable[[Any, Batch], Array]:
    """Builds the jitted `log_prob(policy, batch) -> float32 [B, N]`; the same function for the same arguments.

    Args:
      config: shape of the T5.
      mesh: where policy and batch lie.
      rules: how logical axes lie on the mesh.

    Returns:
      `sequence_log_prob`, whole on every device.
    """

    def log_prob(policy: Any, batch: Batch) -> Array:
        with laid_over(mesh, rules):
            return sequence_log_prob(config, policy, batch)

    return jax.jit(log_prob, out_shardings=partitioning.replicated(mesh))


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


def _log_prob_and_last_logits(config: T5Config, policy: Any, batch: Batch) -> tuple[Array, Array]:
    """log pi(y|x) [B, N], and the last vocabulary entry's logit at every decoder position [B, To]."""
    outputs: Any = T5(config).apply(
        {"params": policy},
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        *_tokens(batch),
        method="log_probs_and_values",
    )
    log_probs, last_logits = outputs
    return _sum(log_probs, batch), last_logits


def _values(config: T5Config, value: Any, batch: Batch) -> Array:
    values: Any = ValueNetwork(config).apply(
        {"params": value},
        batch["encoder_input_tokens"],
        batch.get("encoder_segment_ids"),
        batch["rewards"].shape[1],
    )
    return values


def _per_token_values(config: T5Config, value: Any, batch: Batch) -> Array:
    values: Any = ValueNetwork(config).apply({"params": value}, *_tokens(batch), method="per_token")
    return values


def _tokens(batch: Batch) -> tuple[Array | None, ...]:
    names = ("encoder_input_tokens", "decoder_input_tokens")
    segments = ("encoder_segment_ids", "decoder_segment_ids")
    return (*(batch[name] for name in names), *(batch.get(name) for name in segments))


def _mismatched(batch: Batch) -> Batch:
    """The batch with other prompts' responses in place of its own."""
    prefix = "mismatched_"
    return batch | {
        name.removeprefix(prefix): array
        for name, array in batch.items()
        if name.startswith(f"{prefix}decoder")
    }


def _starts(batch: Batch) -> Array:
    """1 at the first decoder position of each example, 0 elsewhere: float32 [B, To]."""
    segments = batch.get("decoder_segment_ids", jnp.ones_like(batch["decoder_input_tokens"]))
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return ((segments > 0) & (segments != before)).astype(jnp.float32)


def _mean_and_variance(per_token: Array, target_tokens: Array, batch: Batch) -> tuple[Array, Array]:
    """Mean and population variance [B, N] over each response's positions of a quantity [B, To]."""
    count = jnp.maximum(target_tokens, 1)
    mean = _sum(per_token, batch) / count
    # Where rows are not packed every position belongs to example 0.
    segments = batch.get("decoder_segment_ids", jnp.ones(per_token.shape, jnp.int32))
    mean_at_position = jnp.take_along_axis(mean, jnp.maximum(segments - 1, 0), axis=1)
    return mean, _sum((per_token - mean_at_position) ** 2, batch) / count


def _count_targets(batch: Batch) -> Array:
    return _sum(jnp.ones(batch["decoder_target_tokens"].shape, jnp.float32), batch)


def _sum(per_token: Array, batch: Batch) -> Array:
    """The sum [B, N] over each example's target tokens of a quantity [B, To]."""
    return sum_by_example(
        per_token,
        batch["decoder_loss_weights"],
        batch.get("decoder_segment_ids"),
        batch["rewards"].shape[1],
    )
