"""What a training step costs, by arithmetic alone: operations, memory and traffic, before anything is compiled.

A multiply-add is two operations; of the networks only matrix products count, attention at its padded lengths.
"""

import dataclasses
import math
from typing import Any

import jax

from dro_jax.networks import T5Config
from dro_jax.networks.sharding import mesh_axes
from dro_jax.training.algorithms import Needs
from dro_jax.training.partitioning import batch_sharding
from dro_jax.training.train_state import Layout

ADAFACTOR = 22
"""Operations a parameter: measured, as XLA counts `optimizers.Adafactor` with the norms that a step reports."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a training step computes.

    Attributes:
      config: shape of all networks, its `dtype` that of the machine in question ("auto" counts as bfloat16).
      needs: of the method.
      rows: of a batch, over all devices.
      inputs: encoder positions a row.
      targets: decoder positions a row.
      slots: the most examples a row holds.
      cached: whether batches carry the reference's log-probabilities.
      microbatches: parts a batch is worked through in.
      forward_first: whether a forward pass over all parts comes before the gradients, as for methods whose
        gradients look at the batch as a whole.
    """

    config: T5Config
    needs: Needs
    rows: int
    inputs: int
    targets: int
    slots: int = 1
    cached: bool = False
    microbatches: int = 1
    forward_first: bool = False

    @property
    def reference(self) -> bool:
        """Whether the step runs the reference."""
        return self.needs.reference and not self.cached

    @property
    def value_positions(self) -> int:
        """Decoder positions a row of a value network; 0 without one."""
        if self.needs.value != "network":
            return 0
        return self.targets if self.needs.per_token_values else self.slots


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a step, over all devices.

    Attributes:
      encoder: the policy's encoder, forward and backward.
      decoder: the policy's decoder, likewise.
      vocabulary: the policy's logits, likewise.
      value: the value network, likewise.
      reference: the reference, forward.
      mismatched: policy and reference on other prompts' responses, forward.
      optimizer: both updates.
      recomputed: what is done a second time, to keep less in memory.
    """

    encoder: float
    decoder: float
    vocabulary: float
    value: float
    reference: float
    mismatched: float
    optimizer: float
    recomputed: float

    @property
    def total(self) -> float:
        """All that the devices do."""
        return sum(dataclasses.astuple(self))


def flops(work: Workload, parameters: int) -> Flops:
    """Operations of a step on rows that are full: padding counts, also where `logits_chunk` leaves it out.

    Args:
      work: the step.
      parameters: that the optimiser updates, policy and value network together.

    Returns:
      The operations by what they are for.
    """
    config, rows = work.config, work.rows
    encoder = rows * _encoder(config, work.inputs)
    decoder = rows * _decoder(config, work.targets, work.inputs)
    vocabulary = rows * 2 * work.targets * config.emb_dim * config.vocab_size
    forward = encoder + decoder + vocabulary
    positions = work.value_positions
    value = 0.0
    if positions:
        value = encoder + rows * _decoder(config, positions, work.inputs)
        value += rows * 2 * positions * config.emb_dim
    reference = forward * work.reference
    mismatched = (forward + reference) * work.needs.mismatched
    recomputed = rows * _recomputed(config, work.inputs, work.targets)
    if positions:
        recomputed += rows * _recomputed(config, work.inputs, positions)
    if config.logits_chunk is not None:
        recomputed += vocabulary
    if work.microbatches > 1 and work.forward_first:
        recomputed += forward + value + reference + mismatched
    # Backward is a product for the weights and one for what they were multiplied with.
    return Flops(
        encoder=3 * encoder,
        decoder=3 * decoder,
        vocabulary=3 * vocabulary,
        value=3 * value,
        reference=reference,
        mismatched=mismatched,
        optimizer=ADAFACTOR * parameters,
        recomputed=recomputed,
    )


def _encoder(config: T5Config, length: int) -> float:
    """A forward pass over one row."""
    layer = _projections(config, length, 4) + _attention(config, length, length)
    return config.num_encoder_layers * (layer + _mlp(config, length))


def _decoder(config: T5Config, length: int, encoded: int) -> float:
    """A forward pass over one row, against so many encoder states."""
    layer = _projections(config, length, 6) + _projections(config, encoded, 2)
    layer += _attention(config, length, length) + _attention(config, length, encoded)
    return config.num_decoder_layers * (layer + _mlp(config, length))


def _recomputed(config: T5Config, inputs: int, targets: int) -> float:
    """What `remat` makes the backward pass over one row's encoder and decoder do again."""
    if config.remat == "none":
        return 0
    if config.remat == "full":
        # A layer's last product is the next layer's input, which is kept.
        last = 2 * config.mlp_dim * config.emb_dim
        return (
            _encoder(config, inputs)
            + _decoder(config, targets, inputs)
            - last * (config.num_encoder_layers * inputs + config.num_decoder_layers * targets)
        )
    return config.num_encoder_layers * _attention(
        config, inputs, inputs
    ) + config.num_decoder_layers * (
        _attention(config, targets, targets) + _attention(config, targets, inputs)
    )


