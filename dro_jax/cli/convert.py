"""`dro_jax convert`: a model of Hugging Face or T5X becomes what runs start from, and a run such a model."""

import contextlib
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dro_jax.cli.generate import model_of, vocabulary_file_of
from dro_jax.cli.run_folder import MODEL_GIN, STATISTICS, VOCABULARY, vocabulary_digest
from dro_jax.data.feedback import RewardStatistics
from dro_jax.data.vocabulary import check_vocabulary_fits, load_vocabulary
from dro_jax.errors import UsageError
from dro_jax.interop import (
    hub,
    huggingface,
    parameter_shapes,
    stored_arrays,
    tokenizer_files,
)
from dro_jax.interop.t5x import checkpoints as t5x_checkpoints
from dro_jax.networks import T5Config
from dro_jax.training import checkpoints

logger = logging.getLogger(__name__)

VALUE = "value"
"""The value network's folder, inside the one that is written."""

PARTIAL = ".partial-of-dro_jax-convert"
"""Ending of the folder that becomes the target; what an interruption left under this name is removed."""

LENGTHS = {"inputs": 512, "targets": 512}
"""At which T5 was trained and `runs/train.gin` cuts: what `dro_jax generate` takes for a model without a run."""

FORMATS = ("huggingface", "t5x", "t5x_scanned")
"""Of what a run becomes; the last is for T5X's scalable_t5."""

_BYTES = 384
"""The most entries of a model over bytes: ByT5's."""

_LARGE = 48
"""Layers from which on the shipped models scan and rematerialise them."""


def run(
    source: str, target: str, output_format: str | None = None, vocabulary_file: str | None = None
) -> None:
    """Converts one way or the other, by what the source is; see `dro_jax convert --help`.

    Args:
      source: a Hugging Face folder, a model's name on the hub, a T5X checkpoint or MODEL_DIR of T5X's, or a run's
        folder or one `checkpoint_<step>` in it.
      target: folder to write; it must not hold anything yet.
      output_format: for a run one of `FORMATS`, by default the first.
      vocabulary_file: for a T5X checkpoint its SentencePiece model, None for bytes.

    Raises:
      UsageError: if the source is none of them or is damaged, or the target is taken. Nothing is left at the target.
    """
    folder, goal = epath.Path(source), epath.Path(target)
    if os.path.abspath(target) == os.getcwd():
        raise UsageError(f"{target}: is the folder you are in; give another one")
    if goal.exists() and not (goal.is_dir() and not any(goal.iterdir())):
        raise UsageError(
            f"{target}: is there already; give a folder that is empty or does not exist"
        )
    if _is_on_hub(source):
        folder = hub.download(source)
    if not folder.exists():
        raise UsageError(
            f"{source}: no such folder; give a Hugging Face model, its name on the hub as in google/flan-t5-small, "
            "a T5X checkpoint, or a run"
        )
    if folder.is_file() and folder.name != t5x_checkpoints.MSGPACK:
        pickled = folder.suffix in (".bin", ".ckpt", ".pt", ".pth")
        what = huggingface.PICKLE if pickled else "is a file; give the folder that the model is in"
        raise UsageError(f"{source}: {what}")
    of_huggingface = (folder / huggingface.CONFIG).exists()
    of_t5x = None if of_huggingface else t5x_checkpoints.find(folder)
    if output_format is not None and (of_huggingface or of_t5x):
        raise UsageError(
            f"--format={output_format}: {source} becomes a run; convert that run to the format then"
        )
    if vocabulary_file is not None and not of_t5x:
        raise UsageError(
            f"--vocabulary_file: is for T5X checkpoints; {source} has its vocabulary in it"
        )
    if of_huggingface:
        with _whole(goal) as partial:
            import_model(folder, partial, goal, full_name(source))
        return
    if of_t5x is not None:
        with _whole(goal) as partial:
            import_t5x(of_t5x, partial, goal, full_name(source), vocabulary_file)
        return
    try:
        directory, step = checkpoints.find(folder)
    except UsageError as error:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UsageError(
            f"{source}: neither a Hugging Face model ({huggingface.CONFIG} with {huggingface.WEIGHTS}) nor a T5X "
            f"checkpoint nor a run (checkpoint_<step>); found {found}"
        ) from error
    output_format = output_format or FORMATS[0]
    with _whole(goal) as partial:
        if output_format == FORMATS[0]:
            export_run(directory, step, partial)
        else:
            export_t5x(directory, step, partial, goal, scan=output_format == "t5x_scanned")
    reader = "transformers" if output_format == FORMATS[0] else "T5X"
    logger.info("%s: step %d of %s for %s", target, step, directory, reader)


