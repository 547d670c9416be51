"""Contestant: stage `ppo` as `chatray run stage=ppo` runs it, on real Ray and DeepSpeed (or in one process, `runtime=local`).

It is the stage's own `run`. What takes turns is the place that figures are shown at: it is called at the end of each step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from orchestration import config as configuration
from orchestration.data.dialogues import Dialogue, from_list
from orchestration.data.source import Corpus
from orchestration.metrics import Metrics, PeakMemory
from orchestration.roles import connect
from orchestration.run_directory import RunDirectory
from orchestration.stages import ppo
from orchestration.stages.context import Shared, StageContext
from tests.benchmarks.step_time.settings import load, words
from tests.benchmarks.step_time.turns import EndedError, Turns

KEPT = ("score", "kl", "reply_tokens", "tokens", "seconds")
"""Figures of a step that are handed over, beside its phases."""


@dataclass(frozen=True)
class Given:
    """A source of data: these prompts."""

    prompts: list[Dialogue]

    def load(self) -> Corpus:
        return Corpus([], [], self.prompts, [], self.prompts[:1])

    def fingerprint(self) -> str:
        return "benchmark"


class Paced(Metrics):
    """Shows nothing; hands each step over and waits for the next."""

    def __init__(self, config: Config, turns: Turns, shared: Shared) -> None:
        super().__init__(config)
        self.turns, self.shared = turns, shared

    def record(self, step: int, figures: dict[str, float]) -> None:
        phases = {name: value for name, value in figures.items() if name.startswith("seconds_")}
        processes = _processes(self.shared.runtime) if step == 1 else {}
        self.turns.hand_over({name: figures[name] for name in KEPT} | phases | {"processes": processes})


def _processes(runtime: Any) -> dict[str, int]:
    """Process of each rank, by role and rank; none on the local runtime."""
    if not hasattr(next(iter(getattr(runtime, "groups", {}).values()), None), "ranks"):
        return {}
    import ray

    ranks = {f"{name} {number}": actor for name, group in runtime.groups.items() for number, actor in enumerate(group.ranks)}
    return {name: ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for name, actor in ranks.items()}


def compete(turns: Turns, folder: Path, run_dir: Path, dtype: str, further: Sequence[str] = ()) -> None:
    """Work until no more steps are wanted."""
    setting = load(folder)
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    config = configuration.load([*words(setting, folder, run_dir, dtype), *further])
    shared = Shared(config, Given([from_list(str(n), p["messages"]) for n, p in enumerate(prompts)]), connect)
    memory = PeakMemory()  # as every run has it
    memory.start()
    try:
        ppo.run(StageContext("ppo", config, RunDirectory(run_dir, 1), Paced(config, turns, shared), shared))
    except EndedError:
        pass
    finally:
        shared.close()
        memory.stop()


def main() -> None:
    folder, run_dir, dtype, *further = sys.argv[1:]
    compete(Turns(), Path(folder), Path(run_dir), dtype, further)


if __name__ == "__main__":
    main()
