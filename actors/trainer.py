"""The training loop of pretraining, SFT and the reward model: one loop, two tasks (language modelling, preference).

It runs on every rank, knows neither Ray nor the run directory, and talks to both through a `Session`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.batch import Batch
from actors.engine import Engine
from actors.learning import optimizer_step
from actors.micro_batches import limit, padding_share, spent
from actors.profiling import Traces
from actors.reward_network import write_network
from actors.sharded_state import Snapshot, save_snapshot
from actors.sharding import Optimizer
from actors.worker import make_engine
from conf.schema import SFT, Config, Pretrain, RewardModel

BEST_FOLDER = "best"
STAGES = {Pretrain: "pretrain", SFT: "sft", RewardModel: "reward_model"}
"""The stage that has these settings."""


class Session(Protocol):
    """What a training rank may ask of whoever launched it."""

    rank: int
    world_size: int

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Record figures of a step (rank 0)."""

    def commit(self, step: int, save: Callable[[Path], None], memory: dict[str, Any]) -> None:
        """Make a resume point; every rank calls `save` with the same folder."""

    def resume(self) -> tuple[int, Path, dict[str, Any]] | None:
        """The last resume point: (step, folder, memory)."""

    def stop_asked(self) -> bool:
        """Whether the run was asked to stop; rank 0's word counts."""

    def export(self, save: Callable[[Path | None], None]) -> None:
        """Write the stage's result: every rank calls `save`, rank 0 with a folder, the others with None."""


class Task(Protocol):
    """What is learned."""

    @property
    def settings(self) -> SFT | Pretrain | RewardModel: ...

    def module(self) -> torch.nn.Module: ...

    def prepare(self, engine: Engine) -> dict[str, float]:
        """What is done once before the first step, with its figures; not repeated when a run goes on from a commit."""

    def batch(self, step: int, rank: int, ranks: int) -> Batch:
        """This rank's share of the step's rows."""

    def loss(self, engine: Engine, rows: Batch) -> list[tuple[Callable[[Any], Tensor], Batch]]:
        """Loss functions and the rows each applies to, as sums over the global denominators."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Held-out figures; `loss` decides which weights are best."""

    def finish(self, engine: Engine) -> tuple[dict[str, float], dict[str, str]]:
        """Last changes to the best weights; figures of the result, and texts to leave beside the weights by file name."""


@dataclass
class Progress:
    """What survives a restart besides the engine's own state."""

    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    stopped: bool = False


def cosine(peak: float, step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train(config: Config, task: Task, session: Session) -> dict[str, float] | None:
    """Run the task to its held-out optimum and export the best weights. Returns the result's figures (the same on every rank), or None: it
    was asked to stop, and committed."""
    s = task.settings
    engine = make_engine(config, task.module(), Optimizer(s.lr, s.weight_decay, s.max_grad_norm))
    traces = Traces(config, "train", session.rank)
    progress, best, start = _resumed(engine, session)
    prepared = task.prepare(engine) if start == 0 else {}
    for step in range(start, s.steps):
        if progress.stopped:
            break
        began = time.perf_counter()
        traces.turn_to(STAGES[type(s)], step + 1)
        with traces.of("step"):
            figures = _step(config, task, engine, session, step)
        figures["seconds"] = time.perf_counter() - began
        last = step + 1 == s.steps
        if (step + 1) % s.eval_every == 0 or last:
            best = _measure(task, engine, progress, best, step + 1, figures)
        session.report(step + 1, figures)
        stops = not last and _stop_asked(engine, session)
        if stops or ((step + 1) % config.commit.every == 0 and not last):
            session.commit(step + 1, _saver(engine, best), dict(vars(progress)))
        if stops:
            return None
    _restore(engine, best)
    figures, texts = task.finish(engine)

    def save(folder: Path | None) -> None:
        write_network(engine.module, engine.whole, folder, config.engine.shard_mb * 10**6)
        for name, text in texts.items() if folder else ():
            (folder / name).write_text(text, encoding="utf-8")  # type: ignore[operator]

    session.export(save)
    return prepared | figures | {"steps": float(progress.best_step)}


def _stop_asked(engine: Engine, session: Session) -> bool:
    """The same answer on every rank, since all of them commit or none."""
    return bool(engine.sum_over_ranks(torch.tensor(float(session.rank == 0 and session.stop_asked()))))


def _step(config: Config, task: Task, engine: Engine, session: Session, step: int) -> dict[str, float]:
    s = task.settings
    engine.train(True)
    rows = task.batch(step, session.rank, session.world_size)
    total = torch.zeros(())

    lr = cosine(s.lr, step, s.warmup, s.steps)
    most, losses = limit(config.engine, engine), task.loss(engine, rows)
    norm = optimizer_step(engine, losses, most, lr, total)
    tokens = engine.sum_over_ranks(sum(spent(part, most) for _, part in losses))  # type: ignore[arg-type]
    figures = {"loss": float(engine.sum_over_ranks(total)), "grad_norm": norm, "lr": lr}
    return figures | {"tokens": float(tokens[0]), "padding": padding_share(tokens)}


def _measure(
    task: Task, engine: Engine, progress: Progress, best: Snapshot | None, step: int, figures: dict[str, float]
) -> Snapshot | None:
    """Held-out figures; keeps the best weights and decides on early stopping."""
    engine.train(False)
    with torch.no_grad():
        held_out = task.evaluate(engine)
    figures.update({f"heldout_{name}": value for name, value in held_out.items()})
    if held_out["loss"] < progress.best_loss:
        progress.best_loss, progress.best_step, progress.stale = held_out["loss"], step, 0
        return engine.snapshot(step)
    progress.stale += 1
    progress.stopped = progress.stale >= task.settings.patience
    return best


def _saver(engine: Engine, best: Snapshot | None) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        engine.save_state(folder)
        if best:
            save_snapshot(best, folder / BEST_FOLDER)

    return save


def _resumed(engine: Engine, session: Session) -> tuple[Progress, Snapshot | None, int]:
    found = session.resume()
    if found is None:
        return Progress(), None, 0
    step, folder, memory = found
    engine.load_state(folder)
    return Progress(**memory), engine.load_snapshot(folder / BEST_FOLDER), step


def _restore(engine: Engine, best: Snapshot | None) -> None:
    if best:
        engine.restore(best)
    engine.train(False)
