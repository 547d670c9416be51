"""Jobs that were submitted: list, follow, stop."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from orchestration.errors import RunError
from orchestration.jobs.client import Job, Jobs
from orchestration.jobs.words import Ask

POLL_SECONDS = 0.5
BREAKS = 5
"""Connections that may break off one after the other while a job is followed."""
RUN_DIR, WORDS, AGAIN = "chatray_run_dir", "chatray_words", "chatray_again"
"""Names in a job's metadata: what marks it as chatray's, the words of the run, and the command that goes on with it."""
FILE_WIDTH = 170


def answer(ask: Ask) -> None:
    """Do what is asked of jobs."""
    jobs = Jobs(ask.address)
    {"list": lambda: show_all(jobs), "status": lambda: show(jobs, ask.job), "follow": lambda: follow(jobs, ask.job),
     "stop": lambda: stop(jobs, ask.job)}[ask.verb]()  # fmt: skip


def of_runs(jobs: Jobs) -> list[Job]:
    """Those that chatray submitted."""
    return [job for job in jobs.all() if RUN_DIR in job.metadata]


def show_all(jobs: Jobs) -> None:
    table = Table("job", "status", "started", "run_dir on the cluster", "run")
    for job in of_runs(jobs):
        words = shlex.join(json.loads(job.metadata.get(WORDS, "[]")))
        table.add_row(job.identifier, job.status, _at(job.started), job.metadata[RUN_DIR], words)
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = FILE_WIDTH
    out.print(table)


def show(jobs: Jobs, identifier: str) -> None:
    job = jobs.get(identifier)
    print(f"{job.identifier}: {job.status}, submitted {_at(job.started)}")
    for name, value in sorted(job.metadata.items()):
        print(f"  {name.removeprefix('chatray_')}: {value}")
    for line in last_words(jobs, identifier):
        print(f"  {line}")


def follow(jobs: Jobs, identifier: str) -> None:
    """Print what the job has printed and prints, until it ends; Ctrl-C leaves it running.

    Raises:
        RunError: the job failed, or was stopped.
    """
    printed, breaks = 0, 0
    try:
        while not jobs.get(identifier).ended() or not printed:
            seen = 0

            def write(text: str) -> None:
                nonlocal printed, seen, breaks
                new = text[max(printed - seen, 0) :]  # a new connection begins at the beginning
                seen += len(text)
                if new:
                    printed, breaks = seen, 0
                    print(new, end="", flush=True)

            try:
                jobs.tail(identifier, write)
            except RunError:
                breaks += 1
                if breaks > BREAKS:
                    raise
            if jobs.get(identifier).ended():
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nchatray: {identifier} goes on; to follow it again: {_command('follow', jobs, identifier)}", file=sys.stderr)
        return
    _report(jobs, jobs.get(identifier))


def stop(jobs: Jobs, identifier: str) -> None:
    """Ask the job to commit and stop, and wait for it; Ctrl-C waits no longer."""
    job = jobs.get(identifier)
    if job.ended():
        print(f"{identifier}: {job.status} already")
        return
    jobs.stop(identifier)
    print(f"{identifier}: asked to stop; it finishes its step and commits first", flush=True)
    try:
        while not (job := jobs.get(identifier)).ended():
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nchatray: {identifier} was asked to stop, and will; see {_command('status', jobs, identifier)}", file=sys.stderr)
        return
    for line in last_words(jobs, identifier):
        print(f"  {line}")
    print(f"{identifier}: {job.status}")
    if again := job.metadata.get(AGAIN):
        print(f"  resume   {again}")


def last_words(jobs: Jobs, identifier: str) -> Sequence[str]:
    """What chatray itself said last."""
    return [line for line in jobs.log(identifier).splitlines() if line.startswith("chatray: ")][-3:]


def commands(jobs: Jobs, identifier: str, again: str) -> list[str]:
    """What can be done with a job."""
    return [
        f"  follow   {_command('follow', jobs, identifier)}",
        f"  stop     {_command('stop', jobs, identifier)}",
        f"  resume   {again}",
    ]


def _report(jobs: Jobs, job: Job) -> None:
    if job.status == "SUCCEEDED":
        print(f"{job.identifier}: SUCCEEDED; results in {job.metadata.get(RUN_DIR, 'its run_dir')} on the cluster")
        return
    code = f" (exit code {job.exit_code})" if job.exit_code is not None else ""
    again = f"; the same again goes on: {job.metadata[AGAIN]}" if AGAIN in job.metadata else ""
    raise RunError(f"{job.identifier}: {job.status}{code}{again}")


def _command(verb: str, jobs: Jobs, identifier: str) -> str:
    return f"chatray jobs {verb} {identifier} --address {jobs.address}"


def _at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
