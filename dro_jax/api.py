"""The road from a model and feedback to an aligned model, from Python: what the commands do, folder by folder.

    base = load("google/flan-t5-small", "flan")
    aligned = train(rows, base, "aligned", TRAIN_STEPS=1000)
    texts = generate(aligned, ["Name a colour."])
    compare([aligned, base], prompts, judge="llm", folder="side_by_side")
    export(aligned, "aligned_hf")

Everything between the calls lies on disk, so that the commands can take over at any point. `load` and `train` take up
what an earlier call has left; `compare` replaces it; `export` wants an empty folder. Mistakes in what is given raise
`dro_jax.errors.UsageError`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dro_jax.cli import compare as compare_command
from dro_jax.cli import configuration, convert
from dro_jax.cli import train as train_command
from dro_jax.cli.generate import (
    Sampling,
    complete,
    load_policy,
    model_of,
    vocabulary_file_of,
)
from dro_jax.cli.run_folder import make_directory
from dro_jax.data.feedback import FIELDS
from dro_jax.errors import UsageError
from dro_jax.evaluation.report import Report
from dro_jax.training import checkpoints
from dro_jax.whole_files import write_whole

FEEDBACK = "feedback_of_api.jsonl"
PROMPTS = "prompts_of_api.jsonl"
"""Written into the folder of `train` and `compare`."""


def load(
    source: epath.PathLike, folder: epath.PathLike, *, vocabulary_file: epath.PathLike | None = None
) -> str:
    """Makes a model ready to start from, as `dro_jax convert` does.

    Args:
      source: a Hugging Face T5, a folder or a name on the hub, or a T5X checkpoint.
      folder: where to; one that an earlier call has filled from this source is taken as it is.
      vocabulary_file: the SentencePiece model of a T5X checkpoint, None for bytes.

    Returns:
      The folder.
    """
    source, folder = os.fspath(source), os.fspath(folder)
    if not checkpoints.steps(folder):
        pieces = None if vocabulary_file is None else os.fspath(vocabulary_file)
        convert.run(source, folder, vocabulary_file=pieces)
        return folder
    made_from = checkpoints.read_meta(*checkpoints.find(folder)).get("source")
    if made_from != convert.full_name(source):
        raise UsageError(
            f"{folder}: holds a model from {made_from or 'elsewhere'}, not from {source}; give another folder"
        )
    return folder


def train(
    feedback: epath.PathLike | Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]],
    model: epath.PathLike,
    folder: epath.PathLike,
    *,
    algorithm: str = "dro_v",
    **settings: Any,
) -> str:
    """Aligns a model with feedback, as `dro_jax train` does.

    Args:
      feedback: a file, or rows as TRL has them: dictionaries of prompt, completion and label (or reward), a `datasets`
        data set of them, or one dictionary of columns.
      model: a folder of `load`, a run, or one checkpoint in it: the reference and the start.
      folder: of the run.
      algorithm: a file of gin_configs/algorithms.
      settings: macros of gin_configs/runs/train.gin, such as TRAIN_STEPS, BATCH_SIZE or TASK_FEATURE_LENGTHS.

    Returns:
      The folder.

    Raises:
      KeyboardInterrupt: it was asked to stop; all is saved, and the same call goes on.
    """
    model, folder = os.fspath(model), os.fspath(folder)
    if isinstance(feedback, str | os.PathLike):
        feedback = os.fspath(feedback)
    else:
        make_directory(epath.Path(folder))
        feedback = _write_rows(epath.Path(folder) / FEEDBACK, _rows(feedback))
    directory, step = checkpoints.find(model)
    meta = checkpoints.read_meta(directory, step)
    shape = convert.model_bindings(model_of(meta))
    macros: dict[str, Any] = {
        "FEEDBACK_FILE": feedback,
        "MODEL_DIR": folder,
        "INIT_CHECKPOINT": model,
        "VOCABULARY_FILE": vocabulary_file_of(directory, meta),
    }
    # What the caller asks for comes last, and so holds.
    macros |= {f"t5.T5Config.{name}": value for name, value in shape.items()} | settings
    bindings = [f"{name} = {_plain(value)!r}" for name, value in macros.items()]
    configuration.load(
        ["runs/train.gin", "models/t5_1_1_small.gin", f"algorithms/{algorithm}.gin"], bindings
    )
    interrupted = configuration.bound(train_command.train)()
    if interrupted is not None:
        raise KeyboardInterrupt(f"{folder}: stopped at step {interrupted.step}, saved")
    return folder


def generate(model: epath.PathLike, prompts: Sequence[str], **sampling: Any) -> list[str]:
    """Completes prompts, as `dro_jax generate` does.

    Args:
      model: a run, or one checkpoint in it.
      prompts: texts.
      sampling: of `dro_jax.cli.generate.Sampling`, such as temperature, num_beams or seed.

    Returns:
      A completion of each prompt.
    """
    asked = Sampling(**sampling)
    policy = load_policy(os.fspath(model), asked.partitioning())
    completions = complete(
        policy,
        list(prompts),
        asked.decoding(policy.lengths),
        seed=asked.seed,
        batch_size=asked.batch_size,
    )
    return [completion.text for completion in completions]


def compare(
    models: Sequence[epath.PathLike],
    prompts: Sequence[str],
    *,
    judge: str,
    folder: epath.PathLike,
    **sampling: Any,
) -> Report:
    """Holds models against each other, as `dro_jax compare` does.

    Args:
      models: runs, checkpoints in them, or files of completions.
      prompts: texts.
      judge: its name, as of `dro_jax compare --judge`.
      folder: for report.html and what it is made of.
      sampling: as of `generate`.

    Returns:
      The report.
    """
    make_directory(epath.Path(folder))
    written = _write_rows(epath.Path(folder) / PROMPTS, [{"prompt": prompt} for prompt in prompts])
    return compare_command.run(
        policies=[os.fspath(model) for model in models],
        prompts=written,
        judge=judge,
        output=os.fspath(folder),
        reference=None,
        folds=5,
        fold_size=1000,
        sampling=Sampling(**sampling),
    )


def export(
    model: epath.PathLike, folder: epath.PathLike, output_format: str = "huggingface"
) -> str:
    """Writes a run for other programs, as `dro_jax convert` does.

    Args:
      model: a run, or one checkpoint in it.
      folder: where to, new or empty.
      output_format: huggingface, t5x or t5x_scanned.

    Returns:
      The folder.
    """
    model, folder = os.fspath(model), os.fspath(folder)
    convert.run(model, folder, output_format)
    return folder


def _rows(
    feedback: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    if not isinstance(feedback, Mapping):
        return [dict(row) for row in feedback]
    lengths = {name: len(column) for name, column in feedback.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"feedback: its columns have different lengths, {lengths}")
    return [dict(zip(feedback, row, strict=True)) for row in zip(*feedback.values(), strict=True)]


def _write_rows(place: epath.Path, rows: Iterable[Mapping[str, Any]]) -> str:
    def plain(value: Any) -> Any:
        if (known := _plain(value)) is value:
            raise UsageError(f"feedback: {value!r} is neither text nor a number")
        return known

    read = ({name: value for name, value in row.items() if name in FIELDS} for row in rows)
    write_whole(place, "".join(json.dumps(row, default=plain) + "\n" for row in read))
    return str(place)


def _plain(value: Any) -> Any:
    """What is no Python value but has one: NumPy's numbers and arrays, paths, and what a dictionary has of them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
