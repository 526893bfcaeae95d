"""What `dro_jax compare` found, as JSON and Markdown, and the sentences that its page shares with them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dro_jax.evaluation.judges import Verdict
from dro_jax.evaluation.side_by_side import (
    CONFIDENCE,
    SCORES,
    Estimate,
    Pair,
    adjusted,
    compare_pair,
    estimate,
    make_folds,
    win_rate_matrix,
)

SIGNIFICANCE = 1 - CONFIDENCE
"""An adjusted p-value below this is called clear."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity over training: steps ascending and values, equally many."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and its answers.

    Attributes:
      name: short, and no other policy's.
      source: path of the run, checkpoint or file.
      answers: one a prompt.
      log_ratios: log pi(y|x) - log pi_ref(y|x) of its answers, nats, [N]; None where there is no reference or no
        policy, only answers.
      cut: answers that stopped at the longest that was allowed; None where that is not known.
      is_reference: whether its weights are the reference's.
      curves: of its training, by metric, such as "train loss/dro" and "held out loss/dro"; {} without logs.
    """

    name: str
    source: str
    answers: Sequence[str]
    log_ratios: np.ndarray | None = None
    cut: int | None = None
    is_reference: bool = False
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)

    def lengths(self) -> np.ndarray:
        """Characters of each answer, [N]."""
        return np.array([len(answer) for answer in self.answers])

    def log_ratio(self) -> Estimate | None:
        """Mean of the log-ratios, which is the KL where the answers are samples of the policy itself."""
        return None if self.log_ratios is None else estimate(self.log_ratios)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a comparison was made.

    Attributes:
      judge: its name.
      prompts_file: where the prompts are from.
      sampling: how answers were drawn, in words.
      samples_policy: whether that draws from the policies themselves: temperature 1 and nothing cut off.
      reference: path of pi_ref, None without one.
      no_reference: why there is none, "" where there is one.
      seed: of the command.
      folds: number of folds asked for.
      fold_size: prompts a fold asked for.
      date: of the report, ISO 8601.
      version: of dro_jax.
    """

    judge: str
    prompts_file: str
    sampling: str
    samples_policy: bool
    reference: str | None
    no_reference: str
    seed: int
    folds: int
    fold_size: int
    date: str
    version: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Policies, verdicts and their statistics.

    Attributes:
      setting: how it was made.
      prompts: N texts.
      policies: at least two.
      verdicts: of each pair of policies (their places, the smaller first), one a prompt, "A" being the first.
      pairs: statistics of the same pairs, in the same order.
      folds: places of the prompts of each fold.
    """

    setting: Setting
    prompts: Sequence[str]
    policies: Sequence[Policy]
    verdicts: Mapping[tuple[int, int], Sequence[Verdict]]
    pairs: Sequence[Pair]
    folds: Sequence[np.ndarray]

    def names(self) -> list[str]:
        """Of the policies, in order."""
        return [policy.name for policy in self.policies]

    def matrix(self) -> np.ndarray:
        """Win rates of the row's policy over the column's, [P, P]."""
        return win_rate_matrix(self.names(), self.pairs)


def make_report(
    setting: Setting,
    prompts: Sequence[str],
    policies: Sequence[Policy],
    verdicts: Mapping[tuple[int, int], Sequence[Verdict]],
) -> Report:
    """Computes the statistics of every pair; arguments as in `Report`."""
    folds = make_folds(len(prompts), setting.folds, setting.fold_size, setting.seed)
    pairs = [
        compare_pair(
            policies[first].name,
            policies[second].name,
            np.array([SCORES[verdict.winner] for verdict in given]),
            [verdict.flipped for verdict in given],
            [verdict.unanswered for verdict in given],
            (policies[first].lengths(), policies[second].lengths()),
            folds,
        )
        for (first, second), given in verdicts.items()
    ]
    return Report(setting, prompts, policies, verdicts, adjusted(pairs), folds)


def headline(report: Report) -> str:
    """Who wins by how much, in one or two sentences."""
    judged = [pair for pair in report.pairs if not math.isnan(pair.win_rate)]
    if not judged:
        return "The judge gave no verdict, so nothing can be said."
    if len(report.policies) == 2:
        pair = judged[0] if judged[0].win_rate >= 0.5 else judged[0].swapped()
        if clear(pair):
            return f"{pair.first} wins {_rate(pair)} against {pair.second}."
        return f"No clear winner: {pair.first} wins {_rate(pair)} against {pair.second}, {_chance(pair)}."
    means = mean_win_rates(report)
    best = report.names()[int(np.argmax(means))]
    against = [pair.seen_from(best) for pair in judged if best in (pair.first, pair.second)]
    closest = min(against, key=lambda pair: pair.win_rate)
    said = f"{best} wins most often, {max(means):.1%} on average over the others"
    if clear(closest):
        return f"{said}; against the closest, {closest.second}, {_rate(closest)}."
    return (
        f"{said}, but not clearly: {_rate(closest)} against {closest.second}, {_chance(closest)}."
    )


def clear(pair: Pair) -> bool:
    """Whether the verdicts are uneven beyond what chance explains."""
    return pair.adjusted_p_value < SIGNIFICANCE


def mean_win_rates(report: Report) -> list[float]:
    """Of each policy, its win rate averaged over the others it was judged against; -1 without any."""
    rates = ([rate for rate in row if not math.isnan(rate)] for row in report.matrix())
    return [float(np.mean(row)) if row else -1.0 for row in rates]


def _rate(pair: Pair) -> str:
    low, high = pair.interval
    return f"{pair.win_rate:.1%} ({CONFIDENCE:.0%} interval {low:.1%} to {high:.1%})"


def _chance(pair: Pair) -> str:
    return f"which may well be chance (p = {pair.adjusted_p_value:.2g})"


def opponent(report: Report) -> int:
    """Place of the policy that the (KL, win rate) plane compares with: the reference, else the first."""
    return next((k for k, policy in enumerate(report.policies) if policy.is_reference), 0)


def log_ratio_name(setting: Setting) -> str:
    """What the mean of log pi(y|x) - log pi_ref(y|x) is, given how answers were drawn."""
    return (
        "KL to the reference" if setting.samples_policy else "log-ratio to the reference (not KL)"
    )


def notes(report: Report) -> list[str]:
    """How the numbers are to be read, one sentence or two each."""
    setting, folds = report.setting, report.folds
    size = len(folds[0])
    said = [
        f"Win rates count a tie as half a win. Intervals are {CONFIDENCE:.0%} Wilson score intervals over the prompts, "
        "their variance reduced by the ties.",
        f"{len(folds)} disjoint random folds of {size} prompts (seed {setting.seed}); ± is the standard deviation over "
        "folds, with one degree of freedom less.",
        "p is that of the exact two-sided sign test of wins against losses, which is McNemar's for paired answers"
        + (f", adjusted by Holm for {len(report.pairs)} pairs." if len(report.pairs) > 1 else "."),
        "The length-controlled win rate is the one a logistic regression expects at equal lengths (characters): the "
        "method of length-controlled AlpacaEval, arXiv 2404.04475, without its term for an instruction's difficulty.",
    ]
    if (len(folds), size) != (setting.folds, setting.fold_size):
        said.insert(
            2,
            f"{setting.folds} folds of {setting.fold_size} were asked for, and there are {len(report.prompts)} "
            "prompts.",
        )
    elif size * len(folds) < len(report.prompts):
        said.insert(
            2,
            f"The folds hold {size * len(folds)} of the {len(report.prompts)} prompts; the rest counts for the "
            "win rates alone.",
        )
    if any(policy.cut for policy in report.policies):
        said.append("Cut: answers that stopped at the limit of tokens and not by themselves.")
    repeated = len(report.prompts) - len(set(report.prompts))
    if repeated:
        said.append(
            f"{repeated} prompts repeat another: intervals and p take them for independent, which makes both bolder "
            "than they should be."
        )
    judged = [pair for pair in report.pairs if not math.isnan(pair.win_rate)]
    if any(math.isnan(pair.length_controlled) for pair in judged):
        said.append(
            "There is no length-controlled win rate where one policy's answers are always longer by about as much: "
            "nothing is known about equal lengths."
        )
    if any(pair.both_orders for pair in report.pairs):
        said.append(
            "Flips: verdicts that changed when the answers changed places, and their share of those asked for in both "
            "orders. They count as ties."
        )
    if any(pair.unjudged for pair in report.pairs):
        said.append("Prompts without a verdict are left out of every rate.")
    if any(pair.unanswered for pair in report.pairs):
        said.append(
            "Not answered: of those, questions that the judge refused, or that brought no reply. The same command asks "
            "them again."
        )
    if setting.no_reference:
        said.append(f"No KL: {setting.no_reference}.")
    elif setting.samples_policy:
        said.append(
            "KL to the reference is the mean of log π(y|x)/π_ref(y|x) over the answers, nats a sequence, with its "
            "standard error: an estimate without bias, since the answers are drawn from the policy itself."
        )
        if any(policy.cut for policy in report.policies):
            said.append(
                "Where answers were cut, it is the KL of answers as far as the limit of tokens: at most that of "
                "whole ones."
            )
    else:
        said.append(
            "The log-ratio to the reference is the mean of log π(y|x)/π_ref(y|x) over the answers. It is no "
            "estimate of the KL: answers were not drawn at temperature 1 from the whole distribution."
        )
    return said


def to_json(report: Report) -> dict[str, Any]:
    """Everything but the answers and single verdicts, JSON-ready; numbers that do not exist are null."""
    setting = report.setting
    return _without_nan(
        {
            "headline": headline(report),
            **dataclasses.asdict(setting),
            "num_prompts": len(report.prompts),
            "num_folds": len(report.folds),
            "prompts_per_fold": len(report.folds[0]),
            "confidence": CONFIDENCE,
            "policies": [
                {
                    "name": policy.name,
                    "source": policy.source,
                    "is_reference": policy.is_reference,
                    "mean_length": float(policy.lengths().mean()),
                    "median_length": float(np.median(policy.lengths())),
                    "cut": policy.cut,
                    "log_ratio": None
                    if (ratio := policy.log_ratio()) is None
                    else dataclasses.asdict(ratio),
                    "log_ratio_is_kl": setting.samples_policy,
                    "curves": {
                        name: dataclasses.asdict(curve) for name, curve in policy.curves.items()
                    },
                }
                for policy in report.policies
            ],
            "win_rates": {
                "of": "the row's policy over the column's",
                "policies": report.names(),
                "matrix": report.matrix().tolist(),
            },
            "pairs": [dataclasses.asdict(pair) for pair in report.pairs],
            "notes": notes(report),
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(rate: float) -> str:
    """A rate as people read it, a dash where there is none."""
    return "-" if math.isnan(rate) else f"{rate:.1%}"


def interval_text(interval: tuple[float, float]) -> str:
    """Both ends of an interval of a rate in per cent, "" where there is none."""
    return "" if math.isnan(interval[0]) else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def p_text(p_value: float) -> str:
    """A p-value to two digits."""
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.2g}"


PAIR_COLUMNS = (
    "pair",
    "win rate",
    "95% interval",
    "folds",
    "p",
    "length controlled",
    "wins",
    "ties",
    "losses",
    "flips",
    "no verdict",
)


def pair_rows(report: Report) -> list[list[str]]:
    """Cells under `PAIR_COLUMNS`, a row a pair, the policy of the greater win rate first."""
    rows = []
    for pair in report.pairs:
        pair = pair.swapped() if pair.win_rate < 0.5 else pair
        deviation = "" if math.isnan(pair.fold_deviation) else f" ± {100 * pair.fold_deviation:.1f}"
        rows.append(
            [
                f"{pair.first} over {pair.second}",
                percent(pair.win_rate),
                interval_text(pair.interval),
                "-" if math.isnan(pair.fold_mean) else f"{100 * pair.fold_mean:.1f}{deviation}",
                p_text(pair.adjusted_p_value),
                percent(pair.length_controlled),
                str(pair.wins),
                str(pair.ties),
                str(pair.losses),
                f"{pair.flips} ({pair.flips / pair.both_orders:.1%})" if pair.both_orders else "-",
                str(pair.unjudged)
                + (f" ({pair.unanswered} not answered)" if pair.unanswered else ""),
            ]
        )
    return rows


def policy_columns(report: Report) -> list[str]:
    """Headings of `policy_rows`."""
    return ["policy", "from", "mean length", "median length", "cut", log_ratio_name(report.setting)]


def policy_rows(report: Report) -> list[list[str]]:
    """Cells under `policy_columns`, a row a policy; lengths are characters."""
    rows = []
    for policy in report.policies:
        ratio = policy.log_ratio()
        error = (
            ""
            if ratio is None or math.isnan(ratio.standard_error)
            else f" ± {ratio.standard_error:.3f}"
        )
        rows.append(
            [
                policy.name,
                policy.source,
                f"{policy.lengths().mean():.1f}",
                f"{np.median(policy.lengths()):.0f}",
                "-" if policy.cut is None else str(policy.cut),
                "-" if ratio is None else f"{ratio.mean:.3f}{error}",
            ]
        )
    return rows


def matrix_rows(report: Report) -> list[list[str]]:
    """Win rates of the row's policy over the column's, a row a policy, its name first."""
    return [
        [name, *(percent(rate) for rate in row)]
        for name, row in zip(report.names(), report.matrix(), strict=True)
    ]


def to_markdown(report: Report) -> str:
    """The report's numbers as Markdown."""
    setting = report.setting
    facts = [
        f"{len(report.prompts)} prompts of {setting.prompts_file}",
        f"judge {setting.judge}",
        f"answers {setting.sampling}",
        f"reference {setting.reference or 'none'}",
        f"dro_jax {setting.version}, {setting.date}",
    ]
    parts = [
        "# Side by side",
        headline(report),
        "; ".join(facts) + ".",
        "## Win rates",
        "Of the row's policy over the column's.",
        _table(["", *report.names()], matrix_rows(report)),
        "## Pairs",
        _table(PAIR_COLUMNS, pair_rows(report)),
        "## Policies",
        _table(policy_columns(report), policy_rows(report)),
        "## How to read this",
        "\n".join(f"- {note}" for note in notes(report)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    # A bar would end the cell; a line break the table.
    cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
