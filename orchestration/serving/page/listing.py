"""The list of conversations."""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nicegui import ui

from orchestration.serving.page.controls import icon_button, text_button
from orchestration.serving.store.records import Conversation


def age(created: float, today: datetime.date) -> str:
    """The heading a conversation stands under."""
    days = (today - datetime.datetime.fromtimestamp(created).date()).days
    return "Today" if days <= 0 else "Last 7 days" if days <= 7 else "Earlier"


class Listing:
    """Conversations, newest first, by age."""

    def __init__(self, place: ui.element, open_: Callable[[str], Awaitable[None]], delete: Callable[[str], Awaitable[None]]) -> None:
        self.place, self.open, self.delete = place, open_, delete

    def show(self, conversations: Sequence[Conversation], current: str | None, steps: Sequence[tuple[str, Callable[[], Any]]] = ()) -> None:
        """Draw the list anew.

        Args:
            steps: what leads to other parts of the list.
        """
        self.place.clear()
        heading = ""
        with self.place:
            for conversation in conversations:
                if (over := age(conversation.created, datetime.date.today())) != heading:
                    heading = over
                    ui.label(heading).classes("list-heading")
                self._item(conversation, conversation.id == current)
            if not conversations:
                ui.label("Conversations appear here.").classes("quiet list-empty")
            for label, step in steps:
                text_button(label, step)

    def _item(self, conversation: Conversation, current: bool) -> None:
        title = conversation.title or "Untitled"
        with ui.element("div").classes("item" + (" item-current" if current else "")):
            ui.button(title, on_click=lambda: self.open(conversation.id), color=None).props(
                "flat no-caps align=left" + (" aria-current=page" if current else "")
            ).classes("item-open")  # fmt: skip
            icon_button("delete_outline", "Delete this conversation", lambda: self._confirm(conversation)).classes("item-delete")

    async def _confirm(self, conversation: Conversation) -> None:
        with ui.dialog() as dialog, ui.card().classes("dialog"):
            ui.label("Delete this conversation?").classes("dialog-title")
            ui.label("Its messages, and all feedback on them, are deleted on the server too.").classes("quiet")
            with ui.element("div").classes("dialog-buttons"):
                text_button("Cancel", lambda: dialog.submit(False))
                text_button("Delete", lambda: dialog.submit(True), strong=True)
        agreed = await dialog
        dialog.delete()
        if agreed:
            await self.delete(conversation.id)
