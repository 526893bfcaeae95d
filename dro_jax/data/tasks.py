"""The SeqIO task over a feedback file."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from dro_jax.data.feedback import (
    FeedbackFile,
    RewardStatistics,
    Split,
    Triplet,
    prompt_id,
    read_feedback,
    split_of,
    summarise,
)
from dro_jax.data.mismatched import mismatch_offset
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import UsageError

SHUFFLE_BUFFER_SIZE = 65_536
"""Files up to this many rows are shuffled as a whole; a row takes about 8 KB at 512 + 512 tokens."""

# Rows handed to TensorFlow at once: one by one each costs five times as much.
_ROWS_A_CHUNK = 128


class FeedbackSource(seqio.DataSource):
    """Streams the usable rows of a feedback file, in file order.

    Examples are {"inputs": string, "targets": string, "rewards": float64 scalar, raw}, with
    "mismatched_targets", the completion of another prompt, and "prompt_ids", int64 [1], where asked for.
    """

    def __init__(
        self,
        file: FeedbackFile,
        num_input_examples: Mapping[str, int] | None = None,
        *,
        min_reward: float = -math.inf,
        mismatched: bool = False,
        prompt_ids: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
            file: what to read, and how to judge and split it.
            num_input_examples: rows in each split, if it is known.
            min_reward: training rows with a lower one are left out.
            mismatched: whether to give each row another one's completion too, always the same.
            prompt_ids: whether to give each row a number that is its prompt's.
        """
        super().__init__(splits=("train", "validation"), num_input_examples=num_input_examples)
        self.file = file
        self.min_reward = min_reward
        self.mismatched = mismatched
        self.prompt_ids = prompt_ids

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: the rows are one stream, of which every row has its partner elsewhere in it."""
        return False

    def list_shards(self, split: str) -> list[str]:
        """Returns the file, or the pattern of the files, which are read one after the other."""
        return [self.file.path]

    def get_dataset(
        self,
        split: Split = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Returns one pass over a split in file order; the task shuffles after tokenising."""
        if shard_info is not None and shard_info.num_shards > 1:
            raise ValueError(f"one stream cannot be read as {shard_info.num_shards} shards")

        signature = {
            "inputs": tf.TensorSpec([None], tf.string),
            "targets": tf.TensorSpec([None], tf.string),
            "rewards": tf.TensorSpec([None], tf.float64),
        }
        if self.mismatched:
            signature["mismatched_targets"] = tf.TensorSpec([None], tf.string)
        if self.prompt_ids:
            signature["prompt_ids"] = tf.TensorSpec([None, 1], tf.int64)

        def chunks() -> Iterator[dict[str, Any]]:
            rows = self._rows(split)
            others = self._mismatched_completions(split) if self.mismatched else iter(())
            while chunk := list(itertools.islice(rows, _ROWS_A_CHUNK)):
                features: dict[str, Any] = {
                    "inputs": [row.prompt for row in chunk],
                    "targets": [row.completion for row in chunk],
                    "rewards": [row.reward for row in chunk],
                    "mismatched_targets": list(itertools.islice(others, len(chunk))),
                    "prompt_ids": [[_signed(prompt_id(row.prompt))] for row in chunk],
                }
                yield {name: features[name] for name in signature}

        return tf.data.Dataset.from_generator(chunks, output_signature=signature).unbatch()

    def _rows(self, split: Split) -> Iterator[Triplet]:
        rows = read_feedback(self.file, split)
        if split != "train":
            return rows
        return (row for row in rows if row.reward >= self.min_reward)

    def _mismatched_completions(self, split: Split) -> Iterator[str]:
        prompt_ids = np.array([prompt_id(row.prompt) for row in self._rows(split)], np.uint64)
        offset = mismatch_offset(prompt_ids)
        for start, stop in ((offset, None), (0, offset)):
            for row in itertools.islice(self._rows(split), start, stop):
                yield row.completion


def _signed(number: int) -> int:
    return number - 2**63


def feedback_task(
    file: FeedbackFile,
    *,
    vocabulary: seqio.Vocabulary,
    statistics: RewardStatistics,
    num_input_examples: Mapping[str, int] | None = None,
    min_reward: float = -math.inf,
    mismatched: bool = False,
    prompt_ids: bool = False,
    drop_overlong: bool = False,
    keep_text: bool = False,
    metric_fns: Sequence[Callable[..., Any]] = (),
    name: str = "feedback",
) -> seqio.Task:
    """Returns the task that turns a feedback file into tokens and normalised rewards.

    Features: `inputs` and `targets`, int32 [length], encoded as `encode_prompt` and
    `encode_completion` do; `rewards`, float32 [1], normalised by `statistics`; where asked for,
    `mismatched_targets`, int32 [length], and `prompt_ids`, int64 [1]. Splits: "train" and "validation".

    Args:
        file: what to read, and how to judge and split it.
        vocabulary: of prompts and completions alike.
        statistics: of the training split the model was (or will be) trained on, before any
            completion is dropped.
        num_input_examples: rows in each split (`FeedbackSummary.num_input_examples`). Where it is
            known and small, training tokenises once and keeps the examples in memory.
        min_reward: training rows with a lower raw reward are left out.
        mismatched: give each example the completion of another prompt too, for KTO.
        prompt_ids: give each example its prompt's number, to find the others of that prompt.
        drop_overlong: leave out completions that do not fit, instead of cutting them.
        keep_text: give each example its texts too, as `inputs_pretokenized` and so on.
        metric_fns: of SeqIO's evaluation.
        name: of the task, unique among those that are cached.
    """
    text = seqio.Feature(vocabulary=vocabulary, dtype=tf.int32)
    output_features: dict[str, Any] = {
        "inputs": text,
        "targets": text,
        "rewards": seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    }
    if mismatched:
        output_features["mismatched_targets"] = text
    if prompt_ids:
        output_features["prompt_ids"] = seqio.ContinuousFeature(dtype=tf.int64, rank=1)
    return seqio.Task(
        name,
        source=FeedbackSource(
            file,
            num_input_examples,
            min_reward=min_reward,
            mismatched=mismatched,
            prompt_ids=prompt_ids,
        ),
        preprocessors=[
            functools.partial(_normalise_rewards, statistics=statistics),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=keep_text),
            seqio.CacheDatasetPlaceholder(),
            functools.partial(_append_end, drop_overlong=drop_overlong),
        ],
        output_features=output_features,
        metric_fns=list(metric_fns),
        shuffle_buffer_size=SHUFFLE_BUFFER_SIZE,
    )


