"""Scores by a reward model: one of chatray's own folders, or a Hugging Face sequence classifier with one label.

A model with the policy's tokenizer scores the policy's tokens as they are. Any other scores text: the reply is decoded, put behind its
conversation, and encoded with the model's own tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from actors.batch import Dialogues, pad_rows
from actors.learning import Scorable, in_passes
from actors.micro_batches import limit
from actors.models import HEAD_FILE, ScalarModel, load_transformer
from actors.reward_network import FEATURE_HEAD_FILE, FeatureModel, load_reward_model, score
from actors.rewards.source import RewardError, Rows
from actors.worker import make_engine
from conf.schema import Config


def kind_of(path: str, setting: str) -> Literal["scalar", "classifier"]:
    """Which of the two stands there.

    Raises:
        RewardError: neither; names `setting`.
    """
    if any((Path(path) / name).exists() for name in (HEAD_FILE, FEATURE_HEAD_FILE)):
        return "scalar"
    try:
        shape = AutoConfig.from_pretrained(path)
    except Exception as cause:  # a spoilt file can fail anywhere in the loader
        raise RewardError(f"{setting}={path}: no model can be loaded from there ({str(cause).strip()[:200]})") from cause
    classifies = any(name.endswith("ForSequenceClassification") for name in shape.architectures or [])
    if not classifies or shape.num_labels != 1:
        what = f"a classifier with {shape.num_labels} labels" if classifies else f"{', '.join(shape.architectures or ['a model'])}"
        raise RewardError(
            f"{setting}={path}: {what} gives no reward; name a folder that stage reward_model wrote (with {HEAD_FILE}), or a sequence "
            "classifier with one label"
        )
    return "classifier"


class Scorer(nn.Module):
    """Any kind, with the same forward."""

    def __init__(self, model: ScalarModel | FeatureModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """[B, T] tokens padded on the right, [B] lengths, [B, T] where the reply is -> [B] float32."""
        if isinstance(self.model, ScalarModel | FeatureModel):
            return score(self.model, tokens, lengths, mask, self.model)
        pad = self.model.config.pad_token_id
        if pad is None:  # it could not tell padding from text: one row at a time has none
            rows = zip(tokens, lengths.tolist(), strict=True)
            return torch.cat([self.model(input_ids=row[None, :length]).logits[:, 0] for row, length in rows]).float()
        inside = torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]
        return self.model(input_ids=torch.where(inside, tokens, pad), attention_mask=inside.long()).logits[:, 0].float()


def load_scorer(path: str, setting: str, seed: int, unfilled: bool = False) -> Scorer:
    """The model in float32; `unfilled` as in `load_causal_lm`."""
    if kind_of(path, setting) == "scalar":
        return Scorer(load_reward_model(path, seed, unfilled))
    return Scorer(load_transformer(AutoModelForSequenceClassification, path, AutoConfig.from_pretrained(path), unfilled))


class ModelSource:
    """One frozen reward model on this rank."""

    def __init__(self, config: Config, name: str, path: str) -> None:
        self.name = name
        self.engine = make_engine(config, load_scorer(path, f"ppo.rewards: {name}", config.seed, config.zero_stage() == 3), None)
        self.most = limit(config.engine, self.engine)

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """Read as the model was trained to."""
        device = self.engine.device
        pieces: Sequence[Scorable] = self._encoded(rows) or rows.pieces

        def run(part: Dialogues) -> Tensor:
            return self.engine(part.tokens.to(device), part.lengths.to(device), part.mask.to(device))

        return torch.cat(in_passes(self.engine, pieces, run, self.most))

    def _encoded(self, rows: Rows) -> list[Dialogues]:
        """The rows in this model's own tokens, in pieces of the same sizes; none when it shares the policy's."""
        encoder = rows.known.encoders.get(self.name) if rows.known else None
        if encoder is None:
            return []
        encoded = encoder.encode(rows.contexts, rows.replies, rows.finished)
        found, start = [], 0
        for piece in rows.pieces:
            part = encoded[start : start + len(piece)]
            tokens, lengths = pad_rows([ids for ids, _ in part])
            first = (lengths - torch.tensor([count for _, count in part]))[:, None]
            places = torch.arange(tokens.shape[1])[None, :]
            found.append(Dialogues(tokens, lengths, (places >= first) & (places < lengths[:, None])))
            start += len(piece)
        return found
