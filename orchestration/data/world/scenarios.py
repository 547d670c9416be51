"""Conversations of the embedded world: demonstrations as people write them (some bad), prompts, and a held-out judging split.

A skeleton is the sequence of kinds of user turns. Judging uses skeletons, and pairs of words (the value told together with another,
a verb with its item), that never occur in training: unseen compositions, not only unseen draws.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.world.grammar import (
    ADVICE,
    APOLOGY,
    CLOSERS,
    DANGERS,
    FACTS,
    ITEMS,
    OPENER_WEIGHTS,
    OPENERS,
    REFUSAL,
    Act,
    say,
)

TRAIN_SKELETONS = (
    "tell", "howto", "harm", "ask-unknown", "howto harm", "harm howto",
    "tell ask", "tell premise", "tell premise-true", "tell-two ask", "tell-two premise", "tell-two premise-true",
    "tell ask-unknown", "tell-two howto", "tell howto ask", "howto tell ask", "tell harm",
    "tell tell ask", "tell tell premise", "tell tell premise-true", "tell mistake correct", "tell-two mistake correct",
    "harm tell ask", "tell howto premise", "tell howto ask-unknown",
)  # fmt: skip
JUDGE_SKELETONS = (
    "tell-two harm", "tell-two ask-unknown", "howto tell premise", "howto tell premise-true", "tell harm ask", "tell tell howto",
    "tell ask premise", "howto tell mistake correct", "tell-two howto ask", "tell tell harm", "howto tell ask-unknown",
)  # fmt: skip
JUDGE_SHARE = 5
"""One binding in this many is kept for judging."""


@dataclass(frozen=True)
class Flaws:
    """How often people's demonstrations go wrong; probabilities."""

    opener: float = 0.6
    closer: float = 0.5
    agrees_with_false_premise: float = 0.35
    contradicts_true_premise: float = 0.1
    guesses_unknown: float = 0.6
    forgets: float = 0.1
    helps_with_harm: float = 0.35
    refuses_harmless: float = 0.2
    stonewalls: float = 0.4
    apologises_needlessly: float = 0.12
    wrong_fact: float = 0.05


_NUMBER = {word: i for words in (*FACTS.values(), [*ITEMS, *DANGERS], ADVICE) for i, word in enumerate(words)}


def is_held_out(word: str, other: str) -> bool:
    """Whether this pair of words is kept for judging: a diagonal pattern, so that every word occurs in both splits."""
    return (_NUMBER[word] + _NUMBER[other]) % JUDGE_SHARE == 0


def demonstrations(count: int, seed: int, flaws: Flaws | None = None) -> list[Dialogue]:
    """`count` training conversations, every assistant turn written by an imperfect person."""
    return [_Writer(random.Random(f"demo {seed} {i}"), False, flaws or Flaws()).write(f"demo-{seed}-{i}") for i in range(count)]


def prompts(count: int, seed: int, judging: bool) -> list[Dialogue]:
    """`count` conversations that end in a user turn.

    Args:
        judging: draw from the held-out compositions (True) or from those of training (False).
    """
    name = "judge" if judging else "prompt"
    found = []
    for i in range(count):
        whole = _Writer(random.Random(f"{name} {seed} {i}"), judging, Flaws()).write(f"{name}-{seed}-{i}")
        found.append(Dialogue(whole.id, whole.messages[:-1]))
    return found


class _Writer:
    """Writes one conversation: both the user's side and an imperfect assistant's."""

    def __init__(self, rng: random.Random, judging: bool, flaws: Flaws) -> None:
        self.rng, self.judging, self.flaws = rng, judging, flaws
        self.known: dict[str, str] = {}
        self.messages: list[Message] = []

    def write(self, identifier: str) -> Dialogue:
        skeleton = self.rng.choice(JUDGE_SKELETONS if self.judging else TRAIN_SKELETONS)
        for kind in skeleton.split():
            self._turn(kind)
        return Dialogue(identifier, tuple(self.messages))

    def _turn(self, kind: str) -> None:
        if kind == "mistake":  # a planted wrong answer, for the user to correct in the next turn
            self.mistaken = self.rng.choice(list(self.known))
            wrong = self._other_value(self.mistaken)
            self.messages.append(Message("user", say(Act("ask", self.mistaken), self.rng)))
            self.messages.append(Message("assistant", f"your {self.mistaken} is {wrong}.", scripted=True))
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
            return Act("ask", rng.choice([fact for fact in FACTS if fact not in self.known]))
        if kind in ("premise", "premise-true"):
            fact = rng.choice(list(self.known))
            return Act("premise", fact, self.known[fact] if kind == "premise-true" else self._other_value(fact))
        if kind == "correct":
            return Act("correct", self.mistaken, self.known[self.mistaken])
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
            return f"your {fact} is {self.rng.choice(FACTS[fact])}." if slip < flaws.guesses_unknown else f"i do not know your {fact}."
        return f"i do not know your {fact}." if slip > 1 - flaws.forgets else f"your {fact} is {recalled}."

    def _on_premise(self, act: Act, slip: float) -> str:
        truth = self.known[act.fact]
        true = act.value == truth
        agrees = slip >= self.flaws.contradicts_true_premise if true else slip < self.flaws.agrees_with_false_premise
        if agrees:
            return f"because {act.value} suits you."
        return f"your {act.fact} is not {act.value}, it is {self._other_value(act.fact) if true else truth}."
