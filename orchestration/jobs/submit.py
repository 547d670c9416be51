"""`chatray submit`: the run is checked on the cluster by a job of its own, which is deleted again, and only then submitted.

The check is all that `chatray run` checks before it starts (settings, files, the planner's verdict on the live nodes), with the same code
in the same place. What it refuses was never submitted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from orchestration import config as configuration
from orchestration.errors import RequestError, RunError
from orchestration.jobs import wheel
from orchestration.jobs.client import Jobs
from orchestration.jobs.watch import AGAIN, POLL_SECONDS, RUN_DIR, WORDS, commands, follow, of_runs
from orchestration.jobs.words import Submission

PROGRAM = "exec python -P -m orchestration.on_cluster"
"""Of the cluster's own Python; -P keeps its current folder off the path, so that `orchestration` is the one that was sent."""
ANSWER = "chatray-check: "
"""What a check's answer begins with, on a line of its own."""
STEP_CALLS = 6
"""Calls of at most `deadlines.step` seconds each that a stop may have to wait for: those of one PPO step, and the commit."""
LAST_LINES = 8
JOB = "CHATRAY_JOB"
"""Environment variable that tells a job what it is made of."""


@dataclass(frozen=True)
class Package:
    """The code that is sent."""

    wheel: wheel.Wheel
    file: Path
    """The zip file."""

    def described(self) -> dict[str, Any]:
        built = self.wheel
        return {"wheel": built.file.name, "sha256": built.sha256, "commit": built.commit, "dirty": built.dirty}


def submit(wanted: Submission) -> None:
    """Check, submit, say what can be done with the job, and follow it if that was asked.

    Raises:
        RequestError: the request, the address or the token is wrong, the cluster cannot hold the run, or it runs already.
        RunError: the cluster does not do what it should, or the job that is followed failed.
    """
    config = configuration.load(wanted.words, reads_data=False, consistent=False)  # what is there, only the cluster can tell
    jobs = Jobs(wanted.address)
    with tempfile.TemporaryDirectory(prefix="chatray-wheel-") as folder:
        built = wheel.build(Path(folder))
        package = Package(built, wheel.as_zip(built))
        found = check(jobs, wanted, config, package)
        identifier = _free_name(jobs, found["run_dir"])
        again = shlex.join(wanted.again())
        metadata = {
            RUN_DIR: found["run_dir"], WORDS: json.dumps(wanted.words), AGAIN: again, "chatray_code": json.dumps(package.described()),
            "chatray_versions": json.dumps(found["versions"]), "chatray_secrets": json.dumps(wanted.secrets),
        }  # fmt: skip
        environment = _environment(config) | {JOB: json.dumps({"job": identifier, "code": package.described()})}
        jobs.submit(identifier, _entrypoint("run", wanted), package.file, environment, metadata)
    print(f"submitted {identifier}: run_dir={found['run_dir']} on the cluster, code {_named(built)}")
    print("\n".join(commands(jobs, identifier, again)), flush=True)
    if wanted.follow:
        follow(jobs, identifier)


def check(jobs: Jobs, wanted: Submission, config: Config, package: Package) -> dict[str, Any]:
    """What the cluster says of the run: `run_dir`, `versions`, `stages`.

    Raises:
        RequestError: the run would be refused there.
        RunError: the check itself did not run, or not within `deadlines.start`.
    """
    name = f"chatray-check-{secrets.token_hex(4)}"
    with _passing(jobs, name):
        jobs.submit(name, _entrypoint("check", wanted), package.file, _environment(config), {})
        log = _log_at_end(jobs, name, config.deadlines.start)
    answers = [line.removeprefix(ANSWER) for line in log.splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = "\n".join(f"  {line}" for line in log.strip().splitlines()[-LAST_LINES:])
        raise RunError(f"the check did not run on the cluster; nothing was submitted. The end of its log:\n{last}")
    found = json.loads(answers[-1])
    for note in found["notes"]:
        print(f"chatray: {note}", file=sys.stderr)
    if found["mistakes"]:
        raise RequestError([*found["mistakes"], "nothing was submitted"])
    return found


@contextmanager
def _passing(jobs: Jobs, name: str) -> Iterator[None]:
    """A job that is not to be seen afterwards, however this ends."""
    try:
        yield
    finally:
        with contextlib.suppress(RunError, RequestError):
            jobs.stop(name)
            deadline = time.monotonic() + 10
            while not jobs.get(name).ended() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            jobs.delete(name)


def _log_at_end(jobs: Jobs, name: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not (job := jobs.get(name)).ended():
        if time.monotonic() > deadline:
            raise RunError(
                f"waited {seconds:g} s (deadlines.start) for the check on the cluster, which is {job.status}; see that its head node can "
                "start jobs. Nothing was submitted"
            )
        time.sleep(POLL_SECONDS)
    return jobs.log(name) + ("" if job.exit_code is not None else f"\n{job.message}")


def _free_name(jobs: Jobs, run_dir: str) -> str:
    """A name for the next job of this run. Two that are submitted at the same moment get the same one, and Ray refuses the second.

    Raises:
        RequestError: a job of this run has not ended.
    """
    mine = [job for job in of_runs(jobs) if job.metadata[RUN_DIR] == run_dir]
    if busy := [job.identifier for job in mine if not job.ended()]:
        raise RequestError(
            f"run_dir={run_dir}: job {busy[0]} is at work there, and two would write over each other; stop it first (chatray jobs stop "
            f"{busy[0]} --address {jobs.address}), follow it, or choose another run_dir"
        )
    stem = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(run_dir).name)}-{hashlib.sha256(run_dir.encode()).hexdigest()[:6]}"
    numbers = [int(job.identifier.rpartition("-")[2]) for job in mine if job.identifier.startswith(f"{stem}-")]
    return f"{stem}-{max(numbers, default=0) + 1}"


def _entrypoint(verb: str, wanted: Submission) -> str:
    return f"{PROGRAM} {shlex.join([verb, *wanted.options(), 'run', *wanted.words])}"


def _environment(config: Config) -> dict[str, str]:
    """Ray kills a job 3 s after it asked it to stop, unless told to wait for it."""
    return {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(int(STEP_CALLS * config.deadlines.step))}


def _named(built: wheel.Wheel) -> str:
    where = f", commit {built.commit[:12]}{' with changes' if built.dirty else ''}" if built.commit else ""
    return f"{built.file.name} (sha256 {built.sha256[:12]}{where})"
