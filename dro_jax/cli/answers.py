"""Answers to compare: sampled from checkpoints and kept in files, or read from files of other systems."""

import collections
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dro_jax.cli.console import progress_bar
from dro_jax.cli.generate import (
    Completion,
    Policy,
    Sampling,
    complete,
    load_policy,
    model_of,
    texts_of_rows,
)
from dro_jax.cli.run_folder import REFERENCE
from dro_jax.data.packing import Batch, Example, score_examples
from dro_jax.data.vocabulary import encode_prompt
from dro_jax.errors import UsageError
from dro_jax.evaluation.sampling import Decoding
from dro_jax.training import checkpoints, loop, partitioning
from dro_jax.training.step import make_log_prob
from dro_jax.whole_files import write_whole

SAVE_SECONDS = 20.0
"""Sampling is kept this often, so that an interruption loses no more."""

ROWS, EXAMPLES_A_ROW = 32, 8
"""Of a batch of answers whose log-probabilities are computed, at the most."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint to sample from, before its weights are read.

    Attributes:
      path: as the person named it; what is there may be another checkpoint a moment later.
      directory: folder of the checkpoint.
      step: its step.
      meta: its facts.
      name: in the report.
    """

    path: str
    directory: epath.Path
    step: int
    meta: checkpoints.Meta
    name: str

    def checkpoint(self) -> str:
        """The folder of this checkpoint alone."""
        return str(checkpoints.path_of(self.directory, self.step))

    def weights(self) -> str:
        """What identifies its policy, equal to `checkpoints.weights_digest` of it."""
        return checkpoints.policy_digest(self.meta)


@dataclasses.dataclass(frozen=True)
class File:
    """Completions of another system, or of `dro_jax generate`."""

    path: str
    name: str
    answers: list[str]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A policy's answers to all prompts, in their order; the numbers are None where there is no reference.

    Attributes:
      texts: N of them.
      log_ratios: log pi(y|x) - log pi_ref(y|x), nats, [N].
      cut: answers that stopped at the limit of tokens.
    """

    texts: list[str]
    log_ratios: np.ndarray | None
    cut: int | None


def find(path: str, name: str, prompts: Sequence[str]) -> Run | File:
    """What a person named: a checkpoint, or a file of completions.

    Raises:
      UsageError: if it is neither, or the file does not have an answer to every prompt.
    """
    if path.endswith(".jsonl"):
        return File(path, name, read_completions(path, prompts))
    directory, step = checkpoints.find(path)
    return Run(path, directory, step, checkpoints.read_meta(directory, step), name)


def read_completions(path: str, prompts: Sequence[str]) -> list[str]:
    """A file's answer to each prompt; for a prompt that occurs k times, the k-th of its answers at the k-th place.

    Raises:
      UsageError: if the file cannot be read, a row is not a prompt and a completion, or an answer is missing.
    """
    try:
        text = epath.Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a UTF-8 file") from error
    found: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
    for prompt, completion in texts_of_rows(path, text, ["prompt", "completion"]):
        found[prompt].append(completion)
    answers = []
    for number, prompt in enumerate(prompts, 1):
        if not found[prompt]:
            raise UsageError(
                f"{path}: no completion of prompt {number} ({prompt[:60]!r}); give a row for every prompt"
            )
        answers.append(found[prompt].popleft())
    return answers


def find_reference(path: str | None, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The reference that was named, or else the one that the runs were aligned from.

    Returns:
      The reference and "", or None and why there is none.

    Raises:
      UsageError: if the one that was named is no checkpoint, or has another vocabulary than a run.
    """
    if path is not None:
        directory, step = checkpoints.find(path)
        reference = Run(path, directory, step, checkpoints.read_meta(directory, step), path)
        for run in runs:
            if run.meta["vocabulary"] != reference.meta["vocabulary"]:
                raise UsageError(
                    f"{path}: has another vocabulary than {run.path}, and no log-ratio to it; give another --reference"
                )
        return reference, ""
    if not runs:
        return None, "there are only completions, and no policies"
    digests = {run.meta.get("reference") for run in runs} - {None}
    if not digests:
        return None, "no run has a reference of its own, and no --reference is given"
    if len(digests) > 1 or len({run.meta["vocabulary"] for run in runs}) > 1:
        return (
            None,
            "the runs have different references or vocabularies, and no --reference is given",
        )
    for run in runs:
        # One checkpoint's reference lies beside it.
        place = run.directory / REFERENCE
        if run.meta.get("reference") and checkpoints.steps(place):
            step = checkpoints.steps(place)[-1]
            meta = checkpoints.read_meta(place, step)
            return Run(str(place), place, step, meta, str(place)), ""
    return None, "the runs' reference is not there any more, and no --reference is given"


