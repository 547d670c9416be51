"""The chat page in a browser: the service on a port with an engine that says what it is told, and headless Chromium in front of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from orchestration.serving.page.mount import add_page
from orchestration.serving.service import Service
from orchestration.serving.store.store import Store
from tests.serving_stand_ins import ScriptedEngine, create_app, listening, service

MARKDOWN = """A cat needs **three** things:

1. food
2. water
3. a *warm* place

```python
def feed(cat: str) -> int:
    return len(cat)  # one bowl
```

| cat | bowls |
|---|---|
| Tom | 2 |

<img src=x onerror="document.title='broken in'"> ![dot](http://example.invalid/dot.png) [more](https://example.invalid/)
"""
LONG = " ".join(f"the cat sat on mat {number}." for number in range(50))
SAID = {
    "markdown": MARKDOWN, "long": LONG, "violent": "first we talk. then they kill him.", "rough": "they fight a bit.",
    "cat": "the cat sat on the mat.",
}  # fmt: skip


class Script:
    """What the engine answers: by the last word of `SAID` in the prompt; a number more each time, so that no two answers are the same."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompt: str) -> str:
        self.asked += 1
        place, word = max((prompt.rfind(word), word) for word in SAID)
        return SAID[word if place >= 0 else "cat"] + ("" if word in ("markdown", "long") else f" that was answer {self.asked}.")


@dataclass
class Site:
    """The page, what stands behind it, and all that browsers asked for and complained of."""

    url: str
    service: Service
    engine: ScriptedEngine
    browser: Browser
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def visitor(self, **options: Any) -> Iterator[BrowserContext]:
        """A browser profile of its own. Its requests and complaints are noted."""
        context = self.browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.set_default_timeout(15_000)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", lambda message: self._noted(message.type, message.text))
        context.on("weberror", lambda error: self.complaints.append(f"error: {error.error}"))
        context.on("page", lambda page: page.on("websocket", lambda socket: self.requests.append(socket.url)))
        try:
            yield context
        finally:
            context.close()

    def _noted(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(f"{kind}: {text}")

    @contextlib.contextmanager
    def page(self, path: str = "/", **options: Any) -> Iterator[Page]:
        with self.visitor(**options) as context:
            page = context.new_page()
            page.goto(self.url + path)
            yield page


def chromium() -> str:
    """The browser; a skip that says so where there is none, a failure in CI."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        text = "no Chromium: install one (Debian: apt-get install chromium) to test the chat page"
        pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)
    return found


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """The page, open for as long as the context lasts; one at a time."""
    executable = chromium()
    engine = ScriptedEngine(Script(), step=2, pause=0.004)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = Store.open(f"sqlite:///{Path(folder) / 'store.db'}")
        stack.callback(store.close)
        made = service(engine, store, moderated=True, context=4000)
        app = create_app(made)
        add_page(app)
        url = stack.enter_context(listening(app))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        stack.callback(browser.close)
        yield Site(url, made, engine, browser)
