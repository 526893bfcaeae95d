"""Mismatched completions: the offset, whose completion a row is given, and what batches make of it."""

import itertools
import json
import math

import numpy as np
import pytest

from dro_jax.data import batches, feedback, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.mismatched import mismatch_offset
from dro_jax.data.vocabulary import encode_completion, load_vocabulary

LENGTHS = {"inputs": 6, "targets": 5}
RANDOM = np.random.default_rng(0)


def own_partners(prompts, offset):
    """How many rows an offset gives a partner of their own prompt."""
    return sum(prompts[i] == prompts[(i + offset) % len(prompts)] for i in range(len(prompts)))


def make_file(path, prompts, validation_fraction=0.0):
    """A file whose i-th row has reward i and a completion that begins with i and may be too long."""
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "completion": f"{i:03d}" + "x" * (i % 4), "reward": i})
            + "\n"
            for i, prompt in enumerate(prompts)
        )
    )
    return FeedbackFile(str(path), validation_fraction)


def make_task(file, **options):
    return tasks.feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        mismatched=True,
        **options,
    )


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(np.arange(2), id="two rows"),
        pytest.param(2**64 - 1 - np.arange(30, dtype=np.uint64), id="all different"),
        pytest.param(np.repeat(np.arange(40), 9), id="blocks"),
        pytest.param(np.repeat(np.arange(3), 100), id="three blocks"),
        pytest.param(np.repeat(np.arange(20), range(20)), id="uneven blocks"),
        pytest.param(np.tile(np.arange(2), 30), id="two in turns"),
        pytest.param(np.tile(np.arange(5), 60), id="five in turns"),
        pytest.param(np.arange(500) % 309, id="turns as long as the golden section"),
        pytest.param(RANDOM.permutation(np.repeat(np.arange(200), 2)), id="random order"),
        pytest.param(np.array([0, 0, 0, 1, 2, 3]), id="half of one prompt"),
    ],
)
def test_no_row_is_given_its_own_prompt_where_that_can_be_had(prompts):
    offset = mismatch_offset(prompts)
    assert 1 <= offset < len(prompts)
    assert own_partners(prompts.tolist(), offset) == 0


@pytest.mark.parametrize(
    "prompts",
    [
        [0] * 9,
        [0, 1] * 4 + [0],
        [0, 0, 0, 0, 1, 2],
        RANDOM.integers(0, 3, 12).tolist(),
        RANDOM.integers(0, 4, 60).tolist(),
    ],
)
def test_where_own_prompts_cannot_be_avoided_they_are_fewest(prompts):
    offset = mismatch_offset(np.array(prompts))
    assert 1 <= offset < len(prompts)
    fewest = min(own_partners(prompts, other) for other in range(1, len(prompts)))
    assert own_partners(prompts, offset) == fewest > 0


def test_many_rows_of_each_prompt_in_random_order():
    prompts = np.random.default_rng(0).permutation(np.repeat(np.arange(240), 10))
    assert own_partners(prompts.tolist(), mismatch_offset(prompts)) < 9 / 2  # 9: by chance


@pytest.mark.parametrize("rows", [0, 1])
def test_without_another_row_there_is_no_way_to_go(rows):
    assert mismatch_offset(np.zeros(rows)) == 0


@pytest.mark.parametrize("min_reward", [-math.inf, 60])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_completion_goes_to_one_row_of_its_split(tmp_path, split, min_reward):
    file = make_file(tmp_path / "rows.jsonl", [f"p{i // 3}" for i in range(300)], 0.3)
    threshold = min_reward if split == "train" else -math.inf
    rows = [row for row in feedback.read_feedback(file, split) if row.reward >= threshold]
    own = [tuple(encode_completion(load_vocabulary(None), row.completion, 5)) for row in rows]
    assert {len(tokens) for tokens in own} == {4, 5}
    assert {tokens[-1] == 1 for tokens in own} == {True, False}

    lengths = {**LENGTHS, "mismatched_targets": LENGTHS["targets"]}
    dataset = make_task(file, min_reward=min_reward).get_dataset(lengths, split, shuffle=False)
    examples = list(dataset.as_numpy_iterator())
    assert [tuple(example["targets"]) for example in examples] == own
    assert {example["mismatched_targets"].dtype for example in examples} == {np.dtype("int32")}
    partners = [own.index(tuple(example["mismatched_targets"])) for example in examples]
    assert sorted(partners) == list(range(len(rows)))
    assert len({(partner - i) % len(rows) for i, partner in enumerate(partners)}) == 1
    assert all(rows[i].prompt != rows[partner].prompt for i, partner in enumerate(partners))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_all_of_one_prompt(tmp_path, rows):
    task = make_task(make_file(tmp_path / "rows.jsonl", ["p"] * rows))
    dataset = task.get_dataset(None, "train", shuffle=False)
    pairs = [
        (tuple(e["targets"]), tuple(e["mismatched_targets"])) for e in dataset.as_numpy_iterator()
    ]
    own, others = zip(*pairs, strict=True)
    assert sorted(own) == sorted(others)
    assert len(own) == rows
    assert all(a != b for a, b in pairs) == (rows > 1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_partner_is_the_same_in_every_epoch_and_on_every_call(tmp_path, in_memory):
    file = make_file(tmp_path / "rows.jsonl", [f"p{i % 5}" for i in range(22)])
    task = make_task(file, num_input_examples={"train": 22} if in_memory else None)
    options = {"lengths": LENGTHS, "batch_size": 4}
    calls = [
        [b for b, _ in itertools.islice(batches.train_batches(task, seed=seed, **options), 22)]
        for seed in (0, 0, 1)
    ]
    calls.append(list(batches.evaluation_batches(task, split="train", **options)))
    partners = []
    for call in calls:
        own, others = (
            np.concatenate([batch[f"{prefix}decoder_target_tokens"] for batch in call]).tolist()
            for prefix in ("", "mismatched_")
        )
        pairs = {(tuple(a), tuple(b)) for a, b in zip(own, others, strict=True) if any(a)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 22
        assert all(a != b for a, b in pairs)
        partners.append(pairs)
    assert all(pairs == partners[0] for pairs in partners)


def test_features_of_the_other_completion(tmp_path):
    task = make_task(make_file(tmp_path / "rows.jsonl", [f"p{i}" for i in range(10)]))
    options = {"split": "train", "lengths": LENGTHS, "batch_size": 7}
    first, last = batches.evaluation_batches(task, **options)
    for batch in (first, last):
        tokens, inputs, weights = (
            batch[f"mismatched_decoder_{name}"]
            for name in ("target_tokens", "input_tokens", "loss_weights")
        )
        assert {(array.shape, array.dtype) for array in (tokens, inputs, weights)} == {
            ((7, 5), np.dtype("int32"))
        }
        np.testing.assert_array_equal(inputs, np.pad(tokens[:, :-1], [(0, 0), (1, 0)]))
        np.testing.assert_array_equal(weights, tokens != 0)
        np.testing.assert_array_equal(weights.any(1), batch["reward_weights"][:, 0])
    assert last["reward_weights"].sum() == 3