def sample(
    source: Run, base: Run | None, prompts: list[str], sampling: Sampling, folder: epath.Path
) -> Answers:
    """A policy's answers: those that an earlier call left in the folder, and the rest sampled.

    The file's name holds a hash of all that its rows follow from, so that no other policy's, prompts', seed's or
    decoding's are taken for these.

    Args:
      source: the policy.
      base: the reference.
      prompts: texts.
      sampling: how, with the policy's own seed.
      folder: of the completions.

    Returns:
      An answer a prompt.
    """
    decoding = sampling.decoding(source.meta["lengths"])
    facts = {
        "weights": source.weights(),
        "lengths": source.meta["lengths"],
        "dtype": np.dtype(model_of(source.meta).compute_dtype).name,
        "reference": None if base is None else base.weights(),
        "decoding": dataclasses.asdict(decoding),
        "seed": sampling.seed,
        "prompts": prompts,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', source.name)}-{digest}.jsonl"
    rows = read_rows(path, prompts)
    if len(rows) < len(prompts):
        policy = load_policy(source.checkpoint(), sampling.partitioning())
        reference = None
        if base is not None and base.weights() != source.weights():
            reference = load_policy(base.checkpoint(), sampling.partitioning())
        sample_rest(policy, reference, prompts, rows, decoding, sampling, path, source.name)
    ratios = None
    if base is not None:
        ratios = np.array([row["log_ratio"] or 0.0 for row in rows])
    return Answers(
        [row["completion"] for row in rows], ratios, sum(not row["ended"] for row in rows)
    )


def read_rows(path: epath.Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """What a file of `sample_rest` holds, [] without one.

    Raises:
      UsageError: if it is not what was written.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1]):
        try:
            row = json.loads(line)
            whole = set(row) == {"prompt", "completion", "ended", "log_ratio"}
        except (ValueError, TypeError):
            whole = False
        if not whole or number >= len(prompts) or row["prompt"] != prompts[number]:
            raise UsageError(f"{path}, line {number + 1}: is not what was written; delete the file")
        rows.append(row)
    return rows


def sample_rest(
    policy: Policy,
    reference: Policy | None,
    prompts: list[str],
    rows: list[dict[str, Any]],
    decoding: Decoding,
    sampling: Sampling,
    path: epath.Path,
    name: str,
) -> None:
    """Samples the prompts that have no row yet, adding to `rows` and keeping them in a file as it goes."""
    done = len(rows)
    completions = complete(
        policy,
        prompts[done:],
        decoding,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        first=done,
    )
    saved = time.monotonic()
    try:
        with progress_bar(f"sampling {name}", len(prompts), done) as progress:
            some: list[Completion] = []
            for completion in completions:
                some.append(completion)
                if len(some) < sampling.batch_size and done + len(some) < len(prompts):
                    continue
                texts = prompts[done : done + len(some)]
                ratios: Sequence[float | None] = [None] * len(some)
                if reference is not None:
                    ratios = log_ratios(policy, reference, texts, some, decoding.max_tokens)
                rows += [
                    {
                        "prompt": prompt,
                        "completion": completion.text,
                        "ended": bool(completion.tokens[-1] == policy.vocabulary.eos_id),
                        "log_ratio": ratio,
                    }
                    for prompt, completion, ratio in zip(texts, some, ratios, strict=True)
                ]
                done, some = done + len(some), []
                progress.update(progress.task_ids[0], completed=done)
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_rows(path, rows)
                    saved = time.monotonic()
    finally:
        if rows:
            write_rows(path, rows)


def write_rows(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of completions, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log_ratios(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    max_tokens: int,
) -> list[float]:
    """log pi(y|x) - log pi_ref(y|x) of completions, the sum over the tokens that were drawn, nats.

    A completion that was cut has no end of sequence among them.
    """
    limits = {"inputs": policy.lengths["inputs"], "targets": max_tokens}
    examples: list[Example] = [
        {
            "inputs": np.array(encode_prompt(policy.vocabulary, prompt, limits["inputs"])),
            "targets": completion.tokens,
            "rewards": np.zeros(1, np.float32),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    sharding = partitioning.batch_sharding(policy.mesh, policy.rules)

    def log_ratios_of(batch: Batch) -> np.ndarray:
        arrays = loop.to_devices(batch, sharding)
        # Each by its own shape: a reference that a person named may be another model.
        of_policy, of_reference = (
            np.asarray(
                make_log_prob(each.config, each.mesh, each.rules)(each.params, arrays), np.float64
            )
            for each in (policy, reference)
        )
        return of_policy - of_reference

    shards = policy.mesh.size
    return score_examples(
        log_ratios_of,
        examples,
        lengths=limits,
        max_examples=EXAMPLES_A_ROW,
        batch_size=-(-min(ROWS, len(examples)) // shards) * shards,
    ).tolist()
