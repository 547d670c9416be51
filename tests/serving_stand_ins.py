"""Stand-ins for the chat service's neighbours: an engine that says what it is told to, a moderator of one word, and the app on a port."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import uvicorn
import yaml
from fastapi import FastAPI
from transformers import LlamaConfig, LlamaForCausalLM

from actors.serving.protocol import Delta, Request
from conf.serving import Serving
from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.serving.app import create_app
from orchestration.serving.judging import in_process, nobody
from orchestration.serving.keys import Keys, Owner, hashed
from orchestration.serving.local import Connection
from orchestration.serving.metrics import PrometheusMetrics
from orchestration.serving.prompts import HiddenPrompt
from orchestration.serving.service import ServedModel, Service
from orchestration.serving.store.store import Store

TEXTS = ("the cat sat on the mat. where is the cat? in the drawer, of course. call get_menu_items", "Grüße, 世界! 🙂 naïve café")
THRESHOLDS = {"violence": {"warn": 0.3, "block": 0.7}}


@cache
def chat() -> Chat:
    """A small byte-level tokenizer: it writes a character in several tokens."""
    return Chat(learn_tokenizer([Dialogue("a", (Message("user", text), Message("assistant", text))) for text in TEXTS], 320))


@cache
def defaults() -> Serving:
    """The shipped settings."""
    return configuration.load(["experiment=smoke"], reads_data=False, consistent=False).serving


def settings(**limits: Any) -> Serving:
    """The shipped settings with other limits."""
    own = {name: limits.pop(name) for name in list(limits) if name in Serving.__dataclass_fields__}
    return dataclasses.replace(defaults(), limits=dataclasses.replace(defaults().limits, **limits), **own)


ALICE, BOB = {"authorization": "Bearer key-of-alice"}, {"authorization": "Bearer key-of-bob"}


def two_owners() -> Keys:
    """Keys of two clients."""
    entries = [(hashed(f"key-of-{name}"), Owner(f"key-{name}", name, 0, 0)) for name in ("alice", "bob")]
    return Keys(entries, defaults().limits)


class Scripted:
    """A reply of a `ScriptedEngine`."""

    def __init__(self, stream: AsyncIterator[Delta]) -> None:
        self.stream: Any = stream
        self.coming: asyncio.Task[Delta] | None = None
        self.stopping: asyncio.Task[None] | None = None

    async def take(self, wait: float | None = None) -> Delta | None:
        self.coming = self.coming or asyncio.ensure_future(anext(self.stream))
        await asyncio.wait({self.coming}, timeout=wait)
        if not self.coming.done():
            return None
        done, self.coming = self.coming, None
        return done.result()

    def close(self) -> None:
        async def stop() -> None:
            if self.coming is not None:
                self.coming.cancel()
                await asyncio.wait({self.coming})
            await self.stream.aclose()

        self.stopping = asyncio.ensure_future(stop())


class ScriptedEngine:
    """Says what `script` gives for a prompt's text, some tokens at a time."""

    def __init__(self, script: Callable[[str], str], step: int = 1, pause: float = 0.0) -> None:
        self.script, self.step, self.pause = script, step, pause
        self.prompts: list[str] = []
        self.closed: list[bool] = []
        """Of each request: whether it was stopped before its end."""
        self.going = asyncio.Event()
        self.going.set()
        self.error: Exception | None = None
        self.breaks_after: int | None = None
        self.alternatives = 1
        """Told at each token, where they are asked for."""
        self.stopped = threading.Event()

    def submit(self, request: Request) -> Scripted:
        return Scripted(self.write(request))

    async def write(self, request: Request) -> AsyncIterator[Delta]:
        if self.error is not None:
            raise self.error
        prompt = chat().tokenizer.decode(request.prompt)
        self.prompts.append(prompt)
        number = len(self.closed)
        self.closed.append(True)
        ids = [*chat().text(self.script(prompt)), chat().end][: request.drawing.max_tokens]
        asked = request.drawing.logprobs
        try:
            for start in range(0, len(ids), self.step):
                if self.breaks_after is not None and start >= self.breaks_after:
                    yield Delta(request.id, finish="error")
                    return
                await self.going.wait()
                await asyncio.sleep(self.pause)
                some = ids[start : start + self.step]
                last = start + self.step >= len(ids)
                finish = None if not last else "stop" if some[-1] == chat().end else "length"
                told = [] if asked is None else [-0.5 for _ in some]
                best = [] if asked is None else [[(token + other, -0.5) for other in range(self.alternatives)][:asked] for token in some]
                if finish:
                    self.closed[number] = False
                yield Delta(request.id, some, told, best, finish)
        finally:
            if self.closed[number]:
                self.stopped.set()


class WordModerator:
    """One category: 0.9 for a text with `kill` in it, 0.5 for one with `fight`."""

    name = "words"
    categories = ("violence",)

    def __init__(self) -> None:
        self.seen: list[str] = []

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        self.seen += texts
        return [{"violence": 0.9 if "kill" in text else 0.5 if "fight" in text else 0.01} for text in texts]


def service(
    engine: Any, store: Any, *, moderated: bool = False, hidden: HiddenPrompt | None = None, tools: bool = False, context: int = 200,
    with_settings: Serving | None = None, keys: Keys | None = None,
) -> Service:  # fmt: skip
    chosen = with_settings or settings()
    model = ServedModel("tiny", chat(), context, engine, tools, "v1", "", hidden or HiddenPrompt())
    judge = in_process(WordModerator(), THRESHOLDS) if moderated else nobody()
    return Service(
        chosen, {"tiny": model}, judge, store, keys or Keys(None, chosen.limits), PrometheusMetrics()
    )  # fmt: skip


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The app on a port of the loopback address; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=5, http=Connection))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    started = threading.Event()
    while not server.started and thread.is_alive():
        started.wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@contextlib.contextmanager
def served(engine: Any, **further: Any) -> Iterator[tuple[str, Service]]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        made = service(engine, store, **further)
        try:
            with listening(create_app(made)) as url:
                yield url, made
        finally:
            store.close()


def write_yaml(path: Any, content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


TINY_CONTEXT = 256


def tiny_checkpoint(folder: Path, seed: int) -> None:
    """A small Llama with random weights and these tests' tokenizer."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(chat().tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=128, max_position_embeddings=TINY_CONTEXT, initializer_range=0.3, eos_token_id=chat().end,
        pad_token_id=chat().pad, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    chat().save(folder)
