"""The page's frame: bar, list of conversations, the conversation, and the composer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from orchestration.serving.page.controls import icon_button, named, text_button
from orchestration.serving.page.theme import Theme

SEND_ON_ENTER = """(e) => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
  e.preventDefault();
  emit(e.target.value);
}"""


@dataclass
class Actions:
    """What the frame's controls do."""

    send: Callable[[str], Any]
    stop: Callable[[], Any]
    new: Callable[[], Any]
    consent: Callable[[bool], Any]
    compare: Callable[[bool], Any]
    earlier: Callable[[], Any]
    sign_out: Callable[[], Any] | None


class Layout:
    """The frame's parts that change."""

    def __init__(self, theme: Theme, models: list[str], actions: Actions, name: str | None, consent: bool) -> None:
        self.actions, self.writing = actions, False
        self.drawer = ui.left_drawer(top_corner=True, bottom_corner=True).classes("side").props('width=280 aria-label="Conversations"')
        self._bar(theme, models)
        self._side(name, consent)
        with ui.element("main").classes("middle").props('id="conversation"'):
            self.empty = ui.element("div").classes("empty")
            with self.empty:
                ui.icon("forum").classes("empty-icon").props("aria-hidden=true")
                ui.label("How can I help?").classes("empty-title").props('role="heading" aria-level="1"')
                ui.label("Answers can be wrong. Check what matters.").classes("quiet")
            self.earlier = text_button("Earlier messages", actions.earlier)
            self.turns = ui.element("div").classes("turns").props('role="log" aria-label="Conversation" aria-live="off"')
        self._composer()
        ui.on("chatray_stop", actions.stop)

    def _bar(self, theme: Theme, models: list[str]) -> None:
        with ui.header().classes("bar").props('role="banner"'):
            icon_button("menu", "Conversations", self.drawer.toggle)
            self.model = ui.select(models, value=models[0] if models else None).classes("model").props(
                'dense borderless options-dense aria-label="Model"'
            )  # fmt: skip
            ui.space()
            self.compare = ui.switch("Two answers", on_change=lambda event: self.actions.compare(bool(event.value))).classes("compare")
            self.compare.props('dense aria-label="Two answers to choose from"')
            with self.compare:
                ui.tooltip("Ask for two answers and say which is better").props("delay=500")
            theme.button()

    def _side(self, name: str | None, consent: bool) -> None:
        with self.drawer:
            with ui.element("div").classes("side-top"):
                ui.label("chatray").classes("brand")
                text_button("New chat", self.actions.new, strong=True).classes("new-chat").props("icon=add")
            self.list = ui.element("nav").classes("conversations").props('aria-label="Earlier conversations"')
            with ui.element("div").classes("side-bottom"):
                self.consent = (
                    ui.checkbox(
                        "My feedback may be used to train the model",
                        value=consent,
                        on_change=lambda event: self.actions.consent(bool(event.value)),
                    )
                    .props("dense")
                    .classes("consent")
                )
                if self.actions.sign_out:
                    with ui.element("div").classes("who"):
                        ui.label(f"Signed in as {name}").classes("quiet")
                        text_button("Sign out", self.actions.sign_out)

    def _composer(self) -> None:
        with ui.footer().classes("foot").props('role="contentinfo"'), ui.element("div").classes("foot-inner"):
            self.notices = ui.element("div").classes("notices").props('role="alert"')
            with ui.element("div").classes("composer"):
                self.text = ui.textarea(placeholder="Write a message").classes("composer-text").props(
                    'autogrow borderless dense autofocus aria-label="Message" enterkeyhint="send" maxlength=400000'
                ).on("keydown", lambda event: self.actions.send(str(event.args)), js_handler=SEND_ON_ENTER)  # fmt: skip
                self.button = icon_button("arrow_upward", "Send", self._pressed).classes("send")
            ui.label("Enter sends, Shift+Enter starts a new line, Esc stops.").classes("hint")
            self.status = ui.label().classes("unseen").props('role="status" aria-live="polite"')

    def _pressed(self) -> Any:
        return self.actions.stop() if self.writing else self.actions.send(self.text.value or "")

    def focus(self) -> None:
        """Give the composer the focus, unless something else has it."""
        self.text.client.run_javascript("chatray.focus()")

    def busy(self, writing: bool) -> None:
        """Whether an answer is being written: the button then stops it."""
        self.writing = writing
        named(self.button, "stop" if writing else "arrow_upward", "Stop" if writing else "Send")
        self.button.classes(add="stop" if writing else "", remove="" if writing else "stop")
