"""The page of `dro_jax paper`: our numbers beside the paper's, as JSON, Markdown and HTML."""

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from dro_jax.evaluation import page, paper_charts
from dro_jax.evaluation.experiments import (
    HEAD_TO_HEAD,
    MATRIX,
    MODELS,
    OTHER,
    OVER_KTO,
    RESOLUTION,
    UNCLEAR,
    VERDICTS,
    Experiment,
    Findings,
    Order,
    Point,
    interval,
    matrix_orders,
    orders,
    over_kto,
    size_of,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was done, in words.

    Attributes:
      training: steps, batch and learning rates of DRO-V.
      bindings: gin bindings that every training had beside its arm's file.
      failures: by run, why it is not among the findings.
      versions: of the programs that wrote the page.
      date: when they did.
    """

    training: str
    bindings: Sequence[str]
    failures: Mapping[str, str]
    versions: str
    date: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text; the columns `words` hold words, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: a line, tables, and a list."""

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()


def headline(findings: Findings) -> str:
    """The page's first sentence: how far from the frontier each method ends, at its own price."""
    parts = []
    for size, model in MODELS.items():
        arms = {
            "DRO-V": f"{size}dro_v",
            "KTO": findings.kto(size) or "",
            "DRO-P": f"{size}dro_p",
        }
        shares = [
            f"{name} {_share(points)} ({_mean(points, 'kl'):.2f} nats, mass {_mean(points, 'mass'):.2f})"
            for name, arm in arms.items()
            if (points := _points(findings, arm))
        ]
        if shares:
            parts.append(f"{', '.join(shares)} with the {model} model")
    if not parts:
        return "Neither DRO-V nor KTO nor DRO-P is among the runs."
    return (
        f"Of the reward that any policy can gain at its KL from SFT: {'; '.join(parts)}. Mass is the probability of "
        "the answers."
    )


def sections(findings: Findings, setting: Setting) -> list[Section]:
    """All of the page but headline and charts."""
    compared = [
        (experiment, _orders(findings, experiment))
        for experiment in findings.experiments()
        if any(arm in findings.points for arm in experiment.paper)
    ]
    matrix = list(matrix_orders(findings))
    missing = [f"{run} is missing: {problem}" for run, problem in setting.failures.items()]
    every = {f"{e.title} ({e.source})": found for e, found in compared}
    return [
        _summary(findings, every | {"All against all (figure 6)": matrix}),
        _equal_kl(findings),
        _nearness(findings),
        *(_experiment(findings, experiment, found) for experiment, found in compared),
        *([_matrix(findings, matrix)] if matrix else []),
        Section("What differs from the paper", items=_differences(setting)),
        Section("How to read this", items=[*READING, *missing]),
    ]


def _orders(findings: Findings, experiment: Experiment) -> list[Order]:
    """Pairs of an experiment's arms, and DRO-V against KTO where that is the experiment."""
    found = list(orders(experiment.paper, findings.points))
    for size, head in HEAD_TO_HEAD.items():
        direct = over_kto(findings, size) if head.title == experiment.title else None
        found += [] if direct is None else [direct]
    return found


def _summary(findings: Findings, by_title: Mapping[str, Sequence[Order]]) -> Section:
    """How many orders agree, which do not, and why."""
    every = [order for found in by_title.values() for order in found]
    rows = [[title, *_counts(found)] for title, found in by_title.items() if found]
    total = [["all", *_counts(every)]] if len(rows) > 1 else []
    against = [_why(findings, order) for order in every if order.verdict == OTHER]
    unclear = [_pair(order) for order in every if order.verdict == UNCLEAR]
    note = (
        "Pairs of arms: one is above another if it wins more over SFT, and beats it if it wins more of the two. Not "
        "told apart: the interval over seeds of the difference has 0 in it. The paper's own numbers give no order "
        f"where they are nearer than {RESOLUTION:g} point: its ± is 0.3 to 1.0 where it gives one."
    )
    if len(findings.seeds) == 1:
        note += " One seed: no interval, so that every order here may be that seed's."
    tables = [Table(("experiment", *VERDICTS), [*rows, *total])]
    if against:
        tables.append(Table(WHY_COLUMNS, against, (0, 1)))
    items = [f"Not told apart: {', '.join(unclear)}."] if unclear else []
    return Section("Whether the orders agree", note, tables, items)


def _pair(order: Order) -> str:
    return f"{order.first} {'above' if order.over_sft else 'beats'} {order.second}"


def _counts(found: Iterable[Order]) -> list[str]:
    verdicts = [order.verdict for order in found]
    return [str(verdicts.count(verdict)) for verdict in VERDICTS]


WHY_COLUMNS = (
    "the other way here",
    "why",
    "points",
    "paper",
    "KL from SFT",
    "KL to π*",
    "error of V",
    "mass",
    "π* at its τ, %",
    "at equal KL",
)


def _why(findings: Findings, order: Order) -> list[str]:
    """A row of `WHY_COLUMNS`: an order that is not the paper's, with what is known exactly of both arms."""
    turned = Order(
        order.second,
        order.first,
        -order.paper,
        [-number for number in order.ours],
        [-number for number in order.equal_kl],
    )
    sides = [_points(findings, arm) for arm in (turned.first, turned.second)]

    def both(name: str, digits: int, scale: float = 1.0) -> str:
        cells = [
            "-"
            if not points or (name == "value_error" and points[0].value_error is None)
            else f"{scale * _mean(points, name):.{digits}f}"
            for points in sides
        ]
        return " / ".join(cells)

    # SFT has no KL from itself, and nearly all of its probability on the answers.
    first, second = (
        {name: _mean(points, name) if points else default for name, default in _OF_SFT.items()}
        for points in sides
    )
    reasons = {
        "its π* wins more": first["optimum_win_rate"] > second["optimum_win_rate"] + 0.005,
        "the other left the answers": second["mass"] < first["mass"] - 0.02,
        "it went further": first["kl"] > 1.2 * second["kl"] + 0.01,
    }
    return [
        _pair(turned),
        ", ".join(reason for reason, holds in reasons.items() if holds),
        _spread(turned.ours, 1),
        f"{turned.paper:.1f}",
        both("kl", 2),
        both("kl_to_optimum", 3),
        both("value_error", 2),
        both("mass", 2),
        both("optimum_win_rate", 1, 100),
        _spread(turned.equal_kl, 1) if turned.over_sft else "",
    ]


_OF_SFT = {"kl": 0.0, "mass": 1.0, "optimum_win_rate": 0.5}


def _equal_kl(findings: Findings) -> Section:
    rows = []
    for arm, points in _all_arms(findings):
        wins, possible = (
            _numbers(points, "win_rate", 100),
            _numbers(points, "possible_win_rate", 100),
        )
        rows.append(
            [
                arm,
                _spread(_numbers(points, "kl"), 2),
                _spread(wins, 1),
                f"{np.mean(possible):.1f}",
                _spread(_numbers(points, "lost_win_rate", 100), 1),
                _spread(_numbers(points, "gain"), 2),
                f"{_mean(points, 'possible_gain'):.2f}",
                _spread(_numbers(points, "lost_gain"), 2),
                _share(points),
                f"{_mean(points, 'mass'):.2f}",
            ]
        )
    columns = (
        "arm",
        "KL, nats",
        "wins, %",
        "optimum of that KL, %",
        "short of it",
        "gain",
        "possible at that KL",
        "short of it",
        "share",
        "mass",
    )
    note = (
        "Each arm beside the exact optimum that has gone as far from SFT as it: what it is short of in win rate, and "
        "in reward (standard deviations). The smaller that is, the better the method at equal KL."
    )
    return Section("At equal KL", note, [Table(columns, rows)])


def _nearness(findings: Findings) -> Section:
    rows = []
    for arm, points in _all_arms(findings):
        errors = [number for number in _numbers(points, "value_error") if number is not None]
        rows.append(
            [
                arm,
                _spread(_numbers(points, "optimum_win_rate", 100), 1),
                _spread(_numbers(points, "win_rate", 100), 1),
                _spread(_numbers(points, "kl_to_optimum"), 4),
                _spread(errors, 3) if errors else "-",
                _spread(_numbers(points, "mass"), 3),
            ]
        )
    columns = ("arm", "π* wins, %", "arm wins, %", "KL to π*, nats", "error of V", "mass")
    note = (
        "π* is eq. 2's optimum at the arm's own τ; of KTO, whose τ is another thing, at τ = 1. KL to π* and the error "
        "of V are on the answers alone, beside which the mass has to be read."
    )
    return Section("How near to the exact optimum", note, [Table(columns, rows)])


def _experiment(findings: Findings, experiment: Experiment, found: Sequence[Order]) -> Section:
    """An experiment's win rates beside the paper's, and its pairs."""
    rows = []
    for arm, published in experiment.paper.items():
        points = _points(findings, arm)
        if points:
            cells = [
                _spread(_numbers(points, name, 100), 1) for name in ("win_rate", "optimum_win_rate")
            ]
            rows.append([f"{arm} over SFT", cells[0], f"{published:.1f}", cells[1]])
    note = experiment.note
    if experiment.source in {head.source for head in HEAD_TO_HEAD.values()}:
        direct = over_kto(findings, size_of(next(iter(experiment.paper))))
        if direct is not None:
            ours = _spread([50 + number for number in direct.ours], 1)
            published = OVER_KTO[size_of(direct.first)]
            rows.append([f"{direct.first} over {direct.second}", ours, f"{published:.1f}", ""])
        note = (
            "KTO with the τ, of those that were run, that wins most on validation prompts; DRO-V without any search "
            "here."
        )
    arms = Table(("arm", "win rate, %", "paper, %", "π* at the arm's τ, %"), rows)
    pairs = [_pairs(found)] if found else []
    return Section(f"{experiment.title} ({experiment.source})", note, [arms, *pairs])


def _pairs(found: Sequence[Order]) -> Table:
    """Pairs in the paper's order, differences in points."""
    rows = [
        [
            _pair(order),
            f"{order.paper:.1f}",
            _spread(order.ours, 1),
            order.verdict,
            _spread(order.equal_kl, 1) if order.over_sft else "",
        ]
        for order in found
    ]
    return Table(("pair", "paper, points", "ours", "order", "ours at equal KL"), rows, (0, 3))


def _matrix(findings: Findings, found: Sequence[Order]) -> Section:
    shown = [name for name in MATRIX if name in findings.wins]
    rows = []
    for row in shown:
        wins = findings.wins[row]
        cells = [
            f"{100 * np.mean([*wins[column].values()]):.1f} ({MATRIX[row][column]:.1f})"
            if column in wins
            else ""
            for column in shown
        ]
        rows.append([row, *cells])
    pairs = _pairs(found)
    each = Table(pairs.columns[:-1], [row[:-1] for row in pairs.rows], pairs.words)
    return Section(
        "All against all (figure 6)",
        "Win rate of the column over the row, %, the paper's in brackets; then each pair once, as points above 50%. "
        "The paper's numbers are of a quarter of its training, ours of the end.",
        [Table(("over this one …", *shown), rows), each],
    )


def _differences(setting: Setting) -> list[str]:
    return [
        "Task: four letters to put in order, for a harsh or a mild rater, by T5s of 0.2 and 0.9 million parameters "
        "over bytes. The paper: UltraFeedback, with FLAN-T5 of 770 million and 3 billion.",
        f"Training of DRO-V here: {setting.training}. The paper: 40,000 steps of 32 (T5-XL 20,000), 0.0001 throughout; "
        "its figures 5 and 6 after 10,000. Arms of the learning rates have the paper's factors, 0.1, 0.5 and 5.",
        "Every arm is at its last step. The paper takes the checkpoint that wins most.",
        "Win rates are exact, by the true score. The paper samples an answer a prompt and asks a language model.",
        "± is the half of a 95% t interval over seeds, each with its own data, reference and order. The paper's ± is "
        "the standard deviation over five folds of prompts, of one training.",
        "Hyper-parameters are those of `dro_jax demo`, set for DRO-V while the prompts were looked at that are the "
        "validation prompts here; nobody set them for KTO or DRO-P. No test prompt is among those, and no run here was "
        "trained or chosen on one.",
        "KTO's τ is chosen of three on validation prompts; DRO-V's stays at 1, as in the paper.",
        *(f"Every training had {binding}." for binding in setting.bindings),
    ]


READING = (
    "A prompt's 24 answers are enumerated. Everything else that a policy may say is one more outcome: it loses to "
    "every answer, and its reward is the task's for a text that is no arrangement. So a policy that leaves the answers "
    "pays for it in win rate, reward and KL.",
    "KL is at least this: what a policy does with all that is no answer is taken as one. The reward it could have "
    "gained is then at least what is called possible here.",
    "The frontier is what eq. 2 gives over all τ, one line a seed: no policy of that seed gains more reward at its KL. "
    "In win rate the same optima are no ceiling, as eq. 2 maximises reward: an arm may come to lie slightly above.",
    "The win rate of π* at an arm's τ is what a perfect training would reach. An arm that goes further than π* can win "
    "more, for more KL than the gain is worth at that τ.",
    "KL to π* and the error of V are given that one of the answers is chosen, as the data have nothing else: V is "
    "compared with V* less τ log of the mass, which is what they fix. `dro_jax demo` prints the KL from SFT in that "
    "way too, so that it is less there.",
)


def _all_arms(findings: Findings) -> Iterator[tuple[str, list[Point]]]:
    for arm in sorted(findings.points, key=lambda arm: (size_of(arm), arm)):
        yield arm, _points(findings, arm)


def _points(findings: Findings, arm: str) -> list[Point]:
    return list(findings.points.get(arm, {}).values())


def _numbers(points: Iterable[Point], name: str, scale: float = 1.0) -> list[Any]:
    numbers = [getattr(point, name) for point in points]
    return [None if number is None else scale * number for number in numbers]


def _mean(points: Iterable[Point], name: str) -> float:
    return float(np.mean(_numbers(points, name)))


def _share(points: Sequence[Point]) -> str:
    shares = [100 * point.gain / point.possible_gain for point in points if point.possible_gain > 0]
    return f"{_spread(shares, 0)}%" if shares else "-"


def _spread(numbers: Sequence[float], digits: int) -> str:
    """Mean ± half an interval, where there are several seeds."""
    mean, half = interval(numbers)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def files(findings: Findings, setting: Setting) -> dict[str, str]:
    """The page in three forms: text by the file's name."""
    return {
        "paper.json": json.dumps(_json(findings, setting), indent=2) + "\n",
        "paper.md": _markdown(findings, setting),
        "paper.html": to_html(findings, setting),
    }


def _json(findings: Findings, setting: Setting) -> dict[str, Any]:
    numbers = dataclasses.asdict(findings)
    compared = {e.title: _orders(findings, e) for e in findings.experiments()}
    compared["All against all"] = list(matrix_orders(findings))
    return {
        "setting": dataclasses.asdict(setting),
        "seeds": findings.seeds,
        "test": numbers["points"],
        "validation_win_rate": findings.validation,
        "win_rate_of_column_over_row": findings.wins,
        "orders": {
            title: [dataclasses.asdict(order) | {"verdict": order.verdict} for order in found]
            for title, found in compared.items()
        },
        "frontier": {
            f"{MODELS[size]} model": {
                seed: {name: array.tolist() for name, array in vars(frontier).items()}
                for seed, frontier in of_seed.items()
            }
            for size, of_seed in findings.frontiers.items()
        },
    }


def to_html(findings: Findings, setting: Setting) -> str:
    """The page. It loads nothing."""
    package = resources.files("dro_jax.evaluation")
    seeds = ", ".join(map(str, findings.seeds))
    facts = {
        "Arms": str(len(findings.points)),
        "Seeds": seeds if len(findings.seeds) > 1 else f"{seeds} (one seed: no interval)",
        "Trainings": str(sum(map(len, findings.points.values()))),
        "Missing": str(len(setting.failures)),
    }
    parts = {
        "style": package.joinpath("page.css").read_text(encoding="utf-8"),
        "headline": html.escape(headline(findings))
        .replace("DRO-", "DRO&#8209;")
        .replace(" ± ", "&nbsp;±&nbsp;"),
        "facts": "".join(
            f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>"
            for name, fact in facts.items()
        ),
        "charts": "".join(
            page.figure(caption, svg)
            for size in findings.frontiers
            for caption, svg in paper_charts.planes(findings, size)
        ),
        "sections": "".join(_section(section) for section in sections(findings, setting)),
        "footer": html.escape(f"{setting.versions}, {setting.date}"),
    }
    template = package.joinpath("paper.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _section(section: Section) -> str:
    title = html.escape(section.title)
    note = f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
    tables = "".join(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"{page.table(table.columns, table.rows, text=table.words)}</div>"
        for table in section.tables
    )
    items = "".join(f"<li>{html.escape(item)}</li>" for item in section.items)
    return f"<h2>{title}</h2>{note}{tables}" + (f'<ul class="notes">{items}</ul>' if items else "")


def _markdown(findings: Findings, setting: Setting) -> str:
    lines = ["# The paper in miniature", "", headline(findings), ""]
    for section in sections(findings, setting):
        lines += [f"## {section.title}", ""]
        lines += [section.note, ""] if section.note else []
        for table in section.tables:
            cells = [table.columns, ["---"] * len(table.columns), *table.rows]
            lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
        lines += [*(f"- {item}" for item in section.items), ""] if section.items else []
    return "\n".join([*lines, f"{setting.versions}, {setting.date}"]) + "\n"
