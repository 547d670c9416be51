"""`make bench`: everything that is compared side by side, written to BENCHMARKS.md.

    python -m tests.benchmarks.bench                       # all of it, going on where it stopped
    python -m tests.benchmarks.bench --only step-time      # one part
    python -m tests.benchmarks.bench --tables              # only write the tables of what was measured

Ratios mean something on a machine that does nothing else. Parts:

    step-time       one PPO iteration against TRL and against a bare loop, phases, learning, memory (step_time/)
    rollout-speed   tokens per second of the rollout engines (rollout_speed.py)
    weight-sync     from policy tensor to engine parameter (weight_sync.py)
    control-plane   the driver's own CPU time (control_plane.py)

A part that is a script of its own prints its tables to standard output.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.step_time import pairs, tables

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SETTINGS = ("natural", "fixed")
ARMS = ("theirs", "ours", "bare", "ours-bf16", "theirs-bf16")
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rollout-speed": (
        "Rollouts, tokens per second",
        ("rollout_speed vllm", "rollout_speed transformers --checkpoint runs/bench/natural/lm"),
    ),
    "weight-sync": ("Weights on their way", ("weight_sync", "weight_sync --ranks 2 --sizes 125m")),
    "control-plane": ("What the driver itself costs", ("control_plane", "control_plane --ranks 256 --fake")),
}
"""Part -> (title, scripts with their arguments)."""
PARTS = ("step-time", *SCRIPTS)


def step_time(out: Path, rounds: int, data: str, trl: str, measure: bool) -> str:
    """Measure what is missing; returns the section."""
    for setting in SETTINGS if measure else ():
        if left := pairs.run(setting, ARMS, rounds, 1e9, out, data, trl, []):
            raise SystemExit(f"{setting}: {left} rounds left")
    return "\n\n".join(
        [
            "## One PPO iteration, side by side",
            _how("make bench", "tests/benchmarks/step_time/README.md says what is made equal, and what is not."),
            tables.ratios(out, SETTINGS),
            "### Where the time goes",
            tables.phases(out, SETTINGS),
            "### Whether both learn",
            tables.learning(out, SETTINGS),
            "### Memory, MiB",
            tables.memory(out, SETTINGS),
        ]
    )


def script(part: str) -> str | None:
    """The section of a part that is made by scripts: what each prints; None if they are not there.

    Raises:
        SystemExit: one failed.
    """
    title, lines = SCRIPTS[part]
    if not (FOLDER / f"{lines[0].split()[0]}.py").exists():
        return None
    found = [f"## {title}"]
    for line in lines:
        command = [sys.executable, "-m", *f"tests.benchmarks.{line}".split()]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{part}: {' '.join(command)} ended with {done.returncode}")
        found += [_how(f"python -m tests.benchmarks.{line}", ""), done.stdout.strip()]
    return "\n\n".join(found)


def _how(command: str, note: str) -> str:
    return f"`{command}`, {datetime.date.today().isoformat()}, {report.machine()}. {note}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--tables", action="store_true", help="measure nothing; write step-time's tables of what there is")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--data", default="../shared/data/taskmaster-4", help="folder of Taskmaster-4")
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="Python of the environment with TRL")
    wanted = parser.parse_args()
    out = wanted.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in wanted.only:
        if part == "step-time":
            report.write(part, step_time(out, wanted.rounds, wanted.data, wanted.trl, not wanted.tables))
        elif not wanted.tables:
            section = script(part)
            print(f"{part}: {'written' if section else 'no script'}", file=sys.stderr)
            if section:
                report.write(part, section)


if __name__ == "__main__":
    main()
