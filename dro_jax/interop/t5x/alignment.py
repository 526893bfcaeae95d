"""A model for T5X's own trainer: policy, value network and frozen reference in one parameter tree.

The policy lies at the root under T5X's names, so that what T5X saves is an ordinary T5 checkpoint to whoever reads no
more; the value network is `value/…`, the reference `reference/…`. Gin files: gin_configs/t5x/.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from flax.core import freeze, meta, unfreeze
from flax.linen import partitioning as flax_partitioning
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import decoding, metrics, models, optimizers
from t5x.examples.t5 import network

from dro_jax.data.feature_converter import FeedbackFeatureConverter
from dro_jax.data.vocabulary import check_vocabulary_fits
from dro_jax.errors import UsageError
from dro_jax.networks import T5Config
from dro_jax.training import step, train_state
from dro_jax.training.algorithms import Algorithm, DroV

Tree = dict[str, Any]

VALUE, REFERENCE = "value", "reference"
"""Subtrees beside the policy's `token_embedder`, `encoder` and `decoder`."""


class AlignmentModel(models.EncoderDecoderModel):
    """DRO-V, DRO-P or KTO as a T5X model; decoding and scoring are T5X's, of the policy.

    The loss is computed by the networks of dro_jax on the parameters of T5X's, without dropout.
    """

    def __init__(
        self,
        module: network.Transformer,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDef,
        algorithm: Algorithm,
        batch_size: int,
        num_microbatches: int | None = None,
        decode_fn: models.DecodeFnCallable = decoding.beam_search,
    ) -> None:
        """Takes what `EncoderDecoderModel` does, and

        Args:
          module: T5X's T5, not scanned.
          input_vocabulary: of prompts.
          output_vocabulary: of completions.
          optimizer_def: an `AlignmentOptimizer`.
          algorithm: the method.
          batch_size: rows a training step, over all devices.
          num_microbatches: of the trainer, which adds up their gradients.
          decode_fn: of T5X.

        Raises:
          UsageError: for a network or a method that is not offered here.
        """
        name = type(algorithm).__name__
        if not isinstance(module, network.Transformer):
            raise UsageError(
                f"module is of {type(module).__module__}: a run takes t5x.examples.t5's network.Transformer; "
                "`dro_jax convert` brings a scanned checkpoint into its form"
            )
        if module.config.dropout_rate:
            raise UsageError(
                f"network.T5Config.dropout_rate is {module.config.dropout_rate}: the loss is computed without dropout; "
                "give DROPOUT_RATE = 0"
            )
        if not algorithm.needs.reference or algorithm.needs.pairs:
            raise UsageError(
                f"{name}: is not offered inside T5X, DRO-V, DRO-P and KTO are; use `dro_jax train`"
            )
        if algorithm.needs.value == "policy":
            raise UsageError(
                f"{name}.networks is 'single': its last vocabulary entry is no token, which T5X's decoding does not "
                "know; give 'double', or use `dro_jax train`"
            )
        parts = num_microbatches or 1
        alone = isinstance(algorithm, DroV) and algorithm.values != "single"
        if parts > 1 and not alone:
            raise UsageError(
                f"NUM_MICROBATCHES is {parts}: {name} needs all of the batch at once, of which T5X shows parts; give "
                "None"
            )
        check_vocabulary_fits(input_vocabulary, module.config.vocab_size)
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=functools.partial(
                FeedbackFeatureConverter, mismatched=algorithm.needs.mismatched
            ),
        )
        self._algorithm = algorithm
        self._batch_size, self._parts = batch_size, parts
        self._config = model_config(module.config)

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> Any:
        """Parameters and their axes: a random T5, the same one as the reference, and in the value network."""
        variables = unfreeze(super().get_initial_variables(rng, input_shapes, input_types))
        policy, axes = variables["params"], variables["params_axes"]
        params, params_axes = dict(policy), dict(axes)
        params[REFERENCE] = jax.tree.map(jnp.copy, policy)
        params_axes[REFERENCE] = axes
        if self._algorithm.needs.value == "network":
            boxed = train_state.init_value(self._config, 0)
            params[VALUE] = train_state.value_from_policy(
                jax.tree.map(jnp.copy, policy), meta.unbox(boxed)
            )
            params_axes[VALUE] = _axes_metadata(boxed)
        return freeze({"params": params, "params_axes": params_axes})

    def loss_fn(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, models.MetricsMap]:
        """The method's loss and metrics, a microbatch's share of them where this is one.

        Raises:
          UsageError: if these are not the rows that were announced.
        """
        del dropout_rng
        rows = batch["rewards"].shape[0]
        if rows * self._parts != self._batch_size:
            raise UsageError(
                f"a training step sees {rows} rows, where BATCH_SIZE is {self._batch_size} and NUM_MICROBATCHES "
                f"{self._parts}; set those, which bind both data and trainer"
            )
        # T5X adds up the gradients of the parts; every row is one example, so that all parts count alike.
        return self._loss(params, batch, 1 / self._parts)

    def eval_fn(
        self, params: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, models.MetricsMap]:
        """Loss and metrics of a held-out batch, of whatever size."""
        return self._loss(params, batch, 1.0)

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Completions [B, To] by the policy; see `EncoderDecoderModel`."""
        predicted: tuple[jax.Array, Mapping[str, jax.Array]] = super().predict_batch_with_aux(
            parts_of(params)[0], batch, rng, **options
        )
        return predicted

    def score_batch(
        self, params: Any, batch: Mapping[str, jax.Array], return_intermediates: bool = False
    ) -> Any:
        """log pi(y|x) [B] of the policy, nats; see `EncoderDecoderModel`."""
        return super().score_batch(parts_of(params)[0], batch, return_intermediates)

    def _loss(
        self, params: Any, batch: Mapping[str, jax.Array], share: float
    ) -> tuple[jax.Array, models.MetricsMap]:
        rows, most = batch["rewards"].shape
        if most > 1:
            raise UsageError(
                f"TASK_FEATURE_LENGTHS has rewards {most}: rows are not packed inside T5X; give 1, and pack = False in "
                "utils.DatasetConfig, or use `dro_jax train`"
            )
        policy, value, reference = parts_of(params)
        batch = dict(batch)
        examples = step.example_arrays(
            self._config, self._algorithm, {"policy": policy, "value": value}, reference, batch
        )
        loss, scalars = self._algorithm.loss(examples)
        loss = share * loss
        return loss, {
            "loss": metrics.AveragePerStep(total=loss),
            **{
                name: metrics.AveragePerStep(total=share * value)
                for name, value in {**scalars, **step.batch_metrics(batch)}.items()
                if name != "loss"
            },
            "timing/seqs_per_second": metrics.TimeRate.from_model_output(numerator=jnp.array(rows)),
            "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
        }


def parts_of(params: Any) -> tuple[Tree, Tree, Tree]:
    """Policy, value network ({} without one) and reference of a model's parameters."""
    params = unfreeze(params)
    beside = (VALUE, REFERENCE)
    policy = {name: tree for name, tree in params.items() if name not in beside}
    return policy, params.get(VALUE, {}), params.get(REFERENCE, {})


def model_config(config: network.T5Config) -> T5Config:
    """Our words for a T5 of T5X's."""
    return T5Config(
        vocab_size=config.vocab_size,
        emb_dim=config.emb_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        mlp_dim=config.mlp_dim,
        num_encoder_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        mlp_activations=tuple(config.mlp_activations),
        logits_via_embedding=config.logits_via_embedding,
        dtype=jnp.dtype(config.dtype).name,
    )


def _axes_metadata(boxed: Any) -> Tree:
    """T5X's collection params_axes of parameters that carry the names of their axes."""
    leaves = flatten_dict(boxed, is_leaf=lambda _, node: isinstance(node, meta.AxisMetadata))
    return unflatten_dict(
        {
            (*path[:-1], f"{path[-1]}_axes"): flax_partitioning.AxisMetadata(
                # An axis that is never cut has a name in T5X's rules.
                names=tuple(name or "unmodeled" for name in leaf.names)
            )
            for path, leaf in leaves.items()
        }
    )
