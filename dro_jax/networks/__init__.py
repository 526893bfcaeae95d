"""Flax linen networks: the T5 policy, the value network and per-example log-probabilities."""

from dro_jax.networks.log_probs import (
    sum_by_example,
    token_log_probs,
    token_log_probs_in_chunks,
)
from dro_jax.networks.t5 import T5, T5Config
from dro_jax.networks.value import ValueNetwork

__all__ = [
    "T5",
    "T5Config",
    "ValueNetwork",
    "sum_by_example",
    "token_log_probs",
    "token_log_probs_in_chunks",
]
