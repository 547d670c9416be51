from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.engine import Engine
from actors.sharding import Optimizer, Sharding, buckets
from actors.trainer import cosine
from actors.worker import process_group_of_one, warmed_up
from tests.fakes import floats


def engine(stage: int = 0, optimizer: Optimizer | None = Optimizer(lr=0.1, weight_decay=0.01, max_grad_norm=1.0), seed: int = 0) -> Engine:  # noqa: B008
    process_group_of_one()
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return Engine(module, optimizer, Sharding(stage, micro_batch=2))


def learn(of: Engine, step: int, lr: float = 0.1) -> float:
    x = floats(step, 6, 4, dtype=torch.float32)
    of.backward((of(x[:3]) ** 2).sum() / 6, last=False)
    of.backward((of(x[3:]) ** 2).sum() / 6, last=True)
    return of.step(lr)


def weights(of: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.weights().items()}


def test_the_supervised_rate_climbs_to_its_peak_then_falls_along_a_cosine_to_a_tenth() -> None:
    rates = [cosine(2.0, step, 4, 24) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for step in range(4, 25):
        assert rates[step] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * (step - 4) / 20)) / 2)
    assert rates[24] == pytest.approx(0.2)
    assert cosine(2.0, 30, 4, 24) == pytest.approx(0.2)
    assert cosine(2.0, 0, 0, 10) == 2.0
    assert cosine(2.0, 9, 10, 10) == 2.0


def test_the_ppo_rate_climbs_from_a_tenth_and_stays() -> None:
    assert [warmed_up(1.0, step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert warmed_up(1.0, 0, 0) == 1.0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_is_adamw_on_the_summed_and_clipped_gradients_of_its_micro_batches(stage: int) -> None:
    subject = engine(stage)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    plain.load_state_dict(weights(subject))
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for step in range(3):
        norm = learn(subject, step, lr=0.1 / (step + 1))
        (plain(floats(step, 6, 4, dtype=torch.float32)) ** 2).sum().div(6).backward()
        wanted = float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        adam.param_groups[0]["lr"] = 0.1 / (step + 1)
        adam.step()
        adam.zero_grad()
        assert norm == pytest.approx(wanted, rel=1e-4)
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(weights(subject)[name], tensor, atol=2e-6, rtol=1e-5)


def test_a_rank_that_is_alone_exchanges_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine()
    monkeypatch.setattr(subject.deepspeed, "allreduce_bucket", lambda *_, **__: pytest.fail("gradients were gathered for nobody"))
    assert learn(subject, 0) > 0


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_engine_goes_on_bit_by_bit_as_if_nothing_had_happened(stage: int, tmp_path: Path) -> None:
    one = engine(stage)
    learn(one, 0)
    learn(one, 1)
    one.save_state(tmp_path)
    for step in (2, 3):
        learn(one, step)
    other = engine(stage, seed=9)
    other.load_state(tmp_path)
    for step in (2, 3):
        learn(other, step)
    for name, tensor in weights(one).items():
        assert torch.equal(weights(other)[name], tensor)


def test_loading_from_a_folder_without_a_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no engine state"):
        engine().load_state(tmp_path / "nothing")


def test_weights_set_are_weights_read_and_a_bias_can_be_shifted() -> None:
    source, target = engine(seed=1), engine(seed=2)
    target.set_weights(weights(source))
    target.shift_bias("2.bias", -0.25)
    wanted = weights(source)
    wanted["2.bias"] -= 0.25
    for name, tensor in weights(target).items():
        assert torch.equal(tensor, wanted[name])
    with torch.no_grad():
        x = floats(0, 2, 4, dtype=torch.float32)
        torch.testing.assert_close(target(x), source(x) - 0.25)


def test_a_frozen_module_needs_no_gradients_and_is_in_evaluation_mode() -> None:
    frozen = engine(optimizer=None)
    assert not frozen.trains
    assert not frozen.module.training
    assert not any(p.requires_grad for p in frozen.module.parameters())
    assert not frozen(floats(0, 2, 4, dtype=torch.float32)).requires_grad


def test_dropout_is_switched_with_train() -> None:
    subject = engine()
    subject.train(False)
    assert not subject.module.training
    subject.train(True)
    assert subject.module.training


def test_gradients_that_are_nan_stop_the_step_and_leave_the_weights_as_they_were() -> None:
    subject = engine()
    before = weights(subject)
    subject.backward(subject(torch.full((1, 4), math.nan)).sum(), last=True)
    with pytest.raises(FloatingPointError, match="learning rate"):
        subject.step(0.1)
    for name, tensor in weights(subject).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("stage", "value"), [(0, math.inf), (2, math.nan), (2, math.inf)])
def test_gradients_that_are_not_finite_stop_the_step_at_every_stage(stage: int, value: float) -> None:
    subject = engine(stage)
    subject.backward(subject(torch.ones(1, 4)).sum() * value, last=True)
    with pytest.raises(FloatingPointError):
        subject.step(0.1)


def named(*names: str, width: int = 4) -> Engine:
    process_group_of_one()
    module = nn.ModuleDict({name: nn.Linear(width, 2) for name in names})
    return Engine(module, Optimizer(0.1, 0.0, 1.0), Sharding(2, micro_batch=2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("one", "more"), "more.bias is trained in this model and not in the state"),
        ((), "two.bias is in the state and not trained in this model"),
    ],
)
def test_a_state_of_a_model_with_other_names_is_refused(other: tuple[str, ...], message: str, tmp_path: Path) -> None:
    named("one", *(("two",) if not other else ())).save_state(tmp_path)
    with pytest.raises(ValueError, match=message):
        named(*(other or ("one",))).load_state(tmp_path)


