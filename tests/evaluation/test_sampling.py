"""Sampling: greedy against an uncached loop, frequencies against probabilities, filters against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import CONFIG, EOS, PROMPTS, random_params

from dro_jax.evaluation.sampling import Decoding, choose, make_sampler
from dro_jax.networks import T5

LENGTH = 9


@pytest.fixture(scope="module")
def params():
    """Choices are sharp but not certain."""
    return random_params(CONFIG, seed=0, scale=0.4)


@pytest.fixture(scope="module")
def sample(params):
    """`sample(prompts, seed, places, **decoding)`; each sampler is compiled once."""
    samplers = {}

    def run(prompts, seed, places, **settings):
        decoding = Decoding(**{"max_tokens": LENGTH} | settings)
        if decoding not in samplers:
            samplers[decoding] = make_sampler(CONFIG, decoding, EOS)
        return np.asarray(samplers[decoding](params, prompts, seed, np.asarray(places)))

    return run


@jax.jit
def forward(variables, prompts, decoder_input):
    return T5(CONFIG).apply(variables, prompts, decoder_input)


def uncached_greedy(params, prompt):
    """The argmax of the whole forward, a token at a time."""
    tokens = []
    while len(tokens) < LENGTH and EOS not in tokens:
        decoder_input = np.zeros((1, LENGTH + 1), np.int32)
        decoder_input[0, 1 : len(tokens) + 1] = tokens
        logits = forward({"params": params}, prompt[None], decoder_input)
        tokens.append(int(np.argmax(np.asarray(logits)[0, len(tokens)])))
    return tokens + [0] * (LENGTH - len(tokens))


def test_greedy_is_the_argmax_of_the_whole_forward(sample, params):
    tokens = sample(PROMPTS, 0, range(6), temperature=0.0)
    assert tokens.shape == (6, LENGTH)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [uncached_greedy(params, prompt) for prompt in PROMPTS])
    assert len(np.unique(tokens, axis=0)) > 1


def test_greedy_ignores_the_seed(sample):
    first = sample(PROMPTS, 0, range(6), temperature=0.0)
    np.testing.assert_array_equal(first, sample(PROMPTS, 5, range(6), temperature=0.0))


def test_a_row_depends_on_seed_and_place_only(sample):
    together = sample(PROMPTS, 3, range(6))
    np.testing.assert_array_equal(together, sample(PROMPTS, 3, range(6)))
    backwards = sample(PROMPTS[::-1], 3, range(5, -1, -1))
    np.testing.assert_array_equal(together, backwards[::-1])
    for start in (0, 2, 4):
        pair = sample(PROMPTS[start : start + 2], 3, [start, start + 1])
        np.testing.assert_array_equal(together[start : start + 2], pair)


def test_seed_and_place_both_matter(sample):
    same_prompt = np.tile(PROMPTS[:1], (6, 1))
    tokens = sample(same_prompt, 3, range(6))
    assert len(np.unique(tokens, axis=0)) > 1
    assert (tokens != sample(same_prompt, 4, range(6))).any()
    assert len(np.unique(sample(same_prompt, 3, [2] * 6), axis=0)) == 1


def test_zeros_follow_the_end_of_sequence(sample):
    tokens = np.concatenate([sample(PROMPTS, seed, range(6)) for seed in range(40)])
    ended = 0
    for row in tokens:
        ends = np.flatnonzero(row == EOS)
        if len(ends):
            ended += 1
            assert (row[ends[0] + 1 :] == 0).all()
    assert 0 < ended < len(tokens)


def test_decoding_stops_when_every_row_has_ended(params, decoding_steps):
    sampler = make_sampler(CONFIG, Decoding(LENGTH, temperature=0.0), EOS)
    tokens = np.asarray(sampler(params, PROMPTS, 0, np.arange(6)))
    jax.effects_barrier()
    ends = [list(row).index(EOS) + 1 if EOS in row else LENGTH for row in tokens]
    assert len(decoding_steps) == max(ends)

    eager = jax.tree.map(np.copy, params)
    # No state gets past this output layer but towards the end of sequence, or away from it.
    eager["decoder"]["logits_dense"]["kernel"][:] = 0
    eager["decoder"]["decoder_norm"]["scale"][:] = 0
    decoding_steps.clear()
    assert (np.asarray(sampler(eager, PROMPTS, 0, np.arange(6))) == 0).all()
    jax.effects_barrier()
    assert len(decoding_steps) == LENGTH

    config = dataclasses.replace(CONFIG, vocab_size=EOS + 1)
    two = jax.tree.map(np.copy, params)
    two["token_embedder"]["embedding"] = two["token_embedder"]["embedding"][: EOS + 1]
    kernel = np.zeros((CONFIG.emb_dim, EOS + 1), np.float32)
    two["decoder"]["logits_dense"]["kernel"] = kernel
    decoding_steps.clear()
    # Every token as likely as the other: with an end of sequence of 0 the first step ends all rows.
    sampler = make_sampler(config, Decoding(LENGTH, temperature=0.0), eos_id=0)
    sampler(two, np.minimum(PROMPTS, EOS), 0, np.arange(6))
    jax.effects_barrier()
    assert len(decoding_steps) == 1

    decoding_steps.clear()
    # Rows without a prompt fill up a batch, and are not waited for.
    assert (np.asarray(sampler(two, np.zeros_like(PROMPTS), 0, np.arange(6))) == 0).all()
    jax.effects_barrier()
    assert len(decoding_steps) == 0


LOGITS = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])


def frequencies(logits, draws=20_000, **settings):
    """How often each token is chosen from the same logits."""
    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (draws, 1))
    chosen = np.asarray(choose(rows, keys, Decoding(1, **settings)))
    return np.bincount(chosen, minlength=len(logits))


def assert_drawn_from(counts, probabilities):
    """A chi-square statistic below its 0.9999 quantile for up to 6 degrees of freedom."""
    assert (counts[probabilities == 0] == 0).all()
    expected = counts.sum() * probabilities[probabilities > 0]
    observed = counts[probabilities > 0]
    assert ((observed - expected) ** 2 / expected).sum() < 27.9


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    probabilities = np.exp(LOGITS / temperature)
    assert_drawn_from(
        frequencies(LOGITS, temperature=temperature), probabilities / probabilities.sum()
    )


def test_first_tokens_of_the_sampler_follow_the_model(sample, params):
    draws = 4096
    tokens = sample(np.tile(PROMPTS[:1], (draws, 1)), 0, range(draws), max_tokens=1)[:, 0]
    start = np.zeros((1, 1), np.int32)
    logits = np.asarray(forward({"params": params}, PROMPTS[:1], start))[0, 0]
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    counts = np.bincount(tokens, minlength=CONFIG.vocab_size)
    likely = probabilities > 5 / draws
    expected = draws * probabilities[likely]
    # The 0.9999 quantile of chi-square at 11 degrees of freedom.
    assert ((counts[likely] - expected) ** 2 / expected).sum() < 37.4
    assert likely.sum() > 3


def test_every_step_draws_anew(params):
    indifferent = jax.tree.map(np.copy, params)
    indifferent["decoder"]["logits_dense"]["kernel"][:] = 0
    # No token is the end of the sequence: all rows have two.
    sampler = make_sampler(CONFIG, Decoding(2), eos_id=-1)
    first, second = np.asarray(sampler(indifferent, PROMPTS[[0] * 4096], 0, np.arange(4096))).T
    pairs = np.bincount(12 * first + second, minlength=144)
    # The 0.9999 quantile of chi-square at 143 degrees of freedom.
    assert ((pairs - 4096 / 144) ** 2 / (4096 / 144)).sum() < 214


@pytest.mark.parametrize("k", [1, 3, 7, 100])
def test_top_k_keeps_k(k):
    probabilities = np.exp(LOGITS) * (np.arange(7) < k)
    assert_drawn_from(frequencies(LOGITS, top_k=k), probabilities / probabilities.sum())


def smallest_set(probabilities, p):
    """The likeliest tokens up to and including the one that reaches p."""
    kept, total = [], 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if total >= p:
            break
        kept.append(token)
        total += probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, temperature):
    order = np.random.default_rng(1).permutation(7)
    logits = LOGITS[order]
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum()
    kept = np.isin(np.arange(7), smallest_set(probabilities, top_p))
    probabilities = np.where(kept, probabilities, 0)
    counts = frequencies(logits, temperature=temperature, top_p=top_p)
    assert_drawn_from(counts, probabilities / probabilities.sum())


def test_top_p_looks_at_what_top_k_left():
    # Of the two likeliest, 0.4 and 0.25, the first has 0.615 of what is left.
    counts = frequencies(LOGITS, top_k=2, top_p=0.6)
    assert counts[0] == counts.sum()


def test_ties_are_kept_together():
    tied = np.log([0.3, 0.3, 0.3, 0.1])
    thirds = np.array([1, 1, 1, 0]) / 3
    assert_drawn_from(frequencies(tied, top_k=1), thirds)
    assert_drawn_from(frequencies(tied, top_p=0.2), thirds)


def test_greedy_ties_go_to_the_first():
    counts = frequencies(np.log([0.1, 0.45, 0.45]), draws=10, temperature=0.0)
    assert counts.tolist() == [0, 10, 0]


def test_filters_treat_rows_apart():
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1]]), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(logits, keys, Decoding(1, top_k=1)).tolist() == [0, 6]
    assert choose(logits, keys, Decoding(1, top_p=0.1)).tolist() == [0, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": float("inf")}, "temperature is inf; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected 0"),
        ({"top_k": -1}, "top_k is -1; expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1; expected more than 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan; expected more than 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; expected a finite number"),
        ({"num_beams": 2}, "num_beams is 2 and temperature 1.0; a beam search draws nothing"),
        ({"num_beams": 0}, "num_beams is 0; expected 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**{"max_tokens": 3} | settings)
