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

    A task with `prompt_ids` gives pairs: rows 2i and 2i + 1 are two completions of one prompt, other
    ones in every epoch. A completion that is left over sits that epoch out.

    Args:
        task: a `feedback_task`.
        lengths: the token limits of "inputs" and "targets".
        batch_size: rows a batch; even for a task with pairs.
        seed: of the order.
        start_step: batches to pass over, so that the first one yielded is the one an uninterrupted
            run would see at that step. They are read all the same.

    Raises:
        UsageError: while iterating, when the task has no training example.
    """
    examples = _examples(task, "train", lengths)
    if (task.num_input_examples("train") or math.inf) <= task.shuffle_buffer_size:
        examples = examples.cache()
    examples = examples.shuffle(task.shuffle_buffer_size, seed=seed)
    examples = _side_by_side(task, examples).repeat()
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
    `decoder_loss_weights` are 0 too. An empty split gives no batch. Pairs as in `train_batches`.
    """
    batches = _side_by_side(task, _examples(task, split, lengths)).batch(batch_size)
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
    mismatched, prompt_ids = (
        name in task.output_features for name in ("mismatched_targets", "prompt_ids")
    )
    limits = dict(lengths)
    if mismatched:
        limits["mismatched_targets"] = lengths["targets"]
    examples = task.get_dataset(limits, split=split, shuffle=False, try_in_mem_cache=False)
    # The task has cut its features to these lengths, and checking doubles the cost.
    converter = FeedbackFeatureConverter(
        mismatched=mismatched, prompt_ids=prompt_ids, apply_length_check=False
    )
    one = dict.fromkeys(("rewards", "prompt_ids"), 1)
    return converter(
        examples, {**limits, **{k: n for k, n in one.items() if k in task.output_features}}
    )


def _side_by_side(task: seqio.Task, examples: tf.data.Dataset) -> tf.data.Dataset:
    """Puts the examples of one prompt next to each other, two by two, where the task has prompt ids."""
    if "prompt_ids" not in task.output_features:
        return examples
    pairs = examples.group_by_window(
        key_func=lambda example: example["prompt_ids"][0],
        reduce_func=lambda _, window: window.batch(2, drop_remainder=True),
        window_size=2,
    )
    # A number of 64 bits is nothing for an accelerator, and has done its work.
    return pairs.unbatch().map(
        lambda example: {k: v for k, v in example.items() if k != "prompt_ids"}
    )