def register_feedback_task(
    name: str,
    file: FeedbackFile,
    *,
    vocabulary_file: str | None = None,
    mismatched: bool = False,
    keep_text: bool = False,
    metric_fns: Sequence[Callable[..., Any]] = (),
) -> seqio.Task:
    """Registers a feedback task with SeqIO, for tools that find tasks by name.

    A module that calls this is what `seqio_cache_tasks --module_import` takes:

        register_feedback_task("feedback", FeedbackFile("my.jsonl"))

    A task called "feedback" that it caches can be trained from as CACHE_DIR, by the same settings.

    Args:
        name: of the task.
        file: what to read, and how to judge and split it.
        vocabulary_file: a SentencePiece model, or None for bytes.
        mismatched: give each example the completion of another prompt too, for KTO.
        keep_text: give each example its texts too, for readers.
        metric_fns: of SeqIO's evaluation.

    Raises:
        UsageError: as `summarise` and `load_vocabulary`.
    """
    summary = summarise(file)
    task = feedback_task(
        file,
        vocabulary=load_vocabulary(vocabulary_file),
        statistics=summary.rewards,
        num_input_examples=summary.num_input_examples,
        min_reward=summary.top_reward,
        mismatched=mismatched,
        keep_text=keep_text,
        metric_fns=metric_fns,
        name=name,
    )
    seqio.TaskRegistry.add_provider(name, task)
    return task


@dataclasses.dataclass(frozen=True)
class OverlongCounts:
    """Usable rows of a file, and how many of them exceed the token limits, in both splits."""

    rows: int
    prompts: int
    completions: int

    def describe(self, *, drop_overlong: bool = False) -> str:
        """Returns the counts as one line for the log."""
        fate = "dropped" if drop_overlong else "cut"
        return (
            f"of {self.rows} rows {self.prompts} prompts are cut to the length limit and "
            f"{self.completions} completions {fate}"
        )


def count_overlong(
    file: FeedbackFile,
    *,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    drop_overlong: bool = False,
) -> OverlongCounts:
    """Counts the texts that do not fit, end of sequence included, by tokenising the file once.

    Args:
        file: what to read.
        vocabulary: of prompts and completions.
        lengths: the token limits of "inputs" and "targets".
        drop_overlong: whether the task leaves out overlong completions.

    Raises:
        UsageError: as `read_feedback`; or dropping would leave no row to train on.
    """
    rows = prompts = completions = train_rows_left = 0
    for row in read_feedback(file):
        rows += 1
        prompts += len(vocabulary.encode(row.prompt)) >= lengths["inputs"]
        overlong = len(vocabulary.encode(row.completion)) >= lengths["targets"]
        completions += overlong
        if not (drop_overlong and overlong):
            train_rows_left += split_of(row.prompt, file.validation_fraction) == "train"
    if not train_rows_left:
        raise UsageError(
            f"{file.path}: no training row has a completion within {lengths['targets']} tokens; "
            "raise the limit of targets or set drop_overlong = False"
        )
    return OverlongCounts(rows, prompts, completions)


def _normalise_rewards(dataset: tf.data.Dataset, statistics: RewardStatistics) -> tf.data.Dataset:
    """Turns the raw float64 reward [] into normalised float32 rewards [1]."""

    def normalise(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # In float64, so that 1e9 + 0.1 and 1e9 + 0.2 stay apart.
        reward = statistics.normalise(example["rewards"])
        return {**example, "rewards": tf.cast(reward, tf.float32)[tf.newaxis]}

    return dataset.map(normalise)


def _append_end(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None,
    drop_overlong: bool,
) -> tf.data.Dataset:
    """Appends the end of sequence as `encode_prompt` and `encode_completion` do.

    SeqIO cuts every feature to its limit after the last preprocessor, so targets need no cut here.
    """
    end = [output_features["inputs"].vocabulary.eos_id]

    def append(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        inputs = example["inputs"]
        if sequence_length is not None:
            inputs = inputs[: sequence_length["inputs"] - 1]
        completions: dict[str, tf.Tensor] = {
            name: tf.concat([example[name], end], axis=0)
            for name in ("targets", "mismatched_targets")
            if name in example
        }
        return {**example, "inputs": tf.concat([inputs, end], axis=0), **completions}

    dataset = dataset.map(append, num_parallel_calls=tf.data.AUTOTUNE)
    if sequence_length is not None and drop_overlong:
        limit = sequence_length["targets"]
        dataset = dataset.filter(lambda example: tf.size(example["targets"]) <= limit)
    return dataset