def test_a_state_of_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    named("one").save_state(tmp_path)
    with pytest.raises(ValueError, match=r"one.weight has shape \[2, 4\] there, and shape \[2, 5\] in this model"):
        named("one", width=5).load_state(tmp_path)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_state_from_before_the_first_step_is_a_fresh_start(stage: int, tmp_path: Path) -> None:
    one, other = engine(stage), engine(stage, seed=9)
    one.save_state(tmp_path)
    learn(other, 5)  # what Adam kept of this must not be there afterwards
    other.load_state(tmp_path)
    for subject in (one, other):
        learn(subject, 0)
    for name, tensor in weights(one).items():
        assert torch.equal(weights(other)[name], tensor)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_buffers_and_counters_come_back(stage: int, tmp_path: Path) -> None:
    one, other = engine(stage), engine(stage, seed=9)
    for subject, value in ((one, 7.0), (other, 0.0)):
        subject.module.register_buffer("mean", torch.full((3,), value))
    learn(one, 0)
    one.save_state(tmp_path)
    other.load_state(tmp_path)
    assert other.module.get_buffer("mean").tolist() == [7.0] * 3
    assert other.deepspeed.global_steps == one.deepspeed.global_steps == 1


@pytest.mark.parametrize("stage", [0, 2])
def test_a_sleeping_engine_may_not_be_used_and_wakes_as_it_was(stage: int) -> None:
    subject, other = engine(stage), engine(stage)
    for one in (subject, other):
        learn(one, 0)
    subject.sleep()
    subject.sleep()
    with pytest.raises(RuntimeError, match="sleeps.*placement.sleep"):
        subject(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="sleeps"):
        subject.whole("0.weight")
    subject.wake()
    assert learn(subject, 1) == learn(other, 1)
    assert all(torch.equal(weights(subject)[name], tensor) for name, tensor in weights(other).items())


def test_buckets_follow_from_the_model_and_hold_its_largest_parameter() -> None:
    sizes = buckets([3_000_000, 50_000_000, 10], [3_000_000], ranks=4)
    assert (sizes.reduce, sizes.prefetch, sizes.live, sizes.optimizer) == (3_000_000, 6_250_000, 53_000_010, 12_500_000)
    small = buckets([10, 20], [], ranks=2)
    assert (small.reduce, small.prefetch, small.live) == (1, 30, 30)
