"""`chatray chat url=`: a served model on the terminal, streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx

from orchestration.errors import RequestError, RunError

KEY = "CHATRAY_API_KEY"
"""Environment variable with the key, where one is needed."""


def talk_to(url: str, model: str | None, temperature: float) -> None:
    """Read the user's turns from standard input until it ends.

    Args:
        model: its name; None takes the first one that is served.

    Raises:
        RequestError: there is no such service, or it refuses.
        RunError: it broke off.
    """
    headers = {"authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
    with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=300) as client:
        name = model or _first_model(client, url)
        history: list[dict[str, str]] = []
        print(f"Talking to {name}. Type a message; an empty line starts over, end of input leaves.")
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            if not text:
                history = []
                continue
            history.append({"role": "user", "content": text})
            reply = ""
            for part in _reply(client, {"model": name, "messages": history, "temperature": temperature, "stream": True}):
                print(part, end="", flush=True)
                reply += part
            print()
            history.append({"role": "assistant", "content": reply})


def _first_model(client: httpx.Client, url: str) -> str:
    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError as cause:
        raise RequestError(f"url={url}: no service answers there ({type(cause).__name__})") from cause
    if answer.status_code != 200:
        raise RequestError(f"url={url}: {_told(answer.text)} (a key is taken from the environment variable {KEY})")
    return str(answer.json()["data"][0]["id"])


def _reply(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise RequestError(_told(answer.text))
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RunError(event["error"]["message"])
                    yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    except httpx.HTTPError as cause:
        raise RunError(f"the service broke off ({type(cause).__name__})") from cause


def _told(text: str) -> str:
    """The message of an error in OpenAI's form."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
