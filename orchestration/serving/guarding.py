"""What every request passes before an endpoint sees it: headers, the size of its body, its key, its rate."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestration.serving.errors import ApiError
from orchestration.serving.keys import is_loopback
from orchestration.serving.service import Service

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
"""An answer that sets one of them itself keeps its own: the chat page needs another content-security-policy."""
OPEN_PATHS = ("/health",)
"""Answered without a key."""
UNLIMITED = ("/health", "/metrics")
QUERY_BYTES, HEADER_BYTES, HEADERS = 8192, 65_536, 200
"""What requests of browsers and libraries stay far below, and servers in front of this one let through."""
DIGITS = 18
"""Of a length that a computer can have."""


class Guarding:
    """The layer around all endpoints."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service | None = scope["app"].state.service
        if scope["type"] == "websocket" and service is not None and not _named_as_here(scope, service):
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or service is None:  # else the page's websocket, which knows its page by an unguessable name
            await self.app(scope, receive, send)
            return
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message.get("headers", [])}
                extra = [(name, value) for name, value in SECURITY_HEADERS if name not in given]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            try:
                self._admit(scope, service)
                await self.app(scope, _limited(scope, receive, service.settings.limits.body_bytes), sent)
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers())(scope, receive, sent)
        finally:
            route = scope.get("route")
            service.metrics.count("chatray_requests", path=getattr(route, "path", "other"), status=str(status))

    def _admit(self, scope: Scope, service: Service) -> None:
        if len(scope["query_string"]) > QUERY_BYTES or len(scope["path"]) > QUERY_BYTES:
            raise ApiError(414, f"The address is longer than the {QUERY_BYTES} bytes that this server reads.", code="address_too_long")
        if len(scope["headers"]) > HEADERS or sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise ApiError(
                431, f"The headers are more than the {HEADERS}, or {HEADER_BYTES} bytes, that this server reads.", code="headers_too_large"
            )
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not _named_as_here(scope, service):
            raise ApiError(
                421, "Without API keys this server answers under this machine's own names alone, such as localhost.", code="wrong_host"
            )
        if scope["path"] in OPEN_PATHS or not self._guarded(scope["path"]):
            scope["chatray.owner"] = service.keys.everybody
            return
        owner = service.keys.owner(headers.get(b"authorization", b"").decode("latin-1") or None)
        scope["chatray.owner"] = owner
        if scope["path"] not in UNLIMITED:
            service.quotas.admit(owner)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > DIGITS or int(length) > service.settings.limits.body_bytes:
            raise _too_large(service.settings.limits.body_bytes)

    def _guarded(self, path: str) -> bool:
        return path.startswith("/v1/") or path == "/metrics"


def _named_as_here(scope: Scope, service: Service) -> bool:
    """Whether whoever asks called this machine by a name of its own. Without keys, a page of another site that lets its own name point
    here (DNS rebinding) could read everything that a browser on this machine can."""
    if service.keys.entries is not None:
        return True
    given: dict[bytes, bytes] = dict(scope["headers"])
    try:
        host = urlsplit(f"//{given.get(b'host', b'').decode('latin-1')}").hostname
    except ValueError:  # an opening bracket without a closing one
        return False
    return host is not None and is_loopback(host)


class Origins:
    """Lets pages of the origins of `serving.cors` call the API; without any, this layer does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = scope["app"].state.service.settings.cors if scope["type"] == "http" else ()
        app = self.app
        if origins:
            app = CORSMiddleware(
                app, allow_origins=list(origins), allow_methods=["GET", "POST", "DELETE"], allow_headers=["authorization", "content-type"]
            )
        await app(scope, receive, send)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request's body is larger than the {limit} bytes that this server reads.", code="request_too_large")


def _limited(scope: Scope, receive: Receive, limit: int) -> Receive:
    """A body that is sent without its length ends where it is too large."""
    seen = 0

    async def read() -> Message:
        nonlocal seen
        message: Any = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, _too_large(limit).message)  # FastAPI makes a 400 of any other kind
        return message

    return read
