"""What of a conversation the model reads when it is longer than the context.

The system message and the latest turns stay; the oldest turns go, whole ones only, and what then comes first is a user's turn where that
is possible. The room for the reply is kept free. What is hidden is in every prompt, and never counted in what a client is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue, Message
from orchestration.serving.errors import ApiError
from orchestration.serving.prompts import HiddenPrompt


@dataclass(frozen=True)
class Window:
    """A prompt that fits."""

    ids: list[int]
    tokens: int
    """Of these, how many the client knows of: all but the hidden prompt's."""
    dropped: int
    """Turns that were left out."""


def fitted(messages: tuple[Message, ...], chat: Chat, hidden: HiddenPrompt, room: int) -> Window:
    """The most of the conversation that fits into `room` tokens.

    Raises:
        ApiError: its last turn alone does not.
    """
    head = messages[:1] if messages and messages[0].role == "system" else ()
    turns = messages[len(head) :]
    starts = _starts(turns)
    ids, low, high = _ids(messages, chat, hidden), 0, len(starts) - 1
    while len(ids) > room and low < high:  # the fewest dropped turns that fit: prompts get shorter from start to start
        middle = (low + high) // 2
        low, high = (low, middle) if len(_ids(head + turns[starts[middle] :], chat, hidden)) <= room else (middle + 1, high)
    kept = head + turns[starts[low] :]
    ids = _ids(kept, chat, hidden) if low else ids
    visible = len(chat.prompt(Dialogue("", kept))) if hidden else len(ids)
    if len(ids) > room:
        most = max(room - (len(ids) - visible), 0)
        raise ApiError(
            400, f"This model's context leaves {most} tokens for the prompt; the system message and the last turn have {visible}.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip
    return Window(ids, visible, starts[low])


def _ids(messages: tuple[Message, ...], chat: Chat, hidden: HiddenPrompt) -> list[int]:
    return chat.prompt(Dialogue("", hidden.around(messages)))


def _starts(turns: tuple[Message, ...]) -> list[int]:
    """Where the kept part may begin: at a user's turn, or anywhere if there is none."""
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    return sorted({0, *(users or range(len(turns)))})
