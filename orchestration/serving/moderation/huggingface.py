"""A Hugging Face text-classification model as a moderator.

A model that says of itself that it is `multi_label_classification`, or that has one label, gives each label its own sigmoid; the others
give a softmax over all labels, as transformers' own pipeline does. A text longer than the window is scored in windows that overlap by an
eighth, and each label's highest score counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conf.moderation import Moderation
from orchestration.errors import RequestError
from orchestration.serving.moderation.moderators import Limits, fixed

OVERLAP = 8
"""A window repeats one token in this many of the window before."""


class HuggingFace:
    """A text classifier from a folder or the hub."""

    def __init__(self, settings: Moderation) -> None:
        if not settings.path:
            raise RequestError("moderation.path: kind=huggingface needs a folder or a name on the hub")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(settings.path)
            self.model = AutoModelForSequenceClassification.from_pretrained(settings.path, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as cause:
            raise RequestError(
                f"moderation.path={settings.path}: no text-classification model with safetensors weights and a tokenizer "
                f"({str(cause).splitlines()[0][:200]})"
            ) from cause
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        unknown = sorted(set(settings.labels) - set(names))
        if unknown:
            raise RequestError(f"moderation.labels: {', '.join(unknown)}: no such label; {settings.path} has {', '.join(names)}")
        self.labels = [settings.labels.get(name) if settings.labels else name for name in names]
        self.several = self.model.config.problem_type == "multi_label_classification" or len(names) == 1
        self.name = f"huggingface:{settings.path}"
        self.categories = tuple(dict.fromkeys(label for label in self.labels if label))
        self.defaults: Limits = fixed(self.categories)
        places = getattr(self.model.config, "max_position_embeddings", None) or settings.longest
        self.window = min(settings.longest, places, self.tokenizer.model_max_length)
        self.batch, self.threads = settings.batch, settings.threads
        if self.tokenizer.pad_token is None and self.batch > 1:
            self.batch = 1

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        if not texts:
            return []
        coded = self.tokenizer(
            list(texts), truncation=True, max_length=self.window, stride=max(self.window // OVERLAP, 1), return_overflowing_tokens=True
        )  # fmt: skip
        owners = coded["overflow_to_sample_mapping"]
        windows = [{name: coded[name][i] for name in ("input_ids", "attention_mask")} for i in range(len(owners))]
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]["input_ids"]))  # alike lengths pad little
        found = torch.zeros(len(texts), len(self.labels))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for place, row in zip(chosen, self._probabilities([windows[i] for i in chosen]), strict=True):
                found[owners[place]] = torch.maximum(found[owners[place]], row)
        return [self._by_category(row) for row in found.tolist()]

    @torch.inference_mode()
    def _probabilities(self, windows: list[dict[str, list[int]]]) -> torch.Tensor:
        """[windows, labels]."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            padded = self.tokenizer.pad(windows, return_tensors="pt") if len(windows) > 1 else _alone(windows[0])
            logits = self.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits.float()
        finally:
            torch.set_num_threads(before)
        return logits.sigmoid() if self.several else logits.softmax(dim=-1)

    def _by_category(self, row: Sequence[float]) -> dict[str, float]:
        """Several labels of one category: the highest."""
        scores: dict[str, float] = {}
        for label, score in zip(self.labels, row, strict=True):
            if label:
                scores[label] = max(score, scores.get(label, 0.0))
        return scores


def _alone(window: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values]) for name, values in window.items()}