@contextlib.contextmanager
def _whole(goal: epath.Path) -> Iterator[epath.Path]:
    """A folder beside the goal that takes its place in the end, so that nothing half-written is ever there."""
    partial = goal.parent / f"{goal.name}{PARTIAL}"
    try:
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{goal}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    try:
        yield partial
        if goal.exists():
            goal.rmdir()
        partial.rename(goal)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def import_model(folder: epath.Path, directory: epath.Path, goal: epath.Path, source: str) -> None:
    """Writes a Hugging Face model as a run's folder that has taken no step yet.

    Args:
      folder: config.json, safetensors and tokeniser.
      directory: where to.
      goal: what `directory` will be called, for the gin file.
      source: of `full_name`.

    Raises:
      UsageError: if a file is missing or damaged, or the model is not a T5.
    """
    theirs = huggingface.read_config(folder)
    config = huggingface.model_config(theirs, folder / huggingface.CONFIG)
    arrays = huggingface.open_model(folder, config)
    vocabulary_file = tokenizer_files.find_vocabulary(folder, theirs)
    # Exported again, the model keeps what its file says beside the architecture.
    described = {"huggingface": theirs, "source": source}
    _write_run(directory, goal, config, {"policy": arrays}, vocabulary_file, described)


def import_t5x(
    path: epath.Path,
    directory: epath.Path,
    goal: epath.Path,
    source: str,
    vocabulary_file: str | None,
) -> None:
    """Writes a T5X checkpoint as a run's folder that has taken no step yet.

    Args:
      path: of `t5x_checkpoints.find`.
      directory: where to.
      goal: what `directory` will be called, for the gin file.
      source: of `full_name`.
      vocabulary_file: a SentencePiece model, None for bytes.

    Raises:
      UsageError: if a file is missing or damaged, the model is not a T5, or the vocabulary is not its own.
    """
    model = t5x_checkpoints.open_model(path)
    taken, told = model.config.mlp_activations, t5x_checkpoints.activations(path)
    if told is None and len(taken) > 1:
        logger.warning(
            "%s: its feed-forward layers are taken to be of gated GELU; no config.gin beside it tells",
            path,
        )
    if told not in (None, taken):
        raise UsageError(
            f"{path}: has mlp_activations {told} by its config.gin; what converts has ('gelu', 'linear') or ('relu',)"
        )
    vocab_size = model.config.vocab_size
    if vocabulary_file is None and vocab_size > _BYTES:
        raise UsageError(
            f"{path}: has a vocabulary of {vocab_size} entries, which T5X does not keep with the weights; give its "
            "SentencePiece model by --vocabulary_file"
        )
    try:
        check_vocabulary_fits(load_vocabulary(vocabulary_file), vocab_size)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    items = {"policy": model.policy, "value": model.value}
    items = {item: arrays for item, arrays in items.items() if arrays}
    _write_run(directory, goal, model.config, items, vocabulary_file, {"source": source})


