"""Prompts of all lengths in few shapes, on one device and on meshes: the same tokens, and what lies where."""

import re

import jax
import numpy as np
import pytest
from tiny_t5 import EOS, ONE_LAYER, random_params

from dro_jax.evaluation import sampling
from dro_jax.evaluation.sampling import Decoding, make_sampler, sample_prompts
from dro_jax.training import train_state
from dro_jax.training.partitioning import Partitioning, parameter_shardings, row_shards

LENGTH = 6
LONGEST = 12


class Recorder:
    """Stands for a sampler: answers with the place, the prompt's last token and the seed."""

    def __init__(self):
        self.batches = []

    def __call__(self, policy, tokens, seed, places):
        self.batches.append((tokens, places))
        last = [row[np.flatnonzero(row)[-1]] if row.any() else -1 for row in tokens]
        return np.stack([places, last, np.full(len(tokens), seed)], axis=1)


def recorded(lengths, **settings):
    """The batches of prompts of these lengths; a prompt's last token says which it is."""
    recorder = Recorder()
    prompts = [[7] * (length - 1) + [1000 + i] for i, length in enumerate(lengths)]
    settings = {"longest": 100, "seed": 5, "batch_size": 4} | settings
    answers = list(sample_prompts(recorder, None, prompts, **settings))
    assert [answer.tolist() for answer in answers] == [
        [i, 1000 + i, 5] for i in range(len(prompts))
    ]
    for tokens, places in recorder.batches:
        assert tokens.dtype == places.dtype == np.int32
        for row, place in zip(tokens, places, strict=True):
            if row.any():
                assert row[: lengths[place]].tolist() == prompts[place]
                assert not row[lengths[place] :].any()
    return recorder.batches


def shapes(batches):
    return [tokens.shape for tokens, _ in batches]


def test_prompts_of_like_length_share_a_batch_and_come_back_in_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 30).tolist()
    batches = recorded(lengths)
    assert {rows for rows, _ in shapes(batches)} == {4}
    assert {width for _, width in shapes(batches)} == {32, 64, 100}
    assert [width for _, width in shapes(batches)] == sorted(width for _, width in shapes(batches))
    # Nothing but the last batch of a window has room for another prompt.
    assert [int(tokens.any(axis=1).sum()) for tokens, _ in batches] == [4] * 7 + [2]


def test_windows_follow_the_order_of_the_prompts():
    lengths = [90] + [3] * 99
    batches = recorded(lengths)
    assert len(batches) == 25
    window = 4 * sampling.WINDOW
    assert shapes(batches)[sampling.WINDOW - 1] == (4, 100)
    for first in range(0, 100, window):
        places = np.concatenate([p for _, p in batches[first // 4 : first // 4 + sampling.WINDOW]])
        assert sorted(places.tolist()) == list(range(first, min(first + window, 100)))


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 100), (100, 100)]
)
def test_encoder_lengths_are_doubles_up_to_the_longest(tokens, length):
    assert shapes(recorded([tokens])) == [(1, length)]


def test_an_answer_comes_as_soon_as_those_before_it_are_there():
    recorder = Recorder()
    lengths = [3, 3, 40, 3, 3, 3]
    answers = sample_prompts(
        recorder, None, [[7] * n for n in lengths], longest=100, seed=5, batch_size=2
    )
    needed = []
    for _ in answers:
        needed.append(len(recorder.batches))
    assert needed == [1, 1, 3, 3, 3, 3]


def test_a_short_longest_is_the_only_length():
    assert shapes(recorded([3, 9, 13], longest=13)) == [(4, 13)]


@pytest.mark.parametrize(
    ("prompts", "settings", "rows"),
    [
        (1, {}, [1]),
        (2, {}, [2]),
        (3, {}, [4]),
        (9, {}, [4, 4, 4]),
        (9, {"batch_size": 6}, [6, 6]),
        (9, {"batch_size": 6, "shards": 4}, [8, 8]),
        (1, {"shards": 8}, [8]),
        (0, {}, []),
    ],
)
def test_rows_are_as_many_as_needed_and_divide(prompts, settings, rows):
    assert [height for height, _ in shapes(recorded([5] * prompts, **settings))] == rows


@pytest.fixture(scope="module")
def params():
    return random_params(ONE_LAYER, seed=1, scale=0.4)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, LONGEST + 1, 20)
    return [
        [*rng.integers(2, ONE_LAYER.vocab_size, length - 1).tolist(), EOS] for length in lengths
    ]


