"""Batches: epochs, shuffling, resuming at a step, padding of the last evaluation batch."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tensorflow as tf

from dro_jax.data import batches, feedback, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import UsageError

LENGTHS = {"inputs": 6, "targets": 5}
ROWS = 23


def make_task(path, *, rows=ROWS, in_memory=True, validation_fraction=0.0):
    """A task whose i-th row has prompt "i" and reward i."""
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{i}", "completion": "c" * (i % 4 + 1), "reward": i}) + "\n"
            for i in range(rows)
        )
    )
    return tasks.feedback_task(
        FeedbackFile(str(path), validation_fraction),
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        num_input_examples={"train": rows, "validation": rows} if in_memory else None,
    )


def take(task, count, **options):
    return [batch for batch, _ in take_positions(task, count, **options)]


def take_positions(task, count, **options):
    options = {"lengths": LENGTHS, "batch_size": 4, "seed": 0, **options}
    return list(itertools.islice(batches.train_batches(task, **options), count))


def rows_of(some_batches):
    return np.concatenate([batch["rewards"][:, 0] for batch in some_batches]).astype(int).tolist()


@pytest.fixture(params=[True, False], ids=["in memory", "streamed"])
def task(request, tmp_path):
    return make_task(tmp_path / "rows.jsonl", in_memory=request.param)


def test_batch_contract(task):
    (batch,) = take(task, 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "encoder_input_tokens": ((4, 6), np.int32),
        "decoder_input_tokens": ((4, 5), np.int32),
        "decoder_target_tokens": ((4, 5), np.int32),
        "decoder_loss_weights": ((4, 5), np.int32),
        "rewards": ((4, 1), np.float32),
        "reward_weights": ((4, 1), np.float32),
    }
    assert all(type(array) is np.ndarray for array in batch.values())
    for prompt, reward in zip(batch["encoder_input_tokens"], batch["rewards"], strict=True):
        assert bytes((prompt[prompt > 1] - 3).tolist()) == f"{reward[0]:.0f}".encode()


def test_each_epoch_shows_each_example_once_in_a_new_order(task):
    rows = rows_of(take(task, ROWS))  # 4 epochs: 23 batches of 4
    epochs = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(ROWS))}) == 5


def test_order_follows_from_the_seed(task):
    assert rows_of(take(task, 8, seed=3)) == rows_of(take(task, 8, seed=3))
    assert rows_of(take(task, 8, seed=3)) != rows_of(take(task, 8, seed=4))


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


def test_in_memory_or_streamed_the_order_is_the_same(tmp_path):
    orders = [
        rows_of(take(make_task(tmp_path / "rows.jsonl", in_memory=in_memory), 12))
        for in_memory in (True, False)
    ]
    assert orders[0] == orders[1]


def test_fewer_rows_than_a_batch(tmp_path):
    rows = rows_of(take(make_task(tmp_path / "rows.jsonl", rows=3), 6, batch_size=8))
    assert all(sorted(rows[start : start + 3]) == [0, 1, 2] for start in range(0, 48, 3))


def test_batches_are_made_in_a_thread_that_ends_with_them(task):
    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("prefetched")]

    opened = batches.train_batches(task, lengths=LENGTHS, batch_size=4, seed=0)
    assert threads() == []
    expected = take_positions(task, 3)
    for (batch, position), (again, place) in zip(opened, expected, strict=False):
        assert len(threads()) == 1
        # The thread gets ahead; the place stays that of the batch in hand.
        time.sleep(0.3)
        assert position == place
        jax.tree.map(np.testing.assert_array_equal, batch, again)
    del opened
    assert threads() == []


def test_the_process_ends_with_batches_still_open(tmp_path):
    make_task(tmp_path / "rows.jsonl")
    code = f"""
from dro_jax.data import batches, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.vocabulary import load_vocabulary
task = tasks.feedback_task(
    FeedbackFile({str(tmp_path / "rows.jsonl")!r}, 0.0),
    vocabulary=load_vocabulary(None), statistics=RewardStatistics(0.0, 1.0),
)
opened = batches.train_batches(task, lengths={LENGTHS}, batch_size=4, seed=0)
print(next(opened)[1].row)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_an_abandoned_epoch_ends_at_once():
    # A pipeline that TensorFlow tunes ends, one time in six, only when the tuner wakes up next: 1.2 s later here,
    # and later the longer it has run.
    examples = tf.data.Dataset.range(3000).map(
        lambda i: {"rewards": tf.cast(i, tf.float32)[tf.newaxis]}, num_parallel_calls=2
    )
    opened = [batches.windows(examples) for _ in range(24)]
    for windows in opened:
        next(windows)
    time.sleep(1.4)
    begin = time.perf_counter()
    for windows in opened:
        windows.close()
    assert time.perf_counter() - begin < 0.5


def test_evaluation_is_one_pass_in_file_order_padded(task):
    options = {"split": "train", "lengths": LENGTHS, "batch_size": 5}
    one_pass = list(batches.evaluation_batches(task, **options))
    assert [batch["rewards"].shape for batch in one_pass] == [(5, 1)] * 5
    assert rows_of(one_pass)[:ROWS] == list(range(ROWS))
    weights = np.concatenate([batch["reward_weights"] for batch in one_pass])
    np.testing.assert_array_equal(weights[:, 0], [1] * ROWS + [0, 0])
    for name, array in one_pass[-1].items():
        assert array.dtype == one_pass[0][name].dtype
        assert not array[3:].any()
        assert array[:3].any()


def test_empty_splits(tmp_path):
    task = make_task(tmp_path / "rows.jsonl")
    options = {"lengths": LENGTHS, "batch_size": 5}
    assert list(batches.evaluation_batches(task, split="validation", **options)) == []
    task = make_task(tmp_path / "rows.jsonl", rows=2, validation_fraction=0.999)
    with pytest.raises(UsageError, match="task feedback: the training split has no example; check"):
        next(batches.train_batches(task, seed=0, **options))


@pytest.mark.skipif(
    "DRO_JAX_FEEDBACK_FILE" not in os.environ,
    reason="DRO_JAX_FEEDBACK_FILE does not name a real feedback file",
)
def test_real_file_gives_every_row_once():
    file = FeedbackFile(os.environ["DRO_JAX_FEEDBACK_FILE"])
    summary = feedback.summarise(file)
    task = tasks.feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=summary.rewards,
        num_input_examples=summary.num_input_examples,
    )
    lengths = {"inputs": 64, "targets": 64}
    steps = -(-summary.train_rows // 32)
    seen = take(task, steps, lengths=lengths, batch_size=32)
    rewards = np.concatenate([batch["rewards"][:, 0] for batch in seen])[: summary.train_rows]
    expected = [
        summary.rewards.normalise(row.reward) for row in feedback.read_feedback(file, "train")
    ]
    np.testing.assert_array_equal(np.sort(rewards), np.sort(np.float32(expected)))
    assert abs(rewards.mean()) < 1e-5
    assert abs(rewards.std() - 1) < 1e-5
    options = {"split": "validation", "lengths": lengths, "batch_size": 32}
    one_pass = batches.evaluation_batches(task, **options)
    assert sum(b["reward_weights"].sum() for b in one_pass) == summary.validation_rows
