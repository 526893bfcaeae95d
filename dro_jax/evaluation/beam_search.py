"""Beam search: the completion with the best log-probability that a search of limited width finds."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from dro_jax.networks import T5, T5Config
from dro_jax.networks.sharding import by_rows
from dro_jax.networks.t5 import decoding_variables

Array = jax.Array


def beam_search(
    config: T5Config,
    params: Any,
    encoder_input_tokens: Array,
    *,
    max_tokens: int,
    num_beams: int,
    length_penalty: float,
    eos_id: int,
) -> Array:
    """The best completion of each prompt.

    A beam's score is its log-probability / (its number of tokens, the end of sequence among them) ^
    length_penalty. In each step the 2K likeliest continuations of the K beams are looked at. Those among the
    first K that end are finished, and the K best-scored finished ones are kept; the K likeliest that do not
    end go on. At `max_tokens` the first K are finished, ended or not.

    A prompt is done when K are finished and the likeliest beam's score, with the tokens that it has now, is not
    above the worst of them. With a positive length penalty a longer completion might still have come to more.
    These are the rules of Hugging Face `generate` with its default `early_stopping=False`.

    Args:
      config: the T5's shape.
      params: its parameters, of `weights_in_use`.
      encoder_input_tokens: int32 [B, Ti]; a row of zeros is done from the start.
      max_tokens: longest completion, end of sequence included.
      num_beams: K.
      length_penalty: 0 prefers short completions, 1 is the mean log-probability of a token.
      eos_id: id of the end of sequence.

    Returns:
      int32 [B, max_tokens], 0 after the end of sequence.
    """
    model = T5(config)
    rows, beams = encoder_input_tokens.shape[0], num_beams
    caches = model.apply(
        {"params": params}, encoder_input_tokens, max_tokens, beams, method="init_cache"
    )
    variables = decoding_variables(config, params)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        index, done = carry[0], carry[1]
        return (index < max_tokens) & ~jnp.all(done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, done, live, live_log_probs, finished, finished_scores, caches = carry
        previous = jnp.where(index > 0, live[:, :, index - 1], 0)
        logits, caches = cast(
            tuple[Array, list[dict[str, Array]]],
            model.apply(
                variables,
                previous.reshape(rows * beams),
                caches,
                index,
                encoder_input_tokens,
                method="decode_step",
            ),
        )
        log_probs = jax.nn.log_softmax(logits).reshape(rows, beams, -1)
        log_probs = log_probs + live_log_probs[:, :, None]
        best, at = top_k(log_probs.reshape(rows, -1), 2 * beams)
        parent, token = at // logits.shape[-1], at % logits.shape[-1]
        candidates = pick(live, parent)
        candidates = jax.lax.dynamic_update_slice_in_dim(
            candidates, token[:, :, None], index, axis=2
        )

        ends = token == eos_id
        finishes = (ends | (index + 1 == max_tokens))[:, :beams] & ~done[:, None]
        length = (index + 1).astype(jnp.float32) ** length_penalty
        scores = jnp.where(finishes, best[:, :beams] / length, -jnp.inf)
        scores = jnp.concatenate([finished_scores, scores], axis=1)
        finished_scores, kept = top_k(scores, beams)
        finished = pick(jnp.concatenate([finished, candidates[:, :beams]], axis=1), kept)

        live_log_probs, kept = top_k(jnp.where(ends, -jnp.inf, best), beams)
        live, parent = pick(candidates, kept), pick(parent, kept)
        caches = [reorder(cache, parent) for cache in caches]
        done = done | (live_log_probs[:, 0] / length <= finished_scores[:, -1])
        return index + 1, done, live, live_log_probs, finished, finished_scores, caches

    none = jnp.zeros((rows, beams, max_tokens), jnp.int32)
    worst = jnp.full((rows, beams), -jnp.inf)
    # All beams are the same at first: only one of them counts.
    one = worst.at[:, 0].set(0.0)
    done = jnp.all(encoder_input_tokens == 0, axis=1)
    carry: tuple[Any, ...] = (jnp.int32(0), done, none, one, none, worst, caches)
    return jax.lax.while_loop(unfinished, step, carry)[4][:, 0]


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row [B, C], largest first and the first of equals before the others, and their places."""
    return cast(tuple[Array, Array], by_rows(functools.partial(_top_k, k=k), x))


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    rows, columns = x.shape
    size = math.isqrt(columns // k)
    blocks = -(-columns // max(size, 1))
    if size < 2 or blocks <= k:
        return jax.lax.top_k(x, k)
    # The k largest are in the k blocks with the largest maxima; to look for those first reads the row once.
    by_block = jnp.pad(x, ((0, 0), (0, blocks * size - columns)), constant_values=-jnp.inf)
    by_block = by_block.reshape(rows, blocks, size)
    chosen = jnp.sort(jax.lax.top_k(by_block.max(axis=2), k)[1], axis=1)
    kept = jnp.take_along_axis(by_block, chosen[:, :, None], axis=1).reshape(rows, k * size)
    largest, at = jax.lax.top_k(kept, k)
    return largest, jnp.take_along_axis(chosen, at // size, axis=1) * size + at % size


def pick(of_beams: Array, chosen: Array) -> Array:
    """[B, C, ...] of the chosen beams [B, C] out of [B, K, ...]."""
    return jax.vmap(lambda row, chosen: row[chosen])(of_beams, chosen)


def reorder(cache: dict[str, Array], parent: Array) -> dict[str, Array]:
    """A layer's cache after the beams [B, K] have taken the place of those before; what is of the prompt stays."""

    def moved(x: Array) -> Array:
        return pick(x.reshape(*parent.shape, *x.shape[1:]), parent).reshape(x.shape)

    return cache | {"key": moved(cache["key"]), "value": moved(cache["value"])}
