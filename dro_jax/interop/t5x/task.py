"""The feedback task under a name that T5X finds, with metrics for SeqIO's evaluation."""

import functools
from collections.abc import Sequence

import numpy as np

from dro_jax.data.feedback import FeedbackFile
from dro_jax.data.tasks import register_feedback_task

NAME = "feedback"


def feedback(
    file: FeedbackFile, vocabulary_file: str | None, mismatched: bool = False, name: str = NAME
) -> str:
    """Registers a feedback file as a SeqIO task, once however often gin asks; for MIXTURE_OR_TASK_NAME.

    Args:
      file: what to read, and how to judge and split it.
      vocabulary_file: a SentencePiece model, or None for bytes.
      mismatched: whether examples bring another prompt's completion too, which KTO needs.
      name: of the task.

    Returns:
      The name.

    Raises:
      UsageError: as `register_feedback_task`.
    """
    _register(name, file, vocabulary_file, mismatched)
    return name


@functools.cache
def _register(name: str, file: FeedbackFile, vocabulary_file: str | None, mismatched: bool) -> None:
    register_feedback_task(
        name,
        file,
        vocabulary_file=vocabulary_file,
        mismatched=mismatched,
        # T5X's inference writes them beside its predictions.
        keep_text=True,
        metric_fns=(log_prob, completions),
    )


def log_prob(targets: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Mean of log pi(y|x) over the held-out completions, nats a sequence."""
    del targets
    return {"log_prob": float(np.mean(scores))}


def completions(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """How long the policy's own completions are, characters, and the share that are empty."""
    del targets
    lengths = [len(prediction) for prediction in predictions]
    return {
        "completions/characters": float(np.mean(lengths)),
        "completions/empty": float(np.mean([length == 0 for length in lengths])),
    }
