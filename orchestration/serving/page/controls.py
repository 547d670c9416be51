"""The page's small parts, all with a name for screen readers and a visible focus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui


def icon_button(icon: str, label: str, on_click: Callable[..., Any]) -> ui.button:
    """A round button that shows an icon; its label is its tooltip."""
    button = ui.button(icon=icon, on_click=on_click, color=None).props(f'flat round dense aria-label="{label}"').classes("icon-button")
    with button:
        ui.tooltip(label).props("delay=500")
    return button


def named(button: ui.button, icon: str, label: str) -> None:
    """Another icon and label for a button that changes what it does."""
    button.props(f'icon={icon} aria-label="{label}"')
    for child in button.default_slot.children:
        if isinstance(child, ui.tooltip):
            child.set_text(label)


def note(text: str, kind: str = "info") -> ui.element:
    """A short notice: `info`, `warning` or `error`."""
    icons = {"info": "info", "warning": "warning_amber", "error": "error_outline"}
    with ui.element("div").classes(f"note note-{kind}").props('role="note"') as found:
        ui.icon(icons[kind]).props("aria-hidden=true")
        ui.label(text)
    return found


def text_button(label: str, on_click: Callable[..., Any], *, strong: bool = False) -> ui.button:
    return (
        ui.button(label, on_click=on_click, color=None).props("no-caps unelevated").classes("button-strong" if strong else "button-plain")
    )
