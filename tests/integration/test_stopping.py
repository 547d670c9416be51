"""SIGTERM while ranks learn: the step in progress is committed, on both runtimes, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMAND, LIMIT_SECONDS

from orchestration import stopping
from orchestration.run_directory import RunDirectory, read_records
from orchestration.stages.ppo import Loop
from tests import tiny_ppo

pytestmark = pytest.mark.ray

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


def test_ppo_commits_the_step_in_progress_and_ends_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while a step is recorded: that step is kept, and not one more is learned from."""
    start = tiny_ppo.prepared(tmp_path)
    words = ("ppo.steps=4", "commit.every=100", "ppo.reward_normalise=running")
    whole = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "whole", *words))
    record, handler = Loop.record, signal.getsignal(signal.SIGTERM)

    def interrupted(self: Loop, step: int, *rest: Any) -> None:
        record(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stopping, "_request", stopping._Request())
    monkeypatch.setattr(Loop, "record", interrupted)
    given = tiny_ppo.context(start, tmp_path / "stopped", *words)
    stopping.listen()
    try:
        with pytest.raises(stopping.Stopped, match="ppo: stopped as asked; step 2 is committed"):
            tiny_ppo.run(given)
    finally:
        signal.signal(signal.SIGTERM, handler)
    point = given.directory.last()
    assert point and point.step == 2 and [row["step"] for row in tiny_ppo.rows(given)] == [1, 2]
    monkeypatch.setattr(stopping, "_request", stopping._Request())
    monkeypatch.setattr(Loop, "record", record)
    again = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "stopped", *words))
    assert [row["kl"] for row in again[1]] == [row["kl"] for row in whole[1]]
    assert all(torch.equal(whole[2][name], again[2][name]) for name in whole[2])
