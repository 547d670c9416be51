"""What happens on the cluster when something dies or hangs: never silence, never a half-written result, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, Chatray, ray_processes, wait_until_gone

from orchestration.run_directory import RunDirectory, read_records

pytestmark = pytest.mark.ray

POLL = 0.05
GIVE_UP = 480.0


def prepared(smoke_run: Path, folder: Path) -> Path:
    """A run whose PPO has not been run yet."""
    run = Path(shutil.copytree(smoke_run, folder / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in ("ppo", "evaluate"):
        del manifest["stages"][stage]
        shutil.rmtree(run / "round_01" / stage)
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def launched(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(COMMAND), "run", "experiment=smoke", "stage=ppo", f"run_dir={run}", "ppo.steps=2000", "commit.every=2", *words]
    return subprocess.Popen(command, cwd=run.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something the run does; fails when the run ends or takes for ever."""
    deadline = time.monotonic() + GIVE_UP
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited too long"
        psutil.wait_procs([psutil.Process(process.pid)], timeout=POLL)


def shorten(run: Path, steps: int) -> None:
    """Make it the same run, only not 2000 steps long."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["ppo"]["identity"]["settings"]["ppo"]["steps"] = steps
    (run / "manifest.json").write_text(json.dumps(manifest))


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The run's rank processes, newest last."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("ray::RayRank")]
    return sorted(found, key=lambda p: p.create_time())


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_records(run / "round_01" / "ppo" / "metrics.jsonl")]


def nothing_of_ray_below(pids: set[int]) -> bool:
    """No rank, raylet or control store is left. Two small agents of Ray's notice about a minute later that their raylet is gone."""
    return not wait_until_gone(lambda: [p for p in ray_processes() if p.pid in pids and not is_agent(p)])


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def test_a_killed_driver_leaves_nothing_running_and_the_same_command_goes_on(smoke_run: Path, tmp_path: Path, chatray: Chatray) -> None:
    run = prepared(smoke_run, tmp_path)
    process = launched(run)
    stage = RunDirectory(run, 1).stage("ppo")
    until(lambda: stage.last() and len(steps_of(run)) > stage.last().step, process)
    below = {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert nothing_of_ray_below(below), "Ray outlived its driver"
    committed = stage.last()
    assert committed is not None
    before = read_records(run / "round_01/ppo/metrics.jsonl")
    shorten(run, committed.step + 2)
    done = chatray(
        "run", "experiment=smoke", "stage=ppo", f"run_dir={run}", f"ppo.steps={committed.step + 2}", "commit.every=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    after = read_records(run / "round_01/ppo/metrics.jsonl")
    assert [r["step"] for r in after] == list(range(1, committed.step + 3))
    assert after[: committed.step] == before[: committed.step]
    for one, other in zip(before[committed.step :], after[committed.step :], strict=False):  # steps that were run twice
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-6) and one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_dead_rank_ends_the_run_at_once_with_its_name(smoke_run: Path, tmp_path: Path) -> None:
    run = prepared(smoke_run, tmp_path)
    process = launched(run)
    until(lambda: steps_of(run), process)
    ranks_of(process)[-1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 0 died in" in errors and "goes on from the last commit" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 3)), ((1, 3), (2, 2))])  # (ranks, ZeRO stage)
def test_a_run_goes_on_with_other_ranks_at_another_zero_stage(
    smoke_run: Path, tmp_path: Path, chatray: Chatray, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def words(ranks: int, stage: int) -> list[str]:
        return [f"placement.policy.ranks={ranks}", f"placement.critic.ranks={ranks}", f"engine.zero_stage={stage}"]

    run = prepared(smoke_run, tmp_path)
    process = launched(run, *words(*before))
    stage = RunDirectory(run, 1).stage("ppo")
    until(stage.last, process)
    ranks_of(process)[-1].kill()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1, errors
    committed = stage.last()
    assert committed is not None
    shorten(run, committed.step + 2)
    more = (f"run_dir={run}", f"ppo.steps={committed.step + 2}", "commit.every=2", *words(*after))
    done = chatray("run", "experiment=smoke", "stage=ppo", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert steps_of(run) == list(range(1, committed.step + 3))


def test_a_hung_rank_is_named_when_the_deadline_passes(smoke_run: Path, tmp_path: Path) -> None:
    run = prepared(smoke_run, tmp_path)
    process = launched(run, "deadlines.step=20")
    until(lambda: steps_of(run), process)
    for rank in ranks_of(process):
        os.kill(rank.pid, signal.SIGSTOP)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "waited 20 s (deadlines.step)" in errors and "State of each rank" in errors and "does not answer" in errors
    for role in ("policy", "critic", "reference", "reward", "rollout"):
        assert f"{role} rank 0:" in errors


def test_a_cluster_too_small_is_refused_with_what_it_has(smoke_run: Path, tmp_path: Path, chatray: Chatray) -> None:
    run = prepared(smoke_run, tmp_path)
    words = ("stage=ppo", f"run_dir={run}", "placement.policy.cpus=500", "deadlines.start=100")
    refused = chatray("run", "experiment=smoke", *words, cwd=tmp_path, seconds=80)
    assert refused.returncode == 2
    assert "stage ppo needs 500.4 CPUs" in refused.stderr and "a bundle of 500 CPUs" in refused.stderr
    unchecked = chatray("run", "experiment=smoke", *words, "preflight=off", cwd=tmp_path, seconds=80)
    assert unchecked.returncode == 1
    assert "could not reserve 500.4 CPUs" in unchecked.stderr and "Choose a smaller `placement`" in unchecked.stderr
