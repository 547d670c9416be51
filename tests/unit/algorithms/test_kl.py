from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.kl import KLController, k1, k2, k3
from tests import references
from tests.fakes import floats, quickly


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), width=st.integers(1, 9))
def test_estimators_equal_their_formulas_token_by_token(seed: int, rows: int, width: int) -> None:
    logprobs, reference = -floats(seed, rows, width).abs(), -floats(seed + 1, rows, width).abs()
    for b in range(rows):
        for t in range(width):
            both = float(logprobs[b, t]), float(reference[b, t])
            assert float(k1(logprobs, reference)[b, t]) == pytest.approx(references.k1(*both))
            assert float(k2(logprobs, reference)[b, t]) == pytest.approx(references.k2(*both))
            assert float(k3(logprobs, reference)[b, t]) == pytest.approx(references.k3(*both), abs=1e-12)
    assert (k3(logprobs, reference) >= 0).all()


def test_k1_and_k3_have_the_exact_kl_as_their_expectation() -> None:
    policy, reference = torch.log_softmax(floats(1, 12), 0), torch.log_softmax(floats(2, 12), 0)
    exact = float((policy.exp() * (policy - reference)).sum())
    assert exact > 0.1
    assert float((policy.exp() * k1(policy, reference)).sum()) == pytest.approx(exact)
    assert float((policy.exp() * k3(policy, reference)).sum()) == pytest.approx(exact)


def test_equal_policies_have_no_kl() -> None:
    x = floats(4, 3, 5)
    for estimator in (k1, k2, k3):
        assert (estimator(x, x) == 0).all()


def test_k3_keeps_its_digits_for_tiny_differences_in_float32() -> None:
    found = k3(torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-14]))
    assert float(found) == pytest.approx(2.0**-29, rel=1e-2)


@quickly
@given(kl=st.floats(0, 50), target=st.floats(0.5, 20), replies=st.integers(1, 512), horizon=st.floats(1000, 10**5))
def test_the_adaptive_controller_follows_ziegler(kl: float, target: float, replies: int, horizon: float) -> None:
    error = max(-0.2, min(0.2, kl / target - 1))
    found = KLController(0.1, True, target, horizon).updated(kl, replies)
    assert found.beta == pytest.approx(0.1 * (1 + error * replies / horizon))
    assert (found.adaptive, found.target, found.horizon) == (True, target, horizon)


def test_too_much_kl_raises_beta_too_little_lowers_it_and_the_target_keeps_it() -> None:
    controller = KLController(0.1, True, 6.0, 1000.0)
    assert controller.updated(12.0, 100).beta == pytest.approx(0.102)  # clipped at +20%
    assert controller.updated(0.0, 100).beta == pytest.approx(0.098)
    assert controller.updated(6.0, 100).beta == 0.1


def test_the_fixed_controller_keeps_beta() -> None:
    assert KLController(0.1, False, 6.0, 1000.0).updated(40.0, 512).beta == 0.1


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradients_agree_with_finite_differences(estimator) -> None:
    assert torch.autograd.gradcheck(estimator, (floats(1, 2, 3).requires_grad_(), floats(2, 2, 3).requires_grad_()))
