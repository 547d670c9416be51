"""The one dialogue form every source is turned into.

A dialogue is a list of messages, each with a role of `system`, `user`, `assistant` or `tool`. Everything downstream (the chat
template, the loss mask, prompts for PPO, comparisons) sees only this form.
"""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    scripted: bool = False
    """True for an assistant turn that is part of the task (a planted mistake): neither learned from nor replaced by a model's."""

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Dialogue:
    id: str
    messages: tuple[Message, ...]
    source: str = ""
    """The part of a mixture that it belongs to."""

    def assistant_turns(self) -> list[int]:
        """Indices of the messages the assistant wrote, without those that are part of the task."""
        return [i for i, message in enumerate(self.messages) if message.role == "assistant" and not message.scripted]

    def before(self, turn: int) -> Dialogue:
        """The context of message `turn`: all that stands before it."""
        return Dialogue(f"{self.id}@{turn}", self.messages[:turn])

    def answered(self, reply: str) -> Dialogue:
        """This context with an assistant reply after it."""
        return Dialogue(self.id, (*self.messages, Message("assistant", reply)))

    def as_list(self) -> list[dict[str, str]]:
        return [message.as_dict() for message in self.messages]


def from_list(identifier: str, messages: list[dict[str, str]]) -> Dialogue:
    """The inverse of `Dialogue.as_list`."""
    return Dialogue(identifier, tuple(Message(m["role"], m["content"]) for m in messages))
