"""Packed rows: nothing lost, nothing over its limit, well filled, and the same whoever reads them from wherever."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from dro_jax.data import batches, feedback, packing, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.packing import fill_rows, pack, packed_batches, score_examples, text_lengths
from dro_jax.data.vocabulary import load_vocabulary


@pytest.mark.parametrize("max_examples", [1, 2, 3, 16])
@pytest.mark.parametrize("features", [1, 2, 3])
def test_each_example_is_in_one_row_within_its_limits(features, max_examples):
    rng = np.random.default_rng([features, max_examples])
    for count in (1, 2, 50, 300):
        limits = rng.integers(1, 60, features)
        lengths = rng.integers(0, limits + 1, (count, features))
        rows = pack(lengths, limits, max_examples)
        assert sorted(itertools.chain(*rows)) == list(range(count))
        for row in rows:
            assert 1 <= len(row) <= max_examples
            assert np.all(lengths[row].sum(axis=0) <= limits)
        assert rows == pack(lengths, limits, max_examples)


def test_best_fit_by_hand():
    # 7 opens a row, 6 another; 4 fits the second alone; 3 fills the first, 2 and 1 a third.
    lengths = np.array([[2], [7], [1], [4], [6], [3]])
    assert pack(lengths, [10], 16) == [[1, 5], [4, 3], [0, 2]]
    assert pack(lengths, [10], 1) == [[i] for i in range(6)]
    # The second feature decides: 5 and 5 do not go together, though their first features would.
    assert pack(np.array([[1, 5], [1, 5], [1, 4]]), [10, 9], 16) == [[0, 2], [1]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"an example of \[11  3\] tokens does not fit \[10, 5\]"):
        pack(np.array([[11, 2], [4, 3]]), [10, 5], 4)


def test_batches_of_packed_rows_hold_each_example_once(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 20)
    rng = np.random.default_rng(0)
    examples = [
        example(rng.integers(2, 9, size), rng.integers(2, 9, size // 2 + 1), 0.5)
        for size in rng.integers(1, 11, 50)
    ]
    seen = []
    for batch, rows in packed_batches(
        examples, lengths={"inputs": 12, "targets": 9}, max_examples=3, batch_size=4
    ):
        assert batch["encoder_input_tokens"].shape == (4, 12)
        assert batch["decoder_target_tokens"].shape == (4, 9)
        assert len(rows) <= 4
        assert batch["reward_weights"].sum() == sum(len(row) for row in rows)
        for row, numbers in enumerate(rows):
            for slot, number in enumerate(numbers, 1):
                for side, name in (("encoder_input", "inputs"), ("decoder_target", "targets")):
                    tokens = batch[f"{side}_tokens"][row]
                    own = batch[f"{side.split('_')[0]}_segment_ids"][row] == slot
                    np.testing.assert_array_equal(tokens[own], examples[number][name])
            seen += numbers
    assert sorted(seen) == list(range(50))


def test_each_example_gets_its_own_score(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 20)
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 11, 50)
    examples = [example(rng.integers(2, 9, size), [1], number) for number, size in enumerate(sizes)]

    def score(batch):
        # A number and a sum over the row: what belongs to a neighbour would be seen. Empty rows are left out.
        rows = batch["reward_weights"].any(axis=1)
        slots = np.arange(1, 4)
        tokens = (batch["encoder_segment_ids"][:, :, None] == slots).sum(axis=1)
        return (1000 * batch["rewards"] + tokens)[rows]

    scores = score_examples(
        score, examples, lengths={"inputs": 12, "targets": 9}, max_examples=3, batch_size=4
    )
    np.testing.assert_array_equal(scores, 1000 * np.arange(50) + sizes)


def test_rows_are_near_the_fewest_possible():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 1.0, (2048, 1)).astype(int) + 1, 512)
    rows = pack(lengths, [512], 64)
    assert len(rows) <= 1.02 * np.ceil(lengths.sum() / 512)


def example(prompt, response, reward, other=None):
    features = {"inputs": prompt, "targets": response}
    if other is not None:
        features["mismatched_targets"] = other
    arrays = {name: np.array(tokens, np.int32) for name, tokens in features.items()}
    return arrays | {"rewards": np.array([reward], np.float32)}


def test_rows_by_hand():
    first = example([5, 1], [7, 8, 1], 0.5, [9, 1])
    second = example([6, 6, 1], [4, 1], -2.0, [3, 3, 1])
    batch = fill_rows(
        [[first, second], [second], []], lengths={"inputs": 6, "targets": 5}, max_examples=3
    )
    expected = {
        "encoder_input_tokens": [[5, 1, 6, 6, 1, 0], [6, 6, 1, 0, 0, 0], [0] * 6],
        "encoder_segment_ids": [[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0], [0] * 6],
        "encoder_positions": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0], [0] * 6],
        "decoder_target_tokens": [[7, 8, 1, 4, 1], [4, 1, 0, 0, 0], [0] * 5],
        "decoder_input_tokens": [[0, 7, 8, 0, 4], [0, 4, 1, 0, 0], [0] * 5],
        "decoder_loss_weights": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5],
        "decoder_segment_ids": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0], [0] * 5],
        "decoder_positions": [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0] * 5],
        "mismatched_decoder_target_tokens": [[9, 1, 3, 3, 1], [3, 3, 1, 0, 0], [0] * 5],
        "mismatched_decoder_input_tokens": [[0, 9, 0, 3, 3], [0, 3, 3, 1, 0], [0] * 5],
        "mismatched_decoder_loss_weights": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0] * 5],
        "mismatched_decoder_segment_ids": [[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [0] * 5],
        "mismatched_decoder_positions": [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0], [0] * 5],
        "rewards": [[0.5, -2.0, 0.0], [-2.0, 0.0, 0.0], [0.0] * 3],
        "reward_weights": [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3],
    }
    assert set(batch) == set(expected)
    for name, rows in expected.items():
        dtype = np.float32 if "reward" in name else np.int32
        np.testing.assert_array_equal(batch[name], np.array(rows, dtype), strict=True)
    assert text_lengths([first, second]).tolist() == [[2, 3, 2], [3, 2, 3]]


ROWS = 150
LENGTHS = {"inputs": 24, "targets": 20}


@pytest.fixture(params=[True, False], ids=["in memory", "streamed"])
def task(request, tmp_path, monkeypatch):
    """150 examples of many lengths, the i-th with reward i, in windows of 40."""
    monkeypatch.setattr(batches, "WINDOW", 40)
    rng = np.random.default_rng(0)
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "prompt": f"{i}".ljust(rng.integers(3, 24), "p"),
            "completion": "c" * rng.integers(1, 24),
            "reward": i,
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks.feedback_task(
        FeedbackFile(str(path), 0.0),
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        num_input_examples={"train": ROWS, "validation": 0} if request.param else None,
    )


def take(task, count, **options):
    options = {"batch_size": 4, "seed": 0, "max_examples": 8, "lengths": LENGTHS, **options}
    return list(itertools.islice(batches.train_batches(task, **options), count))


def rewards_of(some):
    return [int(r) for b, _ in some for r in b["rewards"][b["reward_weights"] > 0]]


def test_an_epoch_of_packed_rows_has_each_example_once_as_it_is_unpacked(task):
    alone = {
        int(batch["rewards"][0, 0]): batch
        for batch, _ in take(task, ROWS, max_examples=1, batch_size=1)
    }
    assert len(alone) == ROWS
    seen = Counter()
    for batch, position in take(task, 400):
        for row, slot in np.argwhere(batch["reward_weights"]):
            number = int(batch["rewards"][row, slot])
            seen[number] += 1
            for name in ("encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens"):
                segments = batch[f"{name.partition('_')[0]}_segment_ids"][row]
                ours = batch[name][row][segments == slot + 1]
                theirs = alone[number][name][0][: len(ours)]
                np.testing.assert_array_equal(ours, theirs)
        if position.epoch == 2:
            break
    assert set(seen) == set(range(ROWS))
    assert set(seen.values()) <= {2, 3}  # the batch that begins a third epoch
    assert sum(seen.values()) < 2 * ROWS + 32


def test_epochs_differ_and_follow_from_the_seed(task):
    ours, again, others = (rewards_of(take(task, 40, seed=seed)) for seed in (3, 3, 4))
    assert ours == again
    assert ours != others
    assert len({tuple(ours[:ROWS]), tuple(ours[ROWS : 2 * ROWS])}) == 2


def test_every_position_goes_on_as_if_uninterrupted(task):
    whole = take(task, 40)
    assert {position.epoch for _, position in whole} >= {0, 1}
    assert len({position.window for _, position in whole}) > 2
    for number in range(0, 39, 5):
        resumed = take(task, 39 - number, start=whole[number][1])
        for (before, place), (after, again) in zip(whole[number + 1 :], resumed, strict=True):
            assert place == again
            jax.tree.map(np.testing.assert_array_equal, before, after)


def test_packed_evaluation_is_one_pass(task):
    options = {"split": "train", "lengths": LENGTHS, "max_examples": 8, "batch_size": 6}
    one_pass = list(batches.evaluation_batches(task, **options))
    seen = [int(r) for b in one_pass for r in b["rewards"][b["reward_weights"] > 0]]
    assert sorted(seen) == list(range(ROWS))
    assert {batch["rewards"].shape for batch in one_pass} == {(6, 8)}


def test_packing_needs_no_tensorflow():
    code = "import sys, dro_jax.data.packing; assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    "DRO_JAX_FEEDBACK_FILE" not in os.environ,
    reason="DRO_JAX_FEEDBACK_FILE does not name a real feedback file",
)
def test_real_file_fills_the_decoder_at_512():
    file = FeedbackFile(os.environ["DRO_JAX_FEEDBACK_FILE"])
    vocabulary = load_vocabulary(None)
    rows = list(feedback.read_feedback(file, "train"))[: packing.WINDOW]
    lengths = np.array(
        [
            [min(512, len(vocabulary.encode(text)) + 1) for text in (row.prompt, row.completion)]
            for row in rows
        ]
    )
    packed = pack(lengths, [512, 512], 16)
    assert lengths[:, 1].sum() / (512 * len(packed)) > 0.95
