"""A linear head fitted to its optimum: a convex problem, so no learning rate has a say, and the seed only in how the penalty is chosen.

With few rows this beats training the whole network by gradient descent, which overfits before it has learned (BENCHMARKS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PENALTIES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""What cross-validation chooses from, strongest first."""
FOLDS = 5
MOST_ITERATIONS = 100

Loss = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""From rows, [n] long, to what gives the mean loss of their scores, [n] -> scalar."""


def fit_linear(features: Tensor, rows: Tensor, loss: Loss, penalty: float) -> Tensor:
    """Minimise loss(rows)(features[rows] @ w + b) + penalty / 2 |w|^2 by L-BFGS.

    Args:
        features: [N, F], of about unit scale.
        rows: [n] long, those to learn from.

    Returns:
        [F + 1]: w, then b (which is not penalised).
    """
    seen, measure = features[rows], loss(rows)
    head = torch.zeros(features.shape[1] + 1, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=MOST_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = measure(apply(seen, head)) + penalty / 2 * head[:-1] @ head[:-1]
        total.backward()
        return total

    optimizer.step(objective)
    return head.detach()


def apply(features: Tensor, head: Tensor) -> Tensor:
    """[n, F] features and a fitted head -> [n] scores."""
    return features @ head[:-1] + head[-1]


def chosen_penalty(features: Tensor, groups: Tensor, loss: Loss, seed: int, penalties: Sequence[float] = PENALTIES) -> tuple[float, float]:
    """(penalty with the least cross-validated loss, that loss).

    Args:
        features: [N, F].
        groups: [N] long; rows of one group stay in one fold.
    """
    names, number = torch.unique(groups, return_inverse=True)
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold = (shuffled % FOLDS)[number]
    losses = torch.zeros(len(penalties))
    for left_out in range(min(FOLDS, len(names))):
        train, test = (fold != left_out).nonzero()[:, 0], (fold == left_out).nonzero()[:, 0]
        measure = loss(test)
        for place, penalty in enumerate(penalties):
            losses[place] += float(measure(apply(features[test], fit_linear(features, train, loss, penalty)))) * len(test)
    best = int(losses.argmin())
    return penalties[best], float(losses[best] / len(groups))
