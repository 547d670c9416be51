"""Sweeps on Ray Tune: trials in Tune's placement groups, stopped early, copied from each other, and gone on with after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.sweep import records
from tests import tiny_ppo
from tests.conftest import ROOT, ray_processes, wait_until_gone
from tests.intruder import watched

pytestmark = pytest.mark.ray

COMMON = ["experiment=smoke", "ppo.batch=8", "ppo.minibatches=1", "ppo.max_new_tokens=6", "data.demonstrations=64", "data.prompts=64",
          "logging.wandb=off", "preflight=warn", "sweep.prompts=8"]  # fmt: skip
ALONE = ["runtime=local"]
"""All roles of a trial in its driver's process: one process a trial."""
KL_DECIDES = ["sweep.objective.kl_budget=1.0e-9", "sweep.objective.penalty=1.0e6", "ppo.guard.action=off"]
"""The nearer to the SFT model, the better: so which trial is worse is known beforehand."""
SLOW_FIRST = ["ppo.lr=1.0e-7", "ppo.warmup=0", "sweep.space.ppo.lr={choice: [0.01, 0.02]}", "sweep.space.ppo.kl.beta=null",
              "sweep.space.ppo.epochs=null"]  # fmt: skip
"""Trial 0, with the experiment's own settings, hardly learns; the others learn far too fast."""


ANY = (0, 1)
"""Whether somebody wins, at so small a budget, is rounding."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that name an SFT model, a reward model and a judge, so that trials alone are run."""
    start = tiny_ppo.prepared(tmp_path_factory.mktemp("models"))
    return [f"policy_checkpoint={start / 'lm'}", f"reward_checkpoint={start / 'rm'}", f"sweep.judge.path={start / 'rm'}"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "orchestration.cli", *words]


def sweep(folder: Path, *words: str, codes: tuple[int, ...] = (0,)) -> str:
    """`chatray sweep` in `folder`/sweep; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    asked = command("sweep", *COMMON, f"run_dir={folder / 'sweep'}", *words)
    done = subprocess.run(asked, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in codes and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "sweep" / "summary.json").read_text())
    return {row["trial"]: row for row in found["trials"]}


def test_trials_whose_roles_are_ranks_use_the_group_that_tune_reserved(tmp_path: Path, models: list[str]) -> None:
    """The ranks of a trial want more than half of the CPUs: no second group for them could ever be had beside Tune's own."""
    share = (os.cpu_count() or 1) * 0.6 / 3
    few = ["ppo.advantage=reinforce", "lora.rank=2", "lora.roles=[policy]"]  # no critic, and the policy is its own reference
    ranks = [f"placement.{role}.cpus={share}" for role in ("policy", "reward", "rollout")]
    with watched() as listening:
        said = sweep(tmp_path, *models, *few, *ranks, "ppo.steps=2", "sweep.every=1", "sweep.trials=2", "deadlines.start=120")
    assert "RayRank" in " ".join(listening.inet.values()) and listening.open_to_others() == []
    assert "1 at a time (1 fit on the cluster)" in said
    assert {name: row["status"] for name, row in rows(tmp_path).items()} == {"000": "finished", "001": "finished"}, said
    assert all(row["step"] == 2 for row in rows(tmp_path).values())
    assert not (tmp_path / "sweep" / "tune").exists()


def test_a_trial_that_falls_behind_ends_early(tmp_path: Path, models: list[str]) -> None:
    words = [*models, *ALONE, *KL_DECIDES, *SLOW_FIRST, "sweep=ppo_asha", "sweep.scheduler.grace=2", "ppo.steps=4", "sweep.every=1"]
    sweep(tmp_path, *words, "sweep.trials=2", "sweep.concurrency=1", codes=ANY)
    found = rows(tmp_path)
    assert (found["000"]["status"], found["000"]["step"]) == ("finished", 4)
    assert (found["001"]["status"], found["001"]["step"]) == ("stopped", 2)
    assert found["001"]["why_not"] == "by asha after 2 of 4 steps"


@pytest.mark.slow
def test_a_sweep_with_more_trials_tells_asha_of_those_before_without_running_them(tmp_path: Path, models: list[str]) -> None:
    words = [*models, *ALONE, *KL_DECIDES, *SLOW_FIRST, "sweep=ppo_asha", "sweep.scheduler.grace=2", "ppo.steps=4", "sweep.every=1"]
    sweep(tmp_path, *words, "sweep.trials=2", "sweep.concurrency=1", codes=ANY)
    found = rows(tmp_path)
    before = (tmp_path / "sweep/trials/000/summary.json").stat().st_mtime_ns
    sweep(tmp_path, *words, "sweep.trials=3", "sweep.concurrency=1", codes=ANY)
    assert (rows(tmp_path)["002"]["status"], rows(tmp_path)["002"]["step"]) == ("stopped", 2)
    assert {name: row["step"] for name, row in rows(tmp_path).items()} == {"000": 4, "001": 2, "002": 2}
    assert found["001"]["why_not"] == rows(tmp_path)["001"]["why_not"]
    assert (tmp_path / "sweep/trials/000/summary.json").stat().st_mtime_ns == before


