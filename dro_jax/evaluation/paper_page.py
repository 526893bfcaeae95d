"""The page of `dro_jax paper`: our numbers beside the paper's, as JSON, Markdown and HTML."""

import dataclasses
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from dro_jax.evaluation import charts, page
from dro_jax.evaluation.enumeration import AnswerScores, Frontier, head_to_head
from dro_jax.evaluation.experiments import (
    EXPERIMENTS,
    KTO_SEARCH,
    LARGER,
    MATRIX,
    OVER_KTO,
    REFERENCE,
    Agreement,
    Point,
    agreement,
    best_of,
    frontier_of,
    point_of,
)

Scores = Mapping[tuple[str, int], AnswerScores]
"""By arm and seed."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table; cells are text, and the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the runs on disk say.

    Attributes:
      seeds: of any arm, ascending.
      points: by arm, its place on test prompts, one a seed, in the order of the seeds.
      validation: the same on validation prompts.
      matrix: by row and column, the column's win rate over the row, one a seed that both have.
      frontiers: by size of the model ("" or `LARGER`), that of its first seed's reference.
      failures: by run, what became of it instead.
    """

    seeds: Sequence[int]
    points: Mapping[str, Sequence[Point]]
    validation: Mapping[str, Sequence[Point]]
    matrix: Mapping[str, Mapping[str, Sequence[float]]]
    frontiers: Mapping[str, Frontier]
    failures: Mapping[str, str]

    def kto(self, size: str) -> str | None:
        """KTO with the tau that wins most on validation prompts; None where KTO was not run."""
        candidates = [size + name for name in KTO_SEARCH if self.validation.get(size + name)]
        return best_of(candidates, self.validation) if candidates else None


def findings_of(test: Scores, validation: Scores, failures: Mapping[str, str]) -> Findings:
    """Places every run; the references themselves are only compared with.

    Args:
      test: every answer to the test prompts, scored by each run.
      validation: the same of the validation prompts.
      failures: by run, why it is not among them.
    """
    trained = sorted(key for key in test if not key[0].endswith(REFERENCE))
    points = _by_arm({key: point_of(test[key]) for key in trained})
    names = sorted(points)
    matrix: dict[str, dict[str, list[float]]] = {}
    for row, column in ((r, c) for r in [*names, REFERENCE] for c in [*names, REFERENCE]):
        seeds = sorted({seed for arm, seed in trained if arm in (row, column)})
        wins = [_wins(test, column, row, seed) for seed in seeds]
        found = [rate for rate in wins if rate is not None]
        if found and row != column:
            matrix.setdefault(row, {})[column] = found
    sizes = sorted({LARGER if name.startswith(LARGER) else "" for name in names})
    firsts = {
        size: next(key for key in trained if key[0].startswith(LARGER) == bool(size))
        for size in sizes
    }
    return Findings(
        seeds=sorted({seed for _, seed in trained}),
        points=points,
        validation=_by_arm({key: point_of(validation[key]) for key in trained}),
        matrix=matrix,
        frontiers={size: frontier_of(test[key]) for size, key in firsts.items()},
        failures=failures,
    )


