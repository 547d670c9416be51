"""A request's body, from bytes to what its form is made of.

A body of 1 MB can be a third of a million lists, which it takes a second to make and many to validate, and nobody else is served meanwhile.
So what it is made of is counted first; what stands in its texts does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from orchestration.serving.service import Service

PARTS, VALUES, QUOTES = 2**15, 2**17, 2**17
"""A body may have so many objects, lists and named fields (requests have a few hundred), and so many values, the token ids of prompts among
them; in proportion where `body_bytes` is more than 1 MiB. Of a body with more quotes the texts are not told apart from the rest."""
READ_TOGETHER = 16
"""Bytes that are read in the time in which one character of a text is gone through."""
STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def read_json(body: bytes, body_bytes: int) -> Any:
    """Raises:
    HTTPException: 400, it is made of more parts than this server reads.
    json.JSONDecodeError: no JSON.
    ValueError, RecursionError: JSON with a number of more than 4300 digits, or lists in lists without end.
    """
    try:
        text = body.decode("utf-8-sig")  # JSON between systems is UTF-8; other encodings could hide the structure from who counts
    except UnicodeDecodeError as cause:
        raise json.JSONDecodeError("not UTF-8", "", cause.start) from None
    larger = max(1, body_bytes // 2**20)
    most = PARTS * larger, VALUES * larger
    if any(count > limit for count, limit in zip(_made_of(body), most, strict=True)):  # perhaps in its texts alone
        outside = STRINGS.sub(b"", body) if body.count(b'"') <= QUOTES * larger else body
        for what, count, limit in zip(("objects, lists and fields", "values"), _made_of(outside), most, strict=True):
            if count > limit:
                raise HTTPException(400, f"The body has {count} {what}; this server reads {limit}.")
    return json.loads(text)


def _made_of(body: bytes) -> tuple[int, int]:
    """Objects, lists and named fields; values."""
    return sum(body.count(mark) for mark in (b"[", b"{", b":")), body.count(b",")


class Reading(Request):
    """A request whose body is read so."""

    async def json(self) -> Any:
        service: Service = self.app.state.service
        body = await self.body()
        return await service.aside(len(body) // READ_TOGETHER, read_json, body, service.settings.limits.body_bytes)


class Route(APIRoute):
    """A route whose requests are read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handler(Reading(request.scope, request.receive))

        return read