def test_a_bad_trial_goes_on_from_the_weights_of_a_good_one_with_other_values(tmp_path: Path, models: list[str]) -> None:
    interval = [
        "sweep.scheduler.interval=2",
        "sweep.scheduler.synchronous=true",
        "sweep.scheduler.quantile=0.5",
        "sweep.scheduler.resample=1.0",
    ]
    sweep(
        tmp_path, *models, *ALONE, *KL_DECIDES, *SLOW_FIRST, *interval, "sweep=ppo_pbt", "ppo.steps=4", "sweep.every=2", "sweep.trials=2",
        codes=ANY,
    )  # fmt: skip
    good, bad = (records.trial(tmp_path / "sweep", number) for number in (0, 1))
    assert (good.status, bad.status) == ("finished", "finished") and good.lineage() == []
    taken = bad.lineage()[0]
    assert taken["from"] == 0 and taken["its_values"] == {"ppo.lr": 1e-7} and taken["values"]["ppo.lr"] in (0.01, 0.02)
    assert taken["state"] == taken["its_state"], "policy, critic and optimizers are the other's, byte for byte"
    rows = [json.loads(line) for line in (bad.folder / "points.jsonl").read_text().splitlines()]
    copied = [row for row in rows if row["step"] == taken["step"]]
    theirs = next(at for at in good.points() if at.step == taken["step"])
    assert len(copied) == 2, "measured with its own weights, and again with the other's"
    assert copied[0]["kl"] > 100 * abs(copied[1]["kl"])
    assert (copied[1]["kl"], copied[1]["score"]) == pytest.approx((theirs.kl, theirs.score), rel=1e-6)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path, killed: list[subprocess.Popen[bytes]]) -> None:
    """The models are made by the sweep itself; killed in its second trial, continued, refused with other settings, and its best run."""
    before = {process.pid for process in ray_processes()}
    words = [
        *ALONE,
        "ppo.steps=6",
        "sweep.every=1",
        "sweep.trials=3",
        "sweep.concurrency=1",
        "compare.prompts=8",
        "compare.heldout_prompts=4",
    ]
    folder, environment = tmp_path / "sweep", os.environ | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "wb") as log:
        asked = command("sweep", *COMMON, f"run_dir={folder}", *words)
        killed.append(subprocess.Popen(asked, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    second = records.trial(folder, 1)
    deadline = time.monotonic() + 300
    while not (len(second.points()) >= 3 and second.status == "running"):
        assert killed[0].poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(killed[0].pid, signal.SIGKILL)
    killed[0].wait()
    assert wait_until_gone(lambda: [process for process in ray_processes() if process.pid not in before]) == []
    first = records.trial(folder, 0)
    made = {path: path.stat().st_mtime_ns for part in ("base", "judge", "trials/000") for path in (folder / part).rglob("*.safetensors")}
    assert first.status == "finished" and len(made) >= 4
    assert 3 <= len(second.points()) < 7

    said = sweep(tmp_path, *words)
    assert "going on" in said and "2 of 3 trials to run" in said
    found = rows(tmp_path)
    assert [row["status"] for row in found.values()] == ["finished"] * 3 and all(row["step"] == 6 for row in found.values())
    assert {path: path.stat().st_mtime_ns for path in made} == made, "nothing that was made is made again"
    steps = [json.loads(line)["step"] for line in (second.folder / "points.jsonl").read_text().splitlines()]
    assert steps.count(0) == 1 and steps[-1] == 6, "it went on from its commit"

    own, seeds = json.loads((folder / "judge/manifest.json").read_text()), [0, 7919]
    assert [json.loads((folder / part / "manifest.json").read_text())["stages"]["compare"]["identity"]["settings"]["seed"]
            for part in ("base", "judge")] == seeds  # fmt: skip
    assert own["stages"]["reward_model"]["status"] == "complete"

    assert "sweep.every: was 1, is now 2" in sweep(tmp_path, *words, "sweep.every=2", codes=(2,))
    best = json.loads((folder / "summary.json").read_text())["best"]
    values = found[best]["values"]
    run = subprocess.run(
        command("run", "@sweep/best.yaml", "run_dir=best", "stage=ppo", "ppo.steps=1", "logging.progress=false",
                f"policy_checkpoint={folder}/base/round_01/sft/checkpoint",
                f"reward_checkpoint={folder}/base/round_01/reward_model/checkpoint"),
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    settings = json.loads((tmp_path / "best/manifest.json").read_text())["stages"]["ppo"]["identity"]["settings"]["ppo"]
    assert (settings["lr"], settings["kl"]["beta"], settings["epochs"]) == tuple(values[f"ppo.{k}"] for k in ("lr", "kl.beta", "epochs"))


def test_a_trial_that_fails_is_kept_with_its_reason_and_not_repeated(tmp_path: Path, models: list[str]) -> None:
    """Trial 1's batch cannot be cut in three: known only when Optuna has suggested it."""
    space = [
        "sweep.space.ppo.lr=null",
        "sweep.space.ppo.kl.beta=null",
        "sweep.space.ppo.epochs=null",
        "sweep.space.ppo.minibatches={choice: [3, 5]}",
    ]
    words = [*models, *ALONE, *space, "sweep=ppo_optuna", "ppo.steps=1", "sweep.every=1", "sweep.trials=2", "sweep.concurrency=1"]
    assert "minibatches" in sweep(tmp_path, *words, "sweep.search=random", codes=(2,)), "drawn beforehand, it is refused"
    assert not (tmp_path / "sweep").exists()
    said = sweep(tmp_path, *words)
    found = rows(tmp_path)
    assert found["000"]["best"] and found["001"]["status"] == "failed"
    assert "ppo.minibatches" in found["001"]["why_not"] and "RequestError" in found["001"]["why_not"], said
    trace = (tmp_path / "sweep/trials/001/error.txt").read_text()  # in Ray's form, which has no heading
    assert "orchestration/sweep/trial.py" in trace and "ppo.minibatches" in trace
    assert "every trial has ended" in sweep(tmp_path, *words)
    assert rows(tmp_path) == found
