"""Jobs on a real cluster of two nodes with token authentication, started by `cluster/local_cluster.sh`.

On the nodes' own path stand packages of chatray's names that cannot be imported, and the submitter stands in a folder with such packages:
what runs came with the job.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import LIMIT_SECONDS
from local_cluster import SECRET, LocalCluster, broken_packages, free_ports, local_cluster
from tiny_models import save_tiny_models

from orchestration import config as configuration
from orchestration.run_directory import RunDirectory, read_records

pytestmark = pytest.mark.ray

STEPS = 10
"""So many that PPO is still at it when its first step has been seen on disk."""
SHORT = ("experiment=smoke", "stage=ppo", "policy_checkpoint=lm", "reward_checkpoint=rm", "ppo.advantage=reinforce", "lora.rank=4",
         f"ppo.steps={STEPS}", "commit.every=1000", "run_dir=run")  # fmt: skip
"""PPO from models that are there, without a critic, and with a policy that answers for the reference: three processes to start, not five,
and none for other stages. Each takes ten seconds of a core for its imports."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submitter's folder: with packages of chatray's names, which no job may get to see."""
    return broken_packages(tmp_path_factory.mktemp("submitter"))


def jobs_of(cluster: LocalCluster, cwd: Path) -> str:
    return cluster.chatray("jobs", "list", cwd=cwd).stdout


def test_submit_follow_detach_stop_and_resume(cluster: LocalCluster, elsewhere: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_tiny_models(tmp_path, configuration.load(["experiment=smoke"]))
    words = ("submit", "--folder", str(tmp_path), "--secret", "FILE_SECRET", "--follow", "run", *SHORT)
    follower = cluster.start(*words, "from=ppo", cwd=elsewhere)
    driver = _until_it_learns(follower, run)
    driver.suspend()  # it would come to its end while this test looks at it
    job, resume = _followed(follower)
    follower.send_signal(signal.SIGINT)
    said = follower.communicate(timeout=60)[0]
    assert follower.returncode == 0 and f"chatray jobs follow {job}" in said, said

    again = cluster.chatray(*words, cwd=elsewhere)
    assert again.returncode == 2 and f"job {job} is at work there" in again.stderr, again.stderr

    stopping = cluster.start("jobs", "stop", job, cwd=elsewhere)
    _until_asked_to_stop(driver)
    driver.resume()
    stopped = stopping.communicate(timeout=LIMIT_SECONDS)[0]
    assert stopping.returncode == 0 and f"{job}: STOPPED" in stopped, stopped
    stage = RunDirectory(run, 1).stage("ppo")
    point, records = stage.last(), read_records(stage.metrics)
    assert point and 0 < point.step < STEPS
    assert [record["step"] for record in records] == list(range(1, point.step + 1)), "a step was done and not committed"
    assert f"step {point.step} is committed" in stopped

    assert "from=" not in resume and resume in stopped
    done = cluster.chatray(*shlex.split(resume)[1:2], "--follow", *shlex.split(resume)[2:], cwd=elsewhere)
    assert done.returncode == 0 and "SUCCEEDED" in done.stdout, done.stdout + done.stderr
    assert [record["step"] for record in read_records(stage.metrics)] == list(range(1, STEPS + 1))
    assert (run / "summary.json").is_file()
    _check_journal(run, job)
    status = cluster.chatray("jobs", "status", job, cwd=elsewhere).stdout
    assert "STOPPED" in status and '"torch"' in status and "sha256" in status
    listed = jobs_of(cluster, elsewhere)
    assert "STOPPED" in listed and "SUCCEEDED" in listed and "chatray-check" not in listed
    _check_that_nothing_shows_the_secret(cluster, run, said + status + listed + done.stdout)


def _until_it_learns(follower: subprocess.Popen[str], run: Path) -> psutil.Process:
    """The job's driver, once PPO has done a step."""
    deadline, metrics = time.monotonic() + LIMIT_SECONDS, run / "round_01/ppo/metrics.jsonl"
    while not metrics.exists() or not read_records(metrics):
        assert follower.poll() is None and time.monotonic() < deadline, follower.stdout and follower.stdout.read()
        time.sleep(0.02)
    return _driver(run.parent)


def _followed(follower: subprocess.Popen[str]) -> tuple[str, str]:
    """(the job's id, the command that goes on with it), from the followed log up to PPO."""
    assert follower.stdout
    seen = ""
    for line in follower.stdout:
        seen += line
        if line.strip() == "ppo":
            break
    found = re.search(r"^submitted (\S+):.*\n.*\n.*\n  resume   (.*)$", seen, re.MULTILINE)
    assert found, seen
    return found[1], found[2]


def _driver(folder: Path) -> psutil.Process:
    """The driver of the job that works in this folder."""
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"orchestration.on_cluster", "run", str(folder)} <= set(process.info["cmdline"] or ())
    ]
    return found


