"""What `make bench-gpu` can be held to without a GPU: it says so, its sizes fit one by the plan, and its shares are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conf.schema import Config
from orchestration import config as configuration
from orchestration.planner import machines
from orchestration.planner.plan import plan
from orchestration.planner.shapes import language_model, scalar_model
from tests.benchmarks import gpu
from tests.benchmarks.step_time import pairs
from tests.benchmarks.step_time.settings import words

H100 = ["cluster=h200x8", "cluster.gpus=1", "cluster.gpu_memory_gib=80", "cluster.cpus=16", "cluster.host_memory_gib=128"]


def shaped(name: str, *further: str) -> Config:
    """A size's configuration, of random weights in place of its checkpoints."""
    setting = gpu.sizes()[name]
    plain = [word for word in words(setting, Path("/none"), Path("/none"), "bf16") if "_checkpoint=" not in word]
    small = [f"scale@reward_scale={setting.reward_scale}", "reward_model.start=own"] if setting.reward_scale else []
    return configuration.load([*setting.scale, *plain, *small, *further], reads_data=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^bench-gpu: torch sees no GPU here[^\n]*$"):
        gpu.main()


@pytest.mark.parametrize("name", gpu.sizes())
def test_every_size_fits_one_gpu_by_the_plan(name: str) -> None:
    config = shaped(name, *H100)
    found = plan(config, machines.described(config.cluster))
    assert found.fits, found.reasons


def test_gpus_are_known_by_name() -> None:
    assert gpu.known("NVIDIA H100 80GB HBM3").bandwidth == 3350e9
    assert gpu.known("NVIDIA H100 PCIe").flops == 756e12
    assert gpu.known("NVIDIA H200").bandwidth == 4800e9
    with pytest.raises(SystemExit, match=r"nothing is known of a Voodoo 2; add"):
        gpu.known("Voodoo 2")


def test_learning_counts_three_passes_of_each_model_and_epoch_and_two_of_adapters() -> None:
    config = shaped("125m", "ppo.epochs=2")
    tokens, length = 1000.0, 100.0
    policy, critic = (shape.forward_flops(tokens, length) for shape in (language_model(config), scalar_model(config)))
    assert gpu.learning_flops(config, tokens, length) == pytest.approx(2 * 3 * (policy + critic))
    assert policy == pytest.approx(2 * 124e6 * tokens, rel=0.02)  # two operations a parameter
    adapted = shaped("6.7b")
    policy, critic = (shape.forward_flops(tokens, length) for shape in (language_model(adapted), scalar_model(adapted)))
    assert gpu.learning_flops(adapted, tokens, length) == pytest.approx(2 * policy + 3 * critic)


def test_decoding_reads_weights_for_each_token_and_all_keys_and_values_before_it() -> None:
    config = shaped("125m")
    shape = language_model(config)
    weights_alone = gpu.decoding_bytes(config, rows=0, prompt=0, reply=10)
    assert weights_alone == 10 * 2 * shape.active
    cached = 2 * 12 * 768 * 2  # keys and values, layers, width, bytes
    by_hand = sum(3 * cached * (50 + t + 0.5) for t in range(10))
    assert gpu.decoding_bytes(config, rows=3, prompt=50, reply=10) - weights_alone == pytest.approx(by_hand)


def test_a_row_divides_by_the_seconds_of_its_phase_and_by_the_peak(tmp_path: Path) -> None:
    setting, device = gpu.sizes()["125m"], gpu.Device("toy", 1e15, 1e12)
    config = shaped("125m")
    assert gpu.shares(tmp_path, setting, config, device) is None
    figures = {"seconds": 5.0, "seconds_learning": 2.0, "seconds_rollout": 4.0}
    pairs.append(
        tmp_path / "rounds.jsonl", {"setting": "125m", "session": 0, "seconds": {"ours-bf16": 5.0}, "figures": {"ours-bf16": figures}}
    )
    name, whole, learn, mfu, rollout, tokens, reading, count = gpu.shares(tmp_path, setting, config, device) or []
    assert (name, whole, learn, rollout, tokens, count) == ("125m", "5.00", "2.00", "4.00", f"{64 * 256 / 4:.0f}", 1)
    assert mfu == f"{gpu.learning_flops(config, 64 * 512, 512) / 2e15:.1%}"
    assert reading == f"{gpu.decoding_bytes(config, 64, 256, 256) / 4e12:.1%}"


def test_a_size_that_fails_is_told_and_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("ours-bf16 ended:\nCUDA out of memory")

    monkeypatch.setattr(pairs, "run", broken)
    assert gpu.measure(gpu.sizes()["125m"], 1, tmp_path, "python") == "125m: CUDA out of memory"
