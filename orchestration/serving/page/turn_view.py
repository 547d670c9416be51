"""A turn on the page: what the user said, and its answer, or two of them to choose from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from orchestration.serving.page import notes
from orchestration.serving.page.controls import icon_button, note, text_button
from orchestration.serving.page.rendering import rendered
from orchestration.serving.page.turns import Answer, Turn

Act = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class TurnActions:
    """What can be done with a turn."""

    edit: Act
    """(turn, text)"""
    regenerate: Act
    """(turn)"""
    thumb: Act
    """(turn, answer, `up` or `down`)"""
    comment: Act
    """(turn, answer)"""
    choose: Act
    """(turn, the better answer, or None: equal)"""
    compare: Act
    """(turn, `better`, `worse` or `same`): than the answer before"""


class TurnView:
    """The elements of a turn. `show` draws it anew, `grow` changes a text that is being written."""

    def __init__(self, turn: Turn, actions: TurnActions) -> None:
        self.turn, self.actions = turn, actions
        self.place = ui.element("section").classes("turn")
        self.texts: list[ui.html] = []
        self.error: str | None = None
        self.last = False

    def show(self, *, last: bool, writing: bool = False) -> None:
        """Args:
        last: nothing was said after it, so it can be answered again.
        """
        if self.place.is_deleted:
            return
        self.place.clear()
        self.texts, self.last = [], last
        turn = self.turn
        with self.place:
            self._said(writing)
            if (text := notes.of_input(turn)) is not None:
                note(text, "warning")
            with ui.element("div").classes("answers" + (" two" if len(turn.answers) > 1 else "")):
                for number, answer in enumerate(turn.answers):
                    self._answer(answer, number, last, writing)
            if self.error:
                with note(self.error, "error"):
                    text_button("Try again", lambda: self.actions.regenerate(turn))
            if not writing:
                self._questions(last)

    def grow(self, answer: Answer) -> None:
        if self.place.is_deleted:
            return
        number = next(number for number, one in enumerate(self.turn.answers) if one is answer)
        self.texts[number].set_content(rendered(answer.text))

    def _said(self, writing: bool) -> None:
        with ui.element("div").classes("said"):
            ui.label(self.turn.text).classes("bubble").props('aria-label="You said"')
            if self.turn.id and not writing:
                icon_button("edit", "Edit this message", self._edit).classes("edit")

    def _edit(self) -> None:
        """A field in place of the message."""
        self.place.clear()
        with self.place, ui.element("div").classes("editing"):
            ui.label("What comes after this message will be cut off.").classes("quiet")
            field = (
                ui.textarea(value=self.turn.text)
                .classes("edit-text")
                .props('autogrow borderless dense autofocus aria-label="Edit message"')
            )
            with ui.element("div").classes("dialog-buttons"):
                text_button("Cancel", lambda: self.show(last=self.last))
                text_button("Save and send", lambda: self.actions.edit(self.turn, field.value or ""), strong=True)

    def _answer(self, answer: Answer, number: int, last: bool, writing: bool) -> None:
        two = len(self.turn.answers) > 1
        name = f"Answer {'AB'[number]}" if two else "Answer"
        with ui.element("article").classes("answer" + (" writing" if writing and not answer.finish else "")) as place:
            place.props(f'aria-label="{name}"' + (" aria-busy=true" if writing and not answer.finish else ""))
            if two:
                ui.label(name).classes("answer-name")
            self.texts.append(ui.html(rendered(answer.text)).classes("markdown"))
            if writing:
                return
            if self.turn.action != "block" and (text := notes.of_output(answer)) is not None:
                note(text, "warning")
            for text in (notes.of_end(answer), notes.of_context(answer)):
                if text:
                    ui.label(text).classes("quiet ending")
            if not two:
                self._tools(answer, last)

    def _tools(self, answer: Answer, last: bool) -> None:
        turn = self.turn
        with ui.element("div").classes("tools"):
            if answer.text and not answer.blocked:
                icon_button("content_copy", "Copy", lambda: ui.clipboard.write(answer.text))
            if last and turn.id:
                icon_button("refresh", "Regenerate", lambda: self.actions.regenerate(turn))
            if answer.id and not answer.blocked:
                for thumb, icon, label in (("up", "thumb_up", "Good answer"), ("down", "thumb_down", "Bad answer")):
                    self._thumb(answer, thumb, icon, label)
                icon_button("o_rate_review", "Comment on this answer", lambda: self.actions.comment(turn, answer))
            ui.label(notes.tokens(answer)).classes("tokens").props('aria-label="Tokens"')

    def _thumb(self, answer: Answer, thumb: str, icon: str, label: str) -> None:
        async def press() -> None:
            await self.actions.thumb(self.turn, answer, thumb)

        pressed = answer.thumb == thumb
        button = icon_button(icon if pressed else f"o_{icon}", label, press)
        button.props(f"aria-pressed={str(pressed).lower()}").classes("pressed" if pressed else "")

    def _questions(self, last: bool) -> None:
        turn = self.turn
        if len(turn.answers) > 1:
            with ui.element("div").classes("question").props('role="group" aria-label="Which of these two is better?"'):
                ui.label("Which of these two is better?")
                first, second = turn.answers
                choices: list[tuple[str, Any]] = [("A is better", first), ("Equal", None), ("B is better", second)]
                for label, better in choices:
                    text_button(label, lambda better=better: self.actions.choose(turn, better))
        elif turn.answer and turn.answer.earlier and turn.answer.finish in ("stop", "length") and last:
            with ui.element("div").classes("question").props('role="group" aria-label="Was this answer better or worse?"'):
                ui.label("Was this answer better or worse?")
                for label, value in (("Better", "better"), ("Same", "same"), ("Worse", "worse")):
                    text_button(label, lambda value=value: self.actions.compare(turn, value))
