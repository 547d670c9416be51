from __future__ import annotations

from statistics import NormalDist

import pytest

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.labeler import SimulatedLabeler, agreement, ceiling, expected_agreement, golds, noise_for
from orchestration.data.preferences import Comparison
from orchestration.data.world.gold import UNFINISHED_PRICE, WORD_PRICE
from orchestration.data.world.grammar import FACTS

NAMES = FACTS["name"]


def comparison(number: int, answers: int = 4) -> Comparison:
    """Answers of very different quality, and others that differ by a word or two."""
    context = Dialogue(f"c{number}", (Message("user", f"my name is {NAMES[number % len(NAMES)]}."),))
    right, wrong = NAMES[number % len(NAMES)], NAMES[(number + 1) % len(NAMES)]
    texts = [
        f"noted, your name is {right}.",
        f"your name is {right}.",
        f"your name is {wrong}.",
        f"sure. your name is {right}. " * 2,
        "noted.",
    ]
    chosen = tuple(texts[(number + i) % 5] for i in range(answers))
    return Comparison(context, chosen, tuple((number + i) % 3 > 0 for i in range(answers)))


@pytest.fixture(scope="module")
def synthetic() -> list[Comparison]:
    return [comparison(number) for number in range(1500)]


def labelled(comparisons: list[Comparison], noise: float, seed: int) -> list[Comparison]:
    labeler = SimulatedLabeler(noise, seed)
    return [c.ranked(labeler.rank(c)) for c in comparisons]


@pytest.mark.parametrize("wanted", [0.65, 0.726, 0.85])
def test_two_labelers_at_the_calibrated_noise_agree_as_often_as_asked(synthetic: list[Comparison], wanted: float) -> None:
    noise = noise_for(wanted, synthetic)
    assert agreement(labelled(synthetic, noise, 0), labelled(synthetic, noise, 1)) == pytest.approx(wanted, abs=0.015)


def test_the_expected_agreement_is_the_mean_over_pairs_of_both_being_right_or_both_wrong() -> None:
    chances = [NormalDist(0, 0.3 * 2**0.5).cdf(gap) for gap in (0.0, 0.2, 1.0)]
    assert expected_agreement([0.0, 0.2, 1.0], 0.3) == pytest.approx(sum(p * p + (1 - p) ** 2 for p in chances) / 3)


def test_no_noise_gives_an_agreement_that_equally_good_answers_cannot_have() -> None:
    same = [Comparison(comparison(n).context, ("noted.", "noted."), (True, True)) for n in range(3)]
    with pytest.raises(ValueError, match=r"labeler\.agreement=0\.7.*0\.500"):
        noise_for(0.7, same)


def test_ranks_are_a_permutation_and_follow_the_grade_when_there_is_no_noise() -> None:
    for number in range(20):
        c = comparison(number, 5)
        ranks = SimulatedLabeler(1e-9, 0).rank(c)
        gold = golds(c)
        assert sorted(ranks) == [0, 1, 2, 3, 4]
        by_rank = [gold[ranks.index(place)] for place in range(5)]
        assert by_rank == sorted(gold, reverse=True)


def test_a_ranking_is_a_function_of_the_seed_and_the_comparison_alone(synthetic: list[Comparison]) -> None:
    labeler = SimulatedLabeler(0.5, 3)
    first = [labeler.rank(c) for c in synthetic[:30]]
    assert [labeler.rank(c) for c in reversed(synthetic[:30])] == first[::-1]
    assert [SimulatedLabeler(0.5, 3).rank(c) for c in synthetic[:30]] == first
    assert [SimulatedLabeler(0.5, 4).rank(c) for c in synthetic[:30]] != first


def test_the_ceiling_is_the_exact_grades_accuracy_with_ties_one_half() -> None:
    c = comparison(0, 3)  # right in 5 words but unfinished, right in 4 words, wrong in 4 words
    gold = golds(c)
    assert gold == pytest.approx([1 - 5 * WORD_PRICE - UNFINISHED_PRICE, 1 - 4 * WORD_PRICE, -4 * WORD_PRICE])
    assert ceiling([c.ranked([1, 0, 2])]) == 1.0
    assert ceiling([c.ranked([0, 1, 2])]) == pytest.approx(2 / 3)
    assert ceiling([c.ranked([2, 1, 0])]) == pytest.approx(1 / 3)
    tied = Comparison(c.context, ("noted.", "noted."), (True, True), (0, 1))
    assert ceiling([tied, c.ranked([1, 0, 2])]) == pytest.approx(3.5 / 4)


def test_agreement_counts_pairs_ordered_alike() -> None:
    c = comparison(0, 3)
    assert agreement([c.ranked([0, 1, 2])], [c.ranked([0, 1, 2])]) == 1.0
    assert agreement([c.ranked([0, 1, 2])], [c.ranked([1, 0, 2])]) == pytest.approx(2 / 3)
    assert agreement([c.ranked([0, 1, 2])], [c.ranked([2, 1, 0])]) == 0.0
