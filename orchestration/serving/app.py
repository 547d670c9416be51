"""The service as an ASGI app: plain FastAPI, with or without Ray Serve around it."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from orchestration.serving.api.feedback import feedback
from orchestration.serving.api.routes import plain, v1
from orchestration.serving.api.streaming import ClientLeft
from orchestration.serving.errors import ApiError, failed
from orchestration.serving.guarding import Guarding, Origins
from orchestration.serving.service import Service

logger = logging.getLogger("chatray.serving")
LEFT = 499
"""The status that nginx notes for a client that did not wait; nobody receives it."""


def create_app(service: Service | None = None) -> FastAPI:
    """The app of a service; `app.state.service` may be set, and replaced, later. The chat page is added by `page.mount`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gc.freeze()  # else what is there already, half a million objects, is gone through again and again as requests come: 0.3 s each time
        yield
        gc.unfreeze()
        if app.state.service is not None:
            await app.state.service.settle()

    app = FastAPI(title="chatray", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(v1)
    app.include_router(feedback)
    app.include_router(plain)
    _answer_errors(app)
    app.add_middleware(Guarding)
    app.add_middleware(Origins)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ClientLeft)
    async def left(_: Request, error: ClientLeft) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_first_mistake(error).body(), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        told = ApiError(error.status_code, str(error.detail))
        return JSONResponse(told.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(failed().body(), 500)


def _first_mistake(error: RequestValidationError) -> ApiError:
    """What is wrong with a form. Its values are not repeated: they may be long, or secret."""
    mistakes: list[Any] = list(error.errors())
    deepest = max(mistakes, key=lambda mistake: len(mistake["loc"]))
    if mistakes[0]["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    words = [str(part) for part in deepest["loc"] if part not in ("body", "query", "path")]
    name = ".".join(words) or None
    return ApiError(400, f"{name or 'body'}: {deepest['msg']}"[:500], param=words[0] if words else None, code="invalid_value")
