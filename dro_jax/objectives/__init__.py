"""Losses as pure functions of per-example arrays: log-probabilities, values, rewards, weights.

Every loss returns `loss, metrics`. Arrays have one shape, mostly [B, N] (rows, examples in a row);
means are over real examples (weight > 0); padding never reaches value or gradient.

A batch that comes in microbatches needs the numbers that belong to the whole of it, given as
keywords: total_weight (the sum of its weights) always, and what dro_mean_residual, kto_threshold and
kto_z0 compute. Losses, gradients and metrics of the microbatches then add up to the batch's.
"""

from dro_jax.objectives.diagnostics import alignment_diagnostics
from dro_jax.objectives.dro import (
    dro_mean_residual,
    dro_p_loss,
    dro_v_loss,
    two_sample_dro_loss,
)
from dro_jax.objectives.kto import kto_loss, kto_threshold, kto_z0
from dro_jax.objectives.pairs import pair_weights
from dro_jax.objectives.pairwise import pairwise_loss
from dro_jax.objectives.per_example import weighted_mean
from dro_jax.objectives.sft import sft_loss

__all__ = [
    "alignment_diagnostics",
    "dro_mean_residual",
    "dro_p_loss",
    "dro_v_loss",
    "kto_loss",
    "kto_threshold",
    "kto_z0",
    "pair_weights",
    "pairwise_loss",
    "sft_loss",
    "two_sample_dro_loss",
    "weighted_mean",
]
