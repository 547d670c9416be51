"""Who sees a GPU, on a cluster that has one: Ray is told so, and no process computes on it. In a process of its own, whose environment
Ray's workers inherit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
import json, os, sys
from pathlib import Path
import ray
from orchestration import config as configuration
from orchestration.errors import RunError
from orchestration.run_directory import RunDirectory
from orchestration.runtime.cluster import RayRuntime
from orchestration.runtime.group import RoleRequest
from orchestration.runtime.train import run_training

NAMES = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")

class Role:
    def __init__(self, *given): pass
    def open_store(self, host): return host, 0
    def join(self, host, port, timeout): pass
    def load(self): pass
    def seen(self): return {name: os.environ.get(name) for name in NAMES}

class Task:
    settings = None
    def __init__(self, folder, settings): self.folder, self.settings = folder, settings
    def module(self):
        (Path(self.folder) / "seen").write_text(json.dumps({name: os.environ.get(name) for name in NAMES}))
        raise RuntimeError("enough was seen")

folder = sys.argv[1]
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="chatray",
         _temp_dir=folder + "/ray", _system_config={"prestart_worker_first_driver": False})
words = ["placement=cpu", "placement.critic.gpus=0.5", f"run_dir={folder}/run"]
config = configuration.load(["experiment=smoke", *words])
runtime = RayRuntime(config)
groups = runtime.start([RoleRequest(role, Role, "", getattr(config.placement, role)) for role in ("policy", "critic")])
found = {role: runtime.get(group.each(Role.seen), "what they see") for role, group in groups.items()}
runtime.stop()
try:
    run_training(config, Task(folder, config.sft), RunDirectory(Path(folder) / "run", 1).stage("sft"), lambda: None)
except RunError as error:
    assert "enough was seen" in str(error), error
found["train"] = json.loads((Path(folder) / "seen").read_text())
found["driver"] = os.environ["CUDA_VISIBLE_DEVICES"]
print("found", json.dumps(found))
ray.shutdown()
"""


def test_ranks_see_the_gpu_that_they_reserved_and_no_other() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "LOCAL_RANK": "1"}
    with tempfile.TemporaryDirectory() as folder:  # a short path: the names of Ray's sockets are limited
        words = [sys.executable, "-c", SHOW, folder]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found")).removeprefix("found"))
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in (*found["policy"], *found["critic"])] == ["", "0"]
    assert found["train"] == {"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"}
    assert found["driver"] == "0", "a cluster that the driver starts later would have no GPU"