def _by_arm(points: Mapping[tuple[str, int], Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for (arm, _), point in points.items():
        found.setdefault(arm, []).append(point)
    return found


def _wins(test: Scores, arm: str, other: str, seed: int) -> float | None:
    """Win rate of an arm over another of the same seed and size; None where one of them is not there."""
    if arm.startswith(LARGER) != other.startswith(LARGER) and REFERENCE not in (arm, other):
        return None
    there = next((test[n, seed] for n in (arm, other) if (n, seed) in test), None)
    if there is None:
        return None
    log_probs = [
        there.reference_log_prob
        if name == REFERENCE
        else test[name, seed].policy_log_prob
        if (name, seed) in test
        else None
        for name in (arm, other)
    ]
    if log_probs[0] is None or log_probs[1] is None:
        return None
    return head_to_head(log_probs[0], log_probs[1], there.score)


def headline(findings: Findings) -> str:
    """The page's first sentence: how far from the frontier each method ends, at its own price."""
    parts = []
    for size, model in (("", "smaller"), (LARGER, "larger")):
        named = {
            "DRO-V": size + "dro_v",
            "KTO": findings.kto(size) or "",
            "DRO-P": size + "dro_p",
        }
        there = {
            name: findings.points[arm] for name, arm in named.items() if arm in findings.points
        }
        shares = [
            f"{name} {_share(points)} (KL {_mean([p.kl for p in points]):.2f} nats)"
            for name, points in there.items()
        ]
        if shares:
            parts.append(f"{', '.join(shares)} with the {model} model")
    return (
        "Of the reward that any policy can gain at its distance from the reference, each method "
        f"reaches: {'; '.join(parts)}."
    )


def tables(findings: Findings) -> list[Table]:
    """All tables of the page."""
    found = [_head_to_head(findings)]
    for experiment in EXPERIMENTS:
        there = [name for name in experiment.paper if name in findings.points]
        if not there:
            continue
        ours = {name: [p.win_rate for p in findings.points[name]] for name in there}
        found.append(
            Table(
                f"{experiment.title} ({experiment.source})",
                _COLUMNS,
                [_row(name, findings.points[name], experiment.paper[name]) for name in there],
                _verdict(agreement(experiment.paper, ours)),
            )
        )
    rest = sorted(
        set(findings.points) - {name for experiment in EXPERIMENTS for name in experiment.paper}
    )
    if rest:
        note = (
            "The paper has no such number for these. Of DRO-P it says that it is less competitive than DRO-V, does not "
            "collapse and can beat SFT."
        )
        rows = [_row(name, findings.points[name], None) for name in rest]
        found.append(Table("Other arms", _COLUMNS, rows, note))
    shown = [name for name in MATRIX if name in findings.matrix]
    if len(shown) > 2:
        found.append(_matrix(findings, shown))
    return found


_COLUMNS = (
    "arm",
    "win rate, %",
    "paper, %",
    "optimum, %",
    "KL, nats",
    "gain",
    "possible",
    "KL to π*",
    "V error",
    "mass",
)


def _row(name: str, points: Sequence[Point], paper: float | None) -> list[str]:
    errors = [point.value_error for point in points if point.value_error is not None]
    return [
        name,
        _spread([100 * p.win_rate for p in points], 1),
        "" if paper is None else f"{paper:.1f}",
        _spread([100 * p.optimum_win_rate for p in points], 1),
        _spread([p.kl for p in points], 3),
        _spread([p.gain for p in points], 3),
        f"{_mean([p.possible_gain for p in points]):.3f}",
        _spread([p.kl_to_optimum for p in points], 3),
        _spread(errors, 3) if errors else "",
        f"{_mean([p.mass for p in points]):.3f}",
    ]


def _head_to_head(findings: Findings) -> Table:
    rows = []
    for size, model in (("", "smaller"), (LARGER, "larger")):
        ours, kto = size + "dro_v", findings.kto(size) or ""
        over_sft = {"DRO-V over SFT": ours, "KTO over SFT": kto}
        paper = {
            name: number
            for experiment in EXPERIMENTS[:2]
            for name, number in experiment.paper.items()
        }
        for label, arm in over_sft.items():
            if arm in findings.points:
                published = paper[ours if arm == ours else size + "kto"]
                rates = [100 * p.win_rate for p in findings.points[arm]]
                rows.append([f"{model}: {label}", _spread(rates, 1), f"{published:.1f}", arm])
        wins = findings.matrix.get(kto, {}).get(ours)
        if wins:
            cells = [_spread([100 * w for w in wins], 1), f"{OVER_KTO[size]:.1f}"]
            rows.append([f"{model}: DRO-V over KTO", *cells, f"{ours}, {kto}"])
    return Table(
        "Head to head",
        ("comparison", "win rate, %", "paper (T5-L, T5-XL), %", "arms"),
        rows,
        "KTO with the tau, of those that were run, that wins most on validation prompts; DRO-V without any search.",
    )


def _matrix(findings: Findings, shown: Sequence[str]) -> Table:
    rows = []
    for row in shown:
        cells = []
        for column in shown:
            wins = findings.matrix[row].get(column)
            published = MATRIX[row].get(column)
            cells.append("" if wins is None else f"{100 * _mean(wins):.1f} ({published:.1f})")
        rows.append([row, *cells])
    pairs = {
        f"{row} {column}": number
        for row in shown
        for column, number in MATRIX[row].items()
        if column in findings.matrix[row]
    }
    right = sum(
        (_mean(findings.matrix[row][column]) > 0.5) == (MATRIX[row][column] > 50)
        for row, column in (pair.split() for pair in pairs)
    )
    return Table(
        "All against all (figure 6)",
        ("over this one …", *shown),
        rows,
        f"Win rate of the column over the row, %; the paper's in brackets. {right} of {len(pairs)} cells are on the "
        "paper's side of 50%.",
    )


def _verdict(found: Agreement) -> str:
    if not found.pairs:
        return ""
    line = f"{found.same} of {found.pairs} pairs of arms are in the paper's order"
    if found.unclear:
        line += f"; {found.unclear} are nearer to each other than two standard errors"
    return f"{line}."


def _share(points: Sequence[Point]) -> str:
    return f"{100 * _mean([p.gain / p.possible_gain for p in points]):.0f}%"


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers))


