"""`dro_jax generate`: prompts in, completions of a trained policy out, as JSONL."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
from etils import epath

from dro_jax.cli.train import VOCABULARY, vocabulary_digest
from dro_jax.data.vocabulary import encode_prompt, load_vocabulary
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation.sampling import Decoding, Sampler, make_sampler
from dro_jax.networks import T5Config
from dro_jax.training import checkpoints, optimizers, partitioning, train_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained policy and what it takes to talk to it.

    Attributes:
      config: shape of the T5.
      params: its parameters.
      vocabulary: of prompts and completions.
      lengths: most tokens of "inputs" and "targets" in its training.
    """

    config: T5Config
    params: Any
    vocabulary: seqio.Vocabulary
    lengths: dict[str, int]


def load_policy(checkpoint: str) -> Policy:
    """Reads the policy of a run (its MODEL_DIR), or of one checkpoint in it.

    Raises:
      UsageError: if there is none, or it is damaged.
    """
    directory, at = checkpoints.find(checkpoint)
    meta = checkpoints.read_meta(directory, at)
    config = model_of(meta)
    abstract = layout_of(config, has_value=False).abstract().policy
    params = checkpoints.restore_policy(directory, at, abstract, {})
    vocabulary = load_vocabulary(vocabulary_file_of(directory, meta))
    return Policy(config, params, vocabulary, meta["lengths"])


def model_of(meta: checkpoints.Meta) -> T5Config:
    """The model that a checkpoint's facts describe."""
    return T5Config(
        **meta["model"] | {"mlp_activations": tuple(meta["model"]["mlp_activations"])},
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


def layout_of(config: T5Config, *, has_value: bool) -> train_state.Layout:
    """How the parameters of a model lie on this machine's devices."""
    rules = partitioning.Partitioning()
    transforms = optimizers.Adafactor().transforms()
    return train_state.make_layout(
        config, transforms, has_value=has_value, mesh=rules.mesh(), rules=rules
    )


def complete(
    policy: Policy, prompts: list[str], sampler: Sampler, *, seed: int, batch_size: int
) -> Iterator[str]:
    """Completes prompts in order.

    Args:
      policy: of `load_policy`.
      prompts: texts; over-long ones are cut to the policy's length of inputs.
      sampler: of `make_sampler`.
      seed: with a prompt's place in the list it fixes the completion, whatever the batch size.
      batch_size: prompts at a time.

    Yields:
      One completion a prompt.
    """
    length = policy.lengths["inputs"]
    for start in range(0, len(prompts), batch_size):
        texts = prompts[start : start + batch_size]
        tokens = np.zeros((batch_size, length), np.int32)
        for row, text in enumerate(texts):
            encoded = encode_prompt(policy.vocabulary, text, length)
            tokens[row, : len(encoded)] = encoded
        places = start + np.arange(batch_size)
        sampled = np.asarray(sampler(policy.params, tokens, seed, places))
        for row in range(len(texts)):
            yield decode(policy.vocabulary, sampled[row])


def decode(vocabulary: seqio.Vocabulary, tokens: np.ndarray) -> str:
    """The text of tokens [L] before the end of sequence."""
    ends = np.flatnonzero(tokens == vocabulary.eos_id)
    kept = tokens[: ends[0]] if len(ends) else tokens
    return vocabulary.decode([int(token) for token in kept])


def run(
    *,
    checkpoint: str,
    prompts: str,
    output: str,
    max_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int,
) -> None:
    """Completes a file of prompts; see `dro_jax generate --help` for the arguments."""
    texts = read_prompts(prompts)
    check_number("--batch_size", batch_size, whole=True, at_least=1)
    if not 0 <= seed < 2**31:
        raise UsageError(f"--seed {seed}: give a number from 0 to {2**31 - 1}")
    policy = load_policy(checkpoint)
    limit = policy.lengths["inputs"]
    cut = sum(len(policy.vocabulary.encode(text)) >= limit for text in texts)
    if cut:
        logger.warning("%d of %d prompts are cut to %d tokens", cut, len(texts), limit)
    try:
        decoding = Decoding(
            policy.lengths["targets"] if max_tokens is None else max_tokens,
            temperature,
            top_k,
            top_p,
        )
    except ValueError as error:
        raise UsageError(f"generate: {error}") from error
    sampler = make_sampler(policy.config, decoding, policy.vocabulary.eos_id)
    completions = complete(policy, texts, sampler, seed=seed, batch_size=batch_size)
    lines = (
        json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
        for prompt, completion in zip(texts, completions, strict=True)
    )
    if output == "-":
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
        return
    # Written beside its place and then moved there: an interruption leaves no half file.
    partial = epath.Path(f"{output}.partial")
    try:
        with partial.open("wb") as file:
            for line in lines:
                file.write(line.encode())
        partial.replace(output)
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
    prompts = []
    # Not splitlines(): it also splits at characters that JSON leaves inside a string, such as U+2028.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: no field 'prompt'; write one JSON object a line"
            ) from error
        # Half a surrogate pair is no character, and no UTF-8.
        if not isinstance(prompt, str) or any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UsageError(f"{path}, line {number}: field 'prompt' is not text; write a string")
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path}: no prompts; write one a line")
    return prompts
