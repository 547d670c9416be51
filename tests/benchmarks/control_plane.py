"""The driver's own CPU time for each call to a rank, and for a step of PPO: what the control plane costs, whatever the ranks do.

    python -m tests.benchmarks.control_plane --ranks 1 8 32 128 --rounds 20
    python -m tests.benchmarks.control_plane --ranks 256 --fake

Ranks are torch-free stand-ins that give back what they were given at once. A round is the calls of one step of the loop
(`calls_of_a_step`) on the real Ray runtime; or, with `--fake`, on actors that live in the driver's process, so that only our own code is
measured. Beside it stands what as many calls cost in bare Ray: a method of the same actors that takes nothing and gives back a word,
submitted to all and fetched together. CPU time is that of the driver's process with all its threads (user and system). The clusters of
different sizes are started one after the other; the table holds medians over rounds, with the 95% interval of the median by resampling.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import PPO_ROLES, Config
from orchestration import config as configuration
from orchestration.runtime import cluster
from orchestration.runtime.cluster import RayGroup, RayRuntime
from orchestration.runtime.dispatch import Pieces
from orchestration.runtime.group import RoleRequest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stand_ins
from stand_ins import StandIn

RESAMPLES = 2000


def calls_of_a_step(groups: dict[str, Any], put: Callable[[list[Any]], Pieces[Any]], wait: Callable[..., None], pieces: int) -> int:
    """As `stages/ppo.py` makes them: sample, score, experience, learn, sync; returns how many calls to ranks that were."""
    prompts = put(list(range(pieces)))
    rollouts = groups["rollout"].map(StandIn.add, prompts)
    wait(rollouts)
    scores, reference = groups["reward"].map(StandIn.add, rollouts), groups["reference"].map(StandIn.add, rollouts)
    values = groups["critic"].map(StandIn.add, rollouts)
    wait(scores)
    experience = groups["policy"].map(StandIn.add, rollouts)
    wait(scores, reference, values, experience)
    described = [groups[name].each(StandIn.who) for name in ("reward", "policy")]
    wait(*described)
    updates = [groups[name].map(StandIn.add, experience) for name in ("policy", "critic")]
    wait(*updates)
    sync = [groups[name].each(StandIn.who) for name in ("policy", "rollout")]
    wait(*sync)
    size = {name: group.size for name, group in groups.items()}
    return 4 * size["policy"] + 2 * size["critic"] + 2 * size["reward"] + size["reference"] + 2 * size["rollout"]


def measured(step: Callable[[], int], rounds: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(CPU seconds of each round, seconds of each round, calls of a round)."""
    step()
    cpu, wall, calls = [], [], 0
    for _ in range(rounds):
        began, before = time.perf_counter(), cpu_seconds()
        calls = step()
        cpu.append(cpu_seconds() - before)
        wall.append(time.perf_counter() - began)
    return np.array(cpu), np.array(wall), calls


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bare(actors: list[Any], calls: int) -> Callable[[], int]:
    """As many calls as a step has, of Ray alone."""
    import ray

    def step() -> int:
        for start in range(0, calls, len(actors)):
            ray.get([actor.state.remote() for actor in actors[: calls - start]])
        return calls

    return step


