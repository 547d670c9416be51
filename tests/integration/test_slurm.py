"""The Slurm script on this machine: `srun` and `scontrol` are stand-ins that run what they are given here. Ray and its token are real in
one test, and stand-ins where only the order of the end is looked at."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "cluster" / "slurm" / "chatray.sbatch"
SRUN = '#!/bin/bash\nwhile [[ "${1:-}" == --* ]]; do shift; done\nexec "$@"\n'
RAY = "#!/bin/bash\ntrap 'echo ray stopped; kill $!; exit 0' TERM\nsleep 60 >/dev/null 2>&1 & echo ray \"$@\"\nwait\n"
DRIVER = "#!/bin/bash\ntrap 'echo last commit; kill $!; exit 7' TERM\nsleep 60 >/dev/null 2>&1 & echo driver \"$@\"\nwait\n"


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a job of two nodes whose commands run here."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (tmp_path / "home").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf 'one\\ntwo\\n'\n"}.items():
        write(commands / name, text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "[one-two]", "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0"}
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "CHATRAY_PORT": str(port)}
    scratch = tempfile.mkdtemp(prefix="slurm-")  # not in tmp_path: names of Ray's sockets would be too long
    yield {**os.environ, **job, **own, "CHATRAY_BIN": str(Path(sys.executable).parent), "CHATRAY_TMP": scratch}
    shutil.rmtree(scratch)


def write(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def launched(words: list[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, *words], env=dict(environment), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_without_words_it_says_what_to_give(slurm: dict[str, str], tmp_path: Path) -> None:
    done = launched([], slurm, tmp_path)
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 2
    assert "no words for chatray" in said


def test_before_the_end_the_driver_is_told_first_and_nothing_stays(slurm: dict[str, str], tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in {"ray": RAY, "chatray": DRIVER, "python": "#!/bin/bash\ncat >/dev/null\n"}.items():
        write(stand_ins / name, text)
    job = launched(["run", "experiment=smoke"], slurm | {"CHATRAY_BIN": str(stand_ins)}, tmp_path)
    assert job.stdout is not None
    lines = [job.stdout.readline() for _ in range(3)]
    assert sorted(line.split()[0] for line in lines) == ["driver", "ray", "ray"]
    assert sum("--head" in line for line in lines) == 1
    assert any(line.startswith("driver run experiment=smoke ray.address=") for line in lines)
    (private,) = (tmp_path / "home").glob(".chatray-7.*")
    token = (private / "token").read_text()
    assert (private.stat().st_mode & 0o777, len(token)) == (0o700, 64)
    assert not any(token in line for line in lines)
    job.send_signal(signal.SIGTERM)
    rest = job.communicate(timeout=60)[0].split("\n")
    assert job.returncode == 7  # the driver's own
    assert rest.index("last commit") < rest.index("ray stopped")
    assert rest.count("ray stopped") == 2
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_chatray_reaches_the_cluster_of_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "commands" / "scontrol", "#!/bin/bash\necho one\n")  # Ray would take a second node of this machine for the first
    before = {process.pid for process in psutil.process_iter()}
    job = launched(["doctor", f"run_dir={tmp_path / 'run'}", "experiment=smoke"], slurm, tmp_path)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert re.search(r"│ memory +│ .* for 1 CPUs", said), said  # what the script gave to the one node
    usual = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    assert not usual.exists() or slurm["CHATRAY_PORT"] not in usual.read_text()
    assert list((tmp_path / "home").glob(".chatray-*")) == []
    left = [process for process in psutil.process_iter(["cmdline"]) if process.pid not in before]
    assert [p for p in left if slurm["CHATRAY_PORT"] in " ".join(p.info["cmdline"] or [])] == []
