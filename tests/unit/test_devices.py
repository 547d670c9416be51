"""What a process computes on is what it was given. CUDA is pretended: torch says that there is some wherever it is asked."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from actors import devices, worker
from actors.critic import Critic
from actors.engine import Engine
from actors.models import attention
from actors.policy import Policy
from actors.reference import Reference
from actors.reward import Reward
from actors.rollout import Rollout
from actors.rollout_vllm import check_build
from actors.routes import endpoint
from actors.serving.transformers_engine import load as load_served
from actors.sharding import Optimizer, Sharding
from actors.worker import RankSpec, Worker, process_group_of_one
from conf.schema import PPO_ROLES, Config
from orchestration import cli, recipe
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.runtime import train, trials
from orchestration.runtime.cluster import RayGroup, RayRuntime
from orchestration.runtime.group import RoleRequest
from orchestration.runtime.local import LocalRuntime
from orchestration.runtime.rank import RayRank, device_order, rank_environment
from orchestration.serving.launch import replica_options
from orchestration.sweep.run import request
from tests.fakes import saved_lm, saved_scalar, smoke

ROOT = Path(__file__).resolve().parents[2]
ROLES: dict[str, type[Worker]] = {"policy": Policy, "critic": Critic, "reference": Reference, "reward": Reward, "rollout": Rollout}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nobody_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.HIDDEN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(devices, "_gpus", None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is CUDA; whoever then touches it fails, since there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("given", "visible", "device"),
    [(0, "0", CPU), (0.0, "0", CPU), (0.2, "0", CUDA), (1, "0", CUDA), (None, "0", CUDA), (1, "", CPU), (None, "", CPU)],
)
def test_a_process_computes_on_what_it_was_given(
    given: float | None, visible: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if given is not None:
        devices.give(given)
    assert devices.own_device() == device


def test_a_gpu_that_torch_does_not_see_is_not_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.give(1)
    assert devices.own_device() == CPU


def test_nobody_else_asks_whether_there_is_cuda() -> None:
    """What the machine has decides nothing: whoever computes asks for its own device."""
    asking = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in ("actors", "conf", "orchestration")
        for file in sorted((ROOT / package).rglob("*.py"))
        if file != ROOT / "actors/devices.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda.is_available", "torch.cuda.device_count")
    ]
    assert asking == []


def saved(folder: Path) -> Callable[[str], str]:
    """The checkpoint that each role starts from."""
    lm, scalar = saved_lm(folder / "lm"), saved_scalar(folder / "scalar")
    return lambda role: scalar if role in ("critic", "reward") else lm


@pytest.mark.usefixtures("cuda")
def test_every_role_without_a_gpu_computes_on_the_cpu(tmp_path: Path) -> None:
    devices.give(0)
    process_group_of_one()
    starts_from = saved(tmp_path)
    assert set(ROLES) == set(PPO_ROLES)
    for role, kind in ROLES.items():
        devices.give(1)  # what another role of this process was told before
        rank = kind(smoke(), starts_from(role), RankSpec(role, 0, 1, 1))
        rank.load()
        found = [engine.device for engine in rank.engines()] or [rank.device]  # type: ignore[attr-defined]
        assert found == [CPU], role
        assert rank.endpoint().device is None, role


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (0.2, "nccl")])
def test_ranks_talk_by_what_they_compute_on(gpus: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda chosen, **_: asked.append(chosen))
    monkeypatch.setenv("LOCAL_RANK", "3")  # of whatever started this process
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    devices.give(gpus)
    worker.start_process_group(0, 1, dist.HashStore(), datetime.timedelta(seconds=1))
    assert (asked, os.environ["LOCAL_RANK"]) == ([backend], "0")


@pytest.mark.usefixtures("cuda")
def test_a_run_in_one_process_follows_its_placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("orchestration.runtime.local.process_group_of_one", lambda: asked.append(devices.own_device()))
    starts_from = saved(tmp_path)
    groups: Any = LocalRuntime(smoke()).start([RoleRequest("policy", Policy, starts_from("policy"), smoke().placement.policy)])
    assert groups["policy"].rank.engine.device == CPU
    LocalRuntime(smoke("placement=one_gpu"))
    assert asked == [CPU, CUDA]


@pytest.mark.usefixtures("cuda")
def test_a_training_stage_in_one_process_follows_its_placement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(train, "process_group_of_one", lambda: asked.append(devices.own_device()))
    monkeypatch.setattr(train, "train", lambda *_: {"loss": 1.0})
    directory: Any = SimpleNamespace(path=tmp_path)
    for words in ((), ("placement=one_gpu",)):
        assert train.run_training(smoke(*words), SimpleNamespace(), directory, lambda: None) == {"loss": 1.0}  # type: ignore[arg-type]
    assert asked == [CPU, CUDA]


@pytest.mark.usefixtures("cuda")
def test_what_is_chosen_by_the_device_is_chosen_by_the_own_one(tmp_path: Path) -> None:
    serving = configuration.load(["experiment=smoke"]).serving
    devices.give(0)
    assert attention(256) == "eager"
    assert endpoint(on_device=True).device is None
    assert load_served(saved_lm(tmp_path), 1, serving.engine).device == CPU
    devices.give(1)
    assert attention(256) == "sdpa"


@pytest.mark.parametrize("runtime", ["local", "ray"])
def test_the_command_line_hides_gpus_where_all_roles_are_in_its_process(
    runtime: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Ray it must not: the cluster that it starts would have none for its ranks."""
    seen: list[str] = []
    monkeypatch.setattr(recipe, "run", lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr("orchestration.report.show", lambda *_: None)
    monkeypatch.setattr("orchestration.stopping.listen", lambda: None)
    assert cli.main(["run", "experiment=smoke", f"runtime={runtime}", f"run_dir={tmp_path}"]) == 0
    assert seen == ["" if runtime == "local" else "0"]


def test_one_process_cannot_compute_on_a_gpu_and_not() -> None:
    with pytest.raises(RequestError) as refused:
        configuration.load(["experiment=smoke", "runtime=local", "placement=one_gpu", "placement.critic.gpus=0"])
    assert [text for text in refused.value.mistakes if text.startswith("placement.critic.gpus=0") and "placement.train.gpus=1" in text]
    configuration.load(["experiment=smoke", "placement=one_gpu", "placement.critic.gpus=0"])


def test_trials_in_one_process_may_not_ask_for_gpus_that_nobody_reserves() -> None:
    words = ["sweep=ppo", "experiment=smoke", "runtime=local", "placement=one_gpu"]
    with pytest.raises(RequestError) as refused:
        request(words)
    assert [text for text in refused.value.mistakes if text.startswith("placement.policy.gpus=0.2") and "runtime=ray" in text]


def test_a_trial_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(trials.tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "007"))
    trials._trainable(lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))({"point": {"number": 7, "values": {}}})
    assert seen == [""]


