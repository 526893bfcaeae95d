"""`dro_jax generate`: prompts in, completions of a trained policy out, as JSONL."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
from etils import epath
from jax.sharding import Mesh

from dro_jax.cli.run_folder import VOCABULARY, vocabulary_digest
from dro_jax.data.vocabulary import encode_prompt, load_vocabulary
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation.sampling import Decoding, make_sampler, sample_prompts
from dro_jax.networks import T5Config
from dro_jax.networks.sharding import Rules
from dro_jax.training import checkpoints, optimizers, train_state
from dro_jax.training.partitioning import Partitioning, row_shards
from dro_jax.whole_files import whole_file

logger = logging.getLogger(__name__)

ROWS_APART = Partitioning()
"""Weights whole on every device, rows spread over all of them."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained policy and what it takes to talk to it.

    Attributes:
      config: shape of the T5.
      params: its parameters.
      vocabulary: of prompts and completions.
      lengths: most tokens of "inputs" and "targets" in its training.
      mesh: the devices that the parameters lie on.
      rules: how logical axes lie on the mesh.
    """

    config: T5Config
    params: Any
    vocabulary: seqio.Vocabulary
    lengths: dict[str, int]
    mesh: Mesh
    rules: Rules


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """What a policy answers to a prompt.

    Attributes:
      text: without the end of sequence.
      tokens: int32 [L], up to and including the end of sequence if there was one.
    """

    text: str
    tokens: np.ndarray


def load_policy(checkpoint: str, partitioning: Partitioning = ROWS_APART) -> Policy:
    """Reads the policy of a run (its MODEL_DIR), or of one checkpoint in it.

    Args:
      checkpoint: its folder.
      partitioning: how it is laid over this machine's devices; as shipped, whole on each of them.

    Returns:
      The policy.

    Raises:
      UsageError: if there is none, or it is damaged.
    """
    directory, at = checkpoints.find(checkpoint)
    meta = checkpoints.read_meta(directory, at)
    config = model_of(meta)
    layout = layout_of(config, has_value=False, partitioning=partitioning)
    params = checkpoints.restore_policy(directory, at, layout.abstract().policy, {})
    vocabulary = load_vocabulary(vocabulary_file_of(directory, meta))
    return Policy(config, params, vocabulary, meta["lengths"], layout.mesh, layout.rules)


def model_of(meta: checkpoints.Meta) -> T5Config:
    """The model that a checkpoint's facts describe."""
    return T5Config(
        **meta["model"],
        dtype=meta["dtype"],
        reserved_entry=meta["reserved_entry"],
    )


def vocabulary_file_of(directory: epath.Path, meta: checkpoints.Meta) -> str | None:
    """The SentencePiece model that a checkpoint belongs to, None for bytes.

    Args:
      directory: folder of the checkpoint.
      meta: its facts.

    Raises:
      UsageError: if it is not there, or is another.
    """
    if meta["vocabulary"] == "bytes":
        return None
    # A reference lies one folder below the run that its vocabulary belongs to.
    places = [directory / VOCABULARY, directory.parent / VOCABULARY]
    path = next((p for p in places if p.exists()), places[0])
    checkpoints.check_meta(path, meta, {"vocabulary": vocabulary_digest(str(path))})
    return str(path)


def layout_of(
    config: T5Config, *, has_value: bool, partitioning: Partitioning = ROWS_APART
) -> train_state.Layout:
    """How the parameters of a model lie on this machine's devices."""
    transforms = optimizers.Adafactor().transforms()
    mesh = partitioning.mesh()
    return train_state.make_layout(
        config, transforms, has_value=has_value, mesh=mesh, rules=partitioning
    )


