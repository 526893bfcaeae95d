"""Sampling completions from a T5 with a key-value cache."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from dro_jax.evaluation.beam_search import beam_search, top_k
from dro_jax.networks import T5, T5Config
from dro_jax.networks.sharding import Rules, constrain, laid_over
from dro_jax.networks.t5 import decoding_variables, weights_in_use

Array = jax.Array
Sampler = Callable[[Any, ArrayLike, ArrayLike, ArrayLike], Array]

SHORTEST = 32
"""Tokens that the shortest prompts are padded to; each further length is twice the one before."""

WINDOW = 8
"""Batches whose prompts are sorted by length together."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
      max_tokens: longest completion, end-of-sequence included.
      temperature: 0 is greedy; otherwise the logits are divided by it.
      top_k: sample among the k likeliest tokens; 0 for all of them.
      top_p: sample among the likeliest tokens that together have this probability; 1 for all of them.
      num_beams: width of a beam search, which draws nothing: temperature has to be 0. 1 is none.
      length_penalty: a beam's score is its log-probability divided by its number of tokens to this power.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0

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
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; expected 1 (no beam search) or more")
        if self.num_beams > 1 and self.temperature != 0:
            raise ValueError(
                f"num_beams is {self.num_beams} and temperature {self.temperature}; a beam search draws "
                "nothing: expected temperature 0"
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; expected a finite number")


@functools.lru_cache(maxsize=16)
def make_sampler(
    config: T5Config,
    decoding: Decoding,
    eos_id: int,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> Sampler:
    """Builds `sample(policy, encoder_input_tokens, seed, places) -> tokens`, jitted.

    Called again with the same arguments it returns the same function, which compiles once a shape.

    Args:
      config: the T5's shape.
      decoding: how tokens are chosen.
      eos_id: id of the end of sequence.
      mesh: the mesh that the policy lies on, None for a device alone.
      rules: where the logical axes of weights, activations and caches lie on it.

    Returns:
      A function of the policy's parameters, prompts int32 [B, Ti], a seed and the prompts' places int32 [B]
      in the list they come from. It returns int32 [B, max_tokens]: tokens up to and including the end of
      sequence, then 0. Decoding stops when every row has ended; a row without a prompt (all 0) has from the
      start. A row's randomness depends on the seed and its place only, not on the rows beside it. Every
      process gives the same prompts and gets all rows.
    """
    placed = contextlib.nullcontext if mesh is None else lambda: laid_over(mesh, rules)

    def sample(policy: Any, encoder_input_tokens: Array, seed: Array, places: Array) -> Array:
        with placed():
            encoder_input_tokens = constrain(encoder_input_tokens, "batch", None)
            params = weights_in_use(config, policy)
            if decoding.num_beams > 1:
                return beam_search(
                    config,
                    params,
                    encoder_input_tokens,
                    max_tokens=decoding.max_tokens,
                    num_beams=decoding.num_beams,
                    length_penalty=decoding.length_penalty,
                    eos_id=eos_id,
                )
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), places)
            return draw(config, params, encoder_input_tokens, keys, decoding, eos_id)

    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(sample, out_shardings=whole)


def draw(
    config: T5Config,
    params: Any,
    encoder_input_tokens: Array,
    keys: Array,
    decoding: Decoding,
    eos_id: int,
) -> Array:
    """Completions chosen a token at a time.

    Args:
      config: the T5's shape.
      params: its parameters, of `weights_in_use`.
      encoder_input_tokens: int32 [B, Ti].
      keys: one random key a row.
      decoding: how tokens are chosen.
      eos_id: id of the end of sequence.

    Returns:
      int32 [B, max_tokens], 0 after the end of sequence.
    """
    model = T5(config)
    length = decoding.max_tokens
    caches = model.apply({"params": params}, encoder_input_tokens, length, method="init_cache")
    variables = decoding_variables(config, params)
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
    ended = jnp.all(encoder_input_tokens == 0, axis=1)
    carry: tuple[Any, ...] = (jnp.int32(0), ended, start, tokens, caches)
    return jax.lax.while_loop(unfinished, step, carry)[3]


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
        kth = top_k(logits, min(decoding.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if decoding.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < decoding.top_p, descending, jnp.inf)
        logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample_prompts(
    sampler: Sampler,
    policy: Any,
    prompts: Sequence[Sequence[int]],
    *,
    longest: int,
    seed: int,
    batch_size: int,
    first: int = 0,
    shards: int = 1,
) -> Iterator[np.ndarray]:
    """Samples prompts of all lengths in few shapes: batches of prompts of like length.

    The encoder's lengths are `SHORTEST` and its doubles up to `longest`, the rows of all batches as many;
    what is left over of the last is empty.

    Args:
      sampler: of `make_sampler`.
      policy: parameters.
      prompts: tokens, at most `longest`.
      longest: most tokens of any prompt, the last of the encoder's lengths.
      seed: with a prompt's place in the list it fixes the completion, whatever the batch size.
      batch_size: prompts at a time.
      first: place of the first of these prompts in the list.
      shards: parts that rows are cut into; batches are filled up to a multiple.

    Yields:
      int32 [max_tokens] for each prompt, in the order of the prompts, at the latest `WINDOW` batches on.
    """
    # A short list is no reason to compute empty rows, nor every length of list for a program of its own.
    rows = min(batch_size, 1 << (len(prompts) - 1).bit_length())
    rows = shards * math.ceil(rows / shards)
    lengths = [encoder_length(len(prompt), longest) for prompt in prompts]
    sampled: dict[int, np.ndarray] = {}
    answered = 0
    for start in range(0, len(prompts), WINDOW * rows):
        window = range(start, min(start + WINDOW * rows, len(prompts)))
        by_length = sorted(window, key=lengths.__getitem__)
        for at in range(0, len(by_length), rows):
            batch = by_length[at : at + rows]
            tokens = np.zeros((rows, lengths[batch[-1]]), np.int32)
            places = np.zeros(rows, np.int32)
            places[: len(batch)] = first + np.array(batch)
            for row, place in enumerate(batch):
                tokens[row, : len(prompts[place])] = prompts[place]
            completions = np.asarray(sampler(policy, tokens, seed, places))
            sampled.update(zip(batch, completions[: len(batch)], strict=True))
            while answered in sampled:
                yield sampled.pop(answered)
                answered += 1


def encoder_length(tokens: int, longest: int) -> int:
    """The least of `SHORTEST`, its doubles and `longest` that holds so many tokens."""
    length = SHORTEST
    while length < tokens:
        length *= 2
    return min(length, longest)
