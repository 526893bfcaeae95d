"""From the features of a feedback task to those of a batch."""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from dro_jax.errors import UsageError

_spec = seqio.FeatureConverter.FeatureSpec
_DECODER_FEATURES = ("decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights")


class FeedbackFeatureConverter(seqio.EncDecFeatureConverter):
    """T5's encoder-decoder features, with a reward for each example of a row.

    From `inputs`, `targets` and `rewards` of lengths Ti, To and N = 1 (one example a row):
    `encoder_input_tokens` [Ti], `decoder_target_tokens`, `decoder_input_tokens` (the targets shifted
    right behind a 0) and `decoder_loss_weights` [To], int32; `rewards` and `reward_weights` [N],
    float32. Weights are 1 at real tokens, the end of sequence included, and at real examples. With
    `mismatched`, another prompt's completion comes from `mismatched_targets` as
    `mismatched_decoder_target_tokens`, `_input_tokens` and `_loss_weights`; with `prompt_ids`, these
    [N], int64, pass through.

    Raises:
        UsageError: `pack` is set.
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
        self,
        pack: bool = False,
        *,
        mismatched: bool = False,
        prompt_ids: bool = False,
        **options: Any,
    ) -> None:
        """Takes which optional features there are, and the options of `seqio.FeatureConverter`."""
        if pack:
            raise UsageError(
                "this converter does not pack: use dro_jax.data.batches, or set pack = False"
            )
        super().__init__(pack=pack, **options)
        self._mismatched, self._prompt_ids = mismatched, prompt_ids
        task, model = dict(type(self).TASK_FEATURES), dict(type(self).MODEL_FEATURES)
        if mismatched:
            task["mismatched_targets"] = _spec(dtype=tf.int32)
            model |= {f"mismatched_{name}": _spec(dtype=tf.int32) for name in _DECODER_FEATURES}
        if prompt_ids:
            task["prompt_ids"] = model["prompt_ids"] = _spec(dtype=tf.int64)
        self.TASK_FEATURES, self.MODEL_FEATURES = task, model

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        converted = {
            **super()._convert_example(features),
            "rewards": features["rewards"],
            "reward_weights": tf.ones_like(features["rewards"]),
        }
        if self._mismatched:
            other = super()._convert_example(
                {**features, "targets": features["mismatched_targets"]}
            )
            converted |= {f"mismatched_{name}": other[name] for name in _DECODER_FEATURES}
        if self._prompt_ids:
            converted["prompt_ids"] = features["prompt_ids"]
        return converted

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Returns the length of each batch feature from those of the task features."""
        examples = task_feature_lengths["rewards"]
        lengths = {
            **super().get_model_feature_lengths(task_feature_lengths),
            "rewards": examples,
            "reward_weights": examples,
        }
        if self._mismatched:
            length = task_feature_lengths["mismatched_targets"]
            lengths |= {f"mismatched_{name}": length for name in _DECODER_FEATURES}
        if self._prompt_ids:
            lengths["prompt_ids"] = examples
        return lengths
