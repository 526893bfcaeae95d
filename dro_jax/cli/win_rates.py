"""Who wins while a policy trains: its answers to held-out prompts against its reference's, as a judge says."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from dro_jax.cli.generate import Policy, complete
from dro_jax.cli.judging import load_judge
from dro_jax.cli.run_folder import make_directory, write_whole
from dro_jax.data.feedback import FeedbackFile, read_feedback
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation.judges import Comparison, Judge
from dro_jax.evaluation.sampling import Decoding
from dro_jax.training.algorithms import Needs
from dro_jax.training.loop import Periods, Scalars

FOLDER = "side_by_side"
"""Inside MODEL_DIR: the reference's answers, those of every evaluation, and what a language model replied."""


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How a run in training is held against its reference at every evaluation.

    Attributes:
      judge: as of `dro_jax compare --judge`; None asks nobody.
      prompts: how many of the held-out prompts, the first of the file.
      temperature: of the answers.
      seed: of the answers.
      batch_size: prompts at a time.
    """

    judge: str | None = None
    prompts: int = 256
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Raises UsageError for settings that mean nothing."""
        if self.judge is not None and not isinstance(self.judge, str):
            raise UsageError(f"JUDGE is {self.judge!r}: give a judge's name, as in \"'llm'\"")
        check_number("WinRate.prompts", self.prompts, whole=True, at_least=2)
        check_number("WinRate.temperature", self.temperature, at_least=0)
        check_number("WinRate.seed", self.seed, whole=True, at_least=0)
        check_number("WinRate.batch_size", self.batch_size, whole=True, at_least=1)


@dataclasses.dataclass(frozen=True)
class Jury:
    """A judge, and the prompts that it is to judge answers to."""

    judge: Judge
    prompts: list[str]


def prepare(
    settings: WinRate,
    directory: epath.Path,
    feedback: FeedbackFile,
    periods: Periods,
    needs: Needs,
) -> Jury | None:
    """What a run with these settings asks, None where it asks nobody. Nothing is sampled or written.

    Args:
      settings: judge and sampling.
      directory: of the run.
      feedback: whose held-out prompts are asked, each once.
      periods: of the run.
      needs: of its method.

    Raises:
      UsageError: if there is no such judge, nobody to compare with, too few prompts, or what wins would not be saved.
    """
    if settings.judge is None:
        return None
    if not needs.reference:
        raise UsageError(
            f"JUDGE is {settings.judge!r}: this method has no reference to hold the policy against; leave it out"
        )
    if periods.evaluate % periods.checkpoint:
        raise UsageError(
            f"Periods.evaluate is {periods.evaluate} and Periods.checkpoint {periods.checkpoint}: with a JUDGE the "
            "first has to be a multiple of the second, so that the checkpoint that wins most is there"
        )
    if jax.process_count() > 1:
        raise UsageError(
            f"JUDGE is {settings.judge!r}: several processes cannot ask it yet; leave it out, and compare the "
            "checkpoints with `dro_jax compare`"
        )
    judge = load_judge(settings.judge, cache=directory / FOLDER / "judge_replies.sqlite")
    found: dict[str, None] = {}
    for row in read_feedback(feedback, "validation"):
        found[row.prompt] = None
        if len(found) == settings.prompts:
            break
    if len(found) < 2:
        raise UsageError(
            f"{feedback.path}: {len(found)} prompts are held out, and JUDGE needs two at least; raise "
            "FeedbackFile.validation_fraction"
        )
    return Jury(judge, list(found))


def against_reference(
    settings: WinRate,
    jury: Jury,
    *,
    folder: epath.Path,
    policy_of: Callable[[Any], Policy],
    reference: Any,
) -> Callable[[int, Any], Scalars]:
    """Samples the reference once, and returns what holds a policy against it.

    Args:
      settings: judge and sampling.
      jury: of `prepare`.
      folder: keeps all answers, so that a resumed run samples and pays nothing twice.
      policy_of: what to sample, from its parameters.
      reference: parameters of pi_ref.

    Returns:
      A function of the steps done and the policy's parameters. It gives "side_by_side/win_rate", ties counting half,
      "side_by_side/win_rate_standard_error" over prompts, "side_by_side/ties", and "side_by_side/unanswered": the
      shares of prompts with a tie and without a verdict. Where no prompt has a verdict the win rate is not there.
    """
    make_directory(folder)

    def answers(params: Any, name: str, seed: int) -> list[str]:
        policy = policy_of(params)
        # Other settings or prompts are other answers.
        drawn = [settings.temperature, seed, policy.lengths, jury.prompts]
        digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]
        place = folder / f"{name}_{digest}.jsonl"
        if place.exists():
            return [json.loads(line)["completion"] for line in place.read_text().splitlines()]
        completions = complete(
            policy,
            jury.prompts,
            Decoding(policy.lengths["targets"], settings.temperature),
            seed=seed,
            batch_size=settings.batch_size,
        )
        texts = [completion.text for completion in completions]
        rows = [
            {"prompt": prompt, "completion": text}
            for prompt, text in zip(jury.prompts, texts, strict=True)
        ]
        write_whole(place, "".join(json.dumps(row) + "\n" for row in rows))
        return texts

    of_reference = answers(reference, "reference", settings.seed)

    def evaluate(step: int, params: Any) -> Scalars:
        # The two are not given the same luck.
        of_policy = answers(params, f"step_{step}", settings.seed + 1)
        comparisons = [
            Comparison(*row) for row in zip(jury.prompts, of_policy, of_reference, strict=True)
        ]
        verdicts = list(jury.judge(comparisons))
        points = {"A": 1.0, "tie": 0.5, "B": 0.0}
        wins = np.array([points[v.winner] for v in verdicts if v.winner is not None])
        scalars = {
            "side_by_side/unanswered": 1 - len(wins) / len(verdicts),
            "side_by_side/ties": sum(v.winner == "tie" for v in verdicts) / len(verdicts),
        }
        if len(wins):
            scalars["side_by_side/win_rate"] = float(wins.mean())
        if len(wins) > 1:
            error = wins.std(ddof=1) / np.sqrt(len(wins))
            scalars["side_by_side/win_rate_standard_error"] = float(error)
        return scalars

    return evaluate
