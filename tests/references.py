"""The maths of actors/algorithms once more, as loops over single tokens written from the papers. Slow, plain Python, float64.

Tensors come in, floats go out; nothing of `actors` is used. `mask` is a nested list or tensor of truth values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Numbers = Sequence[float]


def rows_of(x: Tensor) -> list[list[float]]:
    return x.tolist()


def positions_of(mask: Tensor) -> list[tuple[int, int]]:
    """(row, column) of each token that counts."""
    return [(b, t) for b, row in enumerate(mask.tolist()) for t, counts in enumerate(row) if counts]


def distribution(logits: Numbers, temperature: float) -> list[float]:
    """softmax(logits / temperature)."""
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    powers = [math.exp(z - top) for z in scaled]
    return [p / sum(powers) for p in powers]


def logits_of(hidden: Numbers, weight: Sequence[Numbers], bias: Numbers | None) -> list[float]:
    """h W^T + b of one position."""
    return [sum(h * w for h, w in zip(hidden, row, strict=True)) + (bias[v] if bias else 0.0) for v, row in enumerate(weight)]


def entropy(probabilities: Numbers) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def k1(policy: float, reference: float) -> float:
    return policy - reference


def k2(policy: float, reference: float) -> float:
    return (policy - reference) ** 2 / 2


def k3(policy: float, reference: float) -> float:
    return math.exp(reference - policy) - 1 - (reference - policy)


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def shaped_rewards(
    score: float, kl: Numbers, mask: Sequence[bool], beta: float, clip: float, finished: bool, penalty: float
) -> list[float]:
    """InstructGPT (2203.02155), equation 2, of one reply."""
    rewards = [-beta * k if counts else 0.0 for k, counts in zip(kl, mask, strict=True)]
    last = max(t for t, counts in enumerate(mask) if counts)
    rewards[last] += clamp(score, -clip, clip) - (0.0 if finished else penalty)
    return rewards


def gae(rewards: Numbers, values: Numbers, gamma: float, lam: float) -> list[float]:
    """Schulman et al. (1506.02438), equation 16, over consecutive actions, term by term; the value after the last is 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def rloo(rewards: Numbers) -> list[float]:
    """Ahmadian et al. (2402.14740), section 3.3, of one prompt's replies."""
    return [r - sum(o for j, o in enumerate(rewards) if j != i) / (len(rewards) - 1) for i, r in enumerate(rewards)]


def grpo(rewards: Numbers, epsilon: float) -> list[float]:
    """Shao et al. (2402.03300), section 4.1.2, of one prompt's replies."""
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (spread + epsilon) for r in rewards]


def by_prompt(rewards: Tensor, prompts: Tensor, of_one) -> list[float]:
    """`of_one` applied to the replies of each prompt, put back in the batch's order."""
    found = [0.0] * len(rewards)
    for prompt in set(prompts.tolist()):
        members = [i for i, p in enumerate(prompts.tolist()) if p == prompt]
        for i, value in zip(members, of_one([float(rewards[i]) for i in members]), strict=True):
            found[i] = value
    return found


def policy_token(current: float, old: float, advantage: float, clip: float, dual_clip: float | None, weight: float) -> float:
    """One token's loss: Schulman et al. (1707.06347), equation 7; where A < 0 Ye et al. (1912.09729), equation 5."""
    ratio = math.exp(current - old)
    objective = min(ratio * advantage, clamp(ratio, 1 - clip, 1 + clip) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -weight * objective


def value_token(value: float, old: float, target: float, clip: float) -> float:
    near = clamp(value, old - clip, old + clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def importance(old: float, behaviour: float, cap: float | None) -> float:
    """IMPALA (1802.01561), section 4.1: the truncated weight of one token; 1 where nothing is corrected."""
    return 1.0 if cap is None else min(math.exp(old - behaviour), cap)
