"""Charts of a report as SVG for its page.

Matplotlib draws them in stand-in colours, which become the page's CSS variables, so that a chart follows the reader's
light or dark scheme. Text stays text.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from dro_jax.evaluation.report import (
    Curve,
    Report,
    log_ratio_name,
    opponent,
)
from dro_jax.evaluation.side_by_side import CONFIDENCE, Pair

TEXT, MUTED, RULE, SURFACE = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#0001{k:02x}" for k in range(8))
"""Stand-ins; a ninth policy has the first one's colour again."""

_VARIABLES = {
    TEXT: "var(--text)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    SURFACE: "var(--surface)",
    **{colour: f"var(--series-{k})" for k, colour in enumerate(SERIES)},
}

STYLE: Any = {
    "svg.fonttype": "none",
    # Otherwise names of clip paths and markers are random.
    "svg.hashsalt": "dro_jax",
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

FOLD_HEIGHT = 0.16
"""Of the line of a fold, in rows of `intervals`."""

WIDTH = 4.8
"""Inches. On a phone a chart is about two thirds as wide, and its text still legible."""

LOSSES = (
    "loss/dro",
    "loss/two_sample_dro",
    "loss/kto",
    "loss/dpo",
    "loss/ipo",
    "loss/slic",
    "loss/sft",
)
"""A method's own, of those that its logs have."""


def intervals(report: Report) -> str:
    """Each pair's win rate with its interval, and below it those of its folds."""
    pairs = [pair.swapped() if pair.win_rate < 0.5 else pair for pair in report.pairs]
    height = 1 + FOLD_HEIGHT * len(report.folds)
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 0.7 + 0.5 * height * len(pairs)))
        axes = figure.add_subplot()
        axes.grid(False)
        axes.axvline(50, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        for row, pair in enumerate(pairs):
            _interval(axes, height * row, pair)
        axes.set_ylim(height * len(pairs) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("win rate, %")
        return to_svg(figure, "Win rates of all pairs with intervals and folds")


def _interval(axes: Axes, row: float, pair: Pair) -> None:
    axes.annotate(
        plain(f"{pair.first} over {pair.second}"),
        (0, row - 0.26),
        xycoords=("axes fraction", "data"),
        va="bottom",
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
    )
    axes.plot([100 * end for end in pair.interval], [row, row], color=SERIES[0], linewidth=2)
    for fold, (rate, ends) in enumerate(zip(pair.fold_rates, pair.fold_intervals, strict=True), 1):
        below = row + 0.08 + FOLD_HEIGHT * fold
        axes.plot([100 * end for end in ends], [below, below], color=MUTED, linewidth=0.8)
        axes.plot(100 * rate, below, "o", color=MUTED, markersize=2.4)
    axes.plot(100 * pair.win_rate, row, "o", color=SERIES[0], markersize=6)


def lengths(report: Report) -> str:
    """How long the policies' answers are: a histogram each, over the same bins."""
    of_each = [policy.lengths() for policy in report.policies]
    # One endless answer would leave a single bar of the rest.
    top = max(1.0, float(np.quantile(np.concatenate(of_each), 0.99)))
    edges = np.linspace(0, top, 25)
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 2.8))
        axes = figure.add_subplot()
        for k, (policy, counted) in enumerate(zip(report.policies, of_each, strict=True)):
            shares = np.histogram(np.minimum(counted, top), edges)[0] / len(counted)
            colour = SERIES[k % len(SERIES)]
            axes.stairs(100 * shares, edges, fill=True, color=colour, alpha=0.12)
            axes.stairs(100 * shares, edges, color=colour, linewidth=1.6, label=plain(policy.name))
        axes.set_xlim(0, top)
        axes.set_xlabel("characters (the longest 1% are in the last bar)")
        axes.set_ylabel("share of answers, %")
        axes.legend()
        return to_svg(figure, "Histogram of answer lengths by policy")