def _spread(numbers: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{_mean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}"


NOTES = (
    "Columns: win rate over SFT; the paper's; that of the exact optimum at tau = 1 over our SFT; KL(π || SFT); reward "
    "gained over SFT, and the most that is possible at that KL; KL(π || π*); error of V; probability of the answers.",
    "The task is `dro_jax demo`'s: four letters to put in order for a harsh or a mild rater. Its 24 answers can be "
    "enumerated, so every number here is exact for the policy that was trained: nothing is sampled and nobody judges.",
    "Win rates are by the true score on prompts that are in no feedback file; text that is no answer loses. ± is the "
    "standard deviation over seeds, each with its own data, reference and order.",
    "The optimum is eq. 2's at tau = 1. Its win rate is a ceiling only for those who stay as near to the reference: "
    "a policy that goes further wins more and gains less than the price it pays.",
    "The frontier is what eq. 2 gives over all tau: no policy gains more reward at its KL from the reference. Reward "
    "is in standard deviations of the data's rewards. KL and reward are of the policy on the 24 answers, beside which "
    "its mass on them has to be read.",
    "Every arm is at its last step. The paper takes the checkpoint that wins most.",
)


def write(
    directory: epath.Path,
    test: Scores,
    validation: Scores,
    failures: Mapping[str, str],
    conditions: str,
) -> list[str]:
    """Writes paper.json, paper.md and paper.html into a folder; returns what to tell the person at the terminal.

    Args:
      directory: where to.
      test: every answer to the test prompts, scored by each run.
      validation: the same of the validation prompts.
      failures: by run, why it is not among them.
      conditions: versions and date, for the foot of the page.
    """
    findings = findings_of(test, validation, failures)
    found = tables(findings)
    places = {
        directory / "paper.json": json.dumps(_json(findings), indent=2) + "\n",
        directory / "paper.md": _markdown(findings, found, conditions),
        directory / "paper.html": _html(findings, found, conditions),
    }
    for place, text in places.items():
        partial = place.parent / f"{place.name}.partial"
        partial.write_text(text)
        partial.replace(place)
    return [headline(findings), *(f"page         {place}" for place in places)]


def _json(findings: Findings) -> dict[str, Any]:
    def points(of: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
        return {arm: [dataclasses.asdict(point) for point in seeds] for arm, seeds in of.items()}

    return {
        "seeds": list(findings.seeds),
        "test": points(findings.points),
        "validation": points(findings.validation),
        "win_rate_of_column_over_row": findings.matrix,
        "frontier": {
            size + "model": {
                name: array.tolist() for name, array in dataclasses.asdict(frontier).items()
            }
            for size, frontier in findings.frontiers.items()
        },
        "failures": dict(findings.failures),
    }


def _html(findings: Findings, found: Sequence[Table], conditions: str) -> str:
    files = resources.files("dro_jax.evaluation")
    facts = {
        "Arms": str(len(findings.points)),
        "Seeds": ", ".join(map(str, findings.seeds)),
        "Trainings": str(sum(map(len, findings.points.values()))),
        "Failed": str(len(findings.failures)),
    }
    written = [
        f"<h2>{html.escape(t.title)}</h2>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(t.title)}">'
        f"{page.table(t.columns, t.rows, text=(0,))}</div>"
        f'<p class="note">{html.escape(t.note)}</p>'
        for t in found
    ]
    parts = {
        "style": files.joinpath("page.css").read_text(encoding="utf-8"),
        "headline": html.escape(headline(findings)),
        "facts": "".join(
            f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>"
            for name, fact in facts.items()
        ),
        "charts": "".join(
            page.figure(caption, svg)
            for size in findings.frontiers
            for caption, svg in _planes(findings, size)
        ),
        "tables": "".join(written),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in _notes(findings)),
        "footer": html.escape(conditions),
    }
    template = files.joinpath("paper.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


GROUPS = {
    "DRO-V": r"dro_v",
    "DRO-V, other settings": r"dro_v_(rates|value_rate|tau).*",
    "DRO-V, other sharing": r"dro_v_single.*",
    "DRO-P": r"dro_p",
    "KTO": r"kto.*",
}
"""Arms of one colour."""


def _planes(findings: Findings, size: str) -> Iterator[tuple[str, str]]:
    """Captions and charts: reward, and win rate, over the distance from the reference."""
    model = "larger" if size else "smaller"
    best = findings.frontiers[size]
    arms = [name for name in findings.points if name.startswith(LARGER) == bool(size)]
    quantities: list[tuple[str, str, Callable[[Point], float], np.ndarray]] = [
        ("reward gained over SFT", "gain", lambda p: p.gain, best.gain),
        ("win rate over SFT, %", "win rate", lambda p: 100 * p.win_rate, 100 * best.win_rate),
    ]
    furthest = 1.15 * max(point.kl for name in arms for point in findings.points[name])
    shown = best.kl <= max(furthest, best.kl[1])
    for label, short, value, optimum in quantities:
        with mpl.rc_context(charts.STYLE):
            figure = Figure((charts.WIDTH, 3.4))
            axes = figure.add_subplot()
            axes.plot(best.kl[shown], optimum[shown], color=charts.TEXT, linewidth=1.2)
            for k, (group, pattern) in enumerate(GROUPS.items()):
                points = [
                    point
                    for name in arms
                    if re.fullmatch(pattern, name.removeprefix(LARGER))
                    for point in findings.points[name]
                ]
                if points:
                    axes.plot(
                        [point.kl for point in points],
                        [value(point) for point in points],
                        "o",
                        color=charts.SERIES[k],
                        markersize=5,
                        label=group,
                    )
            axes.set_xlabel("KL from SFT, nats")
            axes.set_ylabel(label)
            axes.legend(loc="best")
            title = f"The {model} model: {short} and distance from the reference"
            yield f"{title}.", charts.to_svg(figure, title)


def _notes(findings: Findings) -> list[str]:
    return [*NOTES, *(f"{name} failed: {problem}" for name, problem in findings.failures.items())]


def _markdown(findings: Findings, found: Sequence[Table], conditions: str) -> str:
    lines = ["# The paper in miniature", "", headline(findings), ""]
    for table in found:
        lines += [f"## {table.title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (table.columns, ["---"] * len(table.columns))]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        lines += ["", table.note, ""]
    lines += [
        "## How to read this",
        "",
        *(f"- {note}" for note in _notes(findings)),
        "",
        conditions,
    ]
    return "\n".join(lines) + "\n"
