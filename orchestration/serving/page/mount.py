"""Puts the chat page into the service's app.

NiceGUI keeps a page's state in the process that sent it, and its app is one for the process. So a process has one chat page at a time, and
requests of a browser must always reach the same process (CONTRIBUTING.md says what follows for Ray Serve).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nicegui
from fastapi import FastAPI
from nicegui import ui
from starlette.requests import Request
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestration.serving.page.chat import ChatPage
from orchestration.serving.page.sessions import Sessions
from orchestration.serving.page.sign_in import sign_in

STATIC = Path(__file__).parent / "static"
PATHS = re.compile(r"/(c/[A-Za-z0-9_-]{1,64}|favicon\.ico|_nicegui/.*|_nicegui_ws/.*|_chatray/.*)?")
"""What belongs to the page; every other path is the API's, with its own 404."""
POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Vue compiles templates in the browser ('unsafe-eval') and NiceGUI styles elements in place ('unsafe-inline'). A script that stands in
the page runs only with the nonce that the page was sent with, so markup that slipped in cannot run one."""
SCRIPT = re.compile(rb"<script(?=[\s>])")
OUTER = "chatray.app"
"""In a request's scope: our app, where `app` is NiceGUI's by then."""
SESSION_SECONDS = 12 * 3600
RECONNECT_SECONDS = 5.0


def add_page(app: FastAPI) -> None:
    """The chat page at `/`, and a conversation's page at `/c/ID`, of the service that stands in `app.state` when a page is asked for. Call
    it last: it is tried after the app's own routes. Several apps of a process may have it, one after the other."""
    host, own = _host(), app.router.lifespan_context
    app.state.sessions = Sessions(lambda: app.state.service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Any]:
        if nicegui.app.is_started:
            raise RuntimeError("a chat page is being served in this process already; NiceGUI's state is one for the process")
        async with host.router.lifespan_context(host), own(app) as state:
            yield state

    app.router.lifespan_context = lifespan
    app.routes.append(PageMount(app))


@functools.cache
def _host() -> FastAPI:
    """NiceGUI's app with our pages; it is configured once in a process. What it is mounted in here only starts and stops it: that mount
    takes every path, `PageMount` takes the page's."""

    async def index(request: Request) -> None:
        await _build(request, None)

    async def conversation(request: Request, name: str) -> None:
        await _build(request, name)

    ui.page("/", title="chatray")(index)
    ui.page("/c/{name}", title="chatray")(conversation)
    nicegui.app.add_static_files("/_chatray", STATIC)
    host = FastAPI()
    ui.run_with(
        host, title="chatray", favicon=STATIC / "icon.svg", dark=None, language="en-GB", tailwind=False, show_welcome_message=False,
        reconnect_timeout=RECONNECT_SECONDS, storage_secret=secrets.token_hex(32),
        session_middleware_kwargs={"session_cookie": "chatray_session", "max_age": SESSION_SECONDS, "same_site": "strict"},
    )  # fmt: skip
    return host


async def _build(request: Request, conversation: str | None) -> None:
    sessions: Sessions = request.scope[OUTER].state.sessions
    ui.add_head_html(f'<link rel="stylesheet" href="/_chatray/page.css?{_version("page.css")}">')
    ui.add_head_html(f'<script defer src="/_chatray/page.js?{_version("page.js")}"></script>')
    ui.add_head_html('<meta name="robots" content="noindex">')
    owner = sessions.owner(request.session["id"])
    if owner is None:
        sign_in(request, sessions)
    else:
        await ChatPage(owner, sessions, request).build(conversation)


def _version(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]


class PageMount(Mount):
    """A mount that takes the page's paths alone, and these only where the settings want a page."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__("/", app=Policy(nicegui.app))
        self.outer = app

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        service = self.outer.state.service
        if service is None or not service.settings.page or not PATHS.fullmatch(scope.get("path", "")):
            return Match.NONE, {}
        match, child = super().matches(scope)
        return match, {**child, OUTER: self.outer}


class Policy:
    """Sends the page with a content-security-policy of its own, and its scripts with the nonce."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        start: Message | None = None
        body = b""

        async def sent(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                if not _is_page(message):
                    await send(message)
                    return
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    page = SCRIPT.sub(f'<script nonce="{nonce}"'.encode(), body)
                    await send({**start, "headers": _headers(start, nonce, len(page))})
                    await send({"type": "http.response.body", "body": page})

        if not scope["path"].startswith(("/_nicegui", "/_chatray")):  # those are compressed as NiceGUI sees fit; the page must be read
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]}
        await self.app(scope, receive, sent)


def _is_page(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in start["headers"])


def _headers(start: Message, nonce: str, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    policy = POLICY.format(nonce=nonce).encode()
    return [*kept, (b"content-length", str(length).encode()), (b"content-security-policy", policy)]
