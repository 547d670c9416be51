"""A linear head's optimum against scikit-learn's, and how its penalty is chosen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from actors.algorithms.linear import FOLDS, PENALTIES, Loss, apply, chosen_penalty, fit_linear
from tests.fakes import floats

ALL = torch.arange(60)


def judged(seed: int, share_good: float = 0.85, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """([60, 4] features, [60] labels): mostly good ones, so that the intercept is far from 0."""
    features = floats(seed, 60, 4)
    logits = strength * features @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    threshold = (logits + floats(seed + 1, 60)).quantile(1 - share_good)
    return features, (logits + floats(seed + 1, 60) > threshold).double()


def mean_loss(label: Tensor) -> Loss:
    return lambda rows: lambda scores: binary_cross_entropy_with_logits(scores, label[rows])


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_optimum_is_scikit_learns(penalty: float) -> None:
    features, label = judged(0)
    found = fit_linear(features, ALL, mean_loss(label), penalty)
    model = LogisticRegression(C=1 / (penalty * 60), tol=1e-10, max_iter=10_000).fit(features.numpy(), label.numpy())
    wanted = torch.tensor(np.append(model.coef_[0], model.intercept_[0]))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(apply(features, found).numpy(), model.decision_function(features.numpy()), atol=1e-3, rtol=1e-3)


def test_pairs_are_fitted_to_the_optimum_of_a_regression_on_differences() -> None:
    features = floats(3, 40, 3)
    better, worse = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
    found = fit_linear(features, torch.arange(40), lambda rows: lambda scores: softplus(scores[worse] - scores[better]).mean(), 1e-2)
    difference = (features[better] - features[worse]).numpy()
    both, label = np.concatenate([difference, -difference]), np.repeat([1, 0], 20)
    model = LogisticRegression(C=1 / (1e-2 * 40), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(both, label)
    torch.testing.assert_close(found[:-1], torch.tensor(model.coef_[0]), atol=1e-3, rtol=1e-3)
    assert float(found[-1]) == 0.0  # nothing depends on it


def test_the_intercept_is_not_penalised() -> None:
    features, label = judged(5)
    found = fit_linear(features, ALL, mean_loss(label), 1e6)
    assert float(found[:-1].abs().max()) < 1e-4
    assert float(found[-1]) == pytest.approx(float(torch.logit(label.mean())), abs=1e-3)


def test_only_the_named_rows_are_learned_from() -> None:
    features, label = judged(7)
    rows = torch.arange(59, 9, -2)
    wanted = fit_linear(features[rows], torch.arange(len(rows)), mean_loss(label[rows]), 1e-2)
    spoilt = features.clone()
    spoilt[torch.isin(ALL, rows, invert=True)] = float("nan")
    torch.testing.assert_close(fit_linear(spoilt, rows, mean_loss(label), 1e-2), wanted)


def test_noise_is_given_the_strongest_penalty_and_a_clear_signal_the_weakest() -> None:
    noise = floats(9, 60, 30)
    coin = (floats(10, 60) > 0).double()
    assert chosen_penalty(noise, ALL, mean_loss(coin), seed=0)[0] == PENALTIES[0] == max(PENALTIES)
    features, _ = judged(11)
    clear = (features[:, 1] > 0).double()
    assert chosen_penalty(features, ALL, mean_loss(clear), seed=0)[0] == PENALTIES[-1] == min(PENALTIES)


def recorded(
    features: Tensor, groups: Tensor, label: Tensor, seed: int = 0
) -> tuple[tuple[float, float], list[tuple[Tensor, Tensor, float]]]:
    """(what was chosen, for each measurement: rows learned from, rows measured on, mean loss)."""
    whole, learned, found = mean_loss(label), [], []

    def loss(rows: Tensor) -> Callable[[Tensor], Tensor]:
        def measure(scores: Tensor) -> Tensor:
            value = whole(rows)(scores)
            if scores.requires_grad:
                learned[:] = [rows]
            else:
                found.append((learned[0], rows, float(value)))
            return value

        return measure

    return chosen_penalty(features, groups, loss, seed), found


def test_rows_of_a_group_stay_in_one_fold_and_every_row_is_measured_once_for_each_penalty() -> None:
    features, label = judged(13)
    groups = torch.randint(0, 23, (60,), generator=torch.Generator().manual_seed(1)) * 7
    (penalty, expected), found = recorded(features, groups, label)
    assert len(found) == FOLDS * len(PENALTIES)
    for learned, measured, _ in found:
        assert not set(groups[learned].tolist()) & set(groups[measured].tolist())
        assert sorted([*learned.tolist(), *measured.tolist()]) == ALL.tolist()
    totals = [sum(loss * len(measured) for _, measured, loss in found[place :: len(PENALTIES)]) / 60 for place in range(len(PENALTIES))]
    for place in range(len(PENALTIES)):
        assert sorted(row for _, measured, _ in found[place :: len(PENALTIES)] for row in measured.tolist()) == ALL.tolist()
    assert expected == pytest.approx(min(totals), rel=1e-5)
    assert penalty == PENALTIES[totals.index(min(totals))]
    sizes = [len(torch.unique(groups[measured])) for _, measured, _ in found]
    assert max(sizes) - min(sizes) <= 1


def test_folds_follow_from_the_seed() -> None:
    features, label = judged(15)
    one, again, other = (recorded(features, ALL, label, seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_fewer_groups_than_folds_are_one_fold_each() -> None:
    features, label = judged(17)
    (_, expected), found = recorded(features[:6], torch.tensor([4, 4, 4, 9, 9, 9]), label[:6])
    assert len(found) == 2 * len(PENALTIES) and np.isfinite(expected)
