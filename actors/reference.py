"""The reference: the frozen SFT model that the policy is kept close to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.batch import Dialogues, Rollouts
from actors.learning import in_passes
from actors.micro_batches import limit
from actors.worker import Worker, language_model, make_engine


class Reference(Worker):
    """One rank of the reference."""

    def load(self) -> None:
        self.engine = make_engine(self.config, language_model(self.config, self.checkpoint), None)

    @torch.no_grad()
    def logprobs(self, pieces: Sequence[Rollouts | Dialogues], temperature: float) -> list[Tensor]:
        """[B, T] for each piece, at the temperature the policy samples with."""
        device = self.engine.device

        def run(rows: Dialogues) -> Tensor:
            return self.engine(rows.tokens.to(device), rows.mask.to(device), temperature, rows.lengths.to(device))[0]

        return in_passes(self.engine, pieces, run, limit(self.config.engine, self.engine))