def complete(
    policy: Policy,
    prompts: list[str],
    decoding: Decoding,
    *,
    seed: int,
    batch_size: int,
    first: int = 0,
) -> Iterator[Completion]:
    """Completes prompts.

    Args:
      policy: of `load_policy`.
      prompts: texts; over-long ones are cut to the policy's length of inputs.
      decoding: how tokens are chosen.
      seed: with a prompt's place in the list it fixes the completion, whatever the batch size.
      batch_size: prompts at a time, filled up to what divides over the devices.
      first: place of the first of these prompts in the list.

    Yields:
      One completion a prompt, in the order of the prompts. Prompts of like length share a batch, so that one may
      come up to `sampling.WINDOW` batches after the prompt before it.
    """
    vocabulary, longest = policy.vocabulary, policy.lengths["inputs"]
    sampled = sample_prompts(
        make_sampler(policy.config, decoding, vocabulary.eos_id, policy.mesh, policy.rules),
        policy.params,
        [encode_prompt(vocabulary, text, longest) for text in prompts],
        longest=longest,
        seed=seed,
        batch_size=batch_size,
        first=first,
        shards=row_shards(policy.mesh, policy.rules),
    )
    for tokens in sampled:
        ends = np.flatnonzero(tokens == vocabulary.eos_id)
        stop = ends[0] if len(ends) else len(tokens)
        text = vocabulary.decode([int(token) for token in tokens[:stop]])
        yield Completion(text, tokens[: stop + 1])


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a person asks for samples; see `dro_jax generate --help` for the attributes."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0
    batch_size: int = 32
    fsdp: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        """Raises UsageError for what is wrong whatever the policy."""
        check_number("--batch_size", self.batch_size, whole=True, at_least=1)
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed}: give a number from 0 to {2**31 - 1}")
        for name, size in (("--fsdp", self.fsdp), ("--model", self.model)):
            check_number(name, size, whole=True, at_least=1)
        if jax.device_count() % (self.fsdp * self.model):
            raise UsageError(
                f"--fsdp {self.fsdp} --model {self.model}: {self.fsdp * self.model} devices at a time do not divide "
                f"the {jax.device_count()} that are here"
            )
        self.decoding({"targets": 1})

    def partitioning(self) -> Partitioning:
        """How a policy is laid over the devices."""
        return Partitioning(fsdp=self.fsdp, model=self.model)

    def decoding(self, lengths: Mapping[str, int]) -> Decoding:
        """How a policy of such lengths chooses tokens. Raises UsageError for settings that mean nothing."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.num_beams > 1 else 1.0
        try:
            return Decoding(
                lengths["targets"] if self.max_tokens is None else self.max_tokens,
                temperature,
                self.top_k,
                self.top_p,
                self.num_beams,
                self.length_penalty,
            )
        except ValueError as error:
            raise UsageError(f"{error}") from error


def run(*, checkpoint: str, prompts: str, output: str, sampling: Sampling) -> None:
    """Completes a file of prompts; see `dro_jax generate --help` for the arguments."""
    texts = read_prompts(prompts)
    policy = load_policy(checkpoint, sampling.partitioning())
    limit = policy.lengths["inputs"]
    cut = sum(len(policy.vocabulary.encode(text)) >= limit for text in texts)
    if cut:
        logger.warning("%d of %d prompts are cut to %d tokens", cut, len(texts), limit)
    decoding = sampling.decoding(policy.lengths)
    completions = complete(
        policy, texts, decoding, seed=sampling.seed, batch_size=sampling.batch_size
    )
    lines = (
        json.dumps({"prompt": prompt, "completion": completion.text}, ensure_ascii=False) + "\n"
        for prompt, completion in zip(texts, completions, strict=True)
    )
    if output == "-":
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
        return
    try:
        with whole_file(output) as partial, partial.open("wb") as file:
            for line in lines:
                file.write(line.encode())
    except OSError as error:
        raise UsageError(f"{output}: cannot be written ({error.strerror or error})") from error


def read_prompts(path: str) -> list[str]:
    """Prompts of a file or of stdin ("-").

    A line that is a JSON object gives its field "prompt" where the file's name ends in .jsonl; otherwise a
    line is a prompt. Blank lines are passed over.

    Raises:
      UsageError: if the file cannot be read, holds no prompt, or a row has none.
    """
    try:
        text = sys.stdin.read() if path == "-" else epath.Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a UTF-8 text file") from error
    if path.endswith(".jsonl"):
        prompts = [prompt for (prompt,) in texts_of_rows(path, text, ["prompt"])]
    else:
        prompts = [line for _, line in _lines(text)]
    if not prompts:
        raise UsageError(f"{path}: no prompts; write one a line")
    return prompts


def texts_of_rows(path: str, text: str, fields: Sequence[str]) -> Iterator[list[str]]:
    """Yields these fields of each JSON object, one a line; blank lines are passed over.

    Raises:
      UsageError: if a row is not an object, or one of its fields is not there or no text; `path` names the file.
    """
    for number, line in _lines(text):
        try:
            row = json.loads(line)
            texts = [row[field] for field in fields]
        except (ValueError, KeyError, TypeError) as error:
            names = f"field{'s' * (len(fields) > 1)} {' and '.join(map(repr, fields))}"
            raise UsageError(
                f"{path}, line {number}: no {names}; write one JSON object a line"
            ) from error
        for field, value in zip(fields, texts, strict=True):
            # Half a surrogate pair is no character, and no UTF-8.
            if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
                raise UsageError(
                    f"{path}, line {number}: field {field!r} is not text; write a string"
                )
        yield texts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and texts of the lines that are not blank."""
    # Not splitlines(): it also splits at characters that JSON leaves inside a string, such as U+2028.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line
