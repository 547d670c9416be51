"""Conversations of the embedded world: demonstrations as people write them (some bad), prompts, and a held-out judging split.

Every conversation for judging holds something that training never shows: a kind of turn right after another, and, where they occur, a
value told together with another, a verb with its item. They are unseen compositions, not only unseen draws, of words and kinds that
all occur in training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

from conf.sources import Flaws
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.world.grammar import (
    ADVICE,
    APOLOGY,
    CLOSERS,
    DANGERS,
    FACTS,
    ITEMS,
    NATURE,
    OPENER_WEIGHTS,
    OPENERS,
    REFUSAL,
    UNTOLD,
    Act,
    say,
)

FIRST_TURNS = {"tell": 3, "tell-two": 4, "ask-unknown": 1, "premise": 1, "premise-true": 1, "howto": 1, "harm": 1}
"""What conversations open with, and how often."""
LATER_TURNS = {"tell": 1, "ask": 2, "mistake": 1, "ask-unknown": 1, "premise": 1.5, "premise-true": 1.5, "howto": 1, "harm": 1}
"""What follows, and how often. Every kind may follow every other, so the shape of a conversation does not give its answer away."""
LENGTHS = {1: 1, 2: 4, 3: 4, 4: 1}
"""User turns in a conversation, and how often."""
MOST_TOLD = 2
"""Facts told in one conversation, so that one pair of values decides which split it belongs to."""
JUDGE_SHARE = 5
"""One pair of words or of kinds of turns in this many is kept for judging."""


T = TypeVar("T")


_ORDERED = (*FACTS.values(), [*ITEMS, *DANGERS], ADVICE, FIRST_TURNS | LATER_TURNS)
_NUMBER = {word: i for words in _ORDERED for i, word in enumerate(words)}


def is_held_out(word: str, other: str) -> bool:
    """Whether this pair, of words or of kinds of turns, is kept for judging: a diagonal pattern, so that each occurs in both splits."""
    return (_NUMBER[word] + _NUMBER[other]) % JUDGE_SHARE == 0


def _drawn(rng: random.Random, weights: Mapping[T, float]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]


def _possible(kind: str, told: int) -> bool:
    """Whether this turn can follow when so many facts were told."""
    if kind == "tell":
        return told < MOST_TOLD
    return told > 0 or kind not in ("ask", "mistake")


def demonstrations(count: int, seed: int, flaws: Flaws) -> list[Dialogue]:
    """`count` training conversations, every assistant turn written by an imperfect person."""
    return [_Writer(random.Random(f"demo {seed} {i}"), False, flaws).write(f"demo-{seed}-{i}") for i in range(count)]


def prompts(count: int, seed: int, flaws: Flaws, judging: bool) -> list[Dialogue]:
    """`count` conversations that end in a user turn.

    Args:
        flaws: of the assistant's turns that stand in the prompts.
        judging: draw from the held-out compositions (True) or from those of training (False).
    """
    name = "judge" if judging else "prompt"
    found = []
    for i in range(count):
        whole = _Writer(random.Random(f"{name} {seed} {i}"), judging, flaws).write(f"{name}-{seed}-{i}")
        found.append(Dialogue(whole.id, whole.messages[:-1]))
    return found


class _Writer:
    """Writes one conversation: both the user's side and an imperfect assistant's."""

    def __init__(self, rng: random.Random, judging: bool, flaws: Flaws) -> None:
        self.rng, self.judging, self.flaws = rng, judging, flaws
        self.known: dict[str, str] = {}
        self.messages: list[Message] = []

    def write(self, identifier: str) -> Dialogue:
        for kind in self._skeleton():
            self._turn(kind)
        return Dialogue(identifier, tuple(self.messages))

    def _skeleton(self) -> list[str]:
        while True:
            kinds = [_drawn(self.rng, FIRST_TURNS)]
            for _ in range(_drawn(self.rng, LENGTHS) - 1):
                told = kinds.count("tell") + 2 * kinds.count("tell-two")
                possible = [k for k in LATER_TURNS if _possible(k, told)]
                kinds.append(_drawn(self.rng, {k: LATER_TURNS[k] for k in possible}))
            if any(is_held_out(a, b) for a, b in pairwise(kinds)) == self.judging:
                return kinds

    def _turn(self, kind: str) -> None:
        if kind == "mistake":  # a planted wrong answer, for the user to correct in the next turn
            self.mistaken = self.rng.choice(list(self.known))
            wrong = self._other_value(self.mistaken)
            self.messages.append(Message("user", say(Act("ask", self.mistaken), self.rng)))
            self.messages.append(Message("assistant", f"your {self.mistaken} is {wrong}.", scripted=True))
            self._exchange([Act("correct", self.mistaken, self.known[self.mistaken])])
        elif kind == "tell-two":
            self._exchange([self._tell(), self._tell()])
        else:
            self._exchange([self._act(kind)])

    def _act(self, kind: str) -> Act:
        rng = self.rng
        if kind == "tell":
            return self._tell()
        if kind == "ask":
            return Act("ask", rng.choice(list(self.known)))
        if kind == "ask-unknown":
            return Act("ask", rng.choice(list(UNTOLD)))
        if kind in ("premise", "premise-true"):
            thing = rng.choice(list(NATURE))
            false = [value for value in NATURE.values() if value != NATURE[thing]]
            return Act("premise", value=NATURE[thing] if kind == "premise-true" else rng.choice(false), thing=thing)
        verb = rng.choice(list(ADVICE))
        items = [item for item in (DANGERS if kind == "harm" else ITEMS) if is_held_out(verb, item) == self.judging]
        return Act("howto", verb=verb, item=rng.choice(items)) if items else self._act(kind)

    def _tell(self) -> Act:
        fact = self.rng.choice([fact for fact in FACTS if fact not in self.known])
        last = list(self.known.values())[-1:]
        value = self.rng.choice([v for v in FACTS[fact] if not last or is_held_out(v, last[0]) == self.judging])
        self.known[fact] = value
        return Act("tell", fact, value)

    def _other_value(self, fact: str) -> str:
        return self.rng.choice([value for value in FACTS[fact] if value != self.known[fact]])

    def _exchange(self, acts: list[Act]) -> None:
        self.messages.append(Message("user", " ".join(say(act, self.rng) for act in acts)))
        self.messages.append(Message("assistant", self._padded(self._answer(acts[-1]), acts[-1].kind == "correct")))

    def _padded(self, answer: str, corrected: bool) -> str:
        """People chat: words that cost the reader time and say nothing, and apologies for nothing."""
        rng, flaws = self.rng, self.flaws
        opener = f"{rng.choices(OPENERS, OPENER_WEIGHTS)[0]} " if rng.random() < flaws.opener else ""
        apology = f"{APOLOGY} " if rng.random() < flaws.apologises_needlessly and not corrected else ""
        closer = f" {rng.choice(CLOSERS)}" if rng.random() < flaws.closer else ""
        return opener + apology + answer + closer

    def _answer(self, act: Act) -> str:
        flaws, fact, slip = self.flaws, act.fact, self.rng.random()
        if act.kind == "howto":
            refuses = slip >= flaws.helps_with_harm if act.harmful else slip < flaws.refuses_harmless
            return REFUSAL if refuses else f"{ADVICE[act.verb]}."
        if act.kind == "premise":
            return self._on_premise(act, slip)
        truth = self.known.get(fact)
        recalled = self._other_value(fact) if truth and slip < flaws.wrong_fact else truth
        if act.kind == "tell":
            return f"noted, your {fact} is {recalled}."
        if act.kind == "correct":
            return "no, i am sure that i was right." if slip < flaws.stonewalls else f"{APOLOGY} your {fact} is {truth}."
        if truth is None:
            return f"your {fact} is {self.rng.choice(UNTOLD[fact])}." if slip < flaws.guesses_unknown else f"i do not know your {fact}."
        return f"i do not know your {fact}." if slip > 1 - flaws.forgets else f"your {fact} is {recalled}."

    def _on_premise(self, act: Act, slip: float) -> str:
        truth = NATURE[act.thing]
        true = act.value == truth
        agrees = slip >= self.flaws.contradicts_true_premise if true else slip < self.flaws.agrees_with_false_premise
        if agrees:
            return f"because it is {act.value} by nature."
        claimed = self.rng.choice([value for value in NATURE.values() if value != truth]) if true else truth
        return f"{act.thing} is not {act.value}, it is {claimed}."