def _until_asked_to_stop(driver: psutil.Process) -> None:
    """Until the suspended driver has a SIGTERM waiting for it."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        (pending,) = re.findall(r"^ShdPnd:\t(\w+)$", Path(f"/proc/{driver.pid}/status").read_text(), re.MULTILINE)
        if int(pending, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.1)
    raise AssertionError("the driver was not asked to stop")


def _check_journal(run: Path, job: str) -> None:
    lines = [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]
    assert [line["job"] for line in lines] == [job, f"{job.rpartition('-')[0]}-2"]
    assert lines[0]["code"]["sha256"] == lines[1]["code"]["sha256"]
    assert {"python", "ray", "torch", "transformers", "deepspeed", "chatray"} <= lines[0]["versions"].keys()


def _check_that_nothing_shows_the_secret(cluster: LocalCluster, run: Path, printed: str) -> None:
    logs = [file for file in (cluster.folder / "ray").rglob("*") if file.is_file() and not file.is_symlink()]
    assert logs
    files = [*logs, *(file for file in run.rglob("*") if file.is_file())]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("experiment=smoke", "placement.rollout.cpus=50"), r"stage compare needs 50 CPUs.*has 2 node\(s\) with 8 CPUs.*than any node has"),
        (("experiment=taskmaster_coffee", "data.path=not/there"), r"data\.path=\S*/not/there"),
    ],
    ids=["a cluster too small", "a missing file"],
)  # fmt: skip
def test_what_the_cluster_refuses_is_not_submitted(
    cluster: LocalCluster, elsewhere: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    before = jobs_of(cluster, elsewhere)
    done = cluster.chatray("submit", "--folder", str(tmp_path), "run", *words, cwd=elsewhere)
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert "nothing was submitted" in done.stderr and "submitted" not in done.stdout
    assert jobs_of(cluster, elsewhere) == before
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_address_and_a_wrong_token_end_at_once(cluster: LocalCluster, elsewhere: Path) -> None:
    began = time.monotonic()
    (closed,) = free_ports(1)
    nobody = cluster.chatray("jobs", "list", "--address", f"127.0.0.1:{closed}", cwd=elsewhere)
    assert nobody.returncode == 2 and f"--address http://127.0.0.1:{closed}: nothing answers there" in nobody.stderr, nobody.stderr
    wrong = cluster.chatray("submit", "run", "experiment=smoke", cwd=elsewhere, RAY_AUTH_TOKEN="0123" * 16)
    assert wrong.returncode == 2 and "the one that was sent is not the cluster's" in wrong.stderr, wrong.stderr
    assert "0123" not in wrong.stderr
    none = cluster.chatray("submit", "run", "experiment=smoke", cwd=elsewhere, RAY_AUTH_MODE="disabled")
    assert none.returncode == 2 and "wants a token, and none was sent" in none.stderr, none.stderr
    assert time.monotonic() - began < LIMIT_SECONDS


def test_a_job_that_is_not_there_is_named(cluster: LocalCluster, elsewhere: Path) -> None:
    done = cluster.chatray("jobs", "stop", "nobody-1", cwd=elsewhere)
    assert done.returncode == 2 and "job nobody-1: not known at" in done.stderr
