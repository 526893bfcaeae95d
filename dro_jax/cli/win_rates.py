"""Who wins while a policy trains: its answers to held-out prompts against its reference's, as a judge says."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from dro_jax.cli.generate import Policy, complete
from dro_jax.cli.judging import load_judge
from dro_jax.cli.run_folder import make_directory
from dro_jax.data.feedback import FeedbackFile, read_feedback
from dro_jax.errors import UsageError, check_number
from dro_jax.evaluation.chat_completions import JudgeUnavailableError
from dro_jax.evaluation.judges import Comparison, Judge, Verdict
from dro_jax.evaluation.llm_judge import LlmJudge
from dro_jax.evaluation.sampling import Decoding
from dro_jax.evaluation.side_by_side import SCORES
from dro_jax.training import checkpoints, processes
from dro_jax.training.algorithms import Needs
from dro_jax.training.loop import Periods, Scalars
from dro_jax.whole_files import write_whole

logger = logging.getLogger(__name__)

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

    def settings(self, judge: str) -> dict[str, Any]:
        """What a resumed run had better not change, by the names that a person knows; `judge` is its whole name."""
        names = ("prompts", "temperature", "seed")
        return {"JUDGE": judge} | {f"WinRate.{name}": getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Jury:
    """A judge, and the prompts that it is to judge answers to.

    Attributes:
      judge: of process 0, which alone asks it; None in the others.
      name: of the judge, and of its model where it has one.
      prompts: the same in every process.
    """

    judge: Judge | None
    name: str
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
    if jax.process_count() > 1 and settings.judge.startswith(("implied_reward:", "value:")):
        raise UsageError(
            f"JUDGE is {settings.judge!r}: a run's own reward is for one process; give another judge, or leave it out "
            "and compare the checkpoints with `dro_jax compare`"
        )
    judge, name = None, settings.judge
    if processes.is_first():
        judge = load_judge(settings.judge, cache=directory / FOLDER / "judge_replies.sqlite")
    if isinstance(judge, LlmJudge):
        name = f"{name} ({judge.endpoint.model})"
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
    return Jury(judge, name, list(found))


def against_reference(
    settings: WinRate,
    jury: Jury,
    *,
    folder: epath.Path,
    policy_of: Callable[[Any], Policy],
    reference: Any,
) -> Callable[[int, Any, Callable[[], None]], Scalars]:
    """Samples the reference once, and returns what holds a policy against it.

    Every process takes part in the sampling; process 0 writes, asks the judge and tells the others what it said.

    Args:
      settings: judge and sampling.
      jury: of `prepare`.
      folder: keeps all answers, so that a resumed run samples and pays nothing twice.
      policy_of: what to sample, from its parameters.
      reference: parameters of pi_ref.

    Returns:
      A function of the steps done, the policy's parameters, and what to call as a sign of life. It gives
      "side_by_side/win_rate", ties counting half, "side_by_side/win_rate_standard_error" over prompts, and the shares
      of prompts "side_by_side/ties", "side_by_side/no_verdict" and, of those, "side_by_side/unanswered". Where no
      prompt has a verdict the win rate is not there; where the judge fails nothing is, and a warning says why.

    Raises:
      UsageError: if the judge cannot be used, as a trial shows.
    """
    processes.agree(lambda: make_directory(folder))

    def answers(params: Any, name: str, seed: int, alive: Callable[[], None]) -> list[str]:
        policy = policy_of(params)
        # Other weights, settings or prompts are other answers.
        drawn = [
            checkpoints.weights_digest(params),
            np.dtype(policy.config.compute_dtype).name,
            settings.temperature,
            seed,
            policy.lengths,
            jury.prompts,
        ]
        digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]
        place = folder / f"{name}_{digest}.jsonl"
        # The others may not see what process 0 has written.
        kept = processes.of_first(lambda: place.read_text() if place.exists() else "")
        if kept:
            return [json.loads(line)["completion"] for line in kept.splitlines()]
        texts = []
        for completion in complete(
            policy,
            jury.prompts,
            Decoding(policy.lengths["targets"], settings.temperature),
            seed=seed,
            batch_size=settings.batch_size,
        ):
            texts.append(completion.text)
            alive()
        rows = [
            {"prompt": prompt, "completion": text}
            for prompt, text in zip(jury.prompts, texts, strict=True)
        ]
        if processes.is_first():
            write_whole(place, "".join(json.dumps(row) + "\n" for row in rows))
        return texts

    of_reference = answers(reference, "reference", settings.seed, lambda: None)
    # Of two equal answers a judge need not be asked.
    first = of_reference[0]
    other = next((text for text in of_reference if text != first), f"{first}.")
    try_out(jury, Comparison(jury.prompts[0], first, other))

    def evaluate(step: int, params: Any, alive: Callable[[], None]) -> Scalars:
        # The two are not given the same luck.
        of_policy = answers(params, f"step_{step}", settings.seed + 1, alive)
        comparisons = [
            Comparison(*row) for row in zip(jury.prompts, of_policy, of_reference, strict=True)
        ]
        verdicts = []
        try:
            for verdict in ask(jury, comparisons):
                verdicts.append(verdict)
                alive()
        except UsageError as error:
            # Steps are dearer than a win rate.
            logger.warning("no win rate of step %d, and training goes on: %s", step, error)
            return {}
        return summarise(verdicts)

    return evaluate


def ask(jury: Jury, comparisons: list[Comparison]) -> Iterator[Verdict]:
    """The verdicts that process 0 is given, in every process. Raises UsageError in all where the judge fails."""
    given = iter(()) if jury.judge is None else jury.judge(comparisons)

    def next_verdict() -> str:
        try:
            return json.dumps(dataclasses.asdict(next(given)))
        except JudgeUnavailableError as error:
            raise UsageError(str(error)) from error

    for _ in comparisons:
        yield Verdict(**json.loads(processes.of_first(next_verdict)))


def try_out(jury: Jury, comparison: Comparison) -> None:
    """Asks for one verdict, since the first evaluation is hours away.

    Raises:
      UsageError: if the judge fails, unless its endpoint is merely out of order for now.
    """

    def trial() -> str:
        assert jury.judge is not None
        try:
            return str(len(list(jury.judge([comparison]))))
        except JudgeUnavailableError as error:
            logger.warning("the judge does not answer now: %s", error)
        return ""

    processes.of_first(trial)


def summarise(verdicts: list[Verdict]) -> Scalars:
    """The win rate of the first side and what else `against_reference` promises."""
    points = np.array([SCORES[verdict.winner] for verdict in verdicts])
    wins = points[~np.isnan(points)]
    scalars = {
        "side_by_side/no_verdict": 1 - len(wins) / len(points),
        "side_by_side/unanswered": sum(v.unanswered for v in verdicts) / len(verdicts),
        "side_by_side/ties": float(np.mean(points == SCORES["tie"])),
    }
    if len(wins):
        scalars["side_by_side/win_rate"] = float(wins.mean())
    if len(wins) > 1:
        error = wins.std(ddof=1) / np.sqrt(len(wins))
        scalars["side_by_side/win_rate_standard_error"] = float(error)
    return scalars
