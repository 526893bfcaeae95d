"""NumPy batches of a feedback task, endless for training and one pass for evaluation."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from dro_jax.data.packing import WINDOW, Batch, Example, fill_rows, pack, text_lengths
from dro_jax.data.prefetching import prefetched
from dro_jax.errors import UsageError

Row = list[Example]


@dataclasses.dataclass(frozen=True, order=True)
class Position:
    """Where the endless stream of training rows goes on: a row of a window of an epoch.

    It is of the whole stream, however many processes train on it.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0


def train_batches(
    task: seqio.Task,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    max_examples: int = 1,
    start: Position = Position(),
) -> Iterator[tuple[Batch, Position]]:
    """Returns an endless iterator over shuffled batches of the training split, made ahead in a thread.

    Every epoch shows each example exactly once, in an order of its own that follows from the seed;
    a batch may span two epochs. Its arrays are those of `packing.fill_rows`.

    A task with `prompt_ids` gives pairs, which are not packed: rows 2i and 2i + 1 are two completions of
    one prompt, other ones in every epoch. A completion that is left over sits that epoch out. The
    examples whose partner has not come yet are held in memory.

    Args:
        task: a `feedback_task`.
        lengths: tokens a row holds of "inputs" and "targets".
        batch_size: rows of a batch, of all processes together; even for a task with pairs.
        seed: of the order.
        max_examples: the most examples a row holds; 1 is unpacked.
        start: where an earlier run got to.

    Yields:
        A batch, the same in every process, and where the batch after it starts.

    Raises:
        UsageError: while iterating, when the task has no training example.
    """
    rows = _train_rows(task, lengths, seed, max_examples, start)

    def batches() -> Iterator[tuple[Batch, Position]]:
        while True:
            batch, positions = zip(*itertools.islice(rows, batch_size), strict=True)
            yield fill_rows(batch, lengths=lengths, max_examples=max_examples), positions[-1]

    return prefetched(batches())


def evaluation_batches(
    task: seqio.Task,
    *,
    split: str,
    lengths: Mapping[str, int],
    batch_size: int,
    max_examples: int = 1,
) -> Iterator[Batch]:
    """Returns one pass over a split, in file order where it is not packed, in batches of one size.

    The last batch is filled up with empty rows, whose `reward_weights` and `decoder_loss_weights` are 0.
    An empty split gives no batch. Arguments as of `train_batches`.
    """
    rows = itertools.chain.from_iterable(
        pack_window(window, lengths, max_examples)
        for window in _readable(task, windows(_examples(task, split, lengths)))
    )
    while batch := list(itertools.islice(rows, batch_size)):
        # An empty row has no shape of its own: the first one is never empty.
        full = [*batch, *[[]] * (batch_size - len(batch))]
        yield fill_rows(full, lengths=lengths, max_examples=max_examples)


def _train_rows(
    task: seqio.Task, lengths: Mapping[str, int], seed: int, max_examples: int, start: Position
) -> Iterator[tuple[Row, Position]]:
    """Rows from `start` on, each with the position of the next."""
    in_memory = (task.num_input_examples("train") or math.inf) <= task.shuffle_buffer_size
    examples = _examples(task, "train", lengths)
    if in_memory:
        examples = examples.cache()
    for epoch in itertools.count(start.epoch):
        order = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        if in_memory:
            shuffled = examples.shuffle(task.shuffle_buffer_size, seed=order)
        else:
            shuffled = _examples(task, "train", lengths, seed=order)
        first = start.window if epoch == start.epoch else 0
        number = first - 1
        for number, window in enumerate(_readable(task, windows(shuffled, first)), first):
            rows = pack_window(window, lengths, max_examples)
            if max_examples > 1:
                # They come longest first.
                rng = np.random.default_rng([seed, epoch, number])
                rows = [rows[i] for i in rng.permutation(len(rows))]
            resumed = (epoch, number) == (start.epoch, start.window)
            for i in range(start.row if resumed else 0, len(rows)):
                last = i + 1 == len(rows)
                yield rows[i], Position(epoch, number + last, 0 if last else i + 1)
        if number < 0:
            raise UsageError(
                f"task {task.name}: the training split has no example; check the feedback file"
            )


def pack_window(window: list[Example], lengths: Mapping[str, int], max_examples: int) -> list[Row]:
    """Returns the examples of a window as rows; see `packing.pack`."""
    sizes = text_lengths(window)
    limits = [lengths["inputs"], *[lengths["targets"]] * (sizes.shape[1] - 1)]
    return [[window[i] for i in row] for row in pack(sizes, limits, max_examples)]


def windows(examples: tf.data.Dataset, first: int = 0) -> Iterator[list[Example]]:
    """Yields examples as NumPy arrays, `WINDOW` at a time, from the `first` window on.

    Where they have prompt ids, those of one prompt come two by two, and what has no partner is left out.
    """
    if "prompt_ids" in examples.element_spec:
        examples = examples.group_by_window(
            key_func=lambda example: example["prompt_ids"][0],
            reduce_func=lambda _, group: group,
            window_size=2,
        )
    batched = examples.skip(first * WINDOW).ragged_batch(WINDOW).prefetch(1)
    # Closing a pipeline that TensorFlow tunes may take as long as it has run, up to a minute (2.21).
    options = tf.data.Options()
    options.autotune.enabled = False
    for window in batched.with_options(options).as_numpy_iterator():
        count = len(window["rewards"])
        columns = {name: list(feature) for name, feature in window.items()}
        if ids := columns.pop("prompt_ids", None):
            # Pairs come first; what is left over of a prompt comes at the end of an epoch, alone.
            alone = (i for i in range(0, count, 2) if i + 1 == count or ids[i] != ids[i + 1])
            count = next(alone, count)
        if count:
            yield [
                dict(zip(columns, row, strict=True))
                for row in zip(*(c[:count] for c in columns.values()), strict=True)
            ]


def _readable(task: seqio.Task, found: Iterator[list[Example]]) -> Iterator[list[Example]]:
    try:
        yield from found
    except tf.errors.OpError as error:
        where = task.cache_dir or task.source.list_shards("train")[0]
        raise UsageError(
            f"{where}: cannot be read ({str(error).splitlines()[0][:200]}); a cache is made anew by deleting it "
            "and running `dro_jax cache`"
        ) from error


def _examples(
    task: seqio.Task, split: str, lengths: Mapping[str, int], seed: int | None = None
) -> tf.data.Dataset:
    """Returns one pass over a split: in file order, or shuffled by a seed."""
    # The GPUs' memory belongs to JAX. A program that has run TensorFlow has decided for itself.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    limits = {**lengths, "mismatched_targets": lengths["targets"]}
    return task.get_dataset(
        {name: limits[name] for name in limits if name in task.output_features},
        split=split,
        shuffle=seed is not None,
        seed=seed,
        try_in_mem_cache=False,
        # What `dro_jax cache` or seqio_cache_tasks made, where SeqIO has been told of it.
        use_cached=task.cache_dir is not None,
    )