def on_ray(ranks: int, rounds: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    import ray

    ray.cloudpickle.register_pickle_by_value(stand_ins)  # workers do not have the tests on their path
    with contextlib.chdir("."), tempfile.TemporaryDirectory(prefix="chatray-bench-") as folder:  # the runtime moves into the folder
        config = settings(ranks, Path(folder))
        runtime = RayRuntime(config)
        try:
            names = PPO_ROLES if ranks >= len(PPO_ROLES) else ("policy",)
            requests = [RoleRequest(name, StandIn, "", getattr(config.placement, name)) for name in names]  # type: ignore[arg-type]
            started = runtime.start(requests)
            groups = {name: started.get(name, started["policy"]) for name in PPO_ROLES}
            pieces = int(np.lcm.reduce([group.size for group in groups.values()]))  # type: ignore[attr-defined]

            def wait(*given: Pieces[Any]) -> None:
                runtime.wait(*given, what="stand-ins")

            cpu, wall, calls = measured(lambda: calls_of_a_step(groups, runtime.put, wait, pieces), rounds)
            floor, _, _ = measured(bare([actor for group in started.values() for actor in group.ranks], calls), rounds)  # type: ignore[attr-defined]
            return cpu, wall, calls, floor
        finally:
            runtime.close()


def sizes(ranks: int) -> dict[str, int]:
    """Ranks of each role, `ranks` in all: powers of two, and the rollout engines take the rest of the policy's share."""
    if ranks < len(PPO_ROLES):
        return dict.fromkeys(PPO_ROLES, ranks)
    small = 2 ** int(np.log2(ranks / len(PPO_ROLES)))
    found = dict.fromkeys(PPO_ROLES, small)
    if ranks >= sum(found.values()) + 3 * small:
        found |= {"policy": 2 * small, "critic": 2 * small, "rollout": 2 * small}
    return found


def settings(ranks: int, folder: Path) -> Config:
    words = [f"placement.{role}.ranks={count}" for role, count in sizes(ranks).items()]
    few = [f"placement.{role}.cpus=0.01" for role in PPO_ROLES]
    common = ["experiment=smoke", "preflight=off", "placement=cpu", "ppo.batch=512", "ppo.minibatches=1", "deadlines.start=900"]
    config = configuration.load([*common, *few, *words])
    return dataclasses.replace(config, run_dir=str(folder))


class FakeActor:
    """Answers in this process; what Ray does for a call is left out."""

    class _Method:
        def __init__(self, answer: Callable[..., list[Any]]) -> None:
            self.answer, self.returns = answer, 1

        def options(self, num_returns: int) -> FakeActor._Method:
            self.returns = num_returns
            return self

        def remote(self, *_: Any) -> list[Any]:
            return self.answer(self.returns)

    def __init__(self) -> None:
        self.call = self._Method(lambda returns: [object() for _ in range(returns)])


def in_process(ranks: int, rounds: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    groups = {name: RayGroup(name, [FakeActor() for _ in range(count)]) for name, count in sizes(ranks).items()}
    pieces = max(group.size for group in groups.values())
    runtime = object.__new__(RayRuntime)

    class FakeRay:
        exceptions = cluster.ray.exceptions

        @staticmethod
        def wait(given: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
            return given, []

        @staticmethod
        def get(given: Any) -> Any:
            return given

    real, cluster.ray = cluster.ray, FakeRay  # type: ignore[assignment]
    try:

        def wait(*given: Pieces[Any]) -> None:
            runtime._wait(given, "stand-ins", "deadlines.step", time.monotonic() + 60)

        return *measured(lambda: calls_of_a_step(groups, lambda items: Pieces(items, []), wait, pieces), rounds), np.zeros(1)
    finally:
        cluster.ray = real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fake", action="store_true", help="actors in this process")
    wanted = parser.parse_args()
    print("| ranks | calls a step | driver CPU a step, ms | a call, ms | its 95% interval | bare Ray, a call, ms | a step, ms |")
    print("|---|---|---|---|---|---|---|")
    for ranks in wanted.ranks:
        cpu, wall, calls, floor = (in_process if wanted.fake else on_ray)(ranks, wanted.rounds)
        draws = np.random.default_rng(0).integers(0, len(cpu), (RESAMPLES, len(cpu)))
        low, high = 1e3 / calls * np.percentile(np.median(cpu[draws], axis=1), [2.5, 97.5])
        middle = 1e3 * float(np.median(cpu))
        count = sum(sizes(ranks).values()) if ranks >= len(PPO_ROLES) else ranks
        figures = f"{middle:.1f} | {middle / calls:.3f} | {low:.3f} to {high:.3f} | {1e3 * float(np.median(floor)) / calls:.3f}"
        print(f"| {count} | {calls} | {figures} | {1e3 * float(np.median(wall)):.1f} |", flush=True)


if __name__ == "__main__":
    main()
