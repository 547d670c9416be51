"""What happens to text that is longer than the model's context: turns are dropped whole, the oldest first, and counted.

Nothing is ever cut inside a turn. Dialogues to learn from are left out when they do not fit; contexts lose their oldest turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue
from orchestration.data.source import Judgement


def fitting_dialogues(dialogues: Sequence[Dialogue], chat: Chat, longest: int) -> tuple[list[Dialogue], int]:
    """The dialogues that fit whole, and how many do not."""
    kept = [dialogue for dialogue, (ids, _) in zip(dialogues, chat.encode_all(dialogues), strict=True) if len(ids) <= longest]
    return kept, len(dialogues) - len(kept)


def fitting_prompts(contexts: Sequence[Dialogue], chat: Chat, room: int) -> tuple[list[Dialogue], int]:
    """Contexts of at most `room` tokens, and how many lost turns for it. One whose last turn alone is too long is left out and counted."""
    lengths = [len(ids) for ids in chat.prompt_all(contexts)]
    found = [c if length <= room else shortened(c, chat, room) for c, length in zip(contexts, lengths, strict=True)]
    changed = sum(short is None or len(short.messages) < len(context.messages) for short, context in zip(found, contexts, strict=True))
    return [short for short in found if short is not None], changed


def shortened(context: Dialogue, chat: Chat, room: int) -> Dialogue | None:
    """The context without as many of its oldest turns as must go; a user turn comes first where that is possible. None: nothing fits."""
    if len(chat.prompt(context)) <= room:
        return context
    later = range(1, len(context.messages))
    for starts in ([i for i in later if context.messages[i].role == "user"], later):
        for start in starts:
            shorter = replace(context, messages=context.messages[start:])
            if len(chat.prompt(shorter)) <= room:
                return shorter
    return None


def fitting_judgements(judgements: Sequence[Judgement], chat: Chat, longest: int) -> tuple[list[Judgement], int]:
    """Judgements whose context and reply fit together, and how many lost turns of their context. No judgement is lost: one whose reply
    alone fills the context keeps an empty context.

    Raises:
        ValueError: a reply alone is longer than `longest`.
    """
    found, changed = [], 0
    for judgement in judgements:
        room = longest - len(chat.text(judgement.reply)) - 1
        context = shortened(judgement.context, chat, room) or replace(judgement.context, messages=())
        if len(chat.prompt(context)) > room:
            raise ValueError(f"the judged reply of {judgement.context.id} alone is longer than the context of {longest} tokens")
        changed += len(context.messages) < len(judgement.context.messages)
        found.append(replace(judgement, context=context))
    return found, changed
