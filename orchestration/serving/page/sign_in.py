"""Where the service has keys: the page that asks for one. The key is checked and forgotten; the session remembers whose it was."""

from __future__ import annotations

from nicegui import ui
from nicegui.events import GenericEventArguments
from starlette.requests import Request

from orchestration.serving.errors import ApiError
from orchestration.serving.page.controls import note, text_button
from orchestration.serving.page.sessions import Sessions
from orchestration.serving.page.theme import Theme

READ = '(e) => { const field = document.querySelector(".key-field input"); const key = field.value; field.value = ""; emit(key); }'
"""The field is no element of the server's: what is typed goes over the wire once, and stays in no element's state."""
READ_ON_ENTER = f'(e) => {{ if (e.key !== "Enter") return; ({READ})(e); }}'


def sign_in(request: Request, sessions: Sessions) -> None:
    """Build the page."""
    Theme(request)

    def enter(event: GenericEventArguments) -> None:
        failed.clear()
        try:
            sessions.sign_in(request.session["id"], str(event.args).strip()[:512])
        except ApiError as error:
            with failed:
                note(error.message if error.status != 401 else "This API key is not valid. Check it and enter it again.", "error")
            return
        ui.navigate.reload()

    with ui.element("main").classes("sign-in"):
        ui.label("chatray").classes("brand")
        ui.label("Sign in").classes("sign-in-title").props('role="heading" aria-level="1"')
        ui.label("This server asks for an API key. Whoever runs it makes one with chatray key.").classes("quiet")
        with ui.element("div").classes("key-field"):
            ui.element("input").props(
                'type="password" name="api-key" aria-label="API key" placeholder="API key" autocomplete="off" spellcheck="false" autofocus'
            ).on("keydown", enter, js_handler=READ_ON_ENTER)
        failed = ui.element("div").props('role="alert"')
        text_button("Continue", lambda: None, strong=True).on("click", enter, js_handler=READ).classes("sign-in-button")