def _projections(config: T5Config, length: int, count: int) -> float:
    return count * 2 * length * config.emb_dim * config.num_heads * config.head_dim


def _attention(config: T5Config, queries: int, keys: int) -> float:
    """Scores, and values weighted by them."""
    return 4 * queries * keys * config.num_heads * config.head_dim


def _mlp(config: T5Config, length: int) -> float:
    return 2 * length * config.emb_dim * config.mlp_dim * (len(config.mlp_activations) + 1)


def state_bytes(layout: Layout, *, reference: bool) -> dict[str, float]:
    """Bytes on one device of what stays from step to step.

    Args:
      layout: shapes and shardings.
      reference: whether the reference is in memory; it lies as the policy does.

    Returns:
      Bytes of "policy", "value", "optimizer" and "reference".
    """
    shapes, shardings = layout.shapes, layout.shardings
    policy = _held(shapes.policy, shardings.policy)
    return {
        "policy": policy,
        "value": _held(shapes.value, shardings.value),
        "optimizer": _held(shapes.opt_state, shardings.opt_state),
        "reference": policy * reference,
    }


def temporary_bytes(work: Workload, layout: Layout) -> dict[str, float]:
    """Estimates the bytes on one device of what a step needs beside its state.

    Args:
      work: the step.
      layout: shapes and shardings of its state.

    Returns:
      Bytes by what they are for. A compiler shares some of them and pads others; README.md says how far off this was.
    """
    config, parts = work.config, _parts(work, layout)
    trained, frozen = _trained(layout), _weights(layout, "policy") if work.reference else []
    held = sum(weight.held for weight in trained)
    rows = work.rows / work.microbatches / parts.rows
    arrived = sum(weight.gathered - weight.held for weight in trained if weight.in_a_layer)
    if config.remat != "none":
        # Two layers at a time; what is not computed again was multiplied with whole weights, which are kept.
        arrived *= 2 / (config.num_encoder_layers + config.num_decoder_layers)
    tables = [weight for weight in _weights(layout, "policy") if not weight.in_a_layer]
    arrived += 2 * sum(weight.gathered - weight.held for weight in tables)
    # cuDNN has the bias and the mask of a layer in memory, others the scores.
    heads = config.num_heads / parts.heads
    score = heads * (_item(config) if config.attention == "cudnn" else 4)
    encoder, decoder = _kept_by_layer(config, parts, work.inputs, work.targets, "none")
    layer = max(
        encoder + score * work.inputs**2,
        decoder + score * work.targets * (work.targets + work.inputs),
    )
    scores = heads * (work.inputs**2 + work.targets**2)
    return {
        # Of the compute type; their sum over microbatches is float32.
        "gradients": held * (_item(config) + 4 * (work.microbatches > 1)),
        "weights in the compute type": _item(config)
        * (held + sum(weight.held for weight in frozen)),
        "weights gathered": _item(config) * arrived,
        "kept for the backward pass": rows * _kept_by_step(work, parts),
        "logits and their gradient": rows
        * (1 + _item(config) / 4)
        * _logits(work, parts)
        * min(1, (config.logits_chunk or rows * work.targets) / (rows * work.targets)),
        "within a layer": rows * 2 * layer,
        "relative biases and gradients": 2 * 4 * scores * (3 if work.value_positions else 2),
    }


def touched_bytes(work: Workload, layout: Layout) -> float:
    """Bytes that one device reads from and writes to its memory in a step, at the least.

    Counted are state and gradients, weights wherever they are gathered, what is kept for the backward pass, and logits;
    not what stays within a layer.
    """
    parts, item = _parts(work, layout), _item(work.config)
    state = state_bytes(layout, reference=work.reference)
    rows = work.rows / parts.rows
    return (
        2 * sum(state.values())
        - state["reference"]
        + 2 * 4 * sum(weight.held for weight in _trained(layout))
        + item * sum(2 * weight.gathered - weight.held for weight in _passes(work, layout))
        + 2 * rows * _kept_by_step(work, parts)
        # Written and read by the policy's loss, read for their gradient, that of the compute type written and read
        # for two products. In chunks they are written once more.
        + rows
        * _logits(work, parts)
        * (3 + 3 * item / 4 + 2 * work.reference + (work.config.logits_chunk is not None))
    )


def sent_bytes(work: Workload, layout: Layout) -> dict[str, float]:
    """Estimates the bytes that one device sends in a step by kind of collective, going round rings.

    Weights are gathered for every pass, gradients summed and cut once a microbatch, and where layers are cut,
    activations summed after each half of a layer.
    """
    config, parts, item = work.config, _parts(work, layout), _item(work.config)
    gathers = sum(weight.gathered - weight.held for weight in _passes(work, layout))
    gradients = sum(weight.gathered - weight.held for weight in _trained(layout))
    # Where the rows' axes do not all cut a weight, its gradient is also summed over those that are left.
    copies = [
        (parts.rows * weight.held / weight.gathered, weight.held) for weight in _trained(layout)
    ]
    sums = sum(2 * (ring - 1) / ring * held for ring, held in copies)
    ring = max(parts.heads, parts.mlp)
    forwards = 2 + (config.remat == "full")
    activations = forwards * _summed(config, work.inputs, work.targets)
    if work.value_positions:
        activations += forwards * _summed(config, work.inputs, work.value_positions)
    if work.reference:
        activations += _summed(config, work.inputs, work.targets)
    activations *= work.rows / parts.rows * 2 * (ring - 1) / ring
    return {
        "all-gather": item * gathers,
        "reduce-scatter": item * work.microbatches * gradients,
        "all-reduce": item * (work.microbatches * sums + activations),
    }


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Numbers of one weight on one device: where it lies, and where it is whole for the rows it meets."""

    held: float
    gathered: float
    in_a_layer: bool


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How many parts the mesh cuts the axes of activations into."""

    rows: int
    heads: int
    mlp: int
    vocab: int


