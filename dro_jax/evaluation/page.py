"""A report as one self-contained HTML page: page.html with the numbers, the charts, and the answers for page.js."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from dro_jax.evaluation import charts
from dro_jax.evaluation.report import (
    PAIR_COLUMNS,
    Report,
    headline,
    interval_text,
    notes,
    opponent,
    pair_rows,
    percent,
    policy_columns,
    policy_rows,
)
from dro_jax.evaluation.side_by_side import Pair

_LETTERS = {"A": "A", "B": "B", "tie": "t", None: "-"}
"""Winners for page.js."""


def to_html(report: Report) -> str:
    """The page, UTF-8 text. It loads nothing, and no text of a prompt, answer, reason or name can act in it."""
    files = resources.files("dro_jax.evaluation")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    setting = report.setting
    names = " and ".join(report.names()) if len(report.policies) == 2 else ", ".join(report.names())
    parts = {
        "title": html.escape(f"Side by side: {names}"),
        "kicker": html.escape(f"Side by side: {names}"),
        "headline": html.escape(headline(report)).replace("p = ", "p&nbsp;=&nbsp;"),
        "facts": _facts(report),
        "matrix": _matrix(report),
        "matrix_width": " whole-row" if len(report.policies) > 4 else "",
        "charts": _charts(report),
        "pairs": table(PAIR_COLUMNS, pair_rows(report), text=(0,)),
        "policies": _policies(report),
        "training": _training(report),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes(report)),
        "footer": html.escape(f"dro_jax {setting.version}, {setting.date}"),
        "data": _data(report),
        "style": files.joinpath("page.css").read_text(encoding="utf-8"),
        "script": script,
        # The page's policy lets this script run and no other.
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    template = files.joinpath("page.html").read_text(encoding="utf-8")
    # In one pass: what is filled in may look like a place to fill in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _facts(report: Report) -> str:
    setting = report.setting
    facts = {
        "Prompts": f"{len(report.prompts)}, {setting.prompts_file}",
        "Judge": setting.judge,
        "Answers": setting.sampling,
        "Reference": setting.reference or "none",
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(fact)}</dd></div>" for name, fact in facts.items()
    )


def _matrix(report: Report) -> str:
    names = report.names()
    of_pair = {frozenset((p.first, p.second)): (k, p) for k, p in enumerate(report.pairs)}
    rows = []
    for row in names:
        cells = [f'<th scope="row">{html.escape(row)}</th>']
        for column in names:
            if row == column:
                cells.append('<td><span class="self" aria-hidden="true">·</span></td>')
            else:
                place, pair = of_pair[frozenset((row, column))]
                cells.append(_cell(place, pair.seen_from(row)))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    return (
        f'<table class="matrix"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(place: int, pair: Pair) -> str:
    rate = 0.5 if math.isnan(pair.win_rate) else pair.win_rate
    tone = "--win" if rate >= 0.5 else "--lose"
    # At most 60%, so that the number on it stays legible.
    strength = round(120 * abs(rate - 0.5))
    label = html.escape(
        f"{pair.first} over {pair.second}: {percent(pair.win_rate)}, interval "
        f"{interval_text(pair.interval)}. Read the answers."
    )
    return (
        f'<td><button type="button" data-pair="{place}" aria-label="{label}" '
        f'style="--tone: var({tone}); --strength: {strength}%"><b>{percent(pair.win_rate)}</b>'
        f"<small>{interval_text(pair.interval)}</small></button></td>"
    )


def _charts(report: Report) -> str:
    drawn = [
        ("Win rates with 95% intervals; the thin ones are folds.", charts.intervals(report)),
        ("Lengths of answers.", charts.lengths(report)),
    ]
    plane = charts.plane(report)
    if plane is not None:
        against = report.policies[opponent(report)].name
        drawn.append(
            (
                f"Win rate over {against} and distance from the reference, with 95% intervals: of two policies that "
                "win as often, the one further left has given up less.",
                plane,
            )
        )
    return "".join(figure(caption, svg) for caption, svg in drawn)


def figure(caption: str, svg: str) -> str:
    """A chart with its caption."""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>"


def _training(report: Report) -> str:
    figures = "".join(figure(caption, svg) for caption, svg in charts.training(report))
    return f'<h2 id="training">Training</h2><div class="charts">{figures}</div>' if figures else ""


def _policies(report: Report) -> str:
    rows = [
        [
            f'<span class="swatch" style="--c: var(--series-{k % len(charts.SERIES)})"></span>{html.escape(name)}',
            *map(html.escape, others),
        ]
        for k, (name, *others) in enumerate(policy_rows(report))
    ]
    return table(policy_columns(report), rows, text=(0, 1), escaped=True)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int],
    escaped: bool = False,
) -> str:
    """A table; the columns `text` hold words, the others numbers."""

    def cell(kind: str, place: int, content: str) -> str:
        return f'<{kind} class="text">{content}' if place in text else f"<{kind}>{content}"

    heads = "".join(cell("th", k, html.escape(name)) + "</th>" for k, name in enumerate(columns))
    lines = [
        "".join(
            cell("td", k, content if escaped else html.escape(content)) + "</td>"
            for k, content in enumerate(row)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="list"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _data(report: Report) -> str:
    """What page.js shows, as JSON that no text in it can end."""
    pairs: list[dict[str, Any]] = [
        {
            "policies": places,
            "winners": "".join(_LETTERS[verdict.winner] for verdict in verdicts),
            "flipped": [int(verdict.flipped is True) for verdict in verdicts],
            "reasons": [verdict.reason for verdict in verdicts]
            if any(verdict.reason for verdict in verdicts)
            else None,
        }
        for places, verdicts in report.verdicts.items()
    ]
    data = {
        "prompts": list(report.prompts),
        "policies": [
            {"name": policy.name, "answers": list(policy.answers)} for policy in report.policies
        ],
        "pairs": pairs,
    }
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
