"""What happens to text that is longer than the model's context: turns are left out whole, the oldest first, and counted.

Nothing is ever cut inside a turn. Dialogues to learn from are left out when they do not fit, or keep their end (`sft.too_long`);
contexts of prompts, comparisons and judgements lose their oldest turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, Literal, NamedTuple, TypeVar

from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue
from orchestration.data.preferences import Comparison, Judgement

T = TypeVar("T")


class Fitted(NamedTuple, Generic[T]):
    """What fits, and what that took."""

    kept: list[T]
    shortened: int
    """Of those kept: how many lost their oldest turns."""
    left_out: int
    """How many do not fit even so."""


def fitting_dialogues(
    dialogues: Sequence[Dialogue], chat: Chat, longest: int, rule: Literal["drop", "keep_end"] = "drop"
) -> Fitted[Dialogue]:
    """Dialogues of at most `longest` tokens. `keep_end`: a longer one keeps its last turns, if there is an assistant's among them."""

    def fits(dialogue: Dialogue) -> bool:
        return bool(dialogue.assistant_turns()) and len(chat.encode(dialogue)[0]) <= longest

    lengths = [len(ids) for ids, _ in chat.encode_all(dialogues)]
    found = [
        d if length <= longest else last_turns(d, fits) if rule == "keep_end" else None
        for d, length in zip(dialogues, lengths, strict=True)
    ]
    return _counted(found, [length > longest for length in lengths])


def fitting_prompts(contexts: Sequence[Dialogue], chat: Chat, room: int) -> Fitted[Dialogue]:
    """Contexts of at most `room` tokens. One whose last turn alone is too long is left out."""
    lengths = [len(ids) for ids in chat.prompt_all(contexts)]
    found = [c if length <= room else shortened(c, chat, room) for c, length in zip(contexts, lengths, strict=True)]
    return _counted(found, [length > room for length in lengths])


def _counted(found: Sequence[T | None], too_long: Sequence[bool]) -> Fitted[T]:
    kept = [one for one in found if one is not None]
    left_out = len(found) - len(kept)
    return Fitted(kept, sum(too_long) - left_out, left_out)


def shortened(context: Dialogue, chat: Chat, room: int) -> Dialogue | None:
    """The context without as many of its oldest turns as must go; a user turn comes first where that is possible. None: nothing fits."""
    if len(chat.prompt(context)) <= room:
        return context
    return last_turns(context, lambda shorter: len(chat.prompt(shorter)) <= room)


def last_turns(dialogue: Dialogue, fits: Callable[[Dialogue], bool]) -> Dialogue | None:
    """The most of a dialogue's last turns that fit, from a user turn on where that is possible."""
    later = range(1, len(dialogue.messages))
    for starts in ([i for i in later if dialogue.messages[i].role == "user"], later):
        for start in starts:
            shorter = replace(dialogue, messages=dialogue.messages[start:])
            if fits(shorter):
                return shorter
    return None


def fitting_judgements(judgements: Sequence[Judgement], chat: Chat, longest: int) -> Fitted[Judgement]:
    """Judgements whose context and reply fit together. One whose reply alone fills the context keeps an empty context."""
    rooms = [longest - len(ids) - 1 for ids in chat.texts([j.reply for j in judgements])]
    contexts = _before_replies([j.context for j in judgements], rooms, chat)
    found = [None if c is None else replace(j, context=c) for j, c in zip(judgements, contexts, strict=True)]
    return _counted(found, _lost_turns([j.context for j in judgements], contexts))


def fitting_comparisons(comparisons: Sequence[Comparison], chat: Chat, longest: int) -> Fitted[Comparison]:
    """Comparisons whose context fits with the longest of its answers; all answers keep the same context, empty if it must be."""
    lengths = iter(map(len, chat.texts([answer for c in comparisons for answer in c.answers])))
    rooms = [longest - max(next(lengths) for _ in c.answers) - 1 for c in comparisons]
    contexts = _before_replies([c.context for c in comparisons], rooms, chat)
    found = [None if context is None else replace(c, context=context) for c, context in zip(comparisons, contexts, strict=True)]
    return _counted(found, _lost_turns([c.context for c in comparisons], contexts))


def _before_replies(contexts: Sequence[Dialogue], rooms: Sequence[int], chat: Chat) -> list[Dialogue | None]:
    """Each context in its room, without turns if no turn fits; None where not even the opening of a reply does."""
    found: list[Dialogue | None] = []
    lengths = [len(ids) for ids in chat.prompt_all(contexts)]
    for context, room, length in zip(contexts, rooms, lengths, strict=True):
        short = context if length <= room else shortened(context, chat, room) or replace(context, messages=())
        found.append(short if len(chat.prompt(short)) <= room else None)
    return found


def _lost_turns(contexts: Sequence[Dialogue], found: Sequence[Dialogue | None]) -> list[bool]:
    return [short is None or len(short.messages) < len(context.messages) for context, short in zip(contexts, found, strict=True)]