def _write_run(
    directory: epath.Path,
    goal: epath.Path,
    config: T5Config,
    items: Mapping[str, Mapping[str, stored_arrays.StoredArray]],
    vocabulary_file: str | None,
    described: checkpoints.Meta,
) -> None:
    meta: checkpoints.Meta = {
        "model": config.architecture(),
        "reserved_entry": False,
        "vocabulary": vocabulary_digest(vocabulary_file),
        "algorithm": "imported",
        "dtype": config.dtype,
        "lengths": LENGTHS,
    }
    stored_arrays.save_run(directory, items, meta | described)
    if vocabulary_file is not None:
        epath.Path(vocabulary_file).copy(directory / VOCABULARY)
    (directory / MODEL_GIN).write_text(gin_file(config, goal, vocabulary_file is not None))
    for item, arrays in items.items():
        count = sum(math.prod(array.shape) for array in arrays.values())
        logger.info("%s: %.4g million parameters, %s", goal, count / 1e6, item)
    logger.info(
        "train it by: dro_jax train --gin_file=runs/train.gin --gin_file=%s --gin_file=algorithms/dro_v.gin …",
        goal / MODEL_GIN,
    )


def gin_file(config: T5Config, directory: epath.Path, has_vocabulary: bool) -> str:
    """A gin file that binds a model, its vocabulary and its weights, for any run to include.

    Args:
      config: the model.
      directory: where its checkpoint is.
      has_vocabulary: whether `VOCABULARY` lies beside it.
    """
    where = _absolute(directory)
    return "\n".join(
        (
            "# Made by `dro_jax convert`: a model to start from. Comes after the run's file.",
            "from __gin__ import dynamic_registration",
            "",
            "from dro_jax.networks import t5",
            "",
            f"INIT_CHECKPOINT = {where!r}",
            f"VOCABULARY_FILE = {f'{where}/{VOCABULARY}' if has_vocabulary else None!r}",
            "MODEL = @t5.T5Config()",
            "",
            "t5.T5Config:",
            *(f"  {name} = {value!r}" for name, value in model_bindings(config).items()),
            "",
        )
    )


def model_bindings(config: T5Config) -> dict[str, Any]:
    """What a run binds T5Config to for a model: a deep one scans and rematerialises, as the shipped ones do."""
    large = config.num_encoder_layers + config.num_decoder_layers >= _LARGE
    config = dataclasses.replace(config, scan_layers=large, remat="dots" if large else "none")
    # The reserved entry follows from the method.
    return {name: value for name, value in vars(config).items() if name != "reserved_entry"}


def full_name(source: str) -> str:
    """What a run's facts say of where its model is from: a folder's absolute path, or a name on the hub."""
    return source if _is_on_hub(source) else _absolute(epath.Path(source))


def _is_on_hub(source: str) -> bool:
    return not epath.Path(source).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source))


def _absolute(path: epath.Path) -> str:
    return str(path) if "://" in str(path) else str(path.absolute())


def export_run(directory: epath.Path, step: int, folder: epath.Path) -> None:
    """Writes the policy of a checkpoint, and its value network, for transformers.

    Args:
      directory: of the checkpoint.
      step: its step.
      folder: where to: the policy here, the value network in `VALUE`.

    Raises:
      UsageError: if the checkpoint is damaged or its vocabulary is gone.
    """
    meta = checkpoints.read_meta(directory, step)
    config = model_of(meta)
    vocabulary_file = vocabulary_file_of(directory, meta)
    eos_id = load_vocabulary(vocabulary_file).eos_id
    described = meta.get("huggingface")
    if described is None:
        described = huggingface.config_json(config, eos_id=eos_id)
    # The weights are, whatever they were imported from.
    described |= {name: "float32" for name in ("dtype", "torch_dtype") if name in described}
    generation = {
        "pad_token_id": 0,
        "eos_token_id": eos_id,
        "decoder_start_token_id": 0,
        "max_new_tokens": meta["lengths"]["targets"],
    }
    if config.reserved_entry:
        # Its logit is the value, not a token's.
        generation["suppress_tokens"] = [config.vocab_size - 1]
    if config.num_decoder_layers > config.num_encoder_layers:
        # transformers' cache takes the decoder to be as deep as the encoder.
        generation["use_cache"] = False
    huggingface.write_json(folder / huggingface.CONFIG, described)
    huggingface.write_json(folder / "generation_config.json", generation)
    tokenizer_files.write_tokenizer(folder, vocabulary_file, config.vocab_size)
    _export_item(directory, step, folder, config, value=False)
    if "value" in meta["checksums"]:
        (folder / VALUE).mkdir()
        described = described | {"architectures": ["T5Model"]}
        huggingface.write_json(folder / VALUE / huggingface.CONFIG, described)
        _export_item(directory, step, folder / VALUE, config, value=True)
        (folder / VALUE / "README.md").write_text(_about_value(config, directory))


