"""NumPy batches of a feedback task, endless for training and one pass for evaluation."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from dro_jax.data.feature_converter import FeedbackFeatureConverter
from dro_jax.errors import UsageError

Batch = dict[str, np.ndarray]


def train_batches(
    task: seqio.Task,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Returns an endless iterator over shuffled batches of the training split.

    Every epoch shows each example exactly once, in an order of its own that follows from the seed;
    a batch may span two epochs. Shapes and dtypes are design.md's batch contract, unpacked.

    Args:
        task: a `feedback_task`.
        lengths: the token limits of "inputs" and "targets".
        batch_size: rows a batch.
        seed: of the order.
        start_step: batches to pass over, so that the first one yielded is the one an uninterrupted
            run would see at that step. They are read all the same.

    Raises:
        UsageError: while iterating, when the task has no training example.
    """
    examples = _examples(task, "train", lengths)
    if (task.num_input_examples("train") or math.inf) <= task.shuffle_buffer_size:
        examples = examples.cache()
    examples = examples.shuffle(task.shuffle_buffer_size, seed=seed).repeat()
    batches = examples.skip(start_step * batch_size).batch(batch_size, drop_remainder=True)
    yield from batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    raise UsageError(
        f"task {task.name}: the training split has no example; check the feedback file"
    )


def evaluation_batches(
    task: seqio.Task, *, split: str, lengths: Mapping[str, int], batch_size: int
) -> Iterator[Batch]:
    """Returns one pass over a split in file order, in batches of one size.

    The last batch is filled up with rows of zeros, whose `reward_weights` and
    `decoder_loss_weights` are 0 too. An empty split gives no batch.
    """
    batches = _examples(task, split, lengths).batch(batch_size)
    for batch in batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        missing = batch_size - len(batch["rewards"])
        yield {
            name: np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
            for name, rows in batch.items()
        }


def _examples(task: seqio.Task, split: str, lengths: Mapping[str, int]) -> tf.data.Dataset:
    """Returns one pass over a split in file order, in the features of a batch."""
    # The GPUs' memory belongs to JAX. A program that has run TensorFlow has decided for itself.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    examples = task.get_dataset(lengths, split=split, shuffle=False, try_in_mem_cache=False)
    # The task has cut its features to these lengths, and checking doubles the cost.
    converter = FeedbackFeatureConverter(apply_length_check=False)
    return converter(examples, {**lengths, "rewards": 1})
