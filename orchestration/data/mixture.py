"""Weighted mixtures: every part's share of the dialogues is its share of the weights, to within 1%.

Nothing is left out for a proportion's sake: the part that is largest for its weight is taken once, the others are repeated in whole
passes and a random part of one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.data.dialogues import Dialogue
from orchestration.errors import RequestError

SMALLEST = 200
"""Fewest dialogues of a mixture: with fewer, whole numbers of dialogues do not meet the shares."""
MOST_PASSES = 1000


def mixed(dialogues: Sequence[Dialogue], weights: Mapping[str, float], seed: int) -> tuple[list[Dialogue], dict[str, Any]]:
    """The dialogues repeated and shuffled to the weights of their sources, and what that took; as they are without two sources.

    Returns:
        Dialogues, and for each source how many it has, how many times they were used, its share and its passes.

    Raises:
        RequestError: a source has no dialogue, or would be repeated beyond reason.
    """
    if len(weights) < 2:
        return list(dialogues), {}
    parts = {name: [d for d in dialogues if d.source == name] for name in sorted(weights)}
    for name, part in parts.items():
        if not part:
            raise RequestError(f"data.mix: no dialogue of {name} is left to learn from; leave this part out, or use a larger scale.context")
    counts = counts_for({name: len(part) for name, part in parts.items()}, weights)
    rng = random.Random(f"mixture {seed}")
    found = [d for name, part in parts.items() for d in _repeated(part, counts[name], rng)]
    rng.shuffle(found)
    total = sum(counts.values())
    return found, {
        name: {"dialogues": len(part), "used": counts[name], "share": counts[name] / total, "passes": round(counts[name] / len(part), 3)}
        for name, part in parts.items()
    }


def counts_for(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many dialogues of each source a mixture takes: at least all of them.

    Raises:
        RequestError: a source would be repeated more than `MOST_PASSES` times.
    """
    shares = {name: weights[name] / sum(weights[name] for name in sizes) for name in sizes}
    total = max(SMALLEST, *(math.ceil(sizes[name] / shares[name]) for name in sizes))
    counts = {name: max(round(total * shares[name]), 1) for name in sizes}
    for name, size in sizes.items():
        if counts[name] > MOST_PASSES * size:
            raise RequestError(
                f"data.mix: with these weights the {size} dialogue(s) of {name} would be repeated {counts[name] // size} times; "
                "bring the weights nearer to the parts' sizes"
            )
    return counts


def _repeated(part: Sequence[Dialogue], count: int, rng: random.Random) -> list[Dialogue]:
    passes, rest = divmod(count, len(part))
    return [*part] * passes + rng.sample(list(part), rest)