def plane(report: Report) -> str | None:
    """Win rate against distance from the reference; None where no policy's distance is known."""
    against = report.policies[opponent(report)]
    points = [
        (k, policy, ratio, 0.5, (0.5, 0.5))
        if policy is against
        else (k, policy, ratio, *_over(report, policy.name, against.name))
        for k, policy in enumerate(report.policies)
        if (ratio := policy.log_ratio()) is not None
    ]
    points = [point for point in points if math.isfinite(point[2].mean + point[3])]
    if not points:
        return None
    distances = [ratio.mean for _, _, ratio, _, _ in points]
    middle = (min(distances) + max(distances)) / 2
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 3.2))
        axes = figure.add_subplot()
        axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
        for k, policy, ratio, rate, (low, high) in points:
            x, y, colour = ratio.mean, 100 * rate, SERIES[k % len(SERIES)]
            if not math.isnan(ratio.standard_error):
                reach = z * ratio.standard_error
                axes.plot([x - reach, x + reach], [y, y], color=colour, linewidth=1.2)
            axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=1.2)
            axes.plot(x, y, "o", color=colour, markersize=6)
            # Towards the middle, and without a say in the size of the axes.
            leftwards = x > middle
            axes.annotate(
                plain(policy.name),
                (x, y),
                (-6 if leftwards else 6, 5),
                textcoords="offset points",
                ha="right" if leftwards else "left",
            ).set_in_layout(False)
        axes.margins(x=0.2, y=0.2)
        axes.set_xlabel(f"{log_ratio_name(report.setting)}, nats a sequence")
        axes.set_ylabel(plain(f"win rate over {against.name}, %"))
        return to_svg(figure, "Win rate and distance from the reference of each policy")


def _over(report: Report, name: str, other: str) -> tuple[float, tuple[float, float]]:
    """Win rate of one policy over another, and its interval."""
    pair = next(pair for pair in report.pairs if {pair.first, pair.second} == {name, other})
    seen = pair.seen_from(name)
    return seen.win_rate, seen.interval


def training(report: Report) -> Iterator[tuple[str, str]]:
    """Captions and charts of what the runs logged: each one's loss, then quantities of all of them together."""
    for k, policy in enumerate(report.policies):
        loss = next(
            (name for name in LOSSES if any(curve.endswith(name) for curve in policy.curves)), None
        )
        if loss is None:
            continue
        drawn = {
            "training": policy.curves.get(f"train {loss}"),
            "held out": policy.curves.get(f"held out {loss}"),
            "best constant, held out": policy.curves.get("held out loss/constant")
            if loss == "loss/dro"
            else None,
        }
        colour = SERIES[k % len(SERIES)]
        styles = {
            "training": (colour, "-", 0.45),
            "held out": (colour, "-", 1.0),
            "best constant, held out": (MUTED, ":", 1.0),
        }
        yield (
            f"{policy.name}: {loss}",
            _curves(
                [
                    (name, curve, *styles[name])
                    for name, curve in drawn.items()
                    if curve is not None
                ],
                f"Training curve of {policy.name}",
            ),
        )
    together = {
        "kl/log_ratio_mean": "held out: mean of log π/π_ref on the data's answers, nats",
        "side_by_side/win_rate": "held out: win rate over the reference",
    }
    for metric, caption in together.items():
        lines = [
            (policy.name, policy.curves[f"held out {metric}"], SERIES[k % len(SERIES)], "-", 1.0)
            for k, policy in enumerate(report.policies)
            if f"held out {metric}" in policy.curves
        ]
        if lines:
            yield caption, _curves(lines, caption)


def _curves(lines: Sequence[tuple[str, Curve, str, str, float]], title: str) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 2.6))
        axes = figure.add_subplot()
        for name, curve, colour, style, alpha in lines:
            axes.plot(
                curve.steps,
                curve.values,
                color=colour,
                linestyle=style,
                alpha=alpha,
                linewidth=1.6,
                marker="o" if len(curve.steps) < 12 else None,
                markersize=3.5,
                label=plain(name),
            )
        axes.set_xlabel("step")
        axes.legend()
        return to_svg(figure, title)


def plain(text: str) -> str:
    """Text that Matplotlib shows as it is: dollars would be formulas, a leading underscore hides a legend's entry."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")


def to_svg(figure: Figure, title: str) -> str:
    """A figure as SVG for a page, in the page's colours. The title is for those who cannot see it."""
    written = io.StringIO()
    figure.savefig(
        written,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The page sizes it and chooses its font; what Matplotlib says for every element would be said for the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    # Several charts share the page: only names that are referred to stay, and those are made unlike another chart's.
    referred = {name for _, name in re.findall(r'(url\(|href=")#(\w+)', svg)}
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(
        r' id="([^"]*)"', lambda m: f' id="c{prefix}-{m[1]}"' if m[1] in referred else "", svg
    )
    svg = re.sub(r'(url\(|href=")#(\w+)', rf"\1#c{prefix}-\2", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
