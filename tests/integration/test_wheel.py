"""The wheel, installed away from the checkout, runs the recipe from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from orchestration.jobs import wheel

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def installed(folder: Path) -> Path:
    """The programs of a fresh environment that holds chatray's wheel, and sees the packages it needs in this one. Of this environment only
    the folder of packages is seen: what its .pth files do, a checkout's installation among them, is not done there."""
    built = wheel.build(folder / "built")
    venv.create(folder / "environment", symlinks=True)
    programs = folder / "environment" / "bin"
    asked = [str(programs / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = ["--python", str(programs / "python"), "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(built.file)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=300)
    return programs


def test_the_wheel_runs_every_stage_away_from_the_checkout(tmp_path: Path) -> None:
    programs, empty = installed(tmp_path), tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = [
        str(programs / "python"),
        "-c",
        "import conf, actors, orchestration; print(conf.__file__, actors.__file__, orchestration.__file__)",
    ]
    found = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(tmp_path) for file in found), found
    run = [str(programs / "chatray"), "run", "experiment=smoke"]
    done = subprocess.run(run, cwd=empty, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((empty / "runs/smoke/summary.json").read_text())
    assert {"sft", "compare", "reward_model", "ppo", "evaluate"} == summary["stages"].keys() and "Results" in done.stdout
