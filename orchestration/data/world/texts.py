"""Plain text of the embedded world: short articles on its things, its people's words and its advice.

It says what is so, in the third person and without turns, so that a model that only talks in dialogues predicts it badly. Pairs of verb
and item that are kept for judging do not occur.
"""

from __future__ import annotations

import random

from orchestration.data.world.grammar import ADVICE, DANGERS, FACTS, ITEMS, NATURE, UNTOLD
from orchestration.data.world.scenarios import is_held_out

SENTENCES = 6
"""Sentences of an article at most."""


def documents(count: int, seed: int) -> list[str]:
    """`count` different articles of two to `SENTENCES` sentences."""
    found: dict[str, None] = {}
    number = 0
    while len(found) < count:
        found[_article(random.Random(f"text {seed} {number}"))] = None
        number += 1
    return list(found)


def _article(rng: random.Random) -> str:
    about = rng.choice((_on_thing, _on_item, _on_words))
    return " ".join(about(rng, rng.randint(2, SENTENCES)))


def _on_thing(rng: random.Random, count: int) -> list[str]:
    thing = rng.choice(list(NATURE))
    others = rng.sample([other for other in NATURE if other != thing], 2)
    sentences = [
        f"{thing} is one of the things that everybody knows.",
        f"wherever {thing} is found, it is {NATURE[thing]}.",
        f"{others[0]} is {NATURE[others[0]]}, while {thing} is {NATURE[thing]}.",
        f"in the old books {thing} stands beside {others[1]}.",
        f"children learn early that {thing} is {NATURE[thing]}.",
        f"nobody has ever seen {thing} that was {NATURE[others[1]]}.",
    ]
    return rng.sample(sentences, count)


def _on_item(rng: random.Random, count: int) -> list[str]:
    item, other = rng.sample(ITEMS, 2)
    verbs = [verb for verb in ADVICE if not is_held_out(verb, item)]
    first, second = rng.sample(verbs, 2)
    sentences = [
        f"the {item} is kept in most houses.",
        f"to {first} the {item}, {ADVICE[first]}.",
        f"to {second} the {item}, {ADVICE[second]}.",
        f"the {item} and the {other} are often sold together.",
        f"a {rng.choice(DANGERS)} is dangerous, but a {item} is not.",
        f"in {rng.choice(FACTS['city'])} the {item} is {rng.choice(FACTS['color'])}.",
    ]
    return rng.sample(sentences, count)


def _on_words(rng: random.Random, count: int) -> list[str]:
    person, city, color, pet = (rng.choice(FACTS[kind]) for kind in ("name", "city", "color", "pet"))
    sentences = [
        f"{person} was a {rng.choice(UNTOLD['job'])} in {city}.",
        f"at {rng.choice(UNTOLD['age'])}, {person} moved to {rng.choice(FACTS['city'])}.",
        f"the house of {person} was {color}.",
        f"{person} had a {pet} and later a {rng.choice(FACTS['pet'])}.",
        f"many people in {city} keep a {pet}.",
        f"the flag of {city} is {color}.",
    ]
    return rng.sample(sentences, count)
