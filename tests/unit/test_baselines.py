from __future__ import annotations

import math
import random

import pytest
import torch
from sklearn.metrics import roc_auc_score

from actors.preference_task import auc
from orchestration.data.baselines import tfidf_judgement_auc, tfidf_judgement_scores, tfidf_pairwise_accuracy
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.preferences import Comparison, Judgement

WORDS = ["lamp", "book", "coat", "drum", "vase", "rope", "bell", "clock", "ladder", "mirror", "basket", "hammer"]


def comparisons(seed: int, count: int, obvious: bool) -> list[Comparison]:
    """Three answers each; the polite ones are preferred if that is to be obvious, any of them if not."""
    rng, found = random.Random(seed), []
    for number in range(count):
        polite = rng.randrange(3)
        answers = tuple(f"{'thank you ' if i == polite else 'go away '}{rng.choice(WORDS)} {rng.choice(WORDS)}" for i in range(3))
        ranks = [int(i != polite) for i in range(3)] if obvious else rng.sample(range(3), 3)
        found.append(Comparison(Dialogue(str(number), (Message("user", "hello"),)), answers, (True,) * 3, tuple(ranks)))
    return found


def judgements(seed: int, count: int, where: str) -> list[Judgement]:
    rng, found = random.Random(seed), []
    for number in range(count):
        good = rng.random() < 0.6
        mark, noise = ("thank you" if good else "go away"), f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
        context = Dialogue(str(number), (Message("user", f"hello {noise} {mark if where == 'context' else ''}"),))
        found.append(Judgement(context, f"{noise} {mark if where == 'reply' else ''}", good))
    return found


def test_an_obvious_difference_is_learned_from_pairs() -> None:
    assert tfidf_pairwise_accuracy(comparisons(0, 60, True), comparisons(1, 40, True), seed=0) > 0.97


def test_where_ranks_are_random_nothing_is_learned() -> None:
    assert tfidf_pairwise_accuracy(comparisons(0, 120, False), comparisons(1, 120, False), seed=0) == pytest.approx(0.5, abs=0.1)


def test_learning_from_few_of_the_pairs_is_worse_and_the_same_seed_gives_the_same() -> None:
    train, test = comparisons(0, 60, True), comparisons(1, 40, True)
    few = tfidf_pairwise_accuracy(train, test, seed=3, most_pairs=20)
    assert few == tfidf_pairwise_accuracy(train, test, seed=3, most_pairs=20)
    assert few <= tfidf_pairwise_accuracy(train, test, seed=3)


@pytest.mark.parametrize("where", ["context", "reply"])
def test_an_obvious_difference_is_learned_from_judgements_in_context_and_reply(where: str) -> None:
    train, test = judgements(0, 120, where), judgements(1, 60, where)
    scores = tfidf_judgement_scores(train, test)
    assert tfidf_judgement_auc(train, test) > 0.97
    assert tfidf_judgement_auc(train, test) == pytest.approx(roc_auc_score([j.good for j in test], scores))


@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_sklearns_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(50, generator=generator) < 0.3).float()
    scores = torch.randn(50, generator=generator).mul(2).round() + label
    assert auc(scores, label) == pytest.approx(roc_auc_score(label.numpy(), scores.numpy()))


def test_auc_without_both_kinds_is_not_a_number() -> None:
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.ones(2)))
