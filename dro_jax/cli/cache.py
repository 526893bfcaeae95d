"""`dro_jax cache`: tokens and the reference's log-probabilities, computed once and kept beside the data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
from etils import epath

from dro_jax.cli import configuration, train
from dro_jax.cli.console import console, progress_bar
from dro_jax.cli.run_data import cache_facts, read_data
from dro_jax.cli.run_folder import facts_of_reference
from dro_jax.data import caching
from dro_jax.data.packing import Batch, Example, score_examples
from dro_jax.data.tasks import feedback_task
from dro_jax.errors import UsageError
from dro_jax.networks import T5Config
from dro_jax.training import checkpoints, loop, partitioning, processes, train_state
from dro_jax.training.algorithms import Needs
from dro_jax.training.step import make_log_prob

EXAMPLES_A_ROW = 16
"""The reference reads packed rows, however training will have them."""


def run() -> None:
    """Makes the cache of the run that the loaded configuration describes; all but CACHE_DIR as of `train`.

    Raises:
      UsageError: for anything wrong with files or settings, before anything is written.
    """
    bound = configuration.arguments(train.train)
    feedback, lengths, rules = bound["feedback"], bound["lengths"], bound["rules"]
    needs: Needs = bound["algorithm"].needs
    if not isinstance(bound.get("cache_dir"), str):
        raise UsageError("CACHE_DIR must be given: add --gin.CACHE_DIR=\"'cache'\"")
    if needs.reference and bound.get("init_checkpoint") is None:
        raise UsageError(
            "INIT_CHECKPOINT must be given: the cache holds the reference's log-probabilities"
        )
    drop_overlong = bound.get("drop_overlong", False)
    mesh = rules.mesh()
    partitioning.check_batch_size(bound["batch_size"], mesh, rules)
    data = processes.agree(
        lambda: read_data(
            feedback,
            bound["model"],
            bound["algorithm"],
            lengths,
            bound.get("vocabulary_file"),
            None,
            drop_overlong,
        )
    )
    processes.refuse_differences("feedback file", data.summary.digest)
    model, vocabulary, summary = data.model, data.vocabulary, data.summary
    digest, reference = None, None
    if needs.reference:
        layout = train_state.make_layout(
            model, bound["optimizer"].transforms(), has_value=False, mesh=mesh, rules=rules
        )
        expected = facts_of_reference(
            {
                "model": model.architecture(),
                "vocabulary": data.vocabulary_digest,
                "reserved_entry": model.reserved_entry,
            }
        )
        source, at = checkpoints.find(bound["init_checkpoint"])
        reference = checkpoints.restore_policy(source, at, layout.abstract().policy, expected)
        digest = checkpoints.weights_digest(reference)
    for line in (
        *summary.describe().splitlines(),
        data.overlong.describe(drop_overlong=drop_overlong),
    ):
        console.print(line)

    task = feedback_task(
        feedback,
        vocabulary=vocabulary,
        statistics=summary.rewards,
        num_input_examples=summary.num_input_examples,
        min_reward=summary.top_reward,
        mismatched=needs.mismatched,
        prompt_ids=needs.pairs,
        drop_overlong=drop_overlong,
    )
    score: caching.Score | None = None
    scored: list[str] = []
    if reference is not None:
        score = make_score(
            model, reference, vocabulary, lengths, bound["batch_size"], layout, needs.mismatched
        )
        scored = ["reference_log_probs"]
        scored += ["mismatched_reference_log_probs"] if needs.mismatched else []
    facts = cache_facts(
        feedback,
        model,
        needs,
        lengths,
        data.vocabulary_digest,
        drop_overlong,
        digest,
        summary.digest,
    )
    total = sum(summary.num_input_examples.values())
    with progress_bar("caching", total) as progress:
        manifest = caching.write(
            bound["cache_dir"],
            task,
            facts=facts,
            counts={
                "summary": dataclasses.asdict(summary),
                "overlong": dataclasses.asdict(data.overlong),
                "path": feedback.path,
                "reference": bound.get("init_checkpoint"),
                "dtype": np.dtype(model.compute_dtype).name,
            },
            score=score,
            scored=scored,
            writes=processes.is_first(),
            of_writer=processes.of_first,
            progress=lambda done: progress.update(progress.task_ids[0], completed=done),
        )
    if manifest is not None:
        console.print(
            f"{epath.Path(bound['cache_dir']) / caching.TASK}: {total} examples, "
            f"{sum(manifest.files.values()) / 1e6:.1f} MB"
        )
    processes.wait_for_all("the cache is written")


def make_score(
    model: T5Config,
    reference: Any,
    vocabulary: seqio.Vocabulary,
    lengths: Mapping[str, int],
    batch_size: int,
    layout: train_state.Layout,
    mismatched: bool,
) -> caching.Score:
    """Builds the function from a shard's examples to the reference's log-probabilities of their completions.

    Args:
      model: the T5's shape.
      reference: its parameters, on the mesh.
      vocabulary: for the end of sequence.
      lengths: the limits at which training will cut.
      batch_size: rows at a time, a multiple of the mesh's data shards.
      layout: the mesh and its rules.
      mismatched: whether the mismatched completions are scored too.

    Returns:
      A function for `caching.write`.
    """
    sharding = partitioning.batch_sharding(layout.mesh, layout.rules)
    log_prob = make_log_prob(model, layout.mesh, layout.rules)

    def score_batch(batch: Batch) -> np.ndarray:
        return np.asarray(log_prob(reference, loop.to_devices(batch, sharding)))

    def score_completions(examples: list[Example]) -> np.ndarray:
        scores = score_examples(
            score_batch,
            examples,
            lengths=lengths,
            max_examples=EXAMPLES_A_ROW,
            batch_size=batch_size,
        )
        return scores.astype(np.float32)

    def score(examples: list[Example]) -> dict[str, np.ndarray]:
        def finished(name: str) -> list[Example]:
            # As tasks.feedback_task ends and cuts them.
            end = [vocabulary.eos_id]
            return [
                {
                    "inputs": np.append(example["inputs"][: lengths["inputs"] - 1], end),
                    "targets": np.append(example[name], end)[: lengths["targets"]],
                    "rewards": example["rewards"],
                }
                for example in examples
            ]

        scores = {"reference_log_probs": score_completions(finished("targets"))}
        if mismatched:
            others = score_completions(finished("mismatched_targets"))
            scores["mismatched_reference_log_probs"] = others
        return scores

    return score
