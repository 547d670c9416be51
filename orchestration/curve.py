"""The curve of over-optimisation as a picture: reward-model score and exact grade against the root of the KL (Gao et al. 2210.10760).

An SVG written by hand, so that a report needs no plotting package. Each line has its own scale: what matters is whether both rise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, EDGE = 640, 320, 60
LINES = (("score", "reward model", "#2563eb"), ("gold", "exact grade", "#b45309"))
Point = Mapping[str, float]


def svg(curve: Sequence[Point]) -> str:
    """The picture; points in the order of their KL, one line for each of `score` and, where it is known, `gold`."""
    points = sorted(curve, key=lambda point: point["sqrt_kl"])
    known = [line for line in LINES if all(line[0] in point for point in points)]
    across = _scale([point["sqrt_kl"] for point in points], EDGE, WIDTH - EDGE)
    parts = [_axis(points), *(_line(points, across, number, *line) for number, line in enumerate(known))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="sans-serif" font-size="12">'
        + ("".join(parts) + "</svg>\n")
    )


def _scale(values: Sequence[float], start: float, end: float) -> list[float]:
    """Values on a stretch of the picture; all in its middle when they are equal."""
    low, high = min(values), max(values)
    return [(start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start) for value in values]


def _axis(points: Sequence[Point]) -> str:
    bottom, first, last = HEIGHT - EDGE, points[0]["sqrt_kl"], points[-1]["sqrt_kl"]
    return (
        f'<line x1="{EDGE}" y1="{bottom}" x2="{WIDTH - EDGE}" y2="{bottom}" stroke="#888"/>'
        f'<text x="{EDGE}" y="{bottom + 18}">{first:.2f}</text>'
        f'<text x="{WIDTH - EDGE}" y="{bottom + 18}" text-anchor="end">{last:.2f}</text>'
        f'<text x="{WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">square root of the KL to the reference, nats per reply</text>'
    )


def _line(points: Sequence[Point], across: Sequence[float], number: int, name: str, title: str, colour: str) -> str:
    values = [point[name] for point in points]
    up = _scale(values, HEIGHT - EDGE - 10, EDGE)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in zip(across, up, strict=True))
    label = f"{title}, {min(values):.2f} to {max(values):.2f}"
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'
        f'<text x="{EDGE + number * 260}" y="24" fill="{colour}">{label}</text>'
    )
