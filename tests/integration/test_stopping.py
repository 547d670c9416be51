"""SIGTERM while the ranks train: they commit the step in progress, on both runtimes, and the same command goes on from there."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import COMMAND, LIMIT_SECONDS

from orchestration.run_directory import RunDirectory, read_records

pytestmark = pytest.mark.ray

SFT = ("experiment=smoke", "stage=sft", "sft.steps=5000", "sft.eval_every=5000", "commit.every=5000", "run_dir=run")


def stopped_after(steps: int, runtime: str, folder: Path) -> tuple[int, str]:
    """(exit code, what was said) of a run that was sent SIGTERM once so many steps were done."""
    command = [str(COMMAND), "run", *SFT, f"runtime={runtime}"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = folder / "run/round_01/sft/metrics.jsonl", time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and len(read_records(metrics)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, said


@pytest.mark.parametrize("runtime", ["local", "ray"])
def test_training_commits_and_goes_on(runtime: str, tmp_path: Path) -> None:
    stage = RunDirectory(tmp_path / "run", 1).stage("sft")
    code, said = stopped_after(2, runtime, tmp_path)
    point, records = stage.last(), read_records(stage.metrics)
    assert point and 2 <= point.step < 5000, said
    assert code == 1 and f"sft: stopped as asked; step {point.step} is committed" in said
    assert [record["step"] for record in records] == list(range(1, point.step + 1))
    assert not (stage.path / "stop").exists()
    if runtime == "local":
        code, said = stopped_after(point.step + 1, runtime, tmp_path)
        later = stage.last()
        assert code == 1 and later and later.step > point.step, said
        assert [record["step"] for record in read_records(stage.metrics)] == list(range(1, later.step + 1))
