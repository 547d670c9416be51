"""What the page shows of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestration.serving.moderation.verdict import Action, Verdict

STOPPED = "abandoned"
"""How a reply ended that the user stopped, as the service notes it."""


@dataclass(eq=False)
class Answer:
    """A reply, while it is written and afterwards."""

    text: str = ""
    model: str = ""
    version: str = ""
    """Of the model's checkpoint."""
    finish: str | None = None
    """As in the API; `abandoned`: stopped; None: it is being written, or it failed."""
    action: Action = "allow"
    """What moderation did with it."""
    categories: tuple[str, ...] = ()
    written: int | None = None
    """Tokens; None: not known any more."""
    read: int | None = None
    """Tokens of the prompt."""
    dropped: int = 0
    """Earlier turns that did not fit into the model's context."""
    id: str | None = None
    """Of the message in the store."""
    recorded: str | None = None
    """Of the answer that feedback names; None: nobody thought anything of it yet."""
    thumb: str | None = None
    """`up`, `down` or None."""
    earlier: Answer | None = None
    """The answer that this one was written instead of, while nobody has said which is better."""

    @property
    def blocked(self) -> bool:
        return self.finish == "content_filter"

    def judge(self, verdict: Verdict) -> None:
        self.action, self.categories = verdict.action, verdict.categories


@dataclass(eq=False)
class Turn:
    """What the user said, and what came back: one answer, or two to choose from."""

    text: str
    id: str | None = None
    action: Action = "allow"
    """What moderation did with the user's text."""
    categories: tuple[str, ...] = ()
    answers: list[Answer] = field(default_factory=list)

    @property
    def answer(self) -> Answer | None:
        return self.answers[0] if self.answers else None

    @property
    def told(self) -> bool:
        """The model reads this turn again when the conversation goes on."""
        return self.action != "block"


def turns_of(messages: list[Any]) -> list[Turn]:
    """Turns of stored messages, oldest first. What neither user nor assistant said is not shown."""
    turns: list[Turn] = []
    for message in messages:
        extra = message.extra or {}
        action, categories = extra.get("moderation", "allow"), tuple(extra.get("categories", ()))
        if message.role == "user":
            turns.append(Turn(message.content, message.id, action, categories))
        elif message.role == "assistant" and turns:
            turns[-1].answers = [
                Answer(
                    message.content, message.model or "", extra.get("version", ""), extra.get("finish"), action, categories,
                    id=message.id,
                )
            ]  # fmt: skip
    return turns


def prompt_of(turns: list[Turn], last: Turn) -> list[dict[str, str]]:
    """What an answer to `last` answers, as its user can see it: for feedback, which is learned from."""
    found = []
    for turn in turns[: turns.index(last)]:
        if turn.told and turn.answer:
            found.append({"role": "user", "content": turn.text})
            if not turn.answer.blocked:
                found.append({"role": "assistant", "content": turn.answer.text})
    return [*found, {"role": "user", "content": last.text}]


def title_of(text: str, longest: int = 60) -> str:
    """A conversation's title from its first message."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[:longest].rsplit(" ", 1)[0].rstrip(".,;: ") + "…"
