"""Engines that leave a GPU to others and come back, over everything that an engine can be. The GPU is pretended."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.critic import Critic
from actors.engine import Engine
from actors.models import LanguageModel, ScalarModel, new_causal_lm, save_model
from actors.policy import Policy
from actors.reference import Reference
from actors.reward import Reward
from actors.sharding import Optimizer, Place, Sharding
from actors.worker import RankSpec, Worker, process_group_of_one
from tests.fakes import END, PAD, VOCABULARY, floats, learned, rollouts, smoke, with_section
from tests.pretended_gpu import built_on_cuda, moving, sleep_and_wake

Cell = tuple[str, int, Place, Place, str]
"""What is trained of a model, its ZeRO stage, where optimizer and parameters rest, and its arithmetic."""


def cells() -> Iterator[Cell]:
    """All that the configuration allows; `test_config.py` has what it refuses."""
    for trained in ("all", "part", "none"):
        for stage in range(4):
            for optimizer in ("none", "cpu") if stage and trained != "none" else ("none",):
                for parameters in ("none", "cpu") if stage == 3 and trained == "none" else ("none",):
                    for dtype in ("fp32", "bf16"):
                        yield trained, stage, optimizer, parameters, dtype  # type: ignore[misc]


class Net(nn.Module):
    """Two layers that are small enough for ZeRO 3 to keep whole between passes, one that is not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 256), nn.Linear(256, 64), nn.Linear(64, 1)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """DeepSpeed collects garbage at every turn, which takes a second where there are a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def made(trained: str, stage: int, optimizer: Place, parameters: Place, dtype: str) -> Engine:
    process_group_of_one()
    torch.manual_seed(0)
    module = Net()
    if trained == "part":
        module.first.requires_grad_(False)
        module.second.weight.requires_grad_(False)
    adam = None if trained == "none" else Optimizer(0.01, 0.01, 1.0)
    return built_on_cuda(lambda: Engine(module, adam, Sharding(stage, dtype, optimizer, parameters)), lambda engine: [engine])


def outputs(engine: Engine, seed: int) -> Tensor:
    return engine(floats(seed, 6, 4, dtype=next(engine.module.parameters()).dtype))


def life(cell: Cell, sleeps: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Figures of three steps and forward passes, and the weights after them."""
    engine, figures = made(*cell), []
    for step in range(3):
        if engine.trains:
            loss = (outputs(engine, step).float() ** 2).sum() / 6
            engine.backward(loss, last=True)
            figures += [float(loss), engine.step(0.01)]
        with torch.no_grad():
            figures += outputs(engine, 9).flatten().tolist()
        if sleeps:
            sleep_and_wake(engine)
    return figures, {name: tensor.clone() for name, tensor in engine.weights().items()}


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: "-".join(map(str, cell)))
def test_an_engine_that_slept_goes_on_as_if_it_had_not_and_left_nothing_behind(cell: Cell) -> None:
    (figures, weights), (slept, after) = life(cell, sleeps=False), life(cell, sleeps=True)
    assert slept == figures
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_frozen_engine_sleeps_before_its_first_pass_and_after_one_with_gradients() -> None:
    """Under ZeRO 3 small weights stay whole after such a pass."""
    engine = made("none", 3, "none", "none", "fp32")
    sleep_and_wake(engine)
    before = outputs(engine, 0).detach()
    sleep_and_wake(engine)
    assert torch.equal(outputs(engine, 0), before)


@pytest.mark.parametrize("stage", range(4))
def test_nothing_of_a_sleeping_engine_is_read_or_written(stage: int, tmp_path: Path) -> None:
    engine = made("all", stage, "none", "none", "fp32")
    engine.save_state(tmp_path)
    kept, weights = engine.snapshot(0), engine.weights()
    uses: dict[str, Any] = {
        "save_state": [tmp_path], "load_state": [tmp_path], "snapshot": [0], "restore": [kept], "weights": [], "set_weights": [weights],
        "shift_bias": ["third.bias", 0.1], "whole": ["third.bias"],
    }  # fmt: skip
    with moving(engine):
        engine.sleep()
    for name, given in uses.items():
        with pytest.raises(RuntimeError, match="sleeps"):
            getattr(engine, name)(*given)
    with moving(engine):
        engine.wake()
    for name, given in uses.items():
        getattr(engine, name)(*given)


ROLES: dict[str, type[Worker]] = {"policy": Policy, "critic": Critic, "reference": Reference, "reward": Reward}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    lm = new_causal_lm(settings(0, "fp32", ()).scale, VOCABULARY, 0, 0.0, END, PAD)
    for name, model in (("lm", LanguageModel(lm)), ("scalar", ScalarModel(lm.base_model, 0))):
        (folder / name).mkdir()
        save_model(model, model.state_dict(), folder / name)
    return folder


def settings(stage: int, dtype: str, more: tuple[str, ...]):
    """Feed-forward weights are large enough for ZeRO 3 to partition them."""
    wide = ("scale.width=48", "scale.heads=2", "scale.feed_forward=256", f"engine.zero_stage={stage}", f"model.dtype={dtype}")
    return with_section(smoke(*wide, *more), "ppo", batch=4, minibatches=1, epochs=1, lr=1e-3, critic_lr=1e-3, warmup=0, ptx=0.0)


def worked(role: str, stage: int, dtype: str, more: tuple[str, ...], models: Path, sleeps: bool) -> list[float]:
    """What a role finds in two PPO steps, by itself."""
    kind, place = ROLES[role], models / ("lm" if role in ("policy", "reference") else "scalar")

    def loaded() -> Worker:
        rank = kind(settings(stage, dtype, more), str(place), RankSpec(role, 0, 1, 1))
        rank.load()
        return rank

    rank: Any = built_on_cuda(loaded, lambda rank: rank.engines()) if dtype == "bf16" else loaded()
    found: list[float] = []
    for step in range(2):
        rows, given = [rollouts(step, 4)], floats(step, 4, dtype=torch.float32)
        if role == "reference":
            found += rank.logprobs(rows, 1.0)[0].flatten().tolist()
        elif role == "reward":
            found += rank.score(rows)[0].tolist()
        else:
            values = rank.values(rows) if role == "critic" else [torch.zeros(rows[0].tokens.shape)]
            policy = Policy(settings(0, "fp32", ()), str(models / "lm"), RankSpec("policy", 0, 1, 1)) if role == "critic" else rank
            if policy is not rank:
                policy.load()
            experience = policy.experience(rows, [given], [torch.zeros(rows[0].tokens.shape)], values, beta=0.1)
            updated = rank.update(experience, [], step) if role == "policy" else rank.update(experience, step)
            found += [value for _, value in sorted(learned(updated).items())]
        for engine in rank.engines() if sleeps else []:
            sleep_and_wake(engine)
    return found


ADAPTERS = ("lora.rank=2", "lora.roles=[policy,critic]")


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("role", "more"), [("policy", ()), ("policy", ADAPTERS), ("critic", ()), ("critic", ADAPTERS), ("reference", ()), ("reward", ())]
)
def test_every_role_in_bf16_as_on_a_gpu_works_in_turns(role: str, more: tuple[str, ...], stage: int, models: Path) -> None:
    """Among them heads and adapters that are new beside weights that are read part by part."""
    plain = worked(role, stage, "bf16", more, models, sleeps=False)
    assert worked(role, stage, "bf16", more, models, sleeps=True) == pytest.approx(plain, rel=0.02, abs=0.01)  # kernels round by alignment
    assert plain == pytest.approx(worked(role, stage, "fp32", more, models, sleeps=False), rel=0.1, abs=0.05)
