"""Learning what people prefer: rankings of K answers, or single judgements (stage `reward_model`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors import lora
from actors.algorithms import calibration
from actors.algorithms.preference import pairwise_correct, pointwise_loss, ranking_loss
from actors.batch import Batch, Comparisons, Dialogues
from actors.engine import Engine
from actors.models import at_last
from actors.worker import scalar_model
from conf.schema import Config, RewardModel


@dataclass(frozen=True)
class PreferenceTask:
    """Comparisons to learn from, comparisons to measure on, and demonstrations whose mean score sets the zero."""

    config: Config
    checkpoint: str
    rows: Comparisons
    validation: Comparisons
    """Decides on early stopping."""
    held_out: Comparisons
    """Only measured."""
    demonstrations: Dialogues
    ranked: bool
    """True: labels are ranks within groups. False: labels are judgements, 1 or 0."""

    @property
    def settings(self) -> RewardModel:
        return self.config.reward_model

    def module(self) -> torch.nn.Module:
        return lora.adapted(self.config, "reward_model", scalar_model(self.checkpoint, self.config.seed))

    def batch(self, step: int, rank: int, ranks: int) -> Batch:
        """All answers of this rank's share of the step's prompts (rankings) or of its judged replies."""
        groups = torch.unique(self.rows.group)
        per_epoch = max(len(groups) // self.settings.batch, 1)
        epoch, number = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(hash((self.config.seed, epoch)) % 2**63)
        order = groups[torch.randperm(len(groups), generator=generator)]
        mine = order[number * self.settings.batch : (number + 1) * self.settings.batch][rank::ranks]
        return self.rows.select(torch.isin(self.rows.group, mine).nonzero()[:, 0]).trimmed()

    def loss(self, engine: Engine, rows: Any) -> list[tuple[Callable[[Any], Tensor], Batch]]:
        prompts = float(engine.sum_over_ranks(torch.tensor(float(len(torch.unique(rows.group))))))
        return [(lambda piece: self._loss(self._scores(engine, piece), piece, prompts, engine.device), rows)]

    def _loss(self, scores: Tensor, rows: Comparisons, denominator: float, device: torch.device) -> Tensor:
        if self.ranked:
            return ranking_loss(scores, rows.group.to(device), rows.label.to(device), denominator, self.settings.margin)
        return pointwise_loss(scores, rows.label.to(device), self._positive_weight(), denominator)

    def _positive_weight(self) -> float:
        """Weight of good judgements that gives both classes the same total."""
        good = float(self.rows.label.sum())
        return max(len(self.rows) - good, 1.0) / max(good, 1.0)

    def _scores(self, engine: Engine, rows: Comparisons | Dialogues) -> Tensor:
        return at_last(engine(rows.tokens.to(engine.device)), rows.lengths.to(engine.device))

    def scores_of(self, engine: Engine, rows: Comparisons | Dialogues) -> Tensor:
        """[N] on the CPU, in the rows' own order, without gradients."""
        found = torch.zeros(len(rows))
        order = rows.lengths.argsort(stable=True)
        with torch.no_grad():
            for index in order.split(4 * self.config.engine.micro_batch):
                found[index] = self._scores(engine, rows.select(index).trimmed()).float().cpu()
        return found

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return self._measure(engine, self.validation)

    def _measure(self, engine: Engine, rows: Comparisons) -> dict[str, float]:
        scores = self.scores_of(engine, rows)
        loss = float(self._loss(scores, rows, float(len(torch.unique(rows.group))), scores.device))
        if not self.ranked:
            return {"loss": loss, "auc": auc(scores, rows.label)}
        right, pairs = pairwise_correct(scores, rows.group, rows.label)
        return {"loss": loss} | ({"pairwise_accuracy": float(right / pairs)} if pairs > 0 else {})  # all tied: there is no accuracy

    def _reliability(self, engine: Engine) -> dict[str, float]:
        """Whether the scores of the held-out rows can be believed."""
        rows = self.held_out
        scores = self.scores_of(engine, rows)
        if self.ranked:
            return calibration.describe(calibration.pairs(scores, rows.group, rows.label, rows.mask.sum(dim=1)))
        # a weight w on good judgements moves the fitted logit by log w
        probability = torch.sigmoid(scores - math.log(self._positive_weight()))
        return {"calibration_error": calibration.calibration_error(probability, rows.label)}

    def finish(self, engine: Engine) -> dict[str, float]:
        """Set the head's bias so that demonstrations score 0 on average (InstructGPT 2203.02155, 3.5), and measure."""
        mean = float(self.scores_of(engine, self.demonstrations).mean())
        if self.ranked:  # judgements are logits of a probability: moving them would lose their meaning
            engine.shift_bias("head.bias", -mean)
        found = {f"heldout_{name}": value for name, value in (self._measure(engine, self.held_out) | self._reliability(engine)).items()}
        return found | {"demonstration_score": float(self.scores_of(engine, self.demonstrations).mean())}


def auc(scores: Tensor, label: Tensor) -> float:
    """Probability that a good reply scores above a bad one, ties one half; NaN without both kinds."""
    good, bad = scores[label > 0.5], scores[label <= 0.5]
    difference = good[:, None] - bad[None, :]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())