def _parts(work: Workload, layout: Layout) -> _Parts:
    def cut(axis: str, size: int) -> int:
        (entry,) = mesh_axes((axis,), (size,), layout.mesh, layout.rules)
        return _size(layout, entry)

    config = work.config
    return _Parts(
        rows=cut("batch", work.rows // work.microbatches),
        heads=cut("heads", config.num_heads),
        mlp=cut("mlp", config.mlp_dim),
        vocab=cut("vocab", config.vocab_size),
    )


def _weights(layout: Layout, part: str) -> list[_Weight]:
    """Of "policy" or "value"."""
    rows = set(_names(batch_sharding(layout.mesh, layout.rules).spec[0]))
    shapes, shardings = getattr(layout.shapes, part), getattr(layout.shardings, part)
    weights = []
    for (path, shape), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        stays = [entry for entry in sharding.spec if not rows & set(_names(entry))]
        weights.append(
            _Weight(
                held=math.prod(sharding.shard_shape(shape.shape)),
                gathered=math.prod(shape.shape) / math.prod(_size(layout, e) for e in stays),
                in_a_layer="layers_" in jax.tree_util.keystr(path),
            )
        )
    return weights


def _trained(layout: Layout) -> list[_Weight]:
    return _weights(layout, "policy") + _weights(layout, "value")


def _passes(work: Workload, layout: Layout) -> list[_Weight]:
    """The weights as often as a step gathers them."""
    policy, value = _weights(layout, "policy"), _weights(layout, "value")
    forward = policy + value + policy * work.reference
    forward += policy * (1 + work.reference) * work.needs.mismatched
    backward = (policy + value) * (work.config.remat != "none")
    again = forward * (work.forward_first and work.microbatches > 1)
    return (forward + backward + again) * work.microbatches


def _kept_by_step(work: Workload, parts: _Parts) -> float:
    """Bytes a row that policy and value network keep for their backward passes."""
    remat = work.config.remat
    kept = _kept(work.config, parts, work.inputs, work.targets, remat)
    if work.value_positions:
        kept += _kept(work.config, parts, work.inputs, work.value_positions, remat)
    return kept


def _kept(config: T5Config, parts: _Parts, inputs: int, targets: int, remat: str) -> float:
    """Bytes a row that the layers of an encoder and a decoder keep for their backward pass."""
    encoder, decoder = _kept_by_layer(config, parts, inputs, targets, remat)
    return config.num_encoder_layers * encoder + config.num_decoder_layers * decoder


def _kept_by_layer(
    config: T5Config, parts: _Parts, inputs: int, targets: int, remat: str
) -> tuple[float, float]:
    """Bytes a row that a layer of an encoder and one of a decoder keep."""
    item, width = _item(config), config.emb_dim
    heads = config.num_heads / parts.heads
    attended = heads * config.head_dim
    hidden = config.mlp_dim * len(config.mlp_activations) / parts.mlp
    encoder: float
    decoder: float
    if remat == "full":
        encoder, decoder = inputs * width, targets * width
    elif remat == "dots":
        encoder = inputs * (2 * width + 3 * attended + hidden)
        decoder = targets * (3 * width + 4 * attended + hidden) + inputs * 2 * attended
    else:
        # Norms and activation functions too, and attention's weights.
        scores = heads * (config.attention != "cudnn")
        encoder = inputs * (4 * width + 4 * attended + 2 * hidden + scores * inputs)
        decoder = targets * (6 * width + 6 * attended + 2 * hidden + scores * (targets + inputs))
        decoder += inputs * 2 * attended
    return item * encoder, item * decoder


def _summed(config: T5Config, inputs: int, targets: int) -> float:
    """Numbers a row that are summed over the parts of layers in one pass."""
    layers = 2 * config.num_encoder_layers * inputs + 3 * config.num_decoder_layers * targets
    return config.emb_dim * layers


def _logits(work: Workload, parts: _Parts) -> float:
    """Bytes a row."""
    return 4 * work.targets * work.config.vocab_size / parts.vocab


def _item(config: T5Config) -> int:
    return 4 if config.dtype == "float32" else 2


def _held(shapes: Any, shardings: Any) -> float:
    """Bytes on one device."""
    return sum(
        math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        for shape, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def _size(layout: Layout, entry: Any) -> int:
    return math.prod(layout.mesh.shape[name] for name in _names(entry))


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
