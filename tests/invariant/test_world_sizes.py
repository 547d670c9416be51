"""A state that some ranks saved at some ZeRO stage goes on with any other number of ranks at any other stage."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.batch import Dialogues
from actors.engine import Engine, Optimizer, deepspeed
from actors.language_task import LanguageTask
from actors.learning import optimizer_step
from actors.micro_batches import Limit
from actors.models import LanguageModel, new_causal_lm, save_model
from actors.sharded_state import load_state, save_snapshot, save_state
from actors.trainer import train
from actors.worker import make_engine, process_group_of_one
from conf.schema import Config
from orchestration.run_directory import StageDirectory, read_records
from orchestration.runtime.train import DirectorySession
from tests.fakes import END, PAD, VOCABULARY, dialogues, floats, learned, smoke, with_section

ROWS, SAVED_AFTER, STEPS = 8, 2, 4
OFFLOADED = ("engine.offload_optimizer=cpu", "engine.offload_parameters=cpu")
Cell = tuple[int, bool]
"""ZeRO stage, and whether everything is offloaded that can be: parameters at stage 3 alone."""


def config(cell: Cell) -> Config:
    """Weights of the feed-forward layers are large enough for ZeRO-3 to partition them, the others are not."""
    stage, offload = cell
    wide = ("scale.width=48", "scale.heads=2", "scale.feed_forward=256", f"engine.zero_stage={stage}", "engine.micro_batch=3")
    return smoke(*wide, *(OFFLOADED[: 2 if stage == 3 else 1] if offload else ()))


def engine(cell: Cell, seed: int = 0) -> Engine:
    settings = config(cell)
    lm = new_causal_lm(settings.scale, VOCABULARY, seed, 0.0, END, PAD)
    found = make_engine(settings, LanguageModel(lm), Optimizer(1e-2, 0.1, 1.0, 1e-4))
    found.train(False)
    return found


def learn(of: Engine, rank: int, ranks: int, step: int) -> tuple[float, float]:
    """(loss, norm of the gradients) of this step's batch, of which each rank has its part."""
    whole = dialogues(step, ROWS)
    rows, tokens, total = whole.select(slice(rank, None, ranks)).trimmed(), float(whole.mask.sum()), torch.zeros(())

    def loss(piece: Dialogues) -> Tensor:
        return -of(piece.tokens, piece.mask)[0][piece.mask].sum() / tokens

    norm = optimizer_step(of, [(loss, rows)], Limit(3), 1e-2, total)
    return float(of.sum_over_ranks(total)), norm


def saved(rank: int, ranks: int, cell: Cell, folder: Path) -> list[tuple[float, float]]:
    """Learn, save on the way, and go on to the end."""
    subject, curve = engine(cell), []
    for step in range(STEPS):
        if step == SAVED_AFTER:
            subject.save_state(folder)
            save_snapshot(subject.snapshot(version=step), folder / "snapshot")
        curve.append(learn(subject, rank, ranks, step))
    return [*curve[SAVED_AFTER:], of_all(subject)]


def resumed(rank: int, ranks: int, cell: Cell, folder: Path) -> list[Any]:
    """A model with other weights takes up the state, and goes on to the end."""
    subject = engine(cell, seed=9)
    learn(subject, rank, ranks, 7)  # whatever stood there before does not matter
    subject.load_state(folder)
    taken_up = of_all(subject)
    curve = [learn(subject, rank, ranks, step) for step in range(SAVED_AFTER, STEPS)]
    ended = of_all(subject)
    found = subject.load_snapshot(folder / "snapshot")
    assert found
    subject.restore(found)
    for (name, tensor), (_, before) in zip(of_all(subject).items(), taken_up.items(), strict=True):
        assert torch.equal(tensor, before), f"{name} of the snapshot is not what was saved with it"
    return [*curve, ended]


def of_all(subject: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in subject.weights().items()}


CELLS = ((0, False), (1, False), (2, False), (2, True), (3, False), (3, True))
IN_BRIEF = [
    ((2, (0, False)), (1, (0, False))), ((1, (2, False)), (2, (2, False))), ((2, (3, False)), (1, (3, False))),
    ((2, (2, False)), (2, (3, True))), ((2, (3, True)), (1, (0, False))), ((1, (0, False)), (2, (2, True))),
]  # fmt: skip
ALL = [
    ((writers, before), (readers, after))
    for writers, readers in itertools.product((1, 2, 4), repeat=2)
    for before, after in itertools.product(CELLS, repeat=2)
    if (before == after or {writers, readers} == {2, 4}) and ((writers, before), (readers, after)) not in IN_BRIEF
]


