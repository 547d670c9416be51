"""Learning what people prefer: rankings of K answers, or single judgements (stage `reward_model`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors import lora
from actors.algorithms import calibration
from actors.algorithms.linear import Loss, apply, chosen_penalty, fit_linear
from actors.algorithms.preference import pairs_loss, pairwise_correct, pointwise_loss, ranking_loss, untied_pairs
from actors.batch import Batch, Comparisons, Dialogues
from actors.engine import Engine
from actors.micro_batches import limit, planned
from actors.models import load_causal_lm, load_scalar_model
from actors.reward_network import FeatureModel, scaled, score, statistics, widths
from actors.staging import staged
from actors.worker import filled_by_engine
from conf.schema import Config, RewardModel

SCORES_FILE = "heldout_scores.json"


@dataclass(frozen=True)
class Fit:
    """How a linear head reads features."""

    mean: Tensor
    spread: Tensor
    groups: dict[str, int]
    """Width of each group of features."""
    head: Tensor | None = None
    """[F + 1]: weights of the scaled features, and the bias; None: not fitted."""
    figures: dict[str, float] = field(default_factory=dict)

    def scores(self, features: Tensor) -> Tensor:
        """[N, F] -> [N]."""
        assert self.head is not None
        return apply(scaled(features, self.mean, self.spread, self.groups), self.head)


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
    demonstrations: Comparisons
    """Only their scores count; labels and groups mean nothing."""
    ranked: bool
    """True: labels are ranks within groups. False: labels are judgements, 1 or 0."""

    @property
    def settings(self) -> RewardModel:
        return self.config.reward_model

    def module(self) -> torch.nn.Module:
        unfilled, checkpoint = filled_by_engine(self.config), staged(self.checkpoint, self.config.engine.stage_folder)
        if self.settings.features == ("last",) and self.settings.train == "all":
            return lora.adapted(self.config, "reward_model", load_scalar_model(checkpoint, self.config.seed, unfilled))
        model = FeatureModel(load_causal_lm(checkpoint, unfilled=unfilled), self.settings.features)
        if self.settings.train == "all":
            return lora.adapted(self.config, "reward_model", model)
        model.lm.requires_grad_(False)
        return model

    def prepare(self, engine: Engine) -> dict[str, float]:
        """Standardise a feature model's features over the training rows; with `train=head`, fit the head to its optimum as well."""
        model = engine.module
        if not isinstance(model, FeatureModel):
            return {}
        fits = self.settings.train == "head"
        rows = Comparisons.join([self.rows, self.validation]) if fits else self.rows  # cross-validation needs no rows kept apart
        features = self.features_of(engine, rows)
        groups = widths(model.lm.config, model.features)
        found = fitted(features, rows, groups, self) if fits else Fit(*statistics(features, groups), groups)
        model.mean.copy_(found.mean)
        model.spread.copy_(found.spread)
        if found.head is not None:
            engine.set_weights({"head.weight": found.head[None, :-1], "head.bias": found.head[-1:]})
        return found.figures

    def mean_loss(self, rows: Comparisons) -> Loss:
        """The loss of some of `rows`, for a head that is fitted to all of them at once."""

        def judged(index: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda scores: pointwise_loss(scores, rows.label[index], self._positive_weight(), float(len(index)))

        def ranked(index: Tensor) -> Callable[[Tensor], Tensor]:
            pairs = untied_pairs(rows.group[index], rows.label[index])
            return lambda scores: pairs_loss(scores, pairs, self.settings.margin)

        return ranked if self.ranked else judged

    def features_of(self, engine: Engine, rows: Comparisons) -> Tensor:
        """[N, F] on the CPU, in the rows' own order."""
        return self._on_all(engine, rows, lambda part: engine(part.tokens, part.lengths, part.mask, read=True))

    def _on_all(self, engine: Engine, rows: Comparisons, read: Callable[[Comparisons], Tensor]) -> Tensor:
        """What `read` gives for every row, without gradients; every rank on the whole set, so that ZeRO-3 ranks stay in step."""
        alone = Dialogues(rows.tokens, rows.lengths, rows.mask)  # scored one by one, so no answer need be beside those it is compared with
        found: Tensor | None = None
        with torch.no_grad():
            for index in planned(alone, limit(self.config.engine, engine).times(4)):
                got = read(rows.select(index).trimmed().to(engine.device)).float().cpu()
                found = torch.zeros(len(rows), *got.shape[1:]) if found is None else found
                found[index] = got
        assert found is not None
        return found

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

    def _scores(self, engine: Engine, rows: Comparisons) -> Tensor:
        device = engine.device
        return score(engine, rows.tokens.to(device), rows.lengths.to(device), rows.mask.to(device), engine.module)

    def scores_of(self, engine: Engine, rows: Comparisons) -> Tensor:
        """[N] on the CPU, in the rows' own order, without gradients."""
        return self._on_all(engine, rows, lambda part: self._scores(engine, part))

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return self._measure(engine, self.validation)

    def _measure(self, engine: Engine, rows: Comparisons) -> dict[str, float]:
        scores = self.scores_of(engine, rows)
        loss = float(self._loss(scores, rows, float(len(torch.unique(rows.group))), scores.device))
        if not self.ranked:
            both = 0 < float(rows.label.sum()) < len(rows)  # of one kind alone there is no AUC
            return {"loss": loss} | ({"auc": auc(scores, rows.label)} if both else {})
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

    def finish(self, engine: Engine) -> tuple[dict[str, float], dict[str, str]]:
        """Measure, and set the head's bias so that demonstrations score 0 on average (InstructGPT 2203.02155, 3.5).

        Calibration is that of the scores before: a judgement's score is the logit of a probability until its zero is moved. The held-out
        rows' scores are left in a file, in the rows' order, so that models can be compared row by row."""
        found = {f"heldout_{name}": value for name, value in (self._measure(engine, self.held_out) | self._reliability(engine)).items()}
        zero = float(self.scores_of(engine, self.demonstrations).mean())
        engine.shift_bias("head.bias", -zero)
        scores = [round(score, 6) for score in self.scores_of(engine, self.held_out).tolist()]
        after = float(self.scores_of(engine, self.demonstrations).mean())
        return found | {"zero": zero, "demonstration_score": after}, {SCORES_FILE: json.dumps(scores)}


def fitted(features: Tensor, rows: Comparisons, groups: dict[str, int], task: PreferenceTask) -> Fit:
    """The head that is best for these rows, with the L2 penalty that cross-validation over their groups chooses.

    Args:
        features: [N, F] of the rows.
        groups: width of each group of features.
    """
    mean, spread = statistics(features, groups)
    inputs, loss = scaled(features, mean, spread, groups), task.mean_loss(rows)
    used = (inputs != 0).any(dim=0)  # most n-grams occur nowhere, and the weight of those is 0
    inputs = inputs[:, used]
    penalty, expected = chosen_penalty(inputs, rows.group, loss, task.config.seed)
    found = fit_linear(inputs, torch.arange(len(rows)), loss, penalty)
    head = torch.zeros(len(used) + 1)
    head[:-1][used], head[-1] = found[:-1], found[-1]
    return Fit(mean, spread, groups, head, {"penalty": penalty, "cross_validated_loss": expected})


def auc(scores: Tensor, label: Tensor) -> float:
    """Probability that a good reply scores above a bad one, ties one half; NaN without both kinds."""
    good, bad = scores[label > 0.5], scores[label <= 0.5]
    difference = good[:, None] - bad[None, :]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())
