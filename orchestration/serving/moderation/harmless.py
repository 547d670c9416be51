"""Everyday texts that no category is true of, from the data that models are trained on: so that a classifier learned from public forums does
not take a short question for an attack.

    harmless=everyday,world,instructions:PATH,messages:PATH,taskmaster:PATH

`everyday` is what chats open and close with, `world` the embedded world's turns.
"""

from __future__ import annotations

import random
from pathlib import Path

from conf.sources import Flaws, Part
from orchestration.contradictions import part_files
from orchestration.data.dialogues import Dialogue
from orchestration.data.formats.reading import sample_of
from orchestration.data.rows import BadRow, rows_of
from orchestration.data.world.grammar import DANGERS
from orchestration.data.world.scenarios import demonstrations
from orchestration.errors import RequestError

EVERYDAY = (
    ("hello", "hi", "hey", "good morning", "good evening", "hi there", "hello again"),
    ("", ", how are you?", ", how is it going?", ", can you help me?", ", who are you?", ", what can you do?", "! nice to meet you."),
)
"""Openings, and what follows them."""
SHORT = (
    "thanks", "thank you so much!", "ok", "okay, got it", "yes please", "no, thank you", "please go on", "can you explain that again?",
    "what do you mean?", "that is not what i asked", "i do not understand you", "you are right", "you are very kind", "you helped me a lot",
    "i love your answer", "are you a robot?", "do you like music?", "what is your name?", "where are you from?", "tell me a joke",
    "tell me about yourself", "i am tired today", "i feel much better now", "my mother is ill", "my dog died last year", "see you tomorrow",
    "bye", "good night", "sorry, i made a mistake", "could you make it shorter?", "write it in french", "what is the time in tokyo?",
)  # fmt: skip
MOST = 100
"""Texts of each source at most."""
FORMATS = ("messages", "instructions", "taskmaster")
LONGEST_ROW, TOOL_RESPONSE = 1 << 23, 160
NO_FLAWS = Flaws(**dict.fromkeys(Flaws.__dataclass_fields__, 0.0))


def read_harmless(given: str, seed: int = 0) -> list[str]:
    """Texts from sources as in the module's docstring; different ones, at most `MOST` of each, whatever its size.

    Raises:
        RequestError: an unknown format, no such file, or a row of another form.
    """
    found: list[str] = []
    for source in filter(None, given.split(",")):
        name, _, path = source.partition(":")
        if name == "everyday" and not path:
            found += [*SHORT, *(first + second for first in EVERYDAY[0] for second in EVERYDAY[1])]
            continue
        if name == "world" and not path:
            dialogues = [d for d in demonstrations(MOST, seed, NO_FLAWS) if not _dangerous(d)]
        elif name in FORMATS and path:
            dialogues = _read(name, path)
        else:
            raise RequestError(f"harmless={source}: give everyday, world, or one of {', '.join(FORMATS)} with a path after a colon")
        turns = sorted({m.content for d in dialogues for m in d.messages if m.role in ("user", "assistant")})
        found += random.Random(f"harmless {seed}").sample(turns, min(MOST, len(turns)))
    return found


def _read(name: str, path: str) -> list[Dialogue]:
    part = Part(format=name, path=str(Path(path).resolve()))  # type: ignore[arg-type]
    found: list[Dialogue] = []
    for files in part_files(part).values():
        for file in files:
            for row in rows_of(file, LONGEST_ROW):
                sample = row if isinstance(row, BadRow) else sample_of(row, part, f"{file.name}:{row.line}", TOOL_RESPONSE)
                if isinstance(sample, BadRow):
                    raise RequestError(f"harmless={name}:{path}: {sample}")
                found += sample.demonstrations
    if not found:
        raise RequestError(f"harmless={name}:{path}: no dialogue in it")
    return found


def _dangerous(dialogue: Dialogue) -> bool:
    return any(danger in message.content for message in dialogue.messages for danger in DANGERS)
