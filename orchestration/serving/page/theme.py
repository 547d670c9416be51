"""Dark or light: as the system says, until somebody chooses. The browser remembers the choice in a cookie."""

from __future__ import annotations

from nicegui import ui
from starlette.requests import Request

from orchestration.serving.page.controls import icon_button, named

COOKIE = "chatray_theme"
ORDER = ("system", "light", "dark")
DARK = {"system": None, "light": False, "dark": True}
ICONS = {"system": "contrast", "light": "light_mode", "dark": "dark_mode"}
LABELS = {"system": "Theme: as the system", "light": "Theme: light", "dark": "Theme: dark"}


ACCENT = "#14857b"
"""The library's own accents, such as the border of a field with the focus; readable on both grounds."""


def remember(cookie: str, value: str) -> None:
    """Set a cookie of the page for a year. It holds a setting, nothing about anybody."""
    ui.run_javascript(f'document.cookie = "{cookie}={value}; path=/; max-age=31536000; samesite=strict"')


class Theme:
    """The page's colours."""

    def __init__(self, request: Request) -> None:
        chosen = request.cookies.get(COOKIE, "system")
        self.chosen = chosen if chosen in ORDER else "system"
        ui.colors(primary=ACCENT)
        self.dark = ui.dark_mode(DARK[self.chosen])
        self.buttons: list[ui.button] = []

    def button(self) -> ui.button:
        button = icon_button(ICONS[self.chosen], LABELS[self.chosen], self.next)
        self.buttons.append(button)
        return button

    def next(self) -> None:
        """From system to light to dark and round again."""
        self.chosen = ORDER[(ORDER.index(self.chosen) + 1) % len(ORDER)]
        self.dark.value = DARK[self.chosen]
        for button in self.buttons:
            named(button, ICONS[self.chosen], LABELS[self.chosen])
        remember(COOKIE, self.chosen)
