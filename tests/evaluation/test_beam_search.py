"""Beam search: against every sequence there is, against its rules written out with lists, against greedy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import EOS, ONE_LAYER, PROMPTS, random_params

from dro_jax.evaluation.beam_search import beam_search, top_k
from dro_jax.evaluation.sampling import Decoding, make_sampler
from dro_jax.networks import T5

SMALL = dataclasses.replace(ONE_LAYER, vocab_size=4)
"""Four tokens: the padding, the end of sequence, and two more."""

PROMPTS_OF_FOUR = np.array([[3, 2, 1], [2, 1, 0], [3, 3, 1], [1, 0, 0]], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(config, params, prompts, decoder_input):
    logits = T5(config).apply({"params": params}, prompts, decoder_input)
    return jax.nn.log_softmax(logits)


def every_completion(length):
    """All sequences of at most `length` tokens that end where their end of sequence is, or at `length`."""
    finished, open_ones = [], [()]
    for _ in range(length):
        grown = [(*tokens, token) for tokens in open_ones for token in range(SMALL.vocab_size)]
        finished += [tokens for tokens in grown if tokens[-1] == EOS]
        open_ones = [tokens for tokens in grown if tokens[-1] != EOS]
    return finished + open_ones


def padded(tokens, length):
    return [*tokens, *[0] * (length - len(tokens))]


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_a_beam_as_wide_as_all_sequences_finds_the_best(length_penalty):
    length = 3
    completions = every_completion(length)
    assert len(completions) == 1 + 3 + 9 * 4
    params = random_params(SMALL, seed=10, scale=1.0)
    decoding = Decoding(
        length, temperature=0.0, num_beams=len(completions), length_penalty=length_penalty
    )
    sampler = make_sampler(SMALL, decoding, EOS)
    found = np.asarray(sampler(params, PROMPTS_OF_FOUR, 0, np.arange(4)))

    targets = np.array([padded(tokens, length) for tokens in completions])
    decoder_input = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    real = np.arange(length)[None, :] < np.array([len(tokens) for tokens in completions])[:, None]
    found_lengths = set()
    for row, prompt in enumerate(PROMPTS_OF_FOUR):
        prompts = np.tile(prompt, (len(completions), 1))
        log_probs = np.asarray(log_probs_of(SMALL, params, prompts, decoder_input))
        of_tokens = np.take_along_axis(log_probs, targets[:, :, None], axis=2)[:, :, 0]
        scores = (of_tokens * real).sum(axis=1) / real.sum(axis=1) ** length_penalty
        best = int(np.argmax(scores))
        assert found[row].tolist() == targets[best].tolist()
        found_lengths.add(len(completions[best]))
    assert len(found_lengths) > 1


def search_with_lists(next_log_probs, beams, length, length_penalty):
    """The rules of `beam_search`'s docstring. `next_log_probs(tokens)` are those of the token that follows."""
    live, finished = [((), 0.0)], []
    for step in range(1, length + 1):
        continuations = [
            ((*tokens, token), total + float(log_prob))
            for tokens, total in live
            for token, log_prob in enumerate(next_log_probs(tokens))
        ]
        continuations.sort(key=lambda beam: -beam[1])
        for tokens, total in continuations[:beams]:
            if tokens[-1] == EOS or step == length:
                finished.append((tokens, total / step**length_penalty))
        finished = sorted(finished, key=lambda beam: -beam[1])[:beams]
        live = [beam for beam in continuations[: 2 * beams] if beam[0][-1] != EOS][:beams]
        if len(finished) == beams and live[0][1] / step**length_penalty <= finished[-1][1]:
            break
    return padded(finished[0][0], length), step


@pytest.fixture(scope="module")
def params():
    return random_params(ONE_LAYER, seed=7, scale=0.7)


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (3, 0.0), (4, 2.0)], ids=str)
def test_a_narrow_search_follows_its_rules(params, beams, length_penalty):
    length = 7
    rng = np.random.default_rng(3)
    prompts = rng.integers(2, ONE_LAYER.vocab_size, (24, 4)).astype(np.int32)
    prompts[::2, 2:] = 0
    decoding = Decoding(length, temperature=0.0, num_beams=beams, length_penalty=length_penalty)
    found = np.asarray(make_sampler(ONE_LAYER, decoding, EOS)(params, prompts, 0, np.arange(24)))

    expected, steps = [], []
    for prompt in prompts:

        def next_log_probs(tokens, prompt=prompt):
            decoder_input = np.array([padded((0, *tokens), length)], np.int32)
            return np.asarray(log_probs_of(ONE_LAYER, params, prompt[None], decoder_input))[
                0, len(tokens)
            ]

        tokens, taken = search_with_lists(next_log_probs, beams, length, length_penalty)
        expected.append(tokens)
        steps.append(taken)
    np.testing.assert_array_equal(found, expected)
    # Prompts that were done early stood beside others that were not.
    assert length_penalty > 1 or len(set(steps)) > 1


def test_one_beam_is_greedy(params):
    prompts, length = PROMPTS, 9
    search = jax.jit(
        functools.partial(
            beam_search, ONE_LAYER, max_tokens=length, num_beams=1, length_penalty=1.0, eos_id=EOS
        )
    )
    greedy = make_sampler(ONE_LAYER, Decoding(length, temperature=0.0), EOS)
    expected = np.asarray(greedy(params, prompts, 0, np.arange(len(prompts))))
    np.testing.assert_array_equal(search(params, prompts), expected)
    assert (expected == EOS).any()


def test_it_stops_when_every_prompt_is_done(params, decoding_steps, monkeypatch):
    eager = jax.tree.map(np.copy, params)
    # Whatever the prompt, the end of sequence has half of the probability and every other token 1/22.
    eager["decoder"]["decoder_norm"]["scale"][:] = 0
    bias = jnp.zeros(ONE_LAYER.vocab_size).at[EOS].set(jnp.log(ONE_LAYER.vocab_size - 1.0))
    logits = T5.logits
    monkeypatch.setattr(T5, "logits", lambda self, states: logits(self, states) + bias[None, None])
    sampler = make_sampler(ONE_LAYER, Decoding(9, temperature=0.0, num_beams=3), EOS)
    # Rows without a prompt fill up a batch, and are not waited for.
    prompts = np.concatenate([PROMPTS[:2], np.zeros_like(PROMPTS[:2])])
    tokens = np.asarray(sampler(eager, prompts, 0, np.arange(4)))
    jax.effects_barrier()
    assert tokens.tolist() == [[EOS] + [0] * 8] * 2 + [[0] * 9] * 2
    # Beams finish in step 1 (one, log 1/2) and step 2 (two, (log 1/22 + log 1/2) / 2); what is left is worse.
    assert len(decoding_steps) == 2


@pytest.mark.parametrize(
    ("columns", "k"), [(7, 7), (30, 4), (32, 8), (1000, 8), (4 * 3001, 8), (32128, 50)]
)
def test_the_largest_and_their_places_are_those_of_a_stable_sort(columns, k):
    rng = np.random.default_rng(columns)
    # Few values, so that most are equal to others, and rows of which most is worth nothing, as beams that do not count.
    x = rng.integers(-3, 3, (5, columns)).astype(np.float32)
    x[1] = rng.normal(size=columns)
    x[2, : columns - 2] = -np.inf
    x[3] = -np.inf
    x[4, columns // 2 :] = -np.inf
    values, places = (np.asarray(found) for found in jax.jit(top_k, static_argnums=1)(x, k))
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))
