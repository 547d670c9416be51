"""SIGTERM while the ranks train: they commit the step in progress, on both runtimes, and the same command goes on from there."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import COMMAND, LIMIT_SECONDS

from orchestration.run_directory import RunDirectory, read_records

pytestmark = pytest.mark.ray

PPO = ("experiment=smoke", "stage=ppo", "from=ppo", "ppo.steps=5000", "commit.every=5000", "run_dir=run", "runtime=local")
SFT = ("experiment=smoke", "stage=sft", "sft.steps=5000", "sft.eval_every=5000", "commit.every=5000", "run_dir=run")


def stopped_after(steps: int, metrics: Path, words: Sequence[str], folder: Path) -> tuple[int, str]:
    """(exit code, what was said) of a run that was sent SIGTERM once so many steps were done."""
    command = [str(COMMAND), "run", *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and len(read_records(metrics)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, said


@pytest.mark.parametrize("runtime", ["local", "ray"])
def test_training_commits_and_goes_on(runtime: str, tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path / "run", 1).stage("sft")
    code, said = stopped_after(2, stage.metrics, (*SFT, f"runtime={runtime}"), tmp_path)
    point, records = stage.last(), read_records(stage.metrics)
    assert point and 2 <= point.step < 5000, said
    assert code == 1 and f"sft: stopped as asked; step {point.step} is committed" in said
    assert [record["step"] for record in records] == list(range(1, point.step + 1))
    assert not (stage.path / "stop").exists()
    if runtime == "local":
        code, said = stopped_after(point.step + 1, stage.metrics, (*SFT, "runtime=local"), tmp_path)
        later = stage.last()
        assert code == 1 and later and later.step > point.step, said
        assert [record["step"] for record in read_records(stage.metrics)] == list(range(1, later.step + 1))


def test_ppo_commits_and_goes_on(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    shutil.rmtree(run / "round_01/ppo")  # its steps would be taken for those of this run
    stage = RunDirectory(run, 1).stage("ppo")
    code, said = stopped_after(2, stage.metrics, PPO, tmp_path)
    point, records = stage.last(), read_records(stage.metrics)
    assert point and 2 <= point.step < 5000, said
    assert code == 1 and f"ppo: stopped as asked; step {point.step} is committed" in said
    assert [record["step"] for record in records] == list(range(1, point.step + 1))
    again = [word for word in PPO if not word.startswith("from=")]
    code, said = stopped_after(point.step + 1, stage.metrics, again, tmp_path)
    later = stage.last()
    assert code == 1 and later and later.step > point.step, said
