"""What a submitted job runs on the cluster, with the code that was sent (`orchestration/jobs`):

    check    all that `chatray run` checks before it starts; the answer is a line of JSON
    run      `chatray run` on this cluster, in the folder that relative paths start from

The driver sees no GPU: those are for the ranks, which reserve them by placement groups. Values of secrets are read here, from the
environment of Ray's processes or from a file, and are in this process's environment alone: Ray shows what a job is submitted with (runtime
environment, entrypoint, metadata) to everybody who may see its jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.devices import hide_gpus
from orchestration import cli
from orchestration import config as configuration
from orchestration.errors import RequestError, RunError
from orchestration.jobs.submit import ANSWER, JOB
from orchestration.jobs.words import Submission, submission
from orchestration.runtime.machine import versions

SECRETS, SECRETS_FOLDER = "CHATRAY_SECRETS", "~/.chatray/secrets"
"""Environment variable with the folder of secrets, and the folder without it: a file for each, named as the environment variable."""
JOURNAL = "jobs.jsonl"
"""In the run directory: a line for each job that worked on the run."""


def main(words: Sequence[str]) -> int:
    """Exit code: that of `chatray run`; of a check 0, whatever it found."""
    hide_gpus()  # nothing has imported torch yet
    verb, *rest = words
    wanted = submission([*rest[: rest.index("run")], "--address", "http://here", *rest[rest.index("run") :]])
    return _check(wanted) if verb == "check" else _run(wanted)


def _run(wanted: Submission) -> int:
    with _told():
        settle(wanted)
        config = configuration.load(settings(wanted))
        note_job(Path(config.run_dir))
        return cli.main(["run", *settings(wanted)])
    return 2


def _check(wanted: Submission) -> int:
    notes: list[str] = []
    found: dict[str, object] = {"notes": notes, "mistakes": [], "versions": versions()}
    try:
        settle(wanted)
        config = configuration.load(settings(wanted))
        from orchestration import recipe

        found["run_dir"] = config.run_dir
        with nothing_left(Path(config.run_dir)):
            found["stages"] = recipe.rehearse(config, notes.append)
    except RequestError as error:
        found["mistakes"] = error.mistakes
    except RunError as error:
        found["mistakes"] = [str(error)]
    print(f"\n{ANSWER}{json.dumps(found)}", flush=True)
    return 0


@contextlib.contextmanager
def nothing_left(run_dir: Path) -> Iterator[None]:
    """Remove the run directory and those above it that were made meanwhile, to look at the storage, and are empty."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        for mistake in error.mistakes:
            print(f"chatray: {mistake}", file=sys.stderr)


def settings(wanted: Submission) -> list[str]:
    """The run's words, on this cluster."""
    return [*wanted.words, "ray.address=auto"]


def settle(wanted: Submission) -> None:
    """Go to the folder that relative paths start from, and take the secrets.

    Raises:
        RequestError: one is not there, or the folder cannot be made.
    """
    folder = Path(wanted.folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError as cause:
        raise RequestError(f"--folder {wanted.folder}: cannot be used on the cluster ({cause})") from cause
    os.environ["PWD"] = str(folder)
    values = {name: value_of(name) for name in wanted.secrets}
    if missing := [name for name, value in values.items() if not value]:
        raise RequestError([_missing(name) for name in missing])
    os.environ.update(values)


def value_of(name: str) -> str:
    """A secret's value; "" if the cluster has none."""
    if name in os.environ:
        return os.environ[name]
    try:
        return (Path(os.environ.get(SECRETS, SECRETS_FOLDER)).expanduser() / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _missing(name: str) -> str:
    return (
        f"--secret {name}: the cluster has none: neither in the environment of Ray's processes on the head node, nor in the file {name} of "
        f"{os.environ.get(SECRETS, SECRETS_FOLDER)} there ({SECRETS} names another folder). No value is sent from here, since Ray shows "
        "what a job is submitted with"
    )


def note_job(run_dir: Path) -> None:
    """Add what this job is made of to the run directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    made_of = json.loads(os.environ.get(JOB, "{}"))
    with open(run_dir / JOURNAL, "a", encoding="utf-8") as file:
        file.write(json.dumps({**made_of, "started": time.time(), "versions": versions()}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