@pytest.mark.parametrize("name", ["ingress", "engines", "moderators"])
@pytest.mark.parametrize("gpus", [0.0, 0.5])
def test_replicas_without_gpus_see_none(name: str, gpus: float) -> None:
    replicas = dataclasses.replace(getattr(configuration.load(["experiment=smoke"]).serving, name), gpus=gpus)
    options = replica_options(replicas)["ray_actor_options"]
    assert options.get("runtime_env", {"env_vars": {}})["env_vars"] == (
        {} if gpus else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    )


@pytest.mark.parametrize(("built_for_cpu", "on_gpu", "works"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_vllm_that_wants_a_gpu_is_not_started_without(
    built_for_cpu: bool, on_gpu: bool, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = SimpleNamespace(is_cpu=lambda: built_for_cpu)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    with nullcontext() if works else pytest.raises(RuntimeError, match=r"^serving.engines.gpus=0: .*set serving.engines.gpus=1, or"):
        check_build(on_gpu, "serving.engines.gpus")


def test_ranks_without_gpus_see_none_and_others_keep_what_ray_gave_them() -> None:
    place = smoke().placement.policy
    assert devices.HIDDEN.items() <= rank_environment(place, None).items()
    assert not devices.HIDDEN.keys() & rank_environment(dataclasses.replace(place, gpus=0.2), None).keys()


@pytest.mark.parametrize(
    ("given", "devices_found"),
    [
        ([], ()),
        ([10, 9], (9, 10)),
        (["10", "9"], (9, 10)),
        (["GPU-b0", "GPU-a1"], ("GPU-a1", "GPU-b0")),
        (["MIG-7f/3/0"], ("MIG-7f/3/0",)),
        (["GPU-a1", "3"], (3, "GPU-a1")),
    ],
)
def test_a_rank_says_which_devices_it_has_whatever_ray_calls_them(
    given: list[Any], devices_found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
    assert RayRank.where(object.__new__(RayRank))[1] == devices_found
    assert sorted(sorted(devices_found, key=str), key=device_order) == list(devices_found)


def runtime_of(config: Config, devices_of: dict[str, list[tuple[Any, ...]]]) -> RayRuntime:
    """One whose ranks are placed, without any."""
    runtime = object.__new__(RayRuntime)
    runtime.config, runtime.groups = config, {}
    for name, found in devices_of.items():
        runtime.groups[name] = group = RayGroup(name, [None] * len(found))
        group.devices, group.nodes = found, [0] * len(found)
    return runtime


@pytest.mark.parametrize(("gpus", "found"), [(0.2, ["GPU-a", "GPU-b"]), (0, [])])
def test_an_engine_with_a_part_of_its_neighbours_devices_sees_them_unless_it_has_none(gpus: float, found: list[str]) -> None:
    words = ("placement=colocated", "placement.devices=2", "placement.rollout.ranks=1", "placement.rollout.tensor_parallel=2")
    config = configuration.load(["experiment=smoke", *words, f"placement.rollout.gpus={gpus}"])
    runtime = runtime_of(config, {"policy": [("GPU-a",), ("GPU-b",)], "rollout": [("GPU-a",)]})
    assert runtime._devices(RoleRequest("rollout", Rollout, "", config.placement.rollout), 0) == found


@pytest.mark.parametrize(("device", "local_rank"), [("cpu", "0"), ("cuda:0", "0"), ("cuda:1", "1")])
def test_a_training_rank_turns_to_its_own_device(device: str, local_rank: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray Train numbers the ranks of a node, whatever they compute on; two that share a device see one."""
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device(device))
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    threads = torch.get_num_threads()
    train._rank({"config": smoke(), "task": None, "directory": SimpleNamespace(path=tmp_path)})
    torch.set_num_threads(threads)
    assert os.environ["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_given_after_deepspeed_was_loaded_counts(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is loaded it takes CUDA where it finds some."""
    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    devices.give(0)
    process_group_of_one()
    engine = Engine(torch.nn.Linear(4, 1), Optimizer(0.1, 0.0, 1.0), Sharding(stage))
    engine.backward(engine(torch.ones(2, 4)).sum(), last=True)
    assert engine.step(0.1) > 0
