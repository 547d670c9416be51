"""Language modelling: on the assistant's turns (stage `sft`), or on every token of plain text (stage `pretrain`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from actors import lora
from actors.algorithms.supervised import language_loss
from actors.batch import Batch, Dialogues
from actors.engine import Engine
from actors.micro_batches import limit, micro_batches
from actors.packing import Packed, pack
from actors.staging import staged
from actors.worker import language_model
from conf.schema import SFT, Config, Pretrain

POOL = 2
"""Batches drawn together and sorted by length, which saves padding. Larger pools save more and learn worse: dialogues of one length are of
one kind (Taskmaster, 200 steps: 1.03 nats per token with 2, 1.14 with 16)."""


@dataclass(frozen=True)
class LanguageTask:
    """Rows to learn from and rows to measure on: dialogues, or blocks of text."""

    config: Config
    checkpoint: str
    rows: Dialogues
    validation: Dialogues
    """Decides on early stopping."""
    held_out: Dialogues
    """Only measured."""
    held_out_size: int
    """Size of what is predicted in the held-out rows, in `unit`s; for figures that do not depend on the tokenizer."""
    unit: Literal["char", "byte"] = "char"
    section: Literal["sft", "pretrain"] = "sft"
    """Section of the configuration that says how to learn."""
    pack_length: int | None = None
    """Tokens of a packed row at most; None: a row is one dialogue."""

    @property
    def settings(self) -> SFT | Pretrain:
        return getattr(self.config, self.section)

    def module(self) -> torch.nn.Module:
        checkpoint = staged(self.checkpoint, self.config.engine.stage_folder)
        return lora.adapted(self.config, self.section, language_model(self.config, checkpoint, self.settings.dropout))

    def batch(self, step: int, rank: int, ranks: int) -> Batch:
        """Every `ranks`-th row of the step's batch; which rows those are depends on the seed and the step alone."""
        return self.rows.select(step_rows(self.rows.lengths, self.settings.batch, step, self.config.seed)[rank::ranks]).trimmed()

    def loss(self, engine: Engine, rows: Any) -> list[tuple[Callable[[Any], Tensor], Batch]]:
        tokens = float(engine.sum_over_ranks(rows.mask.sum().float()))

        def loss(piece: Dialogues | Packed) -> Tensor:
            piece = piece.to(engine.device)
            places = piece.positions if isinstance(piece, Packed) else None
            return language_loss(engine(piece.tokens, piece.mask, lengths=piece.lengths, position_ids=places)[0], piece.mask, tokens)

        return [(loss, pack(rows, self.pack_length) if self.pack_length else rows)]

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Nats per learned token, every rank on the whole set (so that ZeRO-3 ranks stay in step)."""
        return {"loss": self._total_loss(engine, self.validation) / int(self.validation.mask.sum())}

    def prepare(self, engine: Engine) -> dict[str, float]:
        return {}

    def finish(self, engine: Engine) -> tuple[dict[str, float], dict[str, str]]:
        total = self._total_loss(engine, self.held_out)
        per_token = total / int(self.held_out.mask.sum())
        return {"heldout_nats_per_token": per_token, f"heldout_nats_per_{self.unit}": total / self.held_out_size}, {}

    @torch.no_grad()
    def _total_loss(self, engine: Engine, rows: Dialogues) -> float:
        total = 0.0
        for piece in micro_batches(rows, limit(self.config.engine, engine).times(4)):
            piece = piece.to(engine.device)
            total += float(language_loss(engine(piece.tokens, piece.mask, lengths=piece.lengths)[0], piece.mask, 1.0))
        return total


def step_rows(lengths: Tensor, batch: int, step: int, seed: int, pool: int = POOL) -> Tensor:
    """[batch] indices for this step: passes over the data in random order, sorted by length within pools of `pool` batches.

    With `pool=1` a batch is a plain random sample."""
    per_epoch = max(len(lengths) // batch, 1)
    epoch, number = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
    order = torch.randperm(len(lengths), generator=generator)
    if len(order) < batch:  # a tiny set: rows repeat within a batch
        return order.repeat(-(-batch // len(order)))[:batch]
    pools = order[: per_epoch * batch].split(pool * batch)
    batches = [rows for pool in pools for rows in pool[lengths[pool].argsort(stable=True)].split(batch)]
    return batches[int(torch.randperm(per_epoch, generator=generator)[number])]
