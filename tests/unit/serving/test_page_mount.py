"""The chat page inside the service's app: which paths are its own, and what it is sent with. No browser."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from orchestration.serving.keys import Keys, Owner, hashed
from orchestration.serving.page.mount import add_page
from orchestration.serving.store.store import Store
from tests.serving_stand_ins import ScriptedEngine, create_app, listening, service, settings

API = "default-src 'none'; frame-ancestors 'none'"


@contextmanager
def served(**further: Any) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        app = create_app(service(ScriptedEngine(lambda prompt: "hello"), store, **further))
        add_page(app)
        try:
            with listening(app) as url:
                yield url
        finally:
            store.close()


def test_scripts_run_only_with_the_nonce_that_a_page_is_sent_with() -> None:
    with served() as url:
        first, second = httpx.get(url), httpx.get(url)
    policy = first.headers["content-security-policy"]
    [nonce] = re.findall(r"'nonce-([^']+)'", policy)
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert set(re.findall(r"<script([^>]{0,30})", first.text.replace(nonce, "N"))) and re.findall(r"<script(?! nonce=)", first.text) == []
    assert nonce not in second.text
    assert first.headers["x-frame-options"] == "DENY" and first.headers["cache-control"] == "no-store"
    assert not re.findall(r"https?://(?!127\.0\.0\.1)[^\s\"']+", first.text)


def test_the_api_keeps_its_paths_errors_and_policy() -> None:
    with served() as url:
        unknown, wrong_method, models = httpx.get(f"{url}/v1/nowhere"), httpx.put(f"{url}/v1/models"), httpx.get(f"{url}/v1/models")
        outside = httpx.get(f"{url}/_chatray/%2e%2e/mount.py")
    assert (unknown.status_code, wrong_method.status_code, models.status_code, outside.status_code) == (404, 405, 200, 404)
    assert unknown.json()["error"]["message"] and wrong_method.json()["error"]["message"]
    assert {answer.headers["content-security-policy"] for answer in (unknown, models)} == {API}


def test_without_the_setting_there_is_no_page() -> None:
    with served(with_settings=settings(page=False)) as url:
        answers = [httpx.get(f"{url}{path}") for path in ("/", "/c/conv_1", "/_chatray/page.css", "/_nicegui_ws/socket.io/")]
    assert [(answer.status_code, answer.headers["content-type"]) for answer in answers] == [(404, "application/json")] * 4


def test_with_keys_the_page_shows_nothing_but_the_question_for_one() -> None:
    keys = Keys([(hashed("cr-key"), Owner("key-alice", "alice", 0, 0))], settings().limits)
    with served(keys=keys) as url:
        page = httpx.get(f"{url}/c/conv_1")
    assert "API key" in page.text and "Write a message" not in page.text and "tiny" not in page.text
    assert "httponly" in page.headers["set-cookie"].lower() and "samesite=strict" in page.headers["set-cookie"].lower()


def test_one_page_at_a_time() -> None:
    second = create_app()
    add_page(second)

    async def start() -> None:
        async with second.router.lifespan_context(second):
            pass

    with served() as url:
        with pytest.raises(RuntimeError, match="already"):
            asyncio.run(start())
        assert httpx.get(url).status_code == 200
