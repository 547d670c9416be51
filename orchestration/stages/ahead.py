"""Batches of PPO that are sampled before their step (`ppo.staleness`): the engines work on the next ones while the policy learns from this.

The batch of step k is asked for at step k - staleness, so the weights that sample it are at most that many updates older than those that
learn from it. The samples that measure the last weights are never asked for ahead. Which weights sample which batch follows from the step
alone. When a run resumes the engines have newer weights, so batches that older ones sampled are part of a commit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from actors.batch import Rollouts
from orchestration.runtime.dispatch import Pieces
from orchestration.runtime.group import Runtime

FILE = "ahead.pt"


class Ahead:
    """What has been asked for, by its step."""

    def __init__(self, runtime: Runtime, generate: Callable[[int], Pieces[Rollouts]], staleness: int, steps: int) -> None:
        """Args:
        generate: asks for a step's batch, from the weights that the engines hold then.
        """
        self.runtime, self.generate, self.staleness, self.steps = runtime, generate, staleness, steps
        self.batches: dict[int, Pieces[Rollouts]] = {}

    def take(self, step: int) -> Pieces[Rollouts]:
        """This step's batch, after those that are due have been asked for; it may not be there yet."""
        if not self.staleness:
            return self.generate(step)
        self.batches = {number: batch for number, batch in self.batches.items() if number >= step}
        for number in (step, *range(step + 1, min(step + self.staleness + 1, self.steps))):
            if number not in self.batches:
                self.batches[number] = self.generate(number)
        return self.batches[step]

    def waiting(self, step: int) -> int:
        """Batches of this step and later ones that have been asked for, sampled already or not."""
        return sum(number >= step for number in self.batches)

    def save(self, step: int, folder: Path) -> None:
        """What older weights have sampled; the newest batch can be sampled again. The driver holds these batches for a moment."""
        older = {number: batch for number, batch in self.batches.items() if step <= number < step + self.staleness}
        if older:
            found = {number: self.runtime.get(batch, "batches for the commit") for number, batch in older.items()}
            torch.save({number: [_plain(piece) for piece in pieces] for number, pieces in found.items()}, folder / FILE)

    def restore(self, folder: Path | None, cut: Callable[[Rollouts], list[Rollouts]]) -> None:
        """Know what was saved there, and nothing else.

        Args:
            cut: a batch in pieces for the ranks that there are now.
        """
        self.batches = {}
        if folder is not None and (folder / FILE).exists():
            for number, pieces in torch.load(folder / FILE, weights_only=True).items():
                self.batches[number] = self.runtime.put(cut(Rollouts.join([Rollouts(**piece) for piece in pieces])))


def _plain(piece: Rollouts) -> dict[str, torch.Tensor]:
    return {field.name: getattr(piece, field.name) for field in fields(piece)}