def sampled(params, prompts, batch_size, mesh=None, rules=(), **settings):
    decoding = Decoding(LENGTH, **settings)
    shards = 1 if mesh is None else row_shards(mesh, rules)
    sampler = make_sampler(ONE_LAYER, decoding, EOS, mesh, rules)
    return np.stack(
        list(
            sample_prompts(
                sampler,
                params,
                prompts,
                longest=LONGEST,
                seed=4,
                batch_size=batch_size,
                shards=shards,
            )
        )
    )


@pytest.fixture(scope="module")
def one_at_a_time(params, prompts):
    return sampled(params, prompts, 1)


@pytest.mark.parametrize("batch_size", [3, 8, 16])
def test_the_same_tokens_whatever_the_batch_size(params, prompts, one_at_a_time, batch_size):
    np.testing.assert_array_equal(sampled(params, prompts, batch_size), one_at_a_time)


def test_other_seeds_and_places_give_other_tokens(params, prompts, one_at_a_time):
    assert len(np.unique(sampled(params, prompts[:1] * 20, 16), axis=0)) > 5
    assert (sampled(params, prompts[::-1], 16)[::-1] != one_at_a_time).any()


def test_padding_changes_nothing(params):
    sampler = make_sampler(ONE_LAYER, Decoding(LENGTH), EOS)
    narrow = np.random.default_rng(3).integers(1, ONE_LAYER.vocab_size, (16, 5)).astype(np.int32)
    wide = np.pad(narrow, ((0, 0), (0, 27)))
    places = np.arange(16)
    np.testing.assert_array_equal(
        sampler(params, narrow, 0, places), sampler(params, wide, 0, places)
    )


def laid_out(params, partitioning):
    """The parameters on the mesh, and the mesh."""
    mesh = partitioning.mesh()
    boxed = jax.eval_shape(lambda: train_state.init_policy(ONE_LAYER, 0))
    return jax.device_put(params, parameter_shardings(boxed, mesh, partitioning)), mesh


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_the_same_tokens_on_a_mesh(params, prompts, one_at_a_time, axes):
    partitioning = Partitioning(*axes)
    placed, mesh = laid_out(params, partitioning)
    tokens = sampled(placed, prompts, 5, mesh, partitioning.rules)
    np.testing.assert_array_equal(tokens, one_at_a_time)


def test_a_beam_search_on_a_mesh(params, prompts):
    partitioning = Partitioning(2, 2, 2)
    placed, mesh = laid_out(params, partitioning)
    search = {"temperature": 0.0, "num_beams": 3}
    on_mesh = sampled(placed, prompts[:8], 8, mesh, partitioning.rules, **search)
    np.testing.assert_array_equal(on_mesh, sampled(params, prompts[:8], 8, **search))


def compiled(params, axes, **settings):
    """The program for 8 rows of 16 tokens on a mesh, as text."""
    partitioning = Partitioning(*axes)
    placed, mesh = laid_out(params, partitioning)
    decoding = Decoding(LENGTH, **{"temperature": 0.0} | settings)
    sampler = make_sampler(ONE_LAYER, decoding, EOS, mesh, partitioning.rules)
    arguments = (np.ones((8, 16), np.int32), 0, np.arange(8))
    return sampler.lower(placed, *arguments).compile().as_text()


@pytest.mark.parametrize("beams", [1, 3])
def test_caches_are_cut_by_rows_and_heads(params, beams):
    program = compiled(params, (2, 2, 2), num_beams=beams)
    # Rows, heads, positions, width of a head: of decoded positions, and of the prompt's.
    for rows, positions in ((8 * beams, LENGTH), (8, 16)):
        assert f"f32[{rows // 4},1,{positions},8]" in program
        assert f"f32[{rows},2,{positions},8]" not in program


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"temperature": 1.0, "top_k": 5}], ids=str)
def test_neither_weights_nor_rows_are_gathered_in_the_loop_over_tokens(params, settings):
    program = compiled(params, (1, 8, 1), **settings)
    assert "all-gather" in program
    loops = re.findall(r"body=%?([\w.\-]+)", program)
    assert loops
    for name in loops:
        body = re.search(rf"^%?{re.escape(name)} .*?^}}", program, re.MULTILINE | re.DOTALL)
        assert "all-gather" not in body[0]
