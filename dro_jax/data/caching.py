"""A feedback task on disk: tokenised once, with the reference's log-probabilities, in SeqIO's cached form.

A folder `<cache>/feedback` holds what SeqIO reads (TFRecord shards, info and stats of each split, COMPLETED)
and a manifest: what the cache was made from and for, and the size of every shard.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from dro_jax.data.packing import Example
from dro_jax.errors import UsageError

TASK = "feedback"
SPLITS = ("train", "validation")
SHARD = 4096
"""Examples a shard; the unit in which an interrupted caching goes on."""

Facts = dict[str, Any]
Score = Callable[[list[Example]], dict[str, np.ndarray]]

_MANIFEST = "manifest.json"
_UNFINISHED = "unfinished.json"
_COMPLETED = "COMPLETED"
_REMAKE = "delete the folder and run `dro_jax cache` again, or choose another"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache is.

    Attributes:
        facts: what it was made from and for, JSON-ready; training compares them with its own.
        counts: rows skipped, cut and used, and the reward statistics: for people and for training.
        shards: bytes of each shard, by file name.
    """

    facts: Facts
    counts: Facts
    shards: dict[str, int]


def write(
    directory: epath.PathLike,
    task: seqio.Task,
    *,
    facts: Facts,
    counts: Facts,
    score: Score,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Writes a task's cache, going on after the last whole shard of an earlier call.

    Args:
        directory: the cache; the task's folder is made in it.
        task: of `feedback_task`, with `num_input_examples`.
        facts: of the manifest; an unfinished cache of other facts is refused.
        counts: of the manifest.
        score: from a shard's examples, as the task tokenises them, to what is stored with each: arrays
            [examples] by feature name, such as reference_log_probs.
        progress: takes the number of examples done, those of an earlier call included.

    Returns:
        The manifest, which has been written last.

    Raises:
        UsageError: the folder holds another cache.
    """
    folder = epath.Path(directory) / TASK
    if (folder / _COMPLETED).exists():
        found = read_manifest(directory)
        refuse_differences(folder, found.facts, facts)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    if unfinished.exists():
        refuse_differences(folder, _load(unfinished), facts)
    else:
        _replace(unfinished, json.dumps(facts, indent=2).encode())
    done = 0
    shards: dict[str, int] = {}
    for split in SPLITS:
        total = task.num_input_examples(split) or 0
        number = max(1, -(-total // SHARD))
        features: dict[str, Any] = {}
        chunks = _chunks(task, split)
        for index in range(number):
            shard = folder / f"{split}.tfrecord-{index:05d}-of-{number:05d}"
            chunk = next(chunks, [])
            if chunk and not features:
                features = {name: _described(array) for name, array in chunk[0].items()}
            if not shard.exists():
                scores = score(chunk) if chunk else {}
                _write_shard(shard, chunk, scores)
            if chunk and index == 0:
                # A shard of an earlier call knows what it was scored with.
                features |= dict.fromkeys(
                    _scored(shard, features), _described(np.zeros(1, np.float32))
                )
            shards[shard.name] = shard.stat().length
            done += len(chunk)
            progress(done)
        info = {"num_shards": number, "features": features, "seqio_version": seqio.__version__}
        _replace(folder / f"info.{split}.json", json.dumps(info).encode())
        _replace(folder / f"stats.{split}.json", json.dumps({"examples": total}).encode())
    manifest = Manifest(facts, counts, shards)
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    _replace(folder / _MANIFEST, text.encode())
    _replace(folder / _COMPLETED, b"")
    unfinished.unlink(missing_ok=True)
    return manifest


def read_manifest(directory: epath.PathLike) -> Manifest:
    """Reads the manifest of a finished cache and checks that its shards are all there, whole.

    Raises:
        UsageError: there is none, it is unfinished or damaged, or a shard is missing or cut off.
    """
    folder = epath.Path(directory) / TASK
    if not folder.is_dir():
        raise UsageError(f"{directory}: no cache here; make one with `dro_jax cache`")
    if not (folder / _COMPLETED).exists():
        raise UsageError(f"{folder}: the cache is not finished; run the same `dro_jax cache` again")
    fields = _load(folder / _MANIFEST)
    try:
        manifest = Manifest(**fields)
        shards = dict(manifest.shards.items())
    except (TypeError, AttributeError) as error:
        raise UsageError(f"{folder / _MANIFEST}: is not a manifest; {_REMAKE}") from error
    for name, size in shards.items():
        shard = folder / name
        if not shard.exists():
            raise UsageError(f"{shard}: is missing; {_REMAKE}")
        if shard.stat().length != size:
            raise UsageError(
                f"{shard}: has {shard.stat().length} bytes where {size} were written; {_REMAKE}"
            )
    return manifest


def refuse_differences(folder: epath.Path, found: Facts, expected: Facts) -> None:
    """Raises UsageError naming what differs where a cache was made from or for something else."""
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        detail = ", ".join(
            f"{name} {found.get(name)!r} there, {expected[name]!r} here" for name in differing[:3]
        )
        raise UsageError(f"{folder}: the cache was made with another {detail}; {_REMAKE}")


def _chunks(task: seqio.Task, split: str) -> Iterator[list[Example]]:
    """The examples of a split in file order, as they are before anything is cut, a shard at a time."""
    dataset = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False))
    chunk: list[Example] = []
    for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        chunk.append(example)
        if len(chunk) == SHARD:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_shard(
    shard: epath.Path, examples: list[Example], scores: Mapping[str, np.ndarray]
) -> None:
    partial = epath.Path(f"{shard}.partial")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for number, example in enumerate(examples):
            extra = {name: array[number : number + 1] for name, array in scores.items()}
            record = seqio.utils.dict_to_tfexample({**example, **extra})
            writer.write(record.SerializeToString())
    partial.replace(shard)


def _scored(shard: epath.Path, features: Mapping[str, Any]) -> list[str]:
    """Names of what a shard's examples hold beside the task's own features."""
    record = next(tf.data.TFRecordDataset(str(shard)).take(1).as_numpy_iterator())
    names = tf.train.Example.FromString(record).features.feature
    return sorted(set(names) - set(features))


def _described(array: np.ndarray) -> Facts:
    return {"shape": [None, *array.shape[1:]], "dtype": array.dtype.name}


def _load(path: epath.Path) -> Facts:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is missing or damaged; {_REMAKE}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: is damaged; {_REMAKE}")
    return fields


def _replace(path: epath.Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = epath.Path(f"{path}.partial")
    partial.write_bytes(content)
    partial.replace(path)
