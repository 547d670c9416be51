"""The run directory: what a run has done, and where it goes on.

    runs/<name>/  config.yaml  manifest.json  summary.json
                  round_01/<stage>/  metrics.jsonl  checkpoint/ (the result)  state/step_NNNNNN/ (for resume)

A folder counts once its manifest is there, and manifests are written last (object stores cannot rename). A manifest lists its files
with their sizes; a folder that does not match is as if it were not there, and is removed before the stage runs again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import STAGES
from orchestration.errors import RequestError

MANIFEST = "chatray_manifest.json"
ROUND = "round_01"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file so that a reader sees the old one or the new one, never half of either."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content; {} when there is none.

    Raises:
        RequestError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise RequestError(f"run_dir: {path} is not readable JSON ({cause}); restore it, or choose another run_dir") from cause


def digest(value: Any) -> str:
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's manifest: from now on it counts."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    write_json(folder / MANIFEST, content | {"files": files})


def sealed(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None when the folder is missing, unfinished or damaged."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        content = read_json(folder / MANIFEST)
    except RequestError:
        return None
    if not isinstance(content.get("files"), dict):
        return None
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in content["files"].items())
    return content if whole else None


@dataclass(frozen=True)
class ResumePoint:
    step: int
    folder: Path
    memory: dict[str, Any]


class StageDirectory:
    """One stage's folder. The only writer of its checkpoints and resume points."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.metrics, self.checkpoint = path / "metrics.jsonl", path / "checkpoint"

    def begin_state(self, step: int) -> Path:
        """An empty folder for the state after `step`; it counts only after `seal_state`."""
        folder = self.path / "state" / f"step_{step:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def seal_state(self, step: int, memory: dict[str, Any]) -> None:
        """Let a resume point count, and delete the oldest beyond `keep`."""
        seal(self.path / "state" / f"step_{step:06d}", {"step": step, "memory": memory})
        whole = [point.folder for point in self.resume_points()]
        for folder in whole[: -self.keep]:
            shutil.rmtree(folder)

    def resume_points(self) -> list[ResumePoint]:
        """All that count, oldest first."""
        found = []
        for folder in (self.path / "state").glob("step_*"):
            manifest = sealed(folder)
            if manifest:
                found.append(ResumePoint(manifest["step"], folder, manifest["memory"]))
        return sorted(found, key=lambda point: point.step)

    def last(self) -> ResumePoint | None:
        return next(reversed(self.resume_points()), None)

    def export(self, save: Callable[[Path], None], content: dict[str, Any] | None = None) -> Path:
        """Write the stage's result by `save`, then let it count."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir(parents=True)
        save(self.checkpoint)
        seal(self.checkpoint, content or {})
        return self.checkpoint

    def extend(self, save: Callable[[Path], None]) -> None:
        """Add files to an exported result."""
        content = sealed(self.checkpoint) or {}
        (self.checkpoint / MANIFEST).unlink(missing_ok=True)  # it does not count while it changes
        save(self.checkpoint)
        seal(self.checkpoint, {name: value for name, value in content.items() if name != "files"})

    def append(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be run again, and a last line cut off by a kill."""
        kept = [record for record in read_records(self.metrics) if record["step"] <= step]
        self.metrics.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; [] when there is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]  # what follows the last newline is half a record
    except ValueError as cause:
        raise RequestError(
            f"run_dir: {path} has a line that is not JSON ({cause}); restore it, or run the stage again with from="
        ) from cause


