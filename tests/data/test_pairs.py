"""Pairs of one prompt: who stands next to whom, what is left over, order, resuming, padding."""

import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from dro_jax.data import batches, feedback, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import UsageError

LENGTHS = {"inputs": 6, "targets": 5}
COMPLETIONS = (1, 2, 3, 5, 4, 1, 7)  # of each prompt
PAIRS = 0 + 1 + 1 + 2 + 2 + 0 + 3
# Alike in more characters than the limit leaves of them.
PROMPTS = [
    f"prompt {i}"
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(7), COMPLETIONS))
]


def make_task(path, prompts=PROMPTS, *, in_memory=True):
    """A task with pairs, whose i-th row has reward i."""
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "completion": "c" * (i % 4 + 1), "reward": i}) + "\n"
            for i, prompt in enumerate(prompts)
        )
    )
    file = FeedbackFile(str(path), 0.0)
    return tasks.feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        num_input_examples=feedback.summarise(file).num_input_examples if in_memory else None,
        prompt_ids=True,
    )


def take(task, count, **options):
    return [batch for batch, _ in take_positions(task, count, **options)]


def take_positions(task, count, **options):
    options = {"lengths": LENGTHS, "batch_size": 4, "seed": 0, **options}
    return list(itertools.islice(batches.train_batches(task, **options), count))


def pairs_of(some_batches):
    rewards = np.concatenate([batch["rewards"] for batch in some_batches])
    return [tuple(pair) for pair in rewards.astype(int).reshape(-1, 2).tolist()]


@pytest.fixture(params=[True, False], ids=["in memory", "streamed"])
def task(request, tmp_path):
    return make_task(tmp_path / "rows.jsonl", in_memory=request.param)


def test_prompt_ids_are_equal_where_prompts_are(task):
    examples = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    ids = [example["prompt_ids"] for example in examples]
    assert {(array.shape, array.dtype) for array in ids} == {((1,), np.dtype("int64"))}
    assert len(set(zip(PROMPTS, np.concatenate(ids).tolist(), strict=True))) == 7
    assert len(set(np.concatenate(ids).tolist())) == 7


def test_pairs_are_of_one_prompt_though_cut_prompts_are_alike(task):
    some = take(task, 50 * PAIRS // 2)
    assert {name for batch in some for name in batch} == {
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
        "rewards",
        "reward_weights",
    }
    assert len({tuple(row) for batch in some for row in batch["encoder_input_tokens"]}) == 1
    pairs = pairs_of(some)
    epochs = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    assert len(epochs) == 50
    for epoch in epochs:
        rows = [row for pair in epoch for row in pair]
        assert len(set(rows)) == 2 * PAIRS
        assert all(PROMPTS[a] == PROMPTS[b] for a, b in epoch)
        assert sorted(Counter(PROMPTS[a] for a, _ in epoch).values()) == [1, 1, 2, 2, 3]
    shown = {frozenset(pair) for pair in pairs}
    assert len(shown) == sum(n * (n - 1) // 2 for n in COMPLETIONS)
    assert len({tuple(epoch) for epoch in epochs}) == 50


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_pairs_of_the_training_split_are_counted(tmp_path, validation_fraction):
    make_task(tmp_path / "rows.jsonl")
    file = FeedbackFile(str(tmp_path / "rows.jsonl"), validation_fraction)
    rows = Counter(row.prompt for row in feedback.read_feedback(file, "train"))
    pairs = feedback.summarise(file).train_pairs
    assert 0 < pairs == sum(n // 2 for n in rows.values())
    assert (pairs == PAIRS) == (validation_fraction == 0)


def test_order_follows_from_the_seed(task):
    assert pairs_of(take(task, 8, seed=3)) == pairs_of(take(task, 8, seed=3))
    assert pairs_of(take(task, 8, seed=3)) != pairs_of(take(task, 8, seed=4))


def test_every_position_goes_on_as_if_uninterrupted(task):
    uninterrupted = take_positions(task, 18)
    for number in (0, 4, 5, 13, 16):
        start = uninterrupted[number][1]
        resumed = take_positions(task, 17 - number, start=start)
        for (before, place), (after, again) in zip(
            uninterrupted[number + 1 :], resumed, strict=True
        ):
            assert place == again
            jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("batch_size", [2, 4, 8, 32])
def test_evaluation_is_one_pass_padded_by_whole_pairs(task, batch_size):
    options = {"split": "train", "lengths": LENGTHS, "batch_size": batch_size}
    one_pass = list(batches.evaluation_batches(task, **options))
    assert {batch["rewards"].shape for batch in one_pass} == {(batch_size, 1)}
    assert all("prompt_ids" not in batch for batch in one_pass)
    expected, waiting = [], {}
    for i, prompt in enumerate(PROMPTS):
        if prompt in waiting:
            expected.append((waiting.pop(prompt), i))
        else:
            waiting[prompt] = i
    pairs = pairs_of(one_pass)
    assert pairs[:PAIRS] == expected
    assert len(pairs) == -(-2 * PAIRS // batch_size) * batch_size // 2
    weights = np.concatenate([batch["reward_weights"] for batch in one_pass]).reshape(-1, 2)
    assert weights.tolist() == [[1, 1]] * PAIRS + [[0, 0]] * (len(pairs) - PAIRS)


def test_no_prompt_has_two_completions(tmp_path):
    task = make_task(tmp_path / "rows.jsonl", ["a", "b", "c"])
    options = {"lengths": LENGTHS, "batch_size": 2}
    assert list(batches.evaluation_batches(task, split="train", **options)) == []
    with pytest.raises(UsageError, match="the training split has no example"):
        next(batches.train_batches(task, seed=0, **options))
