"""Records of feedback files as they stand there: JSON lines, Parquet, and TFDS datasets, not yet judged."""

import dataclasses
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from dro_jax.errors import UsageError

TFDS_PREFIX = "tfds:"

LARGEST_FLOAT32 = 3.4028235e38
"""Rewards are of 32 bits in the end."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One record, or what keeps it from being read.

    Attributes:
        path: the file or dataset it is in.
        line: its number there, from 1.
        where: both, for messages.
        fields: its fields; {} where there is a problem.
        problem: what is wrong and how to put it right, "" where nothing is.
    """

    path: str
    line: int
    where: str
    fields: dict[str, Any]
    problem: str = ""


def paths(pattern: str) -> list[str]:
    """Returns the files that a pattern names, sorted; without wildcards, or where it exists, it is a file.

    Raises:
        UsageError: no file matches, or the pattern is of folders of any depth.
    """
    if pattern.startswith(TFDS_PREFIX) or not glob.has_magic(pattern):
        return [pattern]
    location = epath.Path(pattern)
    if location.exists():
        return [pattern]
    if "**" in pattern:
        raise UsageError(f"{pattern}: ** is not supported; write a * for each folder")
    # Everything before the first wildcard is a folder.
    parts = location.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = epath.Path(*parts[:first]) if first else epath.Path(".")
    found = sorted(str(path) for path in folder.glob("/".join(parts[first:])) if path.is_file())
    if not found:
        raise UsageError(f"{pattern}: no file matches; check the pattern")
    return found


def exist(pattern: str) -> bool:
    """Whether there is something to read: files that the pattern names, or a prepared TFDS dataset."""
    try:
        if pattern.startswith(TFDS_PREFIX):
            return next(read_records(pattern), None) is not None
        return all(epath.Path(path).exists() for path in paths(pattern))
    except UsageError:
        return False


def read_records(pattern: str) -> Iterator[Record]:
    """Yields the records of all files of a pattern, in order and in constant memory. Blank lines are none.

    Args:
        pattern: a `.jsonl`, `.jsonl.gz` or `.parquet` file, local or remote (gs://), a glob of them, or a
            prepared TFDS dataset as "tfds:name", "tfds:name/config:version" or, with a split, "tfds:name#train".

    Raises:
        UsageError: a file is missing, a directory, unreadable, or not of the format its name promises.
    """
    for path in paths(pattern):
        if path.startswith(TFDS_PREFIX):
            yield from _tfds_records(path)
        elif path.endswith(".parquet"):
            yield from _parquet_records(path)
        else:
            for line, raw in _lines(path):
                yield _parse(path, line, raw)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes) of every line that is not blank."""
    number = 0
    try:
        location = _existing(path)
        with location.open("rb") as stream:
            zipped = str(path).endswith(".gz")
            for number, raw in enumerate(gzip.GzipFile(fileobj=stream) if zipped else stream, 1):
                if number == 1:
                    if not zipped and raw.startswith(b"\x1f\x8b"):
                        raise UsageError(f"{path}: is gzip; give its name the ending .gz")
                    if raw.startswith(b"PAR1"):
                        raise UsageError(f"{path}: is Parquet; give its name the ending .parquet")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if number:
            raise UsageError(
                f"{path}: the gzip file is cut off or damaged after line {number}; write it anew"
            ) from error
        raise UsageError(
            f"{path}: is not a gzip file, though its name ends in .gz; rename or compress it"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse(path: str, line: int, raw: bytes) -> Record:
    where = f"{path}, line {line}"
    problem = ""
    fields: Any = {}
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    except RecursionError:
        problem = "the JSON is nested too deeply; write one flat object a line"
    except ValueError as error:
        reason = getattr(error, "msg", "a number has too many digits")
        problem = f"is not JSON ({reason}); write one JSON object a line"
    if not isinstance(fields, dict):
        problem = f"is {shown(fields)}, not an object; write one JSON object a line"
        fields = {}
    return Record(path, line, where, fields, problem)


def _parquet_records(path: str) -> Iterator[Record]:
    # TFDS brings it; its import costs a second that few runs need.
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        with _existing(path).open("rb") as stream:
            file = parquet.ParquetFile(stream)
            # No field of ours is a time, and not every time has a Python object.
            columns = [
                field.name
                for field in file.schema_arrow
                if not pyarrow.types.is_temporal(field.type)
            ]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for fields in batch.to_pylist():
                    line += 1
                    yield Record(path, line, f"{path}, row {line}", fields)
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        # Arrow's own have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, error) from error
        after = f" after row {line}" if line else ""
        raise UsageError(
            f"{path}: is no Parquet file, or is damaged{after}; write it anew"
        ) from error


def _tfds_records(path: str) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    name, _, split = path.removeprefix(TFDS_PREFIX).partition("#")
    line = 0
    try:
        # TFDS itself looks at the variable only when it is imported.
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
        uncached = tfds.ReadConfig(try_autocache=False)
        dataset = builder.as_dataset(split=split or "train", read_config=uncached)
        for line, example in enumerate(tfds.as_numpy(dataset), 1):
            yield Record(path, line, f"{path}, example {line}", _decoded(example))
    except Exception as error:  # TFDS raises what its readers, registries and parsers do.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "prepare it anew" if line else "prepare it first, with TFDS_DATA_DIR set"
        after = f"read after example {line}" if line else "opened"
        raise UsageError(f"{path}: cannot be {after} by TFDS ({reason[:200]}); {remedy}") from error


def _decoded(value: Any) -> Any:
    """A TFDS value as JSON would have it."""
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "tolist"):
        return _decoded(value.tolist())
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value


def _existing(path: str) -> epath.Path:
    location = epath.Path(path)
    if not location.exists():
        raise UsageError(f"{path}: no such file; check the path of the feedback file")
    if location.is_dir():
        raise UsageError(f"{path}: is a directory; name a file in it, or all as {path}/*.jsonl")
    return location


def _unreadable(path: str, error: OSError) -> UsageError:
    return UsageError(
        f"{path}: cannot be read ({error.strerror or error}); check the path and permissions"
    )


def shown(value: Any) -> str:
    """Returns a value as short ASCII JSON, so that a message stays one line."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        # What was just shallow enough to be read may be too deep to be written.
        text = "a deeply nested value"
    return text if len(text) <= 40 else f"{text[:40]}..."
