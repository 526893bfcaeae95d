"""Sampling completions from a T5 with a key-value cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dro_jax.networks import T5, T5Config

Array = jax.Array
Sampler = Callable[[Any, ArrayLike, ArrayLike, ArrayLike], Array]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
      max_tokens: longest completion, end-of-sequence included.
      temperature: 0 is greedy; otherwise the logits are divided by it.
      top_k: sample among the k likeliest tokens; 0 for all of them.
      top_p: sample among the likeliest tokens that together have this probability; 1 for all of them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that mean nothing."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")


def make_sampler(config: T5Config, decoding: Decoding, eos_id: int) -> Sampler:
    """Builds `sample(policy, encoder_input_tokens, seed, places) -> tokens`, jitted.

    Args:
      config: the T5's shape.
      decoding: how tokens are chosen.
      eos_id: id of the end of sequence.

    Returns:
      A function of the policy's parameters, prompts int32 [B, Ti], a seed and the prompts' places int32 [B]
      in the list they come from. It returns int32 [B, max_tokens]: tokens up to and including the end of
      sequence, then 0. Decoding stops when every row has ended. A row's randomness depends on the seed and
      its place only, not on the rows beside it.
    """
    model = T5(config)
    length = decoding.max_tokens

    @jax.jit
    def sample(policy: Any, encoder_input_tokens: Array, seed: Array, places: Array) -> Array:
        variables = {"params": policy}
        caches = model.apply(variables, encoder_input_tokens, length, method="init_cache")
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), places)
        rows = encoder_input_tokens.shape[0]

        def unfinished(carry: tuple[Any, ...]) -> Array:
            index, ended = carry[0], carry[1]
            return (index < length) & ~jnp.all(ended)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, ended, previous, tokens, caches = carry
            logits, caches = model.apply(
                variables, previous, caches, index, encoder_input_tokens, method="decode_step"
            )
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            chosen = jnp.where(ended, 0, choose(logits, step_keys, decoding))
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], index, axis=1)
            return index + 1, ended | (chosen == eos_id), chosen, tokens, caches

        start = jnp.zeros(rows, jnp.int32)
        tokens = jnp.zeros((rows, length), jnp.int32)
        carry: tuple[Any, ...] = (jnp.int32(0), jnp.zeros(rows, bool), start, tokens, caches)
        return jax.lax.while_loop(unfinished, step, carry)[3]

    return sample


def choose(logits: Array, keys: Array, decoding: Decoding) -> Array:
    """The next token of each row.

    Args:
      logits: float32 [B, V].
      keys: one random key a row.
      decoding: temperature, top-k and top-p, applied in this order.

    Returns:
      int32 [B].
    """
    if decoding.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / decoding.temperature
    if decoding.top_k:
        kth = jax.lax.top_k(logits, min(decoding.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if decoding.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < decoding.top_p, descending, jnp.inf)
        logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
