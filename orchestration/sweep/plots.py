"""Three pictures of a sweep: parallel coordinates, importance, and score against KL with the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestration.sweep import objective as objectives
from orchestration.sweep.importance import METHOD, position
from orchestration.sweep.records import Trial
from orchestration.sweep.space import Dimension, Space
from orchestration.sweep.table import shown
from orchestration.sweep.trial import Task

COLOURS = colormaps["viridis"]
TICKS = 5
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
"""Behind figures that lines may cross."""


def write(folder: Path, space: Space, found: Sequence[Trial], task: Task, winner: Trial | None, weights: dict[str, float]) -> None:
    """PNG files in the sweep's folder; a picture with nothing to show is not drawn."""
    measured = [which for which in found if which.points()]
    if measured:
        _save(_score_against_kl(measured, task, winner), folder / "score_against_kl.png")
        _save(_parallel(space, measured, task, winner), folder / "parallel_coordinates.png")
    if weights:
        _save(_importance(weights), folder / "importance.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _score_against_kl(found: Sequence[Trial], task: Task, winner: Trial | None) -> Figure:
    """Each trial's way through KL and the judge's score; its last weights as a mark."""
    figure = Figure(figsize=(7.5, 5))
    axes = figure.add_subplot()
    for which in found:
        points = which.points()
        best = winner is not None and which.number == winner.number
        can_win = objectives.ineligible(which.status, points, task.config.ppo.steps, task.kl_budget) is None
        colour = "tab:green" if best else "tab:blue" if can_win else "0.6"
        axes.plot([p.kl for p in points], [p.score for p in points], color=colour, alpha=0.9 if best else 0.4, linewidth=2 if best else 1)
        mark = "*" if best else "o" if can_win else "x"
        axes.scatter([points[-1].kl], [points[-1].score], color=colour, marker=mark, s=160 if best else 36, zorder=3)
        axes.annotate(which.name, (points[-1].kl, points[-1].score), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.axvline(task.kl_budget, color="tab:red", linestyle="--", linewidth=1)
    axes.annotate(
        f" KL budget {task.kl_budget:.3g}", (task.kl_budget, 0.02), xycoords=("data", "axes fraction"), color="tab:red", fontsize=8
    )
    handles = [
        axes.scatter([], [], color=c, marker=m, label=text)
        for c, m, text in (("tab:green", "*", "best"), ("tab:blue", "o", "can win"), ("0.6", "x", "cannot win"))
    ]
    axes.legend(handles=handles, fontsize=8, loc="best")
    axes.set_xlabel("KL to the SFT model, nats per reply, held-out prompts")
    axes.set_ylabel("held-out judge's mean score")
    axes.set_title("Score against KL", fontsize=10)
    return figure


def _parallel(space: Space, found: Sequence[Trial], task: Task, winner: Trial | None) -> Figure:
    """A line for each trial through its values, coloured by its last score; broken lines are trials that cannot win."""
    figure = Figure(figsize=(2.2 * (len(space.dimensions) + 1) + 1, 5))
    axes = figure.add_subplot()
    scores = {which.number: which.points()[-1].score for which in found}
    low, high = min(scores.values()), max(scores.values())
    span = (high - low) or 1.0
    for which in sorted(found, key=lambda which: scores[which.number]):
        heights = [_height(dimension, which) for dimension in space.dimensions] + [(scores[which.number] - low) / span]
        can_win = objectives.ineligible(which.status, which.points(), task.config.ppo.steps, task.kl_budget) is None
        best = winner is not None and which.number == winner.number
        axes.plot(
            range(len(heights)), heights, color=COLOURS((scores[which.number] - low) / span), linewidth=3 if best else 1.3,
            linestyle="-" if can_win else ":", marker="o", markersize=3,
        )  # fmt: skip
    for at, dimension in enumerate(space.dimensions):
        _axis(axes, at, _ticks(dimension))
    _axis(axes, len(space.dimensions), [(n / (TICKS - 1), f"{low + span * n / (TICKS - 1):.3g}") for n in range(TICKS)])
    axes.set_xticks(range(len(space.dimensions) + 1), [*(dimension.key for dimension in space.dimensions), "judge's score"])
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.08)
    axes.set_title("Trials; thick: the best, dotted: cannot win; below an axis: not in force, or outside its range", fontsize=9)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return figure


def _height(dimension: Dimension, which: Trial) -> float:
    if dimension.key not in which.values:
        return -0.06
    found = position(dimension, which.values[dimension.key])
    return found if not math.isnan(found) and 0 <= found <= 1 else -0.06


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.kind == "choice":
        return [(position(dimension, value), shown(value)) for value in dimension.of]
    low, high = dimension.of[:2]
    logarithmic = dimension.kind in ("loguniform", "logint")
    shares = [n / (TICKS - 1) for n in range(TICKS)]
    return [(s, f"{low * (high / low) ** s if logarithmic else low + (high - low) * s:.2g}") for s in shares]


def _axis(axes: Axes, at: int, ticks: Sequence[tuple[float, Any]]) -> None:
    axes.axvline(at, color="0.3", linewidth=1)
    for height, text in ticks:
        axes.annotate(text, (at, height), textcoords="offset points", xytext=(4, -3), fontsize=8, zorder=4, bbox=BEHIND)


def _importance(weights: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6, 0.6 * len(weights) + 1.2))
    axes = figure.add_subplot()
    names = sorted(weights, key=lambda name: weights[name])
    axes.barh(names, [weights[name] for name in names], color="tab:blue")
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share ({METHOD})", fontsize=9)
    axes.set_title("What the judge's score depends on", fontsize=10)
    return figure
