"""What a sweep has done, on disk: the only truth that it goes on from. Tune's own files are thrown away at each start.

runs/<sweep>/  sweep.json (what it is of)  base/  judge/  trials/  best.yaml  trials.csv  summary.json  *.png
trials/007/    trial.json (values, status, reason: written by the sweep; error.txt where it failed)
               points.jsonl (what the judge measured), lineage.jsonl (PBT: whose weights it took over): written by the trial
               and the folder is the run directory of its PPO
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.sweeps import Sweep
from orchestration.errors import RequestError
from orchestration.run_directory import difference, read_json, read_records, write_json
from orchestration.sweep.objective import Point
from orchestration.sweep.space import Values

ENDED = ("finished", "stopped", "failed")
"""`stopped`: by the scheduler, early."""


@dataclass(frozen=True)
class Trial:
    """One trial's folder."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def _entry(self) -> dict[str, Any]:
        return read_json(self.folder / "trial.json")

    @property
    def exists(self) -> bool:
        return bool(self._entry)

    @property
    def status(self) -> str:
        return self._entry.get("status", "running")

    @property
    def reason(self) -> str:
        """Why it failed or was stopped; "" otherwise."""
        return self._entry.get("reason", "")

    @property
    def values(self) -> Values:
        """Those in force: with PBT, the last ones."""
        lineage = self.lineage()
        return lineage[-1]["values"] if lineage else self._entry.get("values", {})

    def lineage(self) -> list[dict[str, Any]]:
        """Each time that the trial took over another's weights: from whom, at which step, and the values since."""
        return read_records(self.folder / "lineage.jsonl")

    def points(self) -> list[Point]:
        """What the judge measured, each step once; the later of two measurements counts, and discards those of later steps."""
        found: list[Point] = []
        for row in read_records(self.folder / "points.jsonl"):
            found = [*(kept for kept in found if kept.step < row["step"]), Point(row["step"], row["kl"], row["score"])]
        return found

    def begin(self, values: Values) -> None:
        """Note that it has these values, and runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "trial.json", {"number": self.number, "values": values, "status": "running", "started": time.time()})

    def end(self, status: str, reason: str = "", trace: str = "") -> None:
        """Note how it ended; what the program said goes to error.txt."""
        if trace:
            (self.folder / "error.txt").write_text(trace, encoding="utf-8")
        write_json(self.folder / "trial.json", self._entry | {"status": status, "reason": reason, "ended": time.time()})

    def measured(self, at: Point) -> None:
        _append(self.folder / "points.jsonl", {"step": at.step, "kl": at.kl, "score": at.score})

    def took_over(self, record: dict[str, Any]) -> None:
        _append(self.folder / "lineage.jsonl", record)


def _append(path: Path, record: dict[str, Any]) -> None:
    """A line; half a line that a kill left is dropped."""
    whole = read_records(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def trial(folder: Path, number: int) -> Trial:
    """Trial `number` of the sweep in this folder, begun or not."""
    return Trial(folder / "trials" / f"{number:03d}", number)


def trials(folder: Path) -> list[Trial]:
    """All that were begun, in order."""
    found = [trial(folder, int(path.parent.name)) for path in sorted((folder / "trials").glob("*/trial.json"))]
    return [each for each in found if each.exists]


def is_over(folder: Path, sweep: Sweep) -> bool:
    """Whether no trial is left to run."""
    found = {each.number: each for each in trials(folder)}
    left = [number for number in range(sweep.trials) if number not in found or found[number].status not in ENDED]
    again = sweep.retry_failed and any(each.status == "failed" for each in found.values())
    return not left and not again


def check(folder: Path, identity: dict[str, Any]) -> bool:
    """See whether the folder can be that of this sweep; True if the sweep goes on.

    Raises:
        RequestError: it is another sweep's, shows the difference; or a run's.
    """
    known = read_json(folder / "sweep.json")
    if not known and (folder / "manifest.json").exists():
        raise RequestError(f"run_dir={folder}: it holds a run; choose another folder for the sweep")
    if known and (changes := difference(known, json.loads(json.dumps(identity)))):
        shown = "\n".join(f"    {line}" for line in changes[:12])
        raise RequestError(f"the sweep in {folder} was begun with other settings:\n{shown}\n  go on with those, or choose another run_dir")
    return bool(known)


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder that of this sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", json.loads(json.dumps(identity)))
