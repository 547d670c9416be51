"""One PPO iteration against another, in turns: each contestant is a process that stays alive, and all but one are blocked on a pipe.

    python -m tests.benchmarks.step_time.pairs natural --arms theirs ours --pairs 20 --seconds 230

Contestants are `ours`, `theirs` (TRL) and `bare` (the bare loop) in fp32, and the same in bf16 with `-bf16` behind the name. A call starts
them, warms each up by two steps, and then takes rounds until the pairs are enough or its seconds are over. Rounds are appended to
<out>/rounds.jsonl, so that the same command goes on where it stopped. After the last round each takes one more step while its processes'
memory is read, which is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.benchmarks.step_time.prepared import prepare
from tests.benchmarks.step_time.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[3]
WARM_UP = 2
MEMORY_SECONDS = 0.05
ARMS = tuple(f"{kind}{suffix}" for suffix in ("", "-bf16") for kind in ("theirs", "ours", "bare"))


def command(arm: str, folder: Path, run_dir: Path, trl: str, words: list[str]) -> list[str]:
    """How a contestant is started."""
    kind, _, dtype = arm.partition("-")
    dtype = dtype or "fp32"
    if kind == "theirs":
        return [trl, str(Path(__file__).with_name("theirs.py")), str(folder), str(run_dir), dtype]
    if kind == "bare":
        return [sys.executable, "-m", "tests.benchmarks.bare_loop", str(folder), dtype]
    return [sys.executable, "-m", "tests.benchmarks.step_time.ours", str(folder), str(run_dir), dtype, *words]


@dataclass
class Contestant:
    """A process that works a step at a time."""

    arm: str
    process: subprocess.Popen[str]
    log: Path
    ranks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, arm: str, words: list[str], log: Path, threads: int) -> Contestant:
        log.parent.mkdir(parents=True, exist_ok=True)
        # only what runs in this process itself; chatray tells its ranks their own
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        with open(log, "w", encoding="utf-8") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            return cls(arm, subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes), log)  # type: ignore[call-overload]

    def answer(self) -> dict[str, Any]:
        """What it hands over next.

        Raises:
            RuntimeError: it ended; with the end of what it said.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.arm} ended:\n" + "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-25:]))
        found = json.loads(line)
        self.ranks |= found.pop("processes", {})
        return found

    def step(self) -> tuple[float, dict[str, Any]]:
        """(seconds from telling it to go until it handed over, its own figures and its processes' CPU seconds)."""
        assert self.process.stdin is not None
        before = self.cpu()
        began = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.answer()
        seconds = time.perf_counter() - began
        return seconds, found | {"cpu": self.cpu() - before}

    def cpu(self) -> float:
        """CPU seconds so far of all its processes that are alive."""
        root, total = psutil.Process(self.process.pid), 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                spent = process.cpu_times()
                total += spent.user + spent.system
        return total

    def end(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("stop\n")
            self.process.stdin.close()
            self.process.wait(timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()


class MemoryWatch(threading.Thread):
    """Largest memory of each process below one, bytes; pages that several share are charged to each in part (PSS)."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__(daemon=True)
        self.contestant, self.largest, self.total, self._ended = contestant, {}, 0, threading.Event()
        self.names = {pid: name for name, pid in contestant.ranks.items()} | {contestant.process.pid: "driver"}

    def run(self) -> None:
        while not self._ended.wait(MEMORY_SECONDS):
            self.look()

    def look(self) -> None:
        root, now = psutil.Process(self.contestant.process.pid), {}
        for process in [root, *root.children(recursive=True)]:
            try:
                name = self.names.get(process.pid) or process.name()
                now[f"{name} ({process.pid})"] = int(process.memory_full_info().pss)
            except psutil.Error:
                continue
        self.total = max(self.total, sum(now.values()))
        self.largest = {name: max(now.get(name, 0), self.largest.get(name, 0)) for name in {*now, *self.largest}}

    def stop(self) -> dict[str, Any]:
        self._ended.set()
        self.join()
        return {"total": self.total, "processes": dict(sorted(self.largest.items(), key=lambda item: -item[1]))}


def read(file: Path, setting: str, arms: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of a setting's rounds in which all of these took part."""
    return [line for line in lines_of(file, setting) if set(arms) <= set(line["seconds"])]


def lines_of(file: Path, setting: str) -> list[dict[str, Any]]:
    """A setting's lines; none if the file is not there."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [line for line in lines if line["setting"] == setting]


def append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(line) + "\n")


class Steps(Protocol):
    """What takes turns."""

    arm: str

    def step(self) -> tuple[float, dict[str, Any]]: ...


def contest(contestants: Sequence[Steps], pairs: int, deadline: float, file: Path, named: dict[str, Any]) -> int:
    """Rounds, until there are so many or the time is over; returns how many were made. Every other round goes the other way round."""
    for _ in range(WARM_UP - 1):
        for contestant in contestants:
            contestant.step()
    longest = made = 0.0
    while made < pairs and time.monotonic() + 1.3 * longest < deadline:
        began, seconds, figures = time.monotonic(), {}, {}
        for contestant in contestants[:: 1 if made % 2 == 0 else -1]:
            seconds[contestant.arm], figures[contestant.arm] = contestant.step()
        longest, made = max(longest, time.monotonic() - began), made + 1
        append(file, named | {"seconds": seconds, "figures": figures, "load": os.getloadavg()[0]})
    return int(made)


def run(setting: str, arms: Sequence[str], pairs: int, seconds: float, out: Path, data: str, trl: str, words: list[str]) -> int:
    """Take rounds for one setting; returns how many are still to be taken."""
    deadline = time.monotonic() + seconds
    chosen = SETTINGS[setting]
    folder = prepare(chosen, out, data)
    file = out / "rounds.jsonl"
    named = {"setting": setting, "session": int(time.time())}
    left = pairs - len(read(file, setting, arms))
    if left <= 0:
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="chatray-bench-"))
    contestants: list[Contestant] = []
    try:
        for arm in arms:
            start = command(arm, folder, scratch / arm, trl, words)
            contestants.append(Contestant.start(arm, start, out / "logs" / f"{setting}-{arm}.log", chosen.threads))
        for contestant in contestants:  # each starts with a step: they do it at once, and it is not timed
            contestant.answer()
        made = contest(contestants, left, deadline, file, named)
        if made == left:
            for contestant in contestants:
                watch = MemoryWatch(contestant)
                watch.start()
                contestant.step()
                append(out / "memory.jsonl", {**named, "arm": contestant.arm, **watch.stop()})
    finally:
        for contestant in contestants:
            contestant.end()
        shutil.rmtree(scratch, ignore_errors=True)
    return left - made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--arms", nargs="+", default=["theirs", "ours", "bare"], choices=ARMS)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--data", default="../shared/data/taskmaster-4", help="folder of Taskmaster-4")
    parser.add_argument("--trl", default=".venv-trl/bin/python")
    parser.add_argument("--words", nargs="*", default=[], help="further settings of ours")
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    left = run(wanted.setting, wanted.arms, wanted.pairs, wanted.seconds, wanted.out.resolve(), wanted.data, wanted.trl, wanted.words)
    print(f"{wanted.setting}: {left} rounds left" if left else f"{wanted.setting}: done")


if __name__ == "__main__":
    main()
