"""What a run is given, read and checked before it begins: its rows, its vocabulary, its cache."""

import dataclasses
import logging
from collections.abc import Mapping

import seqio

from dro_jax.cli.run_folder import vocabulary_digest
from dro_jax.data import caching, records
from dro_jax.data.feedback import FeedbackFile, FeedbackSummary, RewardStatistics, summarise
from dro_jax.data.tasks import OverlongCounts, count_overlong
from dro_jax.data.vocabulary import check_vocabulary_fits, load_vocabulary
from dro_jax.errors import UsageError, check_number
from dro_jax.networks import T5Config
from dro_jax.training.algorithms import Algorithm, Needs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunData:
    """What `read_data` found in order.

    Attributes:
      model: with what the method adds to it.
      vocabulary: of the task.
      vocabulary_digest: what identifies it.
      summary: of the feedback file, or as it was when the cache was made.
      overlong: how many rows are cut.
      manifest: of the cache, None without one or for SeqIO's own.
      rows: `FeedbackSummary.digest` of the file that is there now, else the cache's.
    """

    model: T5Config
    vocabulary: seqio.Vocabulary
    vocabulary_digest: str
    summary: FeedbackSummary
    overlong: OverlongCounts
    manifest: caching.Manifest | None
    rows: str


def read_data(
    feedback: FeedbackFile,
    model: T5Config,
    algorithm: Algorithm,
    lengths: Mapping[str, int],
    vocabulary_file: str | None,
    cache_dir: str | None,
    drop_overlong: bool,
) -> RunData:
    """Reads feedback, vocabulary and the cache's manifest. Raises UsageError for what does not fit together."""
    check_lengths(lengths)
    needs = algorithm.needs
    vocabulary = load_vocabulary(vocabulary_file)
    model = dataclasses.replace(model, reserved_entry=needs.value == "policy")
    check_vocabulary_fits(vocabulary, model.vocab_size, reserved_entry=model.reserved_entry)
    manifest = None if cache_dir is None else caching.read_manifest(cache_dir)
    # A cache serves without its file, but not for another one.
    of_file = summarise(feedback) if manifest is None or records.exist(feedback.path) else None
    if manifest is not None:
        summary, overlong = summaries_of_cache(manifest)
    else:
        assert of_file is not None
        summary = of_file
        overlong = count_overlong(
            feedback, vocabulary=vocabulary, lengths=lengths, drop_overlong=drop_overlong
        )
        if cache_dir is not None:
            needed = ["mismatched_targets"] * needs.mismatched + ["prompt_ids"] * needs.pairs
            caching.check_seqio_cache(cache_dir, summary.num_input_examples, needed)
    return RunData(
        model=model,
        vocabulary=vocabulary,
        vocabulary_digest=vocabulary_digest(vocabulary_file),
        summary=summary,
        overlong=overlong,
        manifest=manifest,
        rows=(of_file or summary).digest,
    )


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Raises UsageError for TASK_FEATURE_LENGTHS that mean nothing."""
    if not isinstance(lengths, Mapping) or set(lengths) != {"inputs", "targets"}:
        raise UsageError(
            f'TASK_FEATURE_LENGTHS is {lengths!r}: write {{"inputs": 512, "targets": 512}}'
        )
    for name, length in lengths.items():
        check_number(f"TASK_FEATURE_LENGTHS[{name!r}]", length, whole=True, at_least=2)


def summaries_of_cache(manifest: caching.Manifest) -> tuple[FeedbackSummary, OverlongCounts]:
    """What `summarise` and `count_overlong` said when a cache was made.

    Raises:
      UsageError: if the manifest does not hold that.
    """
    try:
        summary = dict(manifest.counts["summary"])
        summary["rewards"] = RewardStatistics(**summary["rewards"])
        summary["bad_row_messages"] = tuple(summary["bad_row_messages"])
        return FeedbackSummary(**summary), OverlongCounts(**manifest.counts["overlong"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            "CACHE_DIR: the manifest lacks what training needs; run `dro_jax cache` again, into another folder"
        ) from error


def cache_facts(
    feedback: FeedbackFile,
    model: T5Config,
    needs: Needs,
    lengths: Mapping[str, int],
    vocabulary: str,
    drop_overlong: bool,
    reference: str | None,
    rows: str,
) -> caching.Facts:
    """What a cache has to have been made with, to serve a run.

    Args:
      feedback: how rows are judged and split; the file itself may have moved.
      model: shape of the reference.
      needs: of the method.
      lengths: limits at which texts are cut.
      vocabulary: `vocabulary_digest`.
      drop_overlong: whether over-long completions are left out.
      reference: `checkpoints.weights_digest` of the reference's weights.
      rows: `FeedbackSummary.digest` of the rows.
    """
    return {
        "validation_fraction": feedback.validation_fraction,
        "top_fraction": feedback.top_fraction,
        "ultrafeedback_score": feedback.ultrafeedback_score,
        "model": model.architecture() if needs.reference else None,
        "reserved_entry": model.reserved_entry,
        "lengths": dict(lengths),
        "vocabulary": vocabulary,
        "drop_overlong": drop_overlong,
        "mismatched": needs.mismatched,
        "pairs": needs.pairs,
        "reference": reference,
        "rows": rows,
    }


def check_pairs(needs: Needs, batch_size: int, max_examples: int, summary: FeedbackSummary) -> None:
    """Raises UsageError where a method's pairs or mismatched responses cannot be had."""
    if needs.pairs and max_examples > 1:
        raise UsageError(
            f"MAX_EXAMPLES is {max_examples}: this method takes completions two by two, which are not packed; "
            "give 1"
        )
    if needs.pairs and not summary.train_pairs:
        raise UsageError(
            f"{summary.path}: no training prompt has two completions, which this method compares; give "
            "more completions a prompt, or another method"
        )
    if needs.contrasts and not summary.contrasting_prompts:
        raise UsageError(
            f"{summary.path}: no training prompt has completions of different reward, which this method "
            "prefers one of; give such, or another method"
        )
    if needs.mismatched and batch_size == max_examples == 1:
        logger.warning("batches of one have no mismatched response: KTO's z0 is 0 throughout")
