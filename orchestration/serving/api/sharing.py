"""What the modules of endpoints share: who asks, of which service, and the errors that any of them may answer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.security import HTTPBearer

from orchestration.serving.api.forms import Text
from orchestration.serving.api.reading import Route
from orchestration.serving.keys import Owner
from orchestration.serving.service import Service

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
    for status, text in (
        (400, "The request cannot be served"), (401, "No valid API key"), (404, "There is no such thing"), (413, "The body is too large"),
        (429, "Too many requests, or the quota is used up"), (503, "The engines have no room"), (504, "Out of time"),
    )
}  # fmt: skip
bearer = HTTPBearer(auto_error=False, description="An API key; none is needed where the server has no keys")
Identifier = Annotated[Text, Path(max_length=256)]
PageSize = Annotated[int, Query(ge=1, le=200)]
After = Annotated[Text | None, Query(max_length=256)]
"""The last one of the page before."""


def router() -> APIRouter:
    """For endpoints below `/v1`."""
    return APIRouter(prefix="/v1", route_class=Route, responses=ERRORS, dependencies=[Depends(bearer)])


# `async` though they wait for nothing: FastAPI hands plain functions to a thread, two of them for each request
async def service_of(request: Request) -> Service:
    return request.app.state.service


async def owner_of(request: Request) -> Owner:
    return request.scope["chatray.owner"]  # `guarding.py` has found it


Serving = Annotated[Service, Depends(service_of)]
Asking = Annotated[Owner, Depends(owner_of)]
