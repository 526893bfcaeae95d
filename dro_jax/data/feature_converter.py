"""From the features of a feedback task to those of a batch, as SeqIO and T5X want it: dataset in, dataset out."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from dro_jax.data.batches import pack_window, windows
from dro_jax.data.packing import fill_rows

_spec = seqio.FeatureConverter.FeatureSpec
_DECODER_FEATURES = ("decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights")
_PACKING_FEATURES = ("decoder_segment_ids", "decoder_positions")


class FeedbackFeatureConverter(seqio.EncDecFeatureConverter):
    """T5's encoder-decoder features, with numbers for each example of a row: what `packing.fill_rows` makes.

    From `inputs`, `targets` and `rewards` of lengths Ti, To and N: `encoder_input_tokens` [Ti],
    `decoder_target_tokens`, `decoder_input_tokens` (the targets shifted right behind a 0) and
    `decoder_loss_weights` [To], int32; `rewards` and `reward_weights` [N], float32. Weights are 1 at real
    tokens, the end of sequence included, and at real examples.

    With `pack`, rows hold up to N examples, packed by `dro_jax.data.packing` a window at a time, with
    segment ids and positions; without, N is 1. With `mismatched`, another prompt's completion comes from
    `mismatched_targets` as `mismatched_decoder_target_tokens` and so on. With `cached`, the reference's
    log-probabilities [N] pass through.
    """

    TASK_FEATURES: Mapping[str, Any] = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        "rewards": _spec(dtype=tf.float32),
    }
    MODEL_FEATURES: Mapping[str, Any] = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "rewards": _spec(dtype=tf.float32),
        "reward_weights": _spec(dtype=tf.float32),
    }

    def __init__(
        self, pack: bool = False, *, mismatched: bool = False, cached: bool = False, **options: Any
    ) -> None:
        """Takes which optional features there are, and the options of `seqio.FeatureConverter`."""
        super().__init__(pack=pack, **options)
        self._mismatched_names: list[str] = []
        self._cached_names: list[str] = []
        task, model = dict(type(self).TASK_FEATURES), dict(type(self).MODEL_FEATURES)
        if mismatched:
            names = (*_DECODER_FEATURES, *(_PACKING_FEATURES if pack else ()))
            self._mismatched_names = [f"mismatched_{name}" for name in names]
            task["mismatched_targets"] = _spec(dtype=tf.int32)
            model |= dict.fromkeys(self._mismatched_names, _spec(dtype=tf.int32))
        if cached:
            self._cached_names = ["reference_log_probs"]
            self._cached_names += ["mismatched_reference_log_probs"] if mismatched else []
            task |= dict.fromkeys(self._cached_names, _spec(dtype=tf.float32))
            model |= dict.fromkeys(self._cached_names, _spec(dtype=tf.float32))
        self.TASK_FEATURES, self.MODEL_FEATURES = task, model

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = {name: task_feature_lengths[name] for name in ("inputs", "targets")}
        max_examples = task_feature_lengths["rewards"]
        if not self.pack and max_examples != 1:
            raise ValueError(f"rows that are not packed hold one example, not {max_examples}")

        count = ds.cardinality()
        texts = [name for name in ds.element_spec if name.endswith("_pretokenized")]
        if texts:
            ds = ds.map(lambda example: {k: v for k, v in example.items() if k not in texts})

        def rows() -> Iterator[dict[str, np.ndarray]]:
            for window in windows(ds):
                for row in pack_window(window, lengths, max_examples):
                    filled = fill_rows([row], lengths=lengths, max_examples=max_examples)
                    yield {name: filled[name][0] for name in signature}

        dtypes = {name: spec.dtype for name, spec in self.MODEL_FEATURES.items()}
        model_lengths = self.get_model_feature_lengths(task_feature_lengths)
        signature = {
            name: tf.TensorSpec([length], dtypes.get(name, tf.int32))
            for name, length in model_lengths.items()
            # With one example a row there is nothing to tell apart.
            if max_examples > 1 or not name.endswith(("_segment_ids", "_positions"))
        }
        converted = tf.data.Dataset.from_generator(rows, output_signature=signature)
        if not self.pack and count >= 0:
            # T5X's evaluation asks for it.
            converted = converted.apply(tf.data.experimental.assert_cardinality(count))
        return converted

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Returns the length of each batch feature from those of the task features."""
        examples = task_feature_lengths["rewards"]
        return {
            **super().get_model_feature_lengths(task_feature_lengths),
            **dict.fromkeys(self._mismatched_names, task_feature_lengths["targets"]),
            **dict.fromkeys(("rewards", "reward_weights", *self._cached_names), examples),
        }
