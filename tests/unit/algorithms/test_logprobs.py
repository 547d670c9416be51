from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from actors.algorithms import logprobs
from actors.algorithms.logprobs import CHUNK_LOGITS, token_logprobs
from tests import references
from tests.fakes import floats, quickly

WIDTH, VOCABULARY = 3, 7
SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 6), "temperature": st.sampled_from([0.5, 1.0, 1.7])}


def inputs(seed: int, rows: int, bias: bool = True) -> tuple:
    """hidden, weight, bias, targets."""
    targets = torch.randint(0, VOCABULARY, (rows,), generator=torch.Generator().manual_seed(seed))
    return floats(seed, rows, WIDTH), floats(seed + 1, VOCABULARY, WIDTH), floats(seed + 2, VOCABULARY) if bias else None, targets


def naive(hidden, weight, bias, targets, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with all logits at once, for autograd to differentiate."""
    table = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, dim=-1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@quickly
@given(**SHAPES, bias=st.booleans(), chunk=st.integers(1, 6 * VOCABULARY))
def test_log_probs_and_entropies_equal_a_loop_over_positions_whatever_the_chunk(
    seed: int, rows: int, temperature: float, bias: bool, chunk: int
) -> None:
    hidden, weight, b, targets = inputs(seed, rows, bias)
    found, spread = token_logprobs(hidden, weight, b, targets, temperature, chunk)
    for n in range(rows):
        logits = references.logits_of(hidden[n].tolist(), weight.tolist(), None if b is None else b.tolist())
        p = references.distribution(logits, temperature)
        assert float(found[n]) == pytest.approx(math.log(p[int(targets[n])]))
        assert float(spread[n]) == pytest.approx(references.entropy(p))


@quickly
@given(
    **SHAPES,
    bias=st.booleans(),
    chunk=st.sampled_from([1, VOCABULARY, 2 * VOCABULARY, CHUNK_LOGITS]),
    learns=st.sampled_from([(1, 0), (0, 1), (1, 2)]),
)
def test_gradients_equal_those_of_the_naive_form(seed: int, rows: int, temperature: float, bias: bool, chunk: int, learns: tuple) -> None:
    grads = []
    for function, extra in ((token_logprobs, (chunk,)), (naive, ())):
        hidden, weight, b, targets = inputs(seed, rows, bias)
        given_ = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]
        both = function(hidden, weight, b, targets, temperature, *extra)
        total = sum(scale * (x * floats(seed + 9 + i, rows)).sum() for i, (scale, x) in enumerate(zip(learns, both, strict=True)) if scale)
        grads.append(torch.autograd.grad(total, given_))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_agree_with_finite_differences(temperature: float) -> None:
    hidden, weight, bias, targets = inputs(3, 5)
    asked = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, b, targets, temperature, 2 * VOCABULARY), asked)


def test_a_weight_tied_to_the_input_embedding_gets_both_gradients() -> None:
    found = []
    for function in (token_logprobs, naive):
        weight, tokens = floats(1, VOCABULARY, WIDTH).requires_grad_(), torch.tensor([1, 4, 4, 0])
        one, spread = function(torch.tanh(weight[tokens]), weight, None, tokens.roll(1), 0.8)
        (one.sum() + 0.3 * spread.sum()).backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_no_positions_give_empty_results_and_gradients_of_0() -> None:
    hidden, weight, bias, targets = inputs(0, 3)
    given_ = [hidden[:0].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    one, spread = token_logprobs(*given_, targets[:0])
    assert one.shape == spread.shape == (0,)
    (one.sum() + spread.sum()).backward()
    assert [float(x.grad.abs().sum()) for x in given_] == [0.0, 0.0, 0.0]


def test_an_entropy_that_nobody_learns_from_is_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    slope = logprobs._slope
    monkeypatch.setattr(logprobs, "_slope", lambda *given_: seen.append(given_[3:]) or slope(*given_))
    hidden, weight, bias, targets = inputs(0, 3)
    one, _ = token_logprobs(hidden.requires_grad_(), weight, bias, targets)
    one.sum().backward()
    assert len(seen) == 1 and seen[0][0] is not None and seen[0][1] is None


class Largest(TorchDispatchMode):
    """The most elements of any tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize(("chunk", "most"), [(100 * 8, 100 * 8), (100 * 8 + 99, 100 * 8), (64 * 100, 64 * 100)])
def test_no_more_logits_than_the_chunk_are_ever_held_forward_or_backward(chunk: int, most: int) -> None:
    hidden, weight = floats(0, 64, 4).requires_grad_(), floats(1, 100, 4).requires_grad_()
    with Largest() as largest:
        one, spread = token_logprobs(hidden, weight, None, torch.arange(64), 0.9, chunk)
        (one.sum() + spread.sum()).backward()
    assert largest.elements == most


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_results_are_float32_or_better_and_gradients_have_the_types_of_what_they_are_of(dtype: torch.dtype, wanted: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(0, 5)
    given_ = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    one, spread = token_logprobs(*given_, targets, 1.0, 2 * VOCABULARY)
    assert one.dtype == spread.dtype == wanted
    one.sum().backward()
    assert {x.grad.dtype for x in given_} == {dtype}


def test_in_bf16_the_chunks_of_a_weights_gradient_are_added_up_in_float32() -> None:
    hidden, weight = floats(0, 512, 4).bfloat16(), floats(1, 8, 4).bfloat16()
    targets = torch.zeros(512, dtype=torch.long)
    grads = []
    for chunk in (8, 512 * 8):
        w = weight.clone().requires_grad_()
        token_logprobs(hidden, w, None, targets, 1.0, chunk)[0].sum().backward()
        grads.append(w.grad.float())
    assert float((grads[0] - grads[1]).abs().max() / grads[1].abs().max()) < 0.01


def test_under_autocast_logits_are_products_in_bf16_and_log_probs_float32() -> None:
    hidden, weight, _, targets = (x.float() if x is not None and x.is_floating_point() else x for x in inputs(0, 5))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        one, _ = token_logprobs(hidden, weight, None, targets)
        logits = torch.nn.functional.linear(hidden, weight)
    wanted = torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[:, None])[:, 0]
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one, token_logprobs(hidden, weight, None, targets)[0], atol=1e-4)
    one.sum().backward()  # outside autocast, as an engine does
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(wanted.sum(), hidden)[0], atol=0.05, rtol=0.05)


def test_logits_of_a_thousand_overflow_nothing() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    one, spread = token_logprobs(hidden, torch.tensor([[1.0], [0.0]]), None, torch.tensor([1, 1]))
    assert one.tolist() == [-1000.0, 0.0]
    assert spread.tolist() == [0.0, 0.0]
    (one.sum() + spread.sum()).backward()
    assert hidden.grad[:, 0].tolist() == [-1.0, 0.0]


def test_without_a_chunk_size_128_mib_of_float32_are_held() -> None:
    assert CHUNK_LOGITS * 4 == 128 * 2**20