class RunDirectory:
    """A run's folder: which stages are complete, under which identity, and what they found."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep

    def stage(self, name: str) -> StageDirectory:
        folder = self.path / ROUND / name
        folder.mkdir(parents=True, exist_ok=True)
        return StageDirectory(folder, self.keep)

    def _manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json") or {"stages": {}, "parent": None}

    def _write_stage(self, name: str, entry: dict[str, Any]) -> None:
        manifest = self._manifest()
        manifest["stages"][name] = entry
        write_json(self.path / "manifest.json", manifest)

    def is_complete(self, name: str, identity: dict[str, Any]) -> bool:
        """Whether this stage, under this very identity, has nothing left to do.

        Raises:
            RequestError: the stage was begun or completed under another identity; shows the difference.
        """
        entry = self._manifest()["stages"].get(name)
        if entry is None:
            return False
        changes = difference(entry["identity"], identity)
        if changes:
            shown = "\n".join(f"    {line}" for line in changes[:12])
            raise RequestError(
                f"stage {name!r} in {self.path} was run with other settings or inputs:\n{shown}\n"
                f"  use from={name} to discard its results and run it again, or choose another run_dir"
            )
        return entry["status"] == "complete"

    def begin(self, name: str, identity: dict[str, Any]) -> int:
        """Note that a stage runs under this identity; returns how often it was begun before without coming to its end."""
        restarts = self._manifest()["stages"].get(name, {"restarts": -1}).get("restarts", 0) + 1
        self._write_stage(name, {"status": "running", "identity": identity, "started": time.time(), "restarts": restarts})
        return restarts

    def complete(self, name: str, identity: dict[str, Any], result: dict[str, Any]) -> None:
        """Note that a stage is done; its resume points are deleted."""
        folder = self.stage(name)
        shutil.rmtree(folder.path / "state", ignore_errors=True)
        entry = {"status": "complete", "identity": identity, "result": result, "output": self._output(folder)}
        self._write_stage(name, entry | {"finished": time.time()})

    def _output(self, folder: StageDirectory) -> str:
        """Hash of what the stage made: the sizes and bytes of its result."""
        total = hashlib.sha256()
        for path in sorted(folder.checkpoint.rglob("*")):
            if path.is_file() and path.name != MANIFEST:
                total.update(path.name.encode())
                total.update(path.read_bytes())
        return total.hexdigest()[:16]

    def output_of(self, name: str) -> str | None:
        """The hash of a complete stage's result: an input of the stages after it."""
        entry = self._manifest()["stages"].get(name)
        return entry.get("output") if entry else None

    def results(self) -> dict[str, dict[str, Any]]:
        """What each complete stage found."""
        return {name: entry["result"] for name, entry in self._manifest()["stages"].items() if entry["status"] == "complete"}

    def take_over(self, name: str, commit: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> ResumePoint:
        """Make a commit of another run the only one that this run's stage goes on from, under whatever settings it is started with next.

        Args:
            commit: the other run's folder of the commit, or a copy of it.
            change: what the stage remembers beside weights and optimizers -> what it is to remember.

        Raises:
            RequestError: it is not a whole commit.
        """
        manifest = sealed(commit)
        if manifest is None:
            raise RequestError(f"{commit}: not a whole commit of a run; nothing was taken over")
        stage, step = self.stage(name), manifest["step"]
        aside = stage.path / "taken_over"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(commit, aside, ignore=shutil.ignore_patterns(MANIFEST, ".*"))
        shutil.rmtree(stage.path / "state", ignore_errors=True)
        folder = stage.begin_state(step)
        folder.rmdir()
        aside.rename(folder)
        stage.forget_after(step)
        content = self._manifest()
        content["stages"].pop(name, None)  # it is another run's now: the next start notes its settings
        write_json(self.path / "manifest.json", content)
        stage.seal_state(step, change(manifest["memory"]))
        return ResumePoint(step, folder, change(manifest["memory"]))

    def discard_from(self, name: str) -> None:
        """Delete the results of a stage and of all after it."""
        manifest = self._manifest()
        for stage in STAGES[STAGES.index(name) :]:
            manifest["stages"].pop(stage, None)
            shutil.rmtree(self.path / ROUND / stage, ignore_errors=True)
        write_json(self.path / "manifest.json", manifest)


def difference(old: Any, new: Any, at: str = "") -> list[str]:
    """Lines naming each leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        return lines
    return [] if old == new else [f"{at}: was {json.dumps(old)}, is now {json.dumps(new)}"]
