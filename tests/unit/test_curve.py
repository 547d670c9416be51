"""The picture is well-formed, and shows what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from orchestration.curve import svg

POINT = {"step": 0.0, "kl": 0.0, "sqrt_kl": 0.0, "score": 0.1, "gold": 0.5}


def lines(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return [element.get("points", "") for element in root.iter("{http://www.w3.org/2000/svg}polyline")]


def test_both_lines_in_the_order_of_their_kl() -> None:
    found = lines(svg([POINT | {"sqrt_kl": 2.0}, POINT, POINT | {"sqrt_kl": 1.0, "score": 3.0}]))
    assert len(found) == 2 and all(len(line.split()) == 3 for line in found)
    across = [float(point.split(",")[0]) for point in found[0].split()]
    assert across == sorted(across)


def test_without_an_exact_grade_there_is_one_line_and_one_point_is_enough() -> None:
    assert len(lines(svg([{name: value for name, value in POINT.items() if name != "gold"}]))) == 1