def export_t5x(
    directory: epath.Path, step: int, folder: epath.Path, goal: epath.Path, *, scan: bool
) -> None:
    """Writes the policy of a checkpoint, and its value network, for T5X.

    Args:
      directory: of the checkpoint.
      step: its step.
      folder: where to.
      goal: what `folder` will be called, for the gin file.
      scan: whether for scalable_t5 with its layers scanned.

    Raises:
      UsageError: if the checkpoint is damaged, or T5X has no such model.
    """
    meta = checkpoints.read_meta(directory, step)
    config = model_of(meta)
    distances = (config.relative_buckets, config.relative_max_distance)
    if distances != t5x_checkpoints.RELATIVE_DISTANCES:
        raise UsageError(
            f"{directory}: has (relative_buckets, relative_max_distance) {distances}; every T5 of T5X has "
            f"{t5x_checkpoints.RELATIVE_DISTANCES}"
        )
    if config.reserved_entry:
        logger.warning(
            "the last vocabulary entry's logit is V(x), not a token's; T5X cannot suppress it"
        )
    vocabulary_file = vocabulary_file_of(directory, meta)
    arrays = {
        item: stored_arrays.of_checkpoint(
            directory, step, item, parameter_shapes.shapes(config, value=item == "value")
        )
        for item in ("policy", "value")
        if item in meta["checksums"]
    }
    place = f"checkpoint_{step}"
    t5x_checkpoints.write_model(
        folder / place, step, arrays["policy"], arrays.get("value", {}), scan=scan
    )
    where = _absolute(goal)
    if vocabulary_file is not None:
        epath.Path(vocabulary_file).copy(folder / VOCABULARY)
        vocabulary_file = f"{where}/{VOCABULARY}"
    (folder / MODEL_GIN).write_text(
        t5x_checkpoints.gin_file(config, f"{where}/{place}", vocabulary_file, scan=scan)
    )


def _export_item(
    directory: epath.Path, step: int, folder: epath.Path, config: T5Config, *, value: bool
) -> None:
    shapes = parameter_shapes.shapes(config, value=value)
    item = "value" if value else "policy"
    arrays = stored_arrays.of_checkpoint(directory, step, item, shapes)
    names = huggingface.parameter_names(config, value=value)
    huggingface.write_model(folder, arrays, names)


def _about_value(config: T5Config, directory: epath.Path) -> str:
    units = "the run's normalised reward"
    if (directory / STATISTICS).exists():
        statistics = RewardStatistics.load_json(directory / STATISTICS)
        units += f": reward = {statistics.mean!r} + {statistics.std!r} * V"
    return f"""# Value network V(x)

The T5 in this folder without logits, and a linear head on the decoder's state at the start token 0:
`value_head.weight` [1, {config.emb_dim}] and `value_head.bias` [1]. Its unit is {units}.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Model

model = T5Model.from_pretrained("value")
head = load_file("value/model.safetensors")
prompts = AutoTokenizer.from_pretrained(".")(["a prompt"], return_tensors="pt", padding=True)
start = torch.zeros(len(prompts.input_ids), 1, dtype=torch.long)
state = model(**prompts, decoder_input_ids=start).last_hidden_state[:, 0]
value = state @ head["value_head.weight"].T + head["value_head.bias"]
```
"""
