"""From the features of a feedback task to those of a batch."""

from collections.abc import Mapping
from typing import Any, ClassVar

import seqio
import tensorflow as tf

from dro_jax.errors import UsageError

_spec = seqio.FeatureConverter.FeatureSpec


class FeedbackFeatureConverter(seqio.EncDecFeatureConverter):
    """T5's encoder-decoder features, with a reward for each example of a row.

    From `inputs`, `targets` and `rewards` of lengths Ti, To and N = 1 (one example a row):
    `encoder_input_tokens` [Ti], `decoder_target_tokens`, `decoder_input_tokens` (the targets shifted
    right behind a 0) and `decoder_loss_weights` [To], int32; `rewards` and `reward_weights` [N],
    float32. Weights are 1 at real tokens, the end of sequence included, and at real examples.

    Raises:
        UsageError: `pack` is set.
    """

    TASK_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        "rewards": _spec(dtype=tf.float32),
    }
    MODEL_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "rewards": _spec(dtype=tf.float32),
        "reward_weights": _spec(dtype=tf.float32),
    }

    def __init__(self, pack: bool = False, **options: Any) -> None:
        """Takes the options of `seqio.FeatureConverter`."""
        if pack:
            raise UsageError("feedback rows cannot be packed yet; set pack = False")
        super().__init__(pack=pack, **options)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        return {
            **super()._convert_example(features),
            "rewards": features["rewards"],
            "reward_weights": tf.ones_like(features["rewards"]),
        }

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Returns the length of each batch feature from those of the task features."""
        examples = task_feature_lengths["rewards"]
        return {
            **super().get_model_feature_lengths(task_feature_lengths),
            "rewards": examples,
            "reward_weights": examples,
        }
