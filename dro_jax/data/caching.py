"""A feedback task on disk: tokenised once, with the reference's log-probabilities, in SeqIO's cached form.

A folder `<cache>/feedback` holds what SeqIO reads (TFRecord shards, info and stats of each split, COMPLETED)
and a manifest: what the cache was made from and for, and the size of every shard.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from dro_jax.data.packing import Example
from dro_jax.errors import UsageError
from dro_jax.whole_files import whole_file, write_whole

TASK = "feedback"
SPLITS = ("train", "validation")
SHARD = 16_384
"""Examples a shard: SeqIO reads several in turns, so that what fits a shuffle buffer has to be one."""

PART = 1024
"""Examples after which an interrupted caching goes on."""

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
        files: bytes of each file that SeqIO reads, by name.
    """

    facts: Facts
    counts: Facts
    files: dict[str, int]


def write(
    directory: epath.PathLike,
    task: seqio.Task,
    *,
    facts: Facts,
    counts: Facts,
    score: Score | None,
    scored: Sequence[str],
    writes: bool = True,
    of_writer: Callable[[Callable[[], str]], str] = lambda work: work(),
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest | None:
    """Writes a task's cache, going on after the last whole part of an earlier call.

    Args:
        directory: the cache; the task's folder is made in it.
        task: of `feedback_task`, with `num_input_examples`.
        facts: of the manifest; a cache of other facts, finished or not, is refused.
        counts: of the manifest.
        score: from some examples, as the task tokenises them, to what is stored with each: float32 arrays
            [examples] by feature name; None where nothing is.
        scored: the names of these features.
        writes: whether this is the process that writes; of several that score together the others write nothing.
        of_writer: gives every process what a function says, or raises, in the one that writes: that one alone knows
            for certain what is there.
        progress: takes the number of examples done, those of an earlier call included.

    Returns:
        The manifest, which has been written last; None in a process that does not write.

    Raises:
        UsageError: the folder holds another cache, or the rows are not as many as they were.
    """
    folder = epath.Path(directory) / TASK
    unfinished = folder / _UNFINISHED

    def begin() -> str:
        if (folder / _COMPLETED).exists():
            found = read_manifest(directory)
            if found is None:
                raise UsageError(
                    f"{folder}: is a cache of seqio_cache_tasks; choose another folder"
                )
            refuse_differences(folder, found.facts, facts)
            return "completed"
        if unfinished.exists():
            refuse_differences(folder, _load(unfinished), facts)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(unfinished, json.dumps(facts, indent=2))
        return ""

    if of_writer(begin):
        return read_manifest(directory) if writes else None
    done = 0
    files: dict[str, int] = {}
    for split in SPLITS:
        total = task.num_input_examples(split) or 0
        number = max(1, -(-total // SHARD))
        extra = {name: {"shape": [None], "dtype": "float32"} for name in scored}
        features: Facts = {}
        parts = _parts(task, split)
        before = done
        for index in range(number):
            shard = folder / f"{split}.tfrecord-{index:05d}-of-{number:05d}"
            pieces = []
            for piece in range(-(-min(SHARD, total - index * SHARD) // PART)):
                examples = next(parts, [])
                if examples:
                    features = {name: _described(array) for name, array in examples[0].items()}
                pieces.append(epath.Path(f"{shard}.part-{piece:05d}"))
                if not of_writer(functools.partial(_first_there, shard, pieces[-1])):
                    scores = score(examples) if score else {}
                    if writes:
                        _write_part(pieces[-1], examples, scores)
                done += len(examples)
                progress(done)
            if not writes:
                continue
            if not shard.exists():
                _join(shard, pieces)
            files[shard.name] = shard.stat().length
        if done - before != total or next(parts, None):
            raise UsageError(f"{folder}: the rows changed while they were cached; {_REMAKE}")
        if not writes:
            continue
        info = {
            "num_shards": number,
            "features": features | extra if features else {},
            "seqio_version": seqio.__version__,
        }
        for name, content in (
            (f"info.{split}.json", info),
            (f"stats.{split}.json", {"examples": total}),
        ):
            write_whole(folder / name, json.dumps(content))
            files[name] = (folder / name).stat().length
    if not writes:
        return None
    # Of an earlier, interrupted joining.
    for path in folder.glob("*.part-*"):
        path.unlink()
    manifest = Manifest(facts, counts, files)
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    write_whole(folder / _MANIFEST, text)
    write_whole(folder / _COMPLETED, "")
    unfinished.unlink(missing_ok=True)
    return manifest


def read_manifest(directory: epath.PathLike) -> Manifest | None:
    """Reads the manifest of a finished cache and checks that its files are all there, whole.

    Returns:
        The manifest; None for a cache that `seqio_cache_tasks` made, which has none.

    Raises:
        UsageError: there is none, it is unfinished or damaged, or a file is missing or cut off.
    """
    folder = epath.Path(directory) / TASK
    if not folder.is_dir():
        raise UsageError(f"{directory}: no cache here; make one with `dro_jax cache`")
    if not (folder / _COMPLETED).exists():
        raise UsageError(f"{folder}: the cache is not finished; run the same `dro_jax cache` again")
    if not (folder / _MANIFEST).exists() and not _has_scores(folder):
        return None
    fields = _load(folder / _MANIFEST)
    try:
        manifest = Manifest(**fields)
        files = dict(manifest.files.items())
    except (TypeError, AttributeError) as error:
        raise UsageError(f"{folder / _MANIFEST}: is not a manifest; {_REMAKE}") from error
    for name, size in files.items():
        file = folder / name
        if not file.exists():
            raise UsageError(f"{file}: is missing; {_REMAKE}")
        if file.stat().length != size:
            raise UsageError(
                f"{file}: has {file.stat().length} bytes where {size} were written; {_REMAKE}"
            )
    return manifest


def check_seqio_cache(
    directory: epath.PathLike, examples: Mapping[str, int], needed: Sequence[str]
) -> None:
    """Checks that a cache of `seqio_cache_tasks` serves a run.

    Args:
        directory: the cache.
        examples: how many the feedback file has in each split.
        needed: features that the method takes of the task.

    Raises:
        UsageError: it has not as many examples, or lacks a feature.
    """
    folder = epath.Path(directory) / TASK
    features = _load(folder / "info.train.json").get("features", {})
    for name in needed:
        if name not in features:
            raise UsageError(
                f"{folder}: has no {name}, which this method takes; use `dro_jax cache`"
            )
    for split, number in examples.items():
        cached = _load(folder / f"stats.{split}.json").get("examples", 0) if number else 0
        if cached != number:
            raise UsageError(
                f"{folder}: has {cached} examples for {split}, but the feedback file {number}; {_REMAKE}"
            )


def refuse_differences(folder: epath.Path, found: Facts, expected: Facts) -> None:
    """Raises UsageError naming what differs where a cache was made from or for something else."""
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        detail = ", ".join(
            f"{name} {found.get(name)!r} there, {expected[name]!r} here" for name in differing[:3]
        )
        raise UsageError(f"{folder}: the cache was made with another {detail}; {_REMAKE}")


def _has_scores(folder: epath.Path) -> bool:
    """Whether the examples hold what only `write` puts there."""
    features = _load(folder / "info.train.json").get("features", {})
    return any(name.endswith("reference_log_probs") for name in features)


def _first_there(*paths: epath.Path) -> str:
    """The name of the first that is there, "" where none is."""
    return next((path.name for path in paths if path.exists()), "")


def _parts(task: seqio.Task, split: str) -> Iterator[list[Example]]:
    """The examples of a split in file order, as they are before anything is cut, a part at a time."""
    dataset = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False))
    part: list[Example] = []
    for example in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        part.append(example)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part


def _write_part(
    path: epath.Path, examples: list[Example], scores: Mapping[str, np.ndarray]
) -> None:
    with whole_file(path) as partial, tf.io.TFRecordWriter(str(partial)) as writer:
        for number, example in enumerate(examples):
            extra = {name: array[number : number + 1] for name, array in scores.items()}
            writer.write(_record({**example, **extra}))


def _record(example: Example) -> bytes:
    """What SeqIO's dict_to_tfexample makes of an example, which takes it twenty times as long."""
    features = {
        name: tf.train.Feature(float_list=tf.train.FloatList(value=array))
        if array.dtype.kind == "f"
        else tf.train.Feature(int64_list=tf.train.Int64List(value=array))
        for name, array in example.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def _join(shard: epath.Path, pieces: Sequence[epath.Path]) -> None:
    """Makes a shard of its parts: TFRecord files one after the other are one."""
    with whole_file(shard) as partial, partial.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    for piece in pieces:
        piece.unlink()


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
