"""A reward model that learns from shuffled labels orders held-out pairs no better than a coin: nothing leaks the label.

Labels of training and held-out pairs are coin flips, so each held-out pair is right with probability one half whatever the model is: with
400 pairs the accuracy's deviation is 0.025, and the bounds below are four of them. The same model on true labels shows that it can learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.batch import Comparisons
from actors.models import new_causal_lm
from actors.preference_task import PreferenceTask
from actors.trainer import train
from actors.worker import process_group_of_one
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.comparisons import encode_rankings
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.preferences import Comparison
from tests.fakes import smoke, with_section

TRAIN, HELD_OUT, DEVIATIONS = 320, 400, 0.1
ANSWERS = ("yes.", "no.", "yes, yes.", "no, no.", "i do not know.", "it is so.")
"""The true rule: an answer that begins with yes is better than one that does not."""


class Alone:
    """A training session of one rank that keeps nothing."""

    rank, world_size = 0, 1

    def report(self, step: int, metrics: dict[str, float]) -> None: ...

    def commit(self, step: int, save: Callable[[Path], None], memory: dict[str, Any]) -> None: ...

    def resume(self) -> None: ...

    def stop_asked(self) -> bool:
        return False

    def export(self, save: Callable[[Path], None]) -> None: ...


def pairs(count: int, shuffled: bool, seed: int) -> list[Comparison]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        context = Dialogue(f"{seed} {number}", (Message("user", f"is it {rng.choice(['hot', 'cold', 'far', 'near'])}?"),))
        better, worse = rng.choice([a for a in ANSWERS if "yes" in a]), rng.choice([a for a in ANSWERS if "yes" not in a])
        rows = [(better, 0), (worse, 1)]
        rng.shuffle(rows)  # the better one stands anywhere
        ranks = [0, 1] if rng.random() < 0.5 else [1, 0]
        given = ranks if shuffled else [rank for _, rank in rows]
        found.append(Comparison(context, tuple(answer for answer, _ in rows), (True, True), tuple(given)))
    return found


@pytest.fixture(scope="module")
def chat() -> Chat:
    texts = [Dialogue("t", (Message("user", "is it hot, cold, far or near?"), Message("assistant", answer))) for answer in ANSWERS]
    return Chat(learn_tokenizer(texts * 4, 300))


def accuracy(chat: Chat, shuffled: bool, folder: Path) -> float:
    process_group_of_one()
    config = with_section(smoke(), "reward_model", steps=30, batch=32, lr=3e-3, warmup=3, eval_every=10, patience=9)
    new_causal_lm(config.scale, len(chat.tokenizer), 0, 0.0, chat.end, chat.pad).save_pretrained(folder)
    rows: list[Comparisons] = [encode_rankings(chat, pairs(count, shuffled, seed)) for seed, count in enumerate((TRAIN, 64, HELD_OUT))]
    shown = chat.dialogues([Dialogue("d", (Message("user", "is it hot?"), Message("assistant", "yes.")))])
    task = PreferenceTask(config, str(folder), *rows, shown, True)
    return train(config, task, Alone())["heldout_pairwise_accuracy"]


def test_true_labels_are_learned(chat: Chat, tmp_path: Path) -> None:
    assert accuracy(chat, False, tmp_path) > 0.9


def test_shuffled_labels_score_one_half(chat: Chat, tmp_path: Path) -> None:
    assert abs(accuracy(chat, True, tmp_path) - 0.5) < DEVIATIONS
