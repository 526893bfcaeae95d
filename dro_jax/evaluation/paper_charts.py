"""The plane of `dro_jax paper`: what runs gain, and at what distance from their reference."""

import re
from collections.abc import Callable, Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from dro_jax.evaluation import charts
from dro_jax.evaluation.enumeration import Frontier
from dro_jax.evaluation.experiments import LARGER, MODELS, Findings, Point, size_of

GROUPS = {
    "DRO-V": r"dro_v",
    "DRO-V, other rates and τ": r"dro_v_(rates|value_rate|tau).*",
    "DRO-V, other sharing": r"dro_v_single.*",
    "DRO-P": r"dro_p",
    "KTO": r"kto.*",
}
"""Arms of one colour."""


def planes(findings: Findings, size: str) -> Iterator[tuple[str, str]]:
    """Captions and charts: reward, and win rate, over the distance from the reference."""
    quantities: list[tuple[str, str, Callable[[Point], float], Callable[[Frontier, float], float]]]
    quantities = [
        (
            "Reward gained and distance from SFT",
            "reward gained over SFT",
            lambda point: point.gain,
            lambda best, kl: best.at(kl)[0],
        ),
        (
            "Win rate and distance from SFT",
            "win rate over SFT, %",
            lambda point: 100 * point.win_rate,
            lambda best, kl: 100 * best.at(kl)[1],
        ),
    ]
    arms = {
        arm: list(points.values())
        for arm, points in sorted(findings.points.items())
        if size_of(arm) == size
    }
    furthest = 1.15 * max(point.kl for points in arms.values() for point in points)
    distances = furthest * np.linspace(0, 1, 101) ** 2
    for title, label, value, optimum in quantities:
        with mpl.rc_context(charts.STYLE):
            figure = Figure((charts.WIDTH, 4.4))
            axes = figure.add_subplot()
            for k, best in enumerate(findings.frontiers[size].values()):
                axes.plot(
                    distances,
                    [optimum(best, kl) for kl in distances],
                    color=charts.TEXT,
                    linewidth=0.8,
                    alpha=0.7,
                    label="exact optimum of a seed" if k == 0 else None,
                )
            labelled = []
            for k, (group, pattern) in enumerate(GROUPS.items()):
                there = [arm for arm in arms if re.fullmatch(pattern, arm.removeprefix(LARGER))]
                for place, arm in enumerate(there):
                    x, y = [p.kl for p in arms[arm]], [value(p) for p in arms[arm]]
                    axes.plot(
                        x,
                        y,
                        "o",
                        color=charts.SERIES[k],
                        markersize=4,
                        alpha=0.75,
                        label=None if place else group,
                    )
                    labelled.append((_short(arm), (float(np.mean(x)), float(np.mean(y)))))
            # On it the frontier is nearly straight, and what is near to SFT does not crowd.
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.abs(x)), np.square))
            axes.set_xlim(0, furthest)
            ticks = [float(f"{furthest * (k / 4) ** 2:.1g}") for k in range(5)]
            axes.set_xticks([x for x in ticks if x <= furthest])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("KL from SFT, nats (scale of its square root)")
            axes.set_ylabel(label)
            figure.legend(loc="outside upper left", ncols=2)
            _label(figure, axes, labelled)
            whole = f"The {MODELS[size]} model: {title[0].lower()}{title[1:]}"
            yield f"{whole}.", charts.to_svg(figure, whole)


def _short(arm: str) -> str:
    """An arm's name without what its colour says."""
    name = arm.removeprefix(LARGER).removeprefix("dro_v_")
    return name.replace("_", " ") if name not in ("dro_v", "dro_p") else name


def _label(figure: Figure, axes: Axes, labelled: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Writes names beside points, none over another, a point or a line; one that finds no room is left out."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inside = axes.get_window_extent(renderer)
    unit = figure.dpi / 72
    taken = [
        Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit)
        for line in axes.get_lines()
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    for name, point in labelled:
        for away, (right, up) in ((a, d) for a in (6, 14, 24, 36) for d in _DIRECTIONS):
            text = axes.annotate(
                name,
                point,
                (away * right, away * up),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[np.sign(right)],
                va={1: "bottom", 0: "center", -1: "top"}[np.sign(up)],
                fontsize=8,
                arrowprops=None
                if away == 6
                else {"arrowstyle": "-", "color": charts.MUTED, "linewidth": 0.5, "shrinkB": 3},
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            # Room for a reader's larger letters.
            box = mpl.text.Text.get_window_extent(text, renderer).expanded(1.15, 1.3)
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not box.count_overlaps(taken)
            ):
                taken.append(box)
                break
            text.remove()


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))
"""In which a name may lie from its point, the best first."""