@pytest.mark.parametrize(("writers", "readers"), [*IN_BRIEF, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL)])
def test_a_state_goes_on_with_other_ranks_at_another_stage(ranks, tmp_path: Path, writers, readers) -> None:
    wanted = ranks(writers[0]).run(saved, writers[1], tmp_path)[0]
    for found in ranks(readers[0]).run(resumed, readers[1], tmp_path):
        assert [pytest.approx(figure, rel=1e-4) for figure in wanted[:-1]] == found[:-1]
        for name, tensor in wanted[-1].items():
            torch.testing.assert_close(found[-1][name], tensor, atol=1e-5, rtol=1e-4)


def in_bf16(stage: int, seed: int) -> Any:
    """DeepSpeed's own engine as it is on a GPU: bf16 weights, and float32 ones that Adam updates."""
    process_group_of_one()
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(150, 90), torch.nn.Tanh(), torch.nn.Linear(90, 3))
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    settings = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "optimizer": adam}
    return deepspeed.initialize(model=module, config=settings, model_parameters=module.parameters())[0]


def step_in_bf16(of: Any, number: int) -> float:
    x = floats(number, 4, 150, dtype=torch.bfloat16)
    loss = of(x).float().square().mean()
    of.backward(loss)
    of.step()
    return float(loss)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_float32_weights_beside_bf16_ones_come_back_at_any_stage(before: int, after: int, tmp_path: Path) -> None:
    one, other = in_bf16(before, seed=0), in_bf16(after, seed=9)
    for number in range(2):
        step_in_bf16(one, number)
    save_state(one, tmp_path)
    load_state(other, tmp_path)
    losses = [[step_in_bf16(subject, number) for number in range(2, 5)] for subject in (one, other)]
    assert losses[0] == (losses[1] if before == after else pytest.approx(losses[1], rel=1e-3))
    assert losses[0][0] == losses[1][0], "bf16 weights are not those of the float32 ones"


class Stopping(DirectorySession):
    """Ends like a killed run, right after the commit of `SAVED_AFTER`."""

    def commit(self, step: int, save: Any, memory: dict[str, Any]) -> None:
        super().commit(step, save, memory)
        if step == SAVED_AFTER:
            raise KilledError


class KilledError(Exception):
    pass


def trained(rank: int, ranks: int, stage: int, lm: Path, folder: Path, killed: bool = False) -> None:
    """SFT in a stage's folder, measured at every step."""
    settings = with_section(config((stage, False)), "sft", steps=STEPS, batch=ROWS, eval_every=1, dropout=0.0, lr=5e-3, warmup=0)
    settings = with_section(settings, "commit", every=1)
    task = LanguageTask(settings, str(lm), dialogues(0, 5 * ROWS), dialogues(1, ROWS), dialogues(2, ROWS), 99)
    with contextlib.suppress(KilledError):
        train(settings, task, (Stopping if killed else DirectorySession)(rank, ranks, StageDirectory(folder, keep=1)))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 3)), ((1, 3), (2, 0)), pytest.param((4, 3), (2, 2), marks=pytest.mark.slow)]
)  # (ranks, ZeRO stage)
def test_supervised_training_that_was_stopped_goes_on_along_the_same_curve(ranks, tmp_path: Path, before, after) -> None:
    save_lm(tmp_path / "lm")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    ranks(before[0]).run(trained, before[1], tmp_path / "lm", whole)
    ranks(before[0]).run(trained, before[1], tmp_path / "lm", stopped, True)
    ranks(after[0]).run(trained, after[1], tmp_path / "lm", stopped)
    wanted, found = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, stopped))
    for name in wanted.keys() & found.keys():  # tied output weights are in the file of some stages only
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
    curves = [read_records(folder / "metrics.jsonl") for folder in (whole, stopped)]
    for one, other in zip(*curves, strict=True):
        assert learned(other) == pytest.approx(learned(one | {"seconds": other["seconds"]}), rel=1e-4)


def save_lm(folder: Path) -> None:
    model = LanguageModel(new_causal_lm(config((0, False)).scale, VOCABULARY, 0, 0.0, END, PAD))
    folder.mkdir()
    save_model(model, model.state_dict(), folder)
