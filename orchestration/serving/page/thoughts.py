"""What the user thinks of answers: written to the store as feedback, with the consent that stands at the time."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui

from orchestration.serving.page.backend import Backend
from orchestration.serving.page.controls import text_button
from orchestration.serving.page.turns import Answer, Turn

LONGEST = 20_000
"""Characters of a comment or a better answer."""


class Thoughts:
    """Feedback on the answers of one conversation."""

    def __init__(self, backend: Backend, consent: Callable[[], bool]) -> None:
        self.backend, self.consent = backend, consent

    async def thumb(self, conversation: str, turns: list[Turn], turn: Turn, answer: Answer, value: str) -> None:
        """Set a thumb; the same one again takes it back."""
        [name] = await self.backend.record(conversation, turns, turn, answer)
        if answer.thumb == value:
            await self.backend.take_back("thumbs", name)
            answer.thumb = None
        else:
            await self.backend.feedback("thumbs", [name], value, self.consent())
            answer.thumb = value

    async def say(self, conversation: str, turns: list[Turn], turn: Turn, answer: Answer, comment: str, better: str) -> None:
        """A comment, and what a better answer would have been; either may be empty."""
        if not comment.strip() and not better.strip():
            return
        [name] = await self.backend.record(conversation, turns, turn, answer)
        if comment.strip():
            await self.backend.feedback("comment", [name], comment[:LONGEST], self.consent())
        if better.strip():
            await self.backend.feedback("edit", [name], better[:LONGEST], self.consent())

    async def prefer(self, conversation: str, turns: list[Turn], turn: Turn, pair: tuple[Answer, Answer], better: Answer | None) -> None:
        """Which of two answers to the same prompt is better; None: neither."""
        first, second = await self.backend.record(conversation, turns, turn, *pair)
        value = "tie" if better is None else first if better is pair[0] else second
        await self.backend.feedback("choice", [first, second], value, self.consent())


async def ask_for_words() -> tuple[str, str] | None:
    """A dialog for a comment and a better answer; None: it was closed."""
    with ui.dialog() as dialog, ui.card().classes("dialog"):
        ui.label("What do you think of this answer?").classes("dialog-title")
        props = 'autogrow outlined aria-label="{0}" maxlength=20000'
        comment = ui.textarea(placeholder="A comment").props(props.format("Comment") + " autofocus").classes("dialog-field")
        better = (
            ui.textarea(placeholder="What would have been a better answer? (optional)")
            .props(props.format("Better answer"))
            .classes("dialog-field")
        )
        with ui.element("div").classes("dialog-buttons"):
            text_button("Cancel", lambda: dialog.submit(None))
            text_button("Send", lambda: dialog.submit((comment.value or "", better.value or "")), strong=True)
    found = await dialog
    dialog.delete()
    return found
