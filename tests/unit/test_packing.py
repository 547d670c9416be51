from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.attention import KERNEL, remove_padding
from actors.batch import Dialogues
from actors.language_task import LanguageTask
from actors.learning import optimizer_step
from actors.micro_batches import Limit, micro_batches
from actors.models import LanguageModel, new_causal_lm, save_model
from actors.packing import first_fit, pack
from actors.sharding import Optimizer
from actors.worker import make_engine, process_group_of_one
from tests.fakes import END, PAD, VOCABULARY, dialogues, quickly, smoke

SHAPES = {
    "llama": (),
    "opt": ("scale.architecture=opt",),
    "opt like 350m": ("scale.architecture=opt", "scale.embedding=8", "scale.post_layer_norm=true"),
}


def model(shape: str) -> LanguageModel:
    """Weights large enough that attention looks somewhere."""
    lm = new_causal_lm(smoke(*SHAPES[shape]).scale, VOCABULARY, 0, 0.0, END, PAD).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    packs = LanguageModel(lm)
    assert remove_padding(packs)
    return packs


def learned(lm: LanguageModel, rows: Dialogues, way: str) -> tuple[float, dict[str, Tensor]]:
    """Sum of nats over the mask and its gradients: rows padded together, each by itself, or packed."""
    lm.zero_grad()
    lm.lm.set_attn_implementation("eager" if way == "padded" else KERNEL)
    pieces = {"padded": [rows], "single": [rows.select([n]).trimmed() for n in range(len(rows))], "packed": [pack(rows, 30)]}[way]
    total = 0.0
    for piece in pieces:
        loss = -lm(piece.tokens, piece.mask, lengths=piece.lengths, position_ids=getattr(piece, "positions", None))[0].sum()
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_padded_and_single_rows_give_the_same_loss_and_gradients(shape: str) -> None:
    lm, rows = model(shape), dialogues(0, 7)
    assert len(pack(rows, 30)) < len(rows)
    wanted, gradients = learned(lm, rows, "single")
    assert len(gradients) > 10
    for way in ("padded", "packed"):
        loss, found = learned(lm, rows, way)
        assert loss == pytest.approx(wanted, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_dialogue_of_a_row_sees_another(shape: str) -> None:
    lm, rows = model(shape), dialogues(1, 3)
    packed = pack(rows, 100)
    assert len(packed) == 1
    starts = [*(packed.positions[0] == 0).nonzero()[:, 0].tolist(), packed.tokens.shape[1]]
    everything = torch.ones_like(packed.mask)
    with torch.no_grad():
        before, _ = lm(packed.tokens, everything, position_ids=packed.positions)
        for changed in range(3):
            tokens = packed.tokens.clone()
            own = slice(starts[changed], starts[changed + 1])
            tokens[0, own] = (tokens[0, own] + 5) % VOCABULARY
            after, _ = lm(tokens, everything, position_ids=packed.positions)
            same = torch.ones(tokens.shape[1], dtype=torch.bool)
            same[own] = False
            assert torch.equal(after[0, same], before[0, same])
            assert not torch.allclose(after[0, own], before[0, own])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_label_crosses_a_boundary(shape: str) -> None:
    packed = pack(dialogues(1, 4), 100)
    starts = packed.positions == 0
    assert not packed.mask[starts].any()
    logprobs, _ = model(shape)(packed.tokens, torch.ones_like(packed.mask), position_ids=packed.positions)
    assert not logprobs[starts].any()
    assert (logprobs[~starts] < 0).all()


@quickly
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), longest=st.integers(1, 40))
def test_first_fit_places_each_once_within_the_length_and_leaves_no_two_rows_that_fit_in_one(lengths: list[int], longest: int) -> None:
    rows = first_fit(lengths, longest)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= longest or len(row) == 1 for total, row in zip(filled, rows, strict=True))
    assert all(a + b > longest for n, a in enumerate(filled) for b in filled[n + 1 :])


def test_a_packed_row_holds_each_dialogue_whole_with_positions_that_start_again() -> None:
    rows = dialogues(3, 6)
    packed = pack(rows, 25)
    found = []
    for tokens, length, mask, places in zip(packed.tokens, packed.lengths.tolist(), packed.mask, packed.positions, strict=True):
        starts = [*(places[:length] == 0).nonzero()[:, 0].tolist(), length]
        for start, stop in pairwise(starts):
            found.append((tokens[start:stop].tolist(), mask[start:stop].tolist()))
            assert places[start:stop].tolist() == list(range(stop - start))
        assert not mask[length:].any()
    given_rows = [
        (t[:n].tolist(), m[:n].tolist()) for t, n, m in zip(rows.tokens, rows.lengths.tolist(), rows.mask, strict=True)
    ]  # fmt: skip
    assert sorted(found) == sorted(given_rows)


@pytest.mark.parametrize("shape", ["llama", "opt"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_an_optimizer_step_is_the_same_packed_or_not(shape: str, micro_batch: int, tmp_path: Path) -> None:
    process_group_of_one()
    lm = model(shape)
    save_model(lm, lm.state_dict(), tmp_path)
    config, rows = smoke("engine.zero_stage=0", f"engine.micro_batch={micro_batch}"), dialogues(0, 8)
    found = {}
    for length in (None, 40):
        task = LanguageTask(config, str(tmp_path), rows, rows, rows, 100, pack_length=length)
        engine = make_engine(config, task.module(), Optimizer(1e-2, 0.0, 1e9, 1.0))
        ((loss, packed),) = task.loss(engine, rows)
        assert len(micro_batches(packed, Limit(micro_batch))) <= len(micro_batches(rows, Limit(micro_batch)))
        norm = optimizer_step(engine, [(loss, packed)], Limit(micro_batch), 1e-2)
        found[length] = norm, {name: tensor.clone() for name, tensor in engine.weights().items()}
    assert found[40][0] == pytest.approx(found[None][0], rel=1e-4)
    for name, tensor in found[None][1].items():
        torch.testing.assert_close(found[40][1][name], tensor, atol=1e-5, rtol=1e-5)
